"""Proof that a captured program computes what the user's model does.

Capture calls the same operators in the same order, so the outputs are usually the same bits. They
are compared in evaluation mode, at another batch size than the example's where no guard fixes it
(a size that was baked in unnoticed shows there), and in training mode under the same seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxopt import structures
from fxopt.captured import apply_flags
from fxopt.errors import CaptureError
from fxopt.graphs import assemble, copy_tree
from fxopt.interface import Call, same_constant
from fxopt.program import Program
from fxopt.proof.evidence import SEED, output_errors
from fxopt.tracing.copies import restore, sharing_copy
from fxopt.tracing.departure import describe
from fxopt.tracing.state import snapshot

BOUND_IN_EPSILONS = 84
"""1e-5 in float32: room for a fused kernel that eager PyTorch takes and the graph does not."""


def check_capture(program: Program, model: nn.Module, call: Call, original: nn.Module) -> None:
    """Compare ``program`` with ``model``, fxopt's private copy of what it was captured from.

    A forward may rewrite weights (an embedding with ``max_norm``); they are put back to those of
    ``original``, the user's module.

    Raises:
        CaptureError: the outputs, or the buffers after a training step, differ, or the model does
            not run on its own example.
    """
    other = inputs_at_another_batch(program, call)
    attempts = [*([other] if other else []), seeded(call.tensors), list(call.tensors)]
    for training in (False,) if program.modes.eval_only else (False, True):
        failure = None
        for inputs in attempts:
            try:
                failure = _check_mode(program, model, call, inputs, training)
            finally:
                restore(model, original)
            if failure is None:
                break
        # a norm over one value per channel cannot train, and no other size may be known
        if failure is not None and "more than 1 value per channel" not in str(failure):
            mode = "training" if training else "evaluation"
            raise CaptureError(
                f"{program.name} raises {type(failure).__name__}: {' '.join(str(failure).split())} "
                f"in {mode} mode on the example, so that nothing can be compared; give inputs that "
                "it takes"
            ) from failure


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
    program: Program, model: nn.Module, call: Call, inputs: Sequence[torch.Tensor], training: bool
) -> Exception | None:
    """The error that the model itself raises on ``inputs``; None if the program was found equal."""
    own = sharing_copy(model, own_buffers=True).train(training)
    try:
        before = snapshot(own)
        expected = [_outputs(own, call, inputs)]
        if before.changed(snapshot(own)):  # does that change the next call?
            expected.append(_outputs(own, call, inputs))
    except Exception as error:
        return error
    twin = _twin(program, training)
    comparison = _Comparison(program, model, call, inputs, training)
    for leaves, spec in expected:
        try:
            found = list(_seeded_run(lambda: twin(*[t.clone() for t in inputs])))
        except Exception as error:
            raise comparison.departs(f"it raises {error}") from error
        if _structure(spec) != _structure(program.interface.out_spec):
            raise comparison.departs("its result has another structure")
        comparison.check(leaves, found, program.interface.output_names)
    if training:
        buffers = dict(own.named_buffers())
        mine = {k: v for k, v in twin.named_buffers() if k in buffers}
        comparison.check([buffers[name] for name in mine], list(mine.values()), list(mine))
    return None


def _outputs(model: nn.Module, call: Call, inputs: Sequence[torch.Tensor]) -> tuple[list[Any], Any]:
    args, kwargs = call.arguments([t.clone() for t in inputs])
    return structures.flatten(_seeded_run(lambda: model(*args, **kwargs)))


def _structure(spec: Any) -> str:
    return str(spec).replace("TreeSpec(Size", "TreeSpec(tuple")  # a size stays one, as a tuple does


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


class _Comparison:
    """Of what the program and the model give on ``inputs``."""

    def __init__(
        self, program: Program, model: nn.Module, call: Call, inputs: Sequence[torch.Tensor],
        training: bool,
    ) -> None:  # fmt: skip
        self._program, self._model, self._call = program, model, call
        self._inputs, self._training = inputs, training

    def check(self, expected: Sequence[Any], found: Sequence[Any], names: Sequence[str]) -> None:
        """Raise unless the values are equal, to within rounding, in their kinds exactly."""
        if len(expected) != len(found):
            raise self.departs("it gives another number of outputs")
        for name, theirs, ours in zip(names, expected, found, strict=True):
            what = _difference(theirs, ours)
            if what:
                raise self.departs(f"'{name}' {what}")

    def departs(self, what: str) -> CaptureError:
        """The error, with where the program first departs and what may be the cause."""

        def eager() -> tuple[nn.Module, Callable[[], Any]]:
            model = sharing_copy(self._model, own_buffers=True).train(self._training)
            return model, lambda: _outputs(model, self._call, self._inputs)[0]

        def values() -> Any:
            twin = _twin(self._program, self._training)
            graph = fx.Interpreter(twin, garbage_collect_values=False)
            _seeded_run(lambda: graph.run(*[t.clone() for t in self._inputs]))
            return graph.env

        where = describe(self._program, eager, values, lambda a, b: not _difference(a, b))
        shapes = ", ".join(str(tuple(t.shape)) for t in self._inputs)
        mode = "training" if self._training else "evaluation"
        return CaptureError(
            f"the captured graph of {self._program.name} does not compute what the model does: in "
            f"{mode} mode, with input {shapes}, {what}{where}"
        )


def _difference(expected: Any, found: Any) -> str:
    """In which way a value is another one, in words; empty if it is not."""
    if not isinstance(expected, torch.Tensor) or not isinstance(found, torch.Tensor):
        same = same_constant(expected, found)
        return "" if same else f"is {found!r} and should be {expected!r}"
    for kind in ("dtype", "device", "shape"):
        ours, theirs = getattr(found, kind), getattr(expected, kind)
        if ours != theirs:
            return f"has {kind} {ours} and should have {theirs}"
    if torch.allclose(expected, found, rtol=0, atol=0, equal_nan=True):
        return ""
    (error,) = output_errors([""], [expected], [found])
    floating = expected.is_floating_point() or expected.is_complex()
    bound = BOUND_IN_EPSILONS * torch.finfo(expected.dtype).eps if floating else 0.0
    if error.error is not None and error.error <= bound:
        return ""
    return f"is off by {error.error or float('nan'):.1e}"
