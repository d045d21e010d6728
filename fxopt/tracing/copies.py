"""Copies of the user's module, so that nothing is ever done to the original."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fxopt.errors import CaptureError
from fxopt.infer import with_tensors
from fxopt.tracing.canonical import is_leaf
from fxopt.tracing.closures import Rebinding


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
    memo: dict[int, Any] = {
        id(t): t.detach().clone() for t in _plain_tensors(model) if t.grad_fn is not None
    }
    for _, tensor in named:
        copy.deepcopy(tensor, memo)
    return _copy(model, memo)


def sharing_copy(model: nn.Module, *, own_buffers: bool = False) -> nn.Module:
    """A copy of the module objects alone; parameters are shared, buffers unless ``own_buffers``."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *_plain_tensors(model))}
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.clone() if own_buffers else buffer
    return _copy(model, memo)


def _plain_tensors(model: nn.Module) -> list[torch.Tensor]:
    """Tensors that are attributes of modules without being registered."""
    return [v for m in model.modules() for v in vars(m).values() if isinstance(v, torch.Tensor)]


def _copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """``model`` copied, its tensors as ``memo`` maps them by identity."""
    for module in model.modules():
        if is_leaf(module):  # its settings are values and need no deep copy, which takes long
            memo[id(module)] = with_tensors(module, lambda tensor: memo[id(tensor)])
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
