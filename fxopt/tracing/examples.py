"""Example inputs: the user's, the model's own word on them, or an assumption that is stated."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from fxopt.errors import CaptureError
from fxopt.interface import Call, bind_call

ASSUMED_SIZE = 224
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def example_call(model: nn.Module, inputs: Any, kwargs: dict[str, Any]) -> Call:
    """The example call that ``inputs`` and ``kwargs`` make, or the one that the model suggests.

    Raises:
        CaptureError: there are no inputs and nothing tells what they could be, or they do not fit.
    """
    if inputs is None and not any(isinstance(v, torch.Tensor) for v in _leaves(kwargs)):
        inputs = suggested_inputs(model)
    if inputs is None:
        inputs = ()
    args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    return bind_call(model, args, kwargs)


def _leaves(tree: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(tree)


def suggested_inputs(model: nn.Module) -> Any:
    """What the model says that it takes, else one image for its first convolution.

    Raises:
        CaptureError: nothing tells what the input could be.
    """
    declared = getattr(model, "example_input_array", None)
    if declared is not None:
        return declared
    dtype, device = _dtype_and_device(model)
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = config.get("input_size") if isinstance(config, dict) else None
    if size is not None:
        return torch.zeros(1, *size, dtype=dtype, device=device)
    return _assumed_image(model, dtype, device)


def _assumed_image(model: nn.Module, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    first = next((m for m in model.modules() if isinstance(m, _CONVOLUTIONS)), None)
    if first is None:
        raise CaptureError(
            f"{type(model).__name__} does not say what it takes and has no convolution to tell; "
            "give example_inputs (on the command line: --input 1x3x224x224)"
        )
    rank = _CONVOLUTIONS.index(next(k for k in _CONVOLUTIONS if isinstance(first, k))) + 1
    shape = (1, first.in_channels, *(ASSUMED_SIZE,) * rank)
    warnings.warn(
        f"no example inputs given: assuming one of shape {shape}; give example_inputs to choose",
        stacklevel=5,
    )
    return torch.zeros(shape, dtype=dtype, device=device)


def _dtype_and_device(model: nn.Module) -> tuple[torch.dtype, torch.device]:
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype, tensor.device
    return torch.get_default_dtype(), torch.device("cpu")
