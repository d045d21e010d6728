"""Kernels that write their result over an operand.

What is read of the operand is read where it lies, and written over before the next of it is read:
element by element through the operator's own ``out=`` kernel, or plane by plane.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fxopt.kernels import InPlace
from fxopt.quantized_layers import QuantizedLayer
from fxopt.scaled_ws import folded

_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


@dataclass(frozen=True)
class Call:
    """One operator with its operands; ``run`` gives its result as a new tensor."""

    node: fx.Node
    module: nn.Module | None
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    run: Callable[[], Any]


def write_over(
    call: Call, kind: InPlace, target: torch.Tensor, scratch: torch.Tensor | None
) -> None:
    """Write the call's result into ``target``, which shares bytes with an operand.

    Args:
        scratch: memory for one plane, if the plan has it.
    """
    if kind is InPlace.PLANES:
        plane_by_plane(call, target, scratch)
    elif kind is InPlace.FIRST:
        with _WithoutCopy(target):
            call.run()
    else:
        _element_by_element(call, target)


def plane_by_plane(call: Call, target: torch.Tensor, scratch: torch.Tensor | None = None) -> None:
    """A depthwise convolution, the planes in an order in which each is read before it is lost."""
    operand, weight, bias, convolve = _convolution(call)
    batched = operand.dim() == weight.dim()
    samples = operand if batched else operand.unsqueeze(0)
    results = target if batched else target.unsqueeze(0)
    count, channels = results.shape[:2]
    planes = [(sample, channel) for sample in range(count) for channel in range(channels)]
    if results.numel() > samples.numel():  # each result reaches into the next plane
        planes.reverse()
    for sample, channel in planes:
        one = slice(channel, channel + 1)
        plane = samples[sample : sample + 1, one]
        result = convolve(plane, weight[one], None if bias is None else bias[one])
        if scratch is not None:
            result = scratch.view(result.shape).copy_(result)
        results[sample : sample + 1, one] = result


def _convolution(call: Call) -> tuple[torch.Tensor, torch.Tensor, Any, Callable[..., Any]]:
    """Operand, weight and bias of a depthwise convolution, and the convolution of one plane."""
    if call.module is not None:
        layer = call.module
        plain = layer.fold() if isinstance(layer, QuantizedLayer) else folded(layer)
        one: Any = copy.copy(plain)
        one.groups = 1
        (operand,) = (*call.args, *call.kwargs.values())
        return operand, one.weight, one.bias, one._conv_forward
    function: Any = call.node.target
    given = dict(zip(_CONVOLUTION, call.args, strict=False)) | dict(call.kwargs)
    operand, weight, bias = (given.pop(name, None) for name in _CONVOLUTION[:3])
    given["groups"] = 1
    return operand, weight, bias, lambda x, w, b: function(x, w, b, **given)


def _element_by_element(call: Call, target: torch.Tensor) -> None:
    """The last kernel of the call once more, into ``target``.

    A kernel without an ``out=`` twin (a norm with several results) has its result copied.
    """
    with _Recorder() as recorder:
        result = call.run()
    for function, args, kwargs, found in reversed(recorder.calls):
        if found is result or _same(found, result):
            kernel = _into(function)
            if kernel is None:
                break
            kernel(*args, **kwargs, out=target)
            return
    target.copy_(result)


def _same(one: Any, other: torch.Tensor) -> bool:
    return (
        isinstance(one, torch.Tensor)
        and one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.dtype == other.dtype
    )


def _into(function: Any) -> Any:
    """The kernel that does the same as ``function`` and writes into ``out``, or None."""
    taken = [str(each.type) for each in function._schema.arguments]
    packet = function.overloadpacket
    for name in packet.overloads():
        with suppress(RuntimeError):  # an overload for scripting only
            kernel = getattr(packet, name)
            arguments = kernel._schema.arguments
            given = [str(each.type) for each in arguments if not each.is_out]
            if given == taken and [each.name for each in arguments if each.is_out] == ["out"]:
                return kernel
    return None


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the kernels that were called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class _WithoutCopy(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Leaves out the copy of the first operand with which a changed copy begins."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._target = target

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.clone.default and _same(args[0], self._target):
            return self._target
        return func(*args, **(kwargs or {}))
