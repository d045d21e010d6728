"""Copies of the user's module, so that nothing is ever done to the original."""

from __future__ import annotations

import copy
import threading
import types
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fxopt.errors import CaptureError
from fxopt.infer import with_tensors
from fxopt.tracing.canonical import is_leaf
from fxopt.tracing.closures import Rebinding
from fxopt.tracing.memory import check_memory, held_tensors


def private_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with its own tensors, ties kept.

    Raises:
        CaptureError: a lazy layer is not initialised yet, or the model cannot be copied.
    """
    named = (*model.named_parameters(), *model.named_buffers())
    for name, tensor in named:
        if is_lazy(tensor):
            raise CaptureError(
                f"'{name}' is not initialised yet (a lazy layer); run the model once before "
                "capturing it"
            )
    aliases = check_memory(model)
    held = tuple(held_tensors(model))
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in held if t.grad_fn is not None}
    memo |= {id(t): _marked(t, aliases[id(t)]) for t in held if id(t) in aliases}
    for _, tensor in named:
        copy.deepcopy(tensor, memo)
    return _copy(model, memo)


def _marked(alias: torch.Tensor, owner: str) -> torch.Tensor:
    """A copy of a tensor over the memory of ``owner`` that says so if the forward reads it."""
    copied = alias.detach().clone()
    copied.alias_of = owner  # type: ignore[attr-defined]
    return copied


def restore(copied: nn.Module, original: nn.Module) -> None:
    """Put parameters and buffers of ``copied`` that were written to back to their first values."""
    pairs = zip(
        (*copied.parameters(), *copied.buffers()),
        (*original.parameters(), *original.buffers()),
        strict=False,
    )
    with torch.no_grad():
        for ours, theirs in pairs:
            if ours._version and not torch.equal(ours, theirs):
                ours.copy_(theirs)


def sharing_copy(model: nn.Module, *, own_buffers: bool = False) -> nn.Module:
    """A copy of the module objects alone; parameters are shared, buffers unless ``own_buffers``."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *_plain_tensors(model))}
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.clone() if own_buffers else buffer
    return _copy(model, memo)


def _plain_tensors(model: nn.Module) -> list[torch.Tensor]:
    """Tensors that are attributes of modules without being registered."""
    return [v for m in model.modules() for v in vars(m).values() if isinstance(v, torch.Tensor)]


_SHARED = (type(threading.Lock()), type(threading.RLock()), threading.Condition, threading.Event,
           threading.local, types.ModuleType)  # fmt: skip
"""What ``copy.deepcopy`` refuses and two copies may well have in common."""


def _shared(model: nn.Module) -> list[Any]:
    return [v for m in model.modules() for v in vars(m).values() if isinstance(v, _SHARED)]


def _copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """``model`` copied, its tensors as ``memo`` maps them by identity."""
    for module in model.modules():
        if is_leaf(module):  # its settings are values and need no deep copy, which takes long
            memo[id(module)] = with_tensors(module, lambda tensor: memo[id(tensor)])
    memo.update({id(value): value for value in _shared(model)})
    functions = Rebinding(model, memo)
    try:
        copied = copy.deepcopy(model, memo)
        functions.finish()
        return copied
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); make it "
            "work with copy.deepcopy, because fxopt never touches the original"
        ) from error
