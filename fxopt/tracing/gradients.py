"""What forward or its owner does to gradients that a graph would not: refused, never dropped.

A graph carries values; autograd follows them by itself. Hooks on gradients, and the flags that
switch gradients on and off, are no values.
"""

from __future__ import annotations

import torch
from torch import nn

from fxopt.errors import CaptureError
from fxopt.tracing.aliasing import Value
from fxopt.tracing.trace import Untraceable
from fxopt.tracing.writer import Writer

_HOOKS = ("_backward_hooks", "_backward_pre_hooks")


def check_parameters(model: nn.Module) -> None:
    """Refuse hooks on the gradients of parameters, which copies do not keep.

    Raises:
        CaptureError: naming the parameter.
    """
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks:
            raise CaptureError(
                f"'{name}' has a hook on its gradient (register_hook), which the captured module "
                "would not run; remove it before capture, and register it on the captured module"
            )


def check_module(module: nn.Module, path: str) -> None:
    """Refuse hooks on the gradients of a module that is traced."""
    if any(getattr(module, hooks) for hooks in _HOOKS):
        what = f"'{path}'" if path else f"the {type(module).__name__}"
        error = Untraceable(
            f"{what} has a backward hook, which a graph does not run",
            "remove it before capture, or do in forward what it does",
        )
        error.paths = ("",)
        raise error


def check_flag(tensor: torch.Tensor, name: str | None, value: Value | None, flag: bool) -> None:
    """Refuse to switch the gradient of a tensor; saying again what it is already changes nothing.

    ``name`` is the parameter, buffer or constant that it is, ``value`` what the trace knows of it.
    """
    if value is None or name is not None:
        if tensor.requires_grad != flag:
            raise Untraceable(
                f"it sets requires_grad of '{name or 'a tensor'}', which a graph does not; "
                "detach() what shall not learn, and freeze parameters outside of forward"
            )
    elif flag or value.source:
        raise Untraceable(
            f"it asks autograd to {'follow' if flag else 'leave out'} {_named(value)} "
            "(requires_grad_); do that to inputs, before the call"
        )


def detached(writer: Writer, target: torch.Tensor) -> torch.Tensor:
    """``target`` after ``detach_``, which changes no value."""
    value = writer.value_of(target)
    if not value.learns or not torch.is_grad_enabled():
        return target
    if value.source or any(v is not value and v.storage is value.storage for v in writer.values()):
        raise Untraceable("detach_ of a tensor that has views, or that is an input; use detach()")
    node = value.read()
    value.current = writer.node("call_function", torch.detach, (node,), {}, value.tensor)
    value.learns = False
    return target


def _named(value: Value) -> str:
    return f"its input '{value.source}'" if value.source else "a tensor"
