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
from fxopt.tracing.lines import raised_at
from fxopt.tracing.modes import first_difference, layers_with_a_mode
from fxopt.tracing.settled import Raised, Tracing, Unsettled
from fxopt.tracing.trace import Foreign, Trace, Untraceable


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
                raise _refusal(private, error, opaque) from error
            leaves[path] = opaque[path] = f"{error} ({error.line})" if error.line else str(error)
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
    evaluation.device_was_read |= training.device_was_read
    evaluation.notes.update(training.notes)


def _trace_training(
    private: nn.Module, call: Call, leaves: Mapping[str, str], evaluation: Trace
) -> dict[str, str] | tuple[Trace | None, str]:
    """New leaves, or the training trace and the reason for which there is no training mode."""
    try:
        training = _trace(private, call, leaves, training=True)
    except Unsettled as error:
        found = _difference(private, leaves, evaluation, error.trace)
        return found if isinstance(found, dict) else (None, _reason(error))
    except (Untraceable, CaptureError) as error:
        return None, _reason(error)
    found = _difference(private, leaves, evaluation, training)
    return (training, "") if found is None else found if isinstance(found, dict) else (None, found)


def _reason(error: Untraceable | CaptureError) -> str:
    where = f" at {error.line}" if isinstance(error, Untraceable) and error.line else ""
    return f"its training forward cannot be captured: {error}{where}"


def _difference(
    private: nn.Module, leaves: Mapping[str, str], evaluation: Trace, training: Trace
) -> dict[str, str] | str | None:
    """New leaves where the traces differ, or else in words where they do; None if they do not."""
    difference = first_difference(evaluation, training)
    if difference is None:
        return None
    kept = layers_with_a_mode(private, difference, evaluation, training)
    return {path: reason for path, reason in kept.items() if path not in leaves} or str(difference)


def _trace(private: nn.Module, call: Call, leaves: Mapping[str, str], *, training: bool) -> Trace:
    try:
        trace = Tracing(private, call, leaves, training).settled()
        if trace.asked_for_gradients:
            _check_without_gradients(Tracing(private, call, leaves, training, False), trace)
        return trace
    except Raised as raised:
        error: Any = raised.__cause__
        if training and "more than 1 value per channel" in str(error):
            return _trace(private, _wider(call), leaves, training=True)
        raise _input_refused(private, call, raised.path, error) from error


def _check_without_gradients(tracing: Tracing, trace: Trace) -> None:
    """Raise unless the forward computes the same where a tensor needs no gradient.

    Whether it does, the caller decides at every call (``torch.no_grad``): no guard could say so.
    """
    difference = first_difference(trace, tracing.settled())
    if difference is not None:
        error = Untraceable("it decides by the .requires_grad of a tensor")
        error.line = trace.asked_for_gradients
        raise error


def _wider(call: Call) -> Call:
    """The call with its batch doubled: a norm over one value per channel cannot train."""
    values = tuple(
        torch.cat([v, v]) if leaf.is_tensor and v.dim() else v
        for leaf, v in zip(call.leaves, call.values, strict=True)
    )
    return replace(call, values=values)


def _innermost(error: Untraceable, leaves: Mapping[str, str]) -> str | None:
    if isinstance(error, Foreign):
        return None
    return next((p for p in reversed(error.paths) if p and p not in leaves), None)


def _refusal(model: nn.Module, error: Untraceable, opaque: Mapping[str, str]) -> CaptureError:
    """The refusal, with why something was to run as it is: that may be all there is to mend."""
    where = f" at {error.line}" if error.line else ""
    before = "".join(f"; '{path}' was to run as it is: {reason}" for path, reason in opaque.items())
    return CaptureError(
        f"{type(model).__name__} cannot be captured: {error}{where}{before}; "
        f"{error.remedy or _REMEDY}"
    )


_REMEDY = (
    "move that part into a submodule of its own, which is then run as it is, or out of the model"
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
    what = " ".join(str(error).split())
    untraceable = Untraceable(f"{type(error).__name__} while tracing: {what}")
    untraceable.line = raised_at(error.__traceback__) or untraceable.line
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
