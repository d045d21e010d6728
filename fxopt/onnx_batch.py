"""Which batch sizes an ONNX file of a program can take, and example inputs for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fxopt.guards import ShapeGuard, Violation
from fxopt.infer import META, MetaInterpreter, MetaTwins, to_meta
from fxopt.program import Program
from fxopt.shapes import Dimension, dimensions_of


@dataclass(frozen=True)
class BatchPlan:
    """How the batch axis is treated.

    ``sizes`` are the batch sizes to compare at, the first the one to export with: the exporter
    bakes in a size of 1. ``batched`` says of each input whether axis 0 is the batch. Where the
    batch is fixed, ``sizes`` has one entry and ``reason`` says why.
    """

    sizes: tuple[int, ...]
    batched: tuple[bool, ...]
    open_guards: tuple[ShapeGuard, ...] = ()
    reason: str = ""

    @property
    def dynamic(self) -> bool:
        return len(self.sizes) > 1


def plan_batch(program: Program, example: Sequence[torch.Tensor]) -> BatchPlan:
    """The batch sizes at which ``program`` runs, its guards obeyed.

    ``example`` is one tensor an input, as the program was captured or as the user gives them;
    inputs that share the first one's axis 0 are taken to share the batch.
    """
    batch = next((t.shape[0] for t in example if t.dim() > 0), 1)
    batched = tuple(t.dim() > 0 and t.shape[0] == batch for t in example)
    reason = ""
    for first, second in ((2, 3), (batch + 1, batch), (2 * batch, batch)):
        if first < 2 or second < 2:
            continue
        reason = _refusal(program, example, batched, (first, second))
        if not reason:
            guards = _reading_the_batch(program, example, batched, (first, second))
            return BatchPlan((first, second), batched, guards)
    return BatchPlan((batch,), batched, reason=reason)


def resized(
    example: Sequence[torch.Tensor], batched: Sequence[bool], size: int
) -> list[torch.Tensor]:
    """Meta tensors like ``example`` at another batch size."""
    return [
        torch.empty((size, *t.shape[1:]), dtype=t.dtype, device=META) if is_batch else to_meta(t)
        for t, is_batch in zip(example, batched, strict=True)
    ]


def seeded(
    example: Sequence[torch.Tensor], batched: Sequence[bool], size: int
) -> list[torch.Tensor]:
    """Inputs like ``example`` at batch ``size``: normal numbers, or integers in its range."""
    generator = torch.Generator().manual_seed(size)
    result = []
    for tensor, like in zip(example, resized(example, batched, size), strict=True):
        if tensor.is_floating_point():
            drawn = torch.randn(like.shape, generator=generator).to(tensor.dtype)
        elif tensor.is_complex():
            drawn = torch.randn(like.shape, generator=generator, dtype=tensor.dtype)
        else:
            low, high = (int(tensor.min()), int(tensor.max())) if tensor.numel() else (0, 0)
            drawn = torch.randint(low, high + 1, like.shape, generator=generator)
        result.append(drawn.to(tensor.dtype))
    return result


def depth(program: Program) -> int:
    """Operators on the longest way from an input to an output."""
    longest: dict[str, int] = {}
    for node in program.nodes:
        before = max((longest[operand.name] for operand in node.all_input_nodes), default=0)
        longest[node.name] = before + (node.op not in ("placeholder", "get_attr", "output"))
    return max(longest.values())


def bound_of(dtype: torch.dtype, operators: int) -> float:
    """How far apart two right evaluations of ``operators`` layers in ``dtype`` may lie.

    Relative to the output's largest value. Every layer rounds a few times (a sum of products, a
    norm, an activation), each by at most half an epsilon; independent roundings add up as a random
    walk, so with the square root of the depth: 4 ε √depth for two evaluators. A single long sum
    of products in another order may already differ by 16 ε. Torchvision's and timm's networks
    measure 15 ε at most; a BatchNorm with another ε shows as 4,000. ONNX keeps what an operator is
    told (a norm's ε, the slope of a hard sigmoid) in float32, so no float64 file is nearer.
    """
    rounding = torch.finfo(dtype).eps * max(16.0, 4.0 * math.sqrt(operators))
    return max(rounding, torch.finfo(torch.float32).eps)


def _refusal(
    program: Program,
    example: Sequence[torch.Tensor],
    batched: Sequence[bool],
    sizes: tuple[int, int],
) -> str:
    for size in sizes:
        inputs = resized(example, batched, size)
        violations = program.guards.violations(inputs)
        if violations:
            cause = violations[0]
            text = cause.guard if isinstance(cause, Violation) else cause
            return f"the batch size is fixed by the guard {text}"
        try:
            MetaInterpreter(program.graph_module, MetaTwins()).run(*inputs)
        except Exception as error:
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            return f"the batch size is fixed: the graph does not run at batch {size} ({first_line})"
    return ""


def _reading_the_batch(
    program: Program,
    example: Sequence[torch.Tensor],
    batched: Sequence[bool],
    sizes: tuple[int, int],
) -> tuple[ShapeGuard, ...]:
    """The guards whose dimensions differ between the batch sizes: a file cannot check them."""
    if program.guards.probe is None:
        return ()
    shapes: list[dict[str, torch.Size]] = []
    for size in sizes:
        interpreter = MetaInterpreter(program.guards.probe, MetaTwins())
        interpreter.run(*resized(example, batched, size))
        values = interpreter.env.items()
        shapes.append({n.name: v.shape for n, v in values if isinstance(v, torch.Tensor)})

    def differs(dimension: Dimension) -> bool:
        here, there = (known[dimension.node][dimension.axis] for known in shapes)
        return bool(here != there)

    return tuple(g for g in program.guards.shapes if any(map(differs, dimensions_of(g.condition))))
