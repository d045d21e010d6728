"""Quantised layers made: of plain ones, with another bias, in other units.

The scale of an output channel is

    s_W = max(max|W|/127, |b|/(s_x·2³⁰), the smallest for which s_W and s_x·s_W are normal numbers)

It is *floored* where the second or third decides: a channel of small weights would have a bias
beyond int32 (ours). A channel of zeros, or less than 2⁻²⁴ of the largest, has the scale of that,
and where all are zero that of weights up to 1/√fan-in, to train from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxopt.fake_quantize import check_bits
from fxopt.integer_training import UpdateRounding, cast_after_steps
from fxopt.layers import remade, standard_kind
from fxopt.quantized_layers import KINDS, Granularity, QuantizedLayer

_ZERO = 2.0**-24
"""A channel whose largest weight is at most this times the layer's counts as zero: float32 loses it
beside the largest. Its own scale would be so small that its gradients outweigh all others."""
_BIAS_ROOM = 2.0**30
"""Half of int32's range: a bias, and as much again for the sum that it is added to."""


def quantized(
    layer: nn.Module, input_scale: float, granularity: Granularity = "channel", bits: int = 8
) -> QuantizedLayer:
    """The quantised layer that has the weight and bias of ``layer``, a plain or borrowed one.

    Args:
        layer: of a class in :data:`KINDS`.
        input_scale: s_x, the scale of what it reads.
        granularity: a scale for each output channel, or one for the whole weight.
        bits: width of the weights, from 2 to 8.
    """
    check_bits("weight_bits", bits)
    tensors: Any = layer
    weight, bias = tensors.weight, tensors.bias
    made = remade(layer, {"weight": weight, "bias": bias}, kind=KINDS[standard_kind(layer)])
    assert isinstance(made, QuantizedLayer)
    made.bits = bits
    given = torch.tensor(input_scale, dtype=weight.dtype, device=weight.device)
    made.register_buffer("input_scale", given)
    made.register_buffer("bias_shift", None)
    scale = torch.maximum(*_scales(made))
    made.register_buffer("weight_scale", scale if granularity == "channel" else scale.max())
    return made.train(layer.training)


def with_bias(layer: QuantizedLayer, shift: torch.Tensor) -> QuantizedLayer:
    """``layer`` with ``shift``, ``(C_out,)``, added to its bias, and the scales for that.

    The layer remembers the shift, for who compares it with the one in float.
    """
    bias = (layer.bias.detach().double() + shift).to(layer.bias.dtype)
    trains = layer.bias.requires_grad
    plain = layer.as_plain(layer.weight, nn.Parameter(bias, trains))
    granularity: Granularity = "channel" if layer.weight_scale.dim() else "tensor"
    made = quantized(plain, float(layer.input_scale), granularity, layer.bits)
    made.register_buffer("bias_shift", shift.to(bias.dtype), persistent=False)
    return made


def in_units(
    layer: QuantizedLayer, qas: bool, update_rounding: UpdateRounding | None = None
) -> QuantizedLayer:
    """``layer`` with its weight and bias in quantised units; the whole numbers stay the same.

    Args:
        layer: in any units.
        qas: whether gradients are scaled back.
        update_rounding: for weights that are whole numbers after every step of an optimizer.
    """
    whole = update_rounding is not None
    tensors = {"weight": _master(layer, "weight", whole), "bias": None}
    if layer.bias is not None:
        tensors["bias"] = _master(layer, "bias", whole)
    made = remade(layer, tensors, layer._buffers, kind=type(layer))
    assert isinstance(made, QuantizedLayer)
    made._non_persistent_buffers_set = {*layer._non_persistent_buffers_set}
    made.qas, made.update_rounding = qas, update_rounding
    if whole:
        cast_after_steps(made)
    return made.train(layer.training)


def _master(layer: QuantizedLayer, name: str, whole: bool) -> nn.Parameter:
    tensor: Any = getattr(layer, name)
    with torch.no_grad():
        if whole:
            made = layer.integer_weight() if name == "weight" else layer.integer_bias()
        elif layer.qas is None:
            made = tensor / (layer.weight_steps() if name == "weight" else layer.bias_scale())
        else:
            return tensor  # type: ignore[no-any-return]
    return nn.Parameter(made.to(tensor.dtype), tensor.requires_grad)


def floored_channels(layer: QuantizedLayer) -> list[int]:
    """The output channels whose scale the bias, or the smallest normal number, decides."""
    largest, floor = _scales(layer)
    if layer.weight_scale.dim() == 0:
        largest = largest.max()
    return torch.nonzero(floor > largest).flatten().tolist()


def _scales(layer: QuantizedLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """``max|W|/127`` of each output channel, and the least that ``s_W`` may be there."""
    weight = layer.float_weight().detach()
    others = [axis for axis in range(weight.dim()) if axis != layer.axis]
    largest = weight.abs().amax(others)
    filled = torch.where(largest > _ZERO * largest.max(), largest, largest.max())
    if not bool(filled.any()):
        filled += (len(largest) / weight.numel()) ** 0.5
    largest = filled / layer.most
    smallest = torch.finfo(weight.dtype).tiny
    # s_x·s_W, by which the bias is divided, is a normal number too
    least = max(smallest, smallest / float(layer.input_scale))
    floor = torch.full_like(largest, least)
    bias = layer.float_bias()
    if bias is not None:
        bias = bias.detach().abs().view(-1, len(largest)).amax(0)
        floor = torch.maximum(floor, bias / (layer.input_scale * _BIAS_ROOM))
    return largest, floor
