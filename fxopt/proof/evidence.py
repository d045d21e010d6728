"""What two programs are compared on, and how far apart their outputs are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fxopt.infer import META, MetaInterpreter, MetaTwins
from fxopt.program import Program, TensorType
from fxopt.results import OutputError

SEED = 20210618
"""Any fixed number does; results repeat."""

EXACTLY = "compared exactly"
"""The remark on an output that has no rounding: integers and truth values."""


def verification_shapes(program: Program, batch: int = 2) -> list[tuple[int, ...]]:
    """Input shapes to run with: the example's, at ``batch`` where the program allows it."""
    types = list(program.inputs().values())
    shapes = [t.shape for t in types]
    leads = {shape[0] if shape else 0 for shape in shapes}
    if len(leads) != 1 or leads <= {0, batch}:
        return shapes
    wanted = [(batch, *shape[1:]) for shape in shapes]
    probes = [
        torch.empty(shape, dtype=t.dtype, device=META)
        for shape, t in zip(wanted, types, strict=True)
    ]
    if program.guards.violations(probes):
        return shapes
    try:
        MetaInterpreter(program.graph_module, MetaTwins()).run(*probes)
    except Exception:  # axis 0 is no batch: the program takes this size only
        return shapes
    return wanted


def input_attempts(
    program: Program, shapes: Sequence[tuple[int, ...]], example: Sequence[Any] | None
) -> Iterator[list[torch.Tensor]]:
    """Seeded inputs: the example's own if given, else normal, then uniform on [0, 1)."""
    device = _device_of(program)
    if example is not None:
        yield [tensor.detach().to(device) for tensor in example]
        return
    types = list(program.inputs().values())
    for draw in (torch.randn, torch.rand):
        generator = torch.Generator().manual_seed(SEED)
        yield [
            _drawn(kind, shape, draw, generator).to(device)
            for kind, shape in zip(types, shapes, strict=True)
        ]


def _drawn(
    kind: TensorType, shape: tuple[int, ...], draw: Any, generator: torch.Generator
) -> torch.Tensor:
    if kind.dtype.is_floating_point or kind.dtype.is_complex:
        return draw(shape, generator=generator).to(kind.dtype)  # type: ignore[no-any-return]
    return torch.randint(0, 2, shape, generator=generator).to(kind.dtype)


def _device_of(program: Program) -> torch.device:
    tensors = (*program.graph_module.parameters(), *program.graph_module.buffers())
    return next((t.device for t in tensors), torch.device("cpu"))


def output_errors(
    names: Sequence[str], reference: Sequence[Any], found: Sequence[Any]
) -> tuple[OutputError, ...]:
    """The error of each output, relative to the reference's own largest absolute value."""
    return tuple(
        _output_error(name, expected, value)
        for name, expected, value in zip(names, reference, found, strict=True)
        if isinstance(expected, torch.Tensor)
    )


def _output_error(name: str, reference: torch.Tensor, found: torch.Tensor) -> OutputError:
    if reference.shape != found.shape:
        shapes = f"shape {tuple(found.shape)} instead of {tuple(reference.shape)}"
        return OutputError(name, float("inf"), shapes)
    if reference.numel() == 0:
        return OutputError(name, None, "the reference is empty: no evidence")
    if not (reference.is_floating_point() or reference.is_complex()):
        equal = torch.equal(reference, found)
        return OutputError(name, 0.0 if equal else float("inf"), EXACTLY)
    wide = torch.complex128 if reference.is_complex() else torch.float64
    expected, value = reference.to(wide), found.to(wide)
    if not torch.isfinite(expected).all():
        return OutputError(name, None, "the reference is not finite: no evidence")
    largest = expected.abs().max().item()
    distance = (value - expected).abs().max().item()
    if largest == 0:
        if distance == 0:
            return OutputError(name, None, "the reference is all zero: no evidence")
        return OutputError(name, float("inf"), "the reference is all zero, the result is not")
    return OutputError(name, distance / largest)


def largest_error(errors: Sequence[OutputError]) -> float:
    """The largest error (NaN if any is NaN), 0 if no output is evidence."""
    found = [error.error for error in errors if error.error is not None]
    if any(value != value for value in found):
        return float("nan")
    return max(found, default=0.0)


def has_evidence(errors: Sequence[OutputError]) -> bool:
    return any(error.error is not None for error in errors)


def floating(errors: Sequence[OutputError]) -> list[OutputError]:
    """Leave out what is compared exactly: an argmax hides small errors, and flips by rounding."""
    return [error for error in errors if error.remark != EXACTLY]
