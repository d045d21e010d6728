"""Proof that a captured program computes what the user's model does.

Capture calls the same operators in the same order, so the outputs are usually the same bits. They
are compared in evaluation mode, at another batch size than the example's where no guard fixes it
(a size that was baked in unnoticed shows there), and in training mode under the same seed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxopt import structures
from fxopt.captured import apply_flags
from fxopt.errors import CaptureError
from fxopt.graphs import assemble, copy_tree
from fxopt.interface import Call
from fxopt.program import Program
from fxopt.proof.evidence import SEED, output_errors
from fxopt.tracing.copies import sharing_copy

BOUND_IN_EPSILONS = 84
"""1e-5 in float32: room for a fused kernel that eager PyTorch takes and the graph does not."""


def check_capture(program: Program, model: nn.Module, call: Call) -> None:
    """Compare ``program`` with ``model``, fxopt's private copy of what it was captured from.

    Raises:
        CaptureError: the outputs, or the buffers after a training step, differ.
    """
    other = inputs_at_another_batch(program, call)
    if other is None or not _check_mode(program, model, call, other, training=False):
        _check_mode(program, model, call, seeded(call.tensors), training=False)
    if not program.modes.eval_only:
        _check_mode(program, model, call, other or seeded(call.tensors), training=True)


def seeded(examples: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Normal numbers for floating inputs; other inputs (indices) keep the example's values."""
    generator = torch.Generator().manual_seed(SEED)
    return [
        torch.randn(t.shape, generator=generator).to(t)
        if t.is_floating_point() and not t.is_meta
        else t.detach().clone()
        for t in examples
    ]


def inputs_at_another_batch(program: Program, call: Call) -> list[torch.Tensor] | None:
    """Seeded inputs with another first dimension than the example's; None if a guard forbids."""
    tensors = call.tensors
    leads = {t.shape[0] if t.dim() else 0 for t in tensors}
    if len(leads) != 1 or leads == {0}:
        return None
    (lead,) = leads
    size = 2 if lead != 2 else 3
    widened = [torch.cat([t] * size)[:size] for t in tensors]
    return None if program.guards.violations(widened) else seeded(widened)


def _check_mode(
    program: Program, model: nn.Module, call: Call, inputs: list[torch.Tensor], *, training: bool
) -> bool:
    """Whether the model runs on ``inputs`` at all; if so the program was found equal."""
    own = sharing_copy(model, own_buffers=True).train(training)
    try:
        attributes = _attributes(own)
        expected = _outputs(own, call, inputs)
        again = _outputs(own, call, inputs) if _attributes(own) != attributes else None
    except Exception:
        return False  # this size, or training at it, is none that the model takes
    twin = _twin(program, training)
    try:
        found = list(_seeded_run(lambda: twin(*inputs)))
        second = list(_seeded_run(lambda: twin(*inputs))) if again is not None else []
    except Exception as error:
        raise _departs(program, training, inputs, f"it raises {error}") from error
    names = program.interface.output_names
    _compare(program, training, inputs, expected, found, names)
    if (
        again is not None
    ):  # forward changed an attribute of its own: does that change the next call?
        _compare(program, training, inputs, again, second, names)
    if training:
        buffers = dict(own.named_buffers())
        mine = {k: v for k, v in twin.named_buffers() if k in buffers}
        theirs = [buffers[name] for name in mine]
        _compare(program, training, inputs, theirs, list(mine.values()), list(mine))
    return True


def _outputs(model: nn.Module, call: Call, inputs: Sequence[torch.Tensor]) -> list[Any]:
    args, kwargs = call.arguments([t.clone() for t in inputs])
    return structures.flatten(_seeded_run(lambda: model(*args, **kwargs)))[0]


def _attributes(model: nn.Module) -> list[tuple[str, int, int]]:
    """Identity and length of everything that the modules hold beside parameters and buffers."""
    return [
        (name, id(value), len(value) if isinstance(value, (list, dict, set, deque)) else 0)
        for module in model.modules()
        for name, value in vars(module).items()
        if name not in _TENSOR_MEMBERS
    ]


_TENSOR_MEMBERS = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"})


def _seeded_run(function: Callable[[], Any]) -> Any:
    torch.manual_seed(SEED)
    with torch.no_grad():
        return function()


def _twin(program: Program, training: bool) -> fx.GraphModule:
    """The program's flat graph in the wanted mode, with buffers of its own."""
    module = program.graph_module
    memo: dict[int, Any] = {id(p): p for p in module.parameters()}
    twin = assemble(copy_tree(module, memo), module.graph, fx.GraphModule)
    twin.train(training)
    apply_flags(twin, {path: flags[training] for path, flags in program.modes.fixed.items()})
    return twin


def _compare(
    program: Program, training: bool, inputs: Sequence[torch.Tensor], expected: Sequence[Any],
    found: Sequence[Any], names: Sequence[str],
) -> None:  # fmt: skip
    if len(expected) != len(found):
        raise _departs(program, training, inputs, "it gives another number of outputs")
    pairs = [
        (n, e, f)
        for n, e, f in zip(names, expected, found, strict=True)
        if isinstance(e, torch.Tensor) and not _identical(e, f)
    ]
    errors = output_errors(*([p[i] for p in pairs] for i in range(3)))  # type: ignore[arg-type]
    for (_, tensor, _), error in zip(pairs, errors, strict=True):
        floating = tensor.is_floating_point() or tensor.is_complex()
        bound = BOUND_IN_EPSILONS * torch.finfo(tensor.dtype).eps if floating else 0.0
        if error.error is None or not error.error <= bound:
            what = f"'{error.output}' is off by {error.error or float('nan'):.1e}"
            raise _departs(program, training, inputs, what)


def _identical(expected: torch.Tensor, found: Any) -> bool:
    return (
        isinstance(found, torch.Tensor)
        and (expected.shape, expected.dtype) == (found.shape, found.dtype)
        and torch.allclose(expected, found, rtol=0, atol=0, equal_nan=True)
    )


def _departs(
    program: Program, training: bool, inputs: Sequence[torch.Tensor], what: str
) -> CaptureError:
    shapes = ", ".join(str(tuple(t.shape)) for t in inputs)
    return CaptureError(
        f"the captured graph of {program.name} does not compute what the model does: in "
        f"{'training' if training else 'evaluation'} mode, with input {shapes}, {what}. A value "
        "that changes from call to call (random numbers of Python, a global, an attribute that "
        "forward sets) is the usual cause; make it an argument or a buffer"
    )
