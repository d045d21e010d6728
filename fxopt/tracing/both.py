"""Traces a model in both modes, and again where a submodule has to be called as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from fxopt.errors import CaptureError
from fxopt.interface import Call
from fxopt.tracing import canonical
from fxopt.tracing.copies import sharing_copy
from fxopt.tracing.modes import first_difference, layers_with_a_mode
from fxopt.tracing.tracer import Tracer
from fxopt.tracing.writer import Trace, Untraceable


@dataclass(frozen=True)
class Traces:
    """Both traces of a model, and what they say of it.

    ``training`` is None where the program is eval-only, for the reason in ``eval_only``.
    ``leaves`` are the submodules that are called as they are, by path with the reason; ``opaque``
    those of them that could not be traced.
    """

    evaluation: Trace
    training: Trace | None
    eval_only: str
    leaves: Mapping[str, str]
    opaque: Mapping[str, str]


def trace_both(private: nn.Module, call: Call) -> Traces:
    """Trace in eval and in train mode; modules that cannot be traced become leaves, and again."""
    leaves: dict[str, str] = {}
    opaque: dict[str, str] = {}
    while True:
        try:
            evaluation = _trace(private, call, leaves, training=False)
        except Untraceable as error:
            path = _innermost(error, leaves)
            if path is None:
                raise _refusal(private, error) from error
            leaves[path] = opaque[path] = f"{error} ({error.line})"
            continue
        outcome = _trace_training(private, call, leaves, evaluation)
        if isinstance(outcome, dict):
            leaves.update(outcome)
            continue
        training, reason = outcome
        if training is not None:
            _share_guards(evaluation, training)
        _check_opaque(private, opaque)
        return Traces(evaluation, training, reason, leaves, opaque)


def _share_guards(evaluation: Trace, training: Trace) -> None:
    """A decision taken in one mode is guarded in both; the two traces have the same nodes."""
    for condition, guard in training.guards.items():
        evaluation.guards.setdefault(condition, guard)
    for dimension, size in training.sizes.items():
        evaluation.sizes.setdefault(dimension, size)
    evaluation.layouts.update(training.layouts)
    evaluation.dtype_was_read |= training.dtype_was_read


def _trace_training(
    private: nn.Module, call: Call, leaves: Mapping[str, str], evaluation: Trace
) -> dict[str, str] | tuple[Trace | None, str]:
    """New leaves, or the training trace and the reason for which there is no training mode."""
    try:
        training = _trace(private, call, leaves, training=True)
    except (Untraceable, CaptureError) as error:
        return None, f"its training forward cannot be captured: {error}"
    difference = first_difference(evaluation, training)
    if difference is None:
        return training, ""
    kept = layers_with_a_mode(private, difference, evaluation, training)
    new = {path: reason for path, reason in kept.items() if path not in leaves}
    return new or (None, str(difference))


def _trace(private: nn.Module, call: Call, leaves: Mapping[str, str], *, training: bool) -> Trace:
    model = sharing_copy(private)
    model.train(training)
    tracer = Tracer(model, leaves)
    try:
        return tracer.run(call)
    except Untraceable:
        raise
    except Exception as error:
        if training and "more than 1 value per channel" in str(error):
            return _trace(private, _wider(call), leaves, training=True)
        failure = tracer.failure
        path = failure[1] if failure is not None and failure[0] is error else ""
        raise _input_refused(private, call, path, error) from error


def _wider(call: Call) -> Call:
    """The call with its batch doubled: a norm over one value per channel cannot train."""
    values = tuple(
        torch.cat([v, v]) if leaf.is_tensor and v.dim() else v
        for leaf, v in zip(call.leaves, call.values, strict=True)
    )
    return replace(call, values=values)


def _innermost(error: Untraceable, leaves: Mapping[str, str]) -> str | None:
    return next((p for p in reversed(error.paths) if p and p not in leaves), None)


def _refusal(model: nn.Module, error: Untraceable) -> CaptureError:
    where = f" at {error.line}" if error.line else ""
    return CaptureError(
        f"{type(model).__name__} cannot be captured: {error}{where}; move that part into a "
        "submodule of its own, which is then run as it is, or out of the model"
    )


def _input_refused(
    model: nn.Module, call: Call, path: str, error: Exception
) -> CaptureError | Untraceable:
    """Whose fault an exception during tracing is: if the model itself runs, it is ours."""
    shapes = ", ".join(f"{tuple(t.shape)} {str(t.dtype)[6:]}" for t in call.tensors)
    entered: list[str] = []
    try:
        args, kwargs = call.arguments([t.detach().clone() for t in call.tensors])
        twin = sharing_copy(model).eval()
        with torch.no_grad(), _entered_modules(twin) as entered:
            twin(*args, **kwargs)
    except Exception as own:
        path = next(filter(None, reversed(entered)), "")
        layer = f"'{path}' ({type(model.get_submodule(path)).__name__})" if path else "its forward"
        return CaptureError(
            f"{type(model).__name__} refuses the example input of shape {shapes}: {layer} raises "
            f"{type(own).__name__}: {' '.join(str(own).split())}; give inputs that it takes"
        )
    untraceable = Untraceable(f"{type(error).__name__} while tracing: {error}")
    untraceable.paths = (path,)
    return untraceable


@contextlib.contextmanager
def _entered_modules(model: nn.Module) -> Iterator[list[str]]:
    """Paths of the modules whose forward is running, outermost first."""
    paths = {id(module): path for path, module in model.named_modules()}
    entered: list[str] = []

    def enter(module: nn.Module, args: Any) -> None:
        entered.append(paths.get(id(module), ""))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        entered.pop()

    handles = register_module_forward_pre_hook(enter), register_module_forward_hook(leave)
    try:
        yield entered
    finally:
        for handle in handles:
            handle.remove()


_OPAQUE_SHARE = 0.05


def _check_opaque(model: nn.Module, opaque: Mapping[str, str]) -> None:
    """Opaque leaves may hold little, and no convolution, linear layer or norm."""
    total = sum(p.numel() for p in model.parameters())
    for path, reason in opaque.items():
        module = model.get_submodule(path)
        hidden = [n for n, m in module.named_modules() if type(m) in canonical.LEAVES
                  and any(True for _ in m.parameters())]  # fmt: skip
        if hidden and module.__module__.startswith("torch.nn."):
            hidden = []
        share = sum(p.numel() for p in module.parameters()) / max(total, 1)
        if hidden or share >= _OPAQUE_SHARE:
            what = (
                f"hides '{path}.{hidden[0]}'" if hidden else f"holds {share:.0%} of the parameters"
            )
            raise CaptureError(
                f"'{path}' cannot be traced ({reason}) and {what}; rewrite that part of its "
                "forward, or move it into a small submodule of its own"
            )
