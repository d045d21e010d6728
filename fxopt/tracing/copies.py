"""Copies of the user's module, so that nothing is ever done to the original."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from fxopt.errors import CaptureError


def private_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with its own tensors, ties kept.

    Raises:
        CaptureError: a lazy layer is not initialised yet, or the model cannot be copied.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
            raise CaptureError(
                f"'{name}' is not initialised yet (a lazy layer); run the model once before "
                "capturing it"
            )
    memo = {id(t): t.detach().clone() for t in _plain_tensors(model) if t.grad_fn is not None}
    return _deepcopy(model, memo)


def sharing_copy(model: nn.Module, *, own_buffers: bool = False) -> nn.Module:
    """A copy of the module objects alone; parameters are shared, buffers unless ``own_buffers``."""
    tensors = [*model.parameters(), *_plain_tensors(model)]
    if not own_buffers:
        tensors += model.buffers()
    return _deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _plain_tensors(model: nn.Module) -> list[torch.Tensor]:
    """Tensors that are attributes of modules without being registered."""
    return [v for m in model.modules() for v in vars(m).values() if isinstance(v, torch.Tensor)]


def _deepcopy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); make it "
            "work with copy.deepcopy, because fxopt never touches the original"
        ) from error
