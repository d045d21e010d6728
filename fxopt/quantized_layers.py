"""Convolutions and linear layers whose weights and biases are quantised in each call.

Per output channel

    Ŵ = s_W·round(W/s_W)        b̂ = s_x·s_W·round(b/(s_x·s_W))

with whole numbers from -127 to 127, and in int32, and ``s_x`` the scale of the layer's input: what
an integer kernel multiplies and adds (Jacob et al., CVPR 2018, section 2.4). The scale of a channel

    s_W = max(max|W|/127, |b|/(s_x·2³⁰), the smallest for which s_W and s_x·s_W are normal numbers)

is *floored* where the second or third decides: a channel whose weights are (almost) zero would have
a bias beyond int32 (ours). Weights and biases stay the user's float parameters and train, straight
through the rounding; the scales are constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn

from fxopt.channelwise import TRANSPOSED_KINDS
from fxopt.fake_quantize import check_bits, fake_quantize, integers
from fxopt.layers import remade, standard_kind

Granularity = Literal["channel", "tensor"]

_BIAS_ROOM = 2.0**30
"""Half of int32's range: a bias, and as much again for the sum that it is added to."""
_INT32 = (-(2**31), 2**31 - 128)
"""As far as float32 numbers fit into int32."""


def quantized_weight(
    weight: torch.Tensor, scale: torch.Tensor, axis: int, most: int
) -> torch.Tensor:
    """``Ŵ``, with a scale for the whole weight or one for each output channel along ``axis``."""
    return fake_quantize(weight, _spread(scale, weight, axis), 0, -most, most)


def quantized_bias(
    bias: torch.Tensor, weight_scale: torch.Tensor, input_scale: torch.Tensor
) -> torch.Tensor:
    """``b̂``, ``(C_out,)``."""
    return fake_quantize(bias, _products(bias, weight_scale, input_scale), 0, *_INT32)


def _spread(scale: torch.Tensor, weight: torch.Tensor, axis: int) -> torch.Tensor:
    """``scale`` in a shape that broadcasts to the weight's."""
    if scale.dim() == 0:
        return scale
    return scale.view([-1 if each == axis else 1 for each in range(weight.dim())])


def _products(
    bias: torch.Tensor, weight_scale: torch.Tensor, input_scale: torch.Tensor
) -> torch.Tensor:
    """s_x·s_W of each output channel; of a transposed layer each group has the same."""
    each = input_scale * weight_scale
    return each.repeat(len(bias) // each.numel())


class QuantizedLayer(nn.Module):
    """What quantised layers have in common; it goes before the plain one.

    They are made of plain layers by :func:`quantized`.

    Attributes:
        weight, bias: as in the plain layer, in float.
        weight_scale: s_W, ``(C_out,)`` (of a transposed convolution ``(C_out / groups,)``), or a
            number for the whole tensor.
        input_scale: s_x, a number.
        bias_shift: what calibration added to the bias, ``(C_out,)``; None if nothing.
        bits: width of the weights.
    """

    plain: ClassVar[type[nn.Module]]
    """The layer that computes the same with a weight that is given."""

    weight: torch.Tensor
    bias: Any
    weight_scale: torch.Tensor
    input_scale: torch.Tensor
    bias_shift: torch.Tensor | None
    bits: int

    @property
    def axis(self) -> int:
        """That of the output channels in the weight."""
        return 1 if issubclass(self.plain, TRANSPOSED_KINDS) else 0

    @property
    def most(self) -> int:
        """The greatest whole number that a weight becomes; the least is its negative."""
        return (1 << (self.bits - 1)) - 1

    def bias_scale(self) -> torch.Tensor:
        """s_x·s_W of each output channel, ``(C_out,)``."""
        return _products(self.bias, self.weight_scale, self.input_scale)

    def quantized_weight(self) -> torch.Tensor:
        """``Ŵ``, in the shape of ``weight``."""
        return quantized_weight(self.weight, self.weight_scale, self.axis, self.most)

    def quantized_bias(self) -> torch.Tensor | None:
        """``b̂``, ``(C_out,)``."""
        if self.bias is None:
            return None
        return quantized_bias(self.bias, self.weight_scale, self.input_scale)

    def integer_weight(self) -> torch.Tensor:
        """What an integer kernel multiplies by, int8."""
        scale = _spread(self.weight_scale, self.weight, self.axis)
        with torch.no_grad():
            return integers(self.weight, scale, 0, -self.most, self.most).to(torch.int8)

    def integer_bias(self) -> torch.Tensor:
        """What an integer kernel adds, int32."""
        with torch.no_grad():
            return integers(self.bias, self.bias_scale(), 0, *_INT32).to(torch.int32)

    def fold(self) -> nn.Module:
        """The plain layer that computes the same now, with tensors of its own."""
        with torch.no_grad():
            tensors = {"weight": self.quantized_weight(), "bias": self.quantized_bias()}
        return remade(self, tensors, kind=self.plain).train(self.training)

    def extra_repr(self) -> str:
        per = "tensor" if self.weight_scale.dim() == 0 else "channel"
        return f"{super().extra_repr()}, {self.bits} bits per {per}"


class _QuantizedConv(QuantizedLayer):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        layer: Any = self
        weight, bias = self.quantized_weight(), self.quantized_bias()
        result: torch.Tensor = layer._conv_forward(input, weight, bias)
        return result


class QuantizedConv1d(_QuantizedConv, nn.Conv1d):
    """``nn.Conv1d`` with quantised weights: ``(N, C, L)``."""

    plain = nn.Conv1d


class QuantizedConv2d(_QuantizedConv, nn.Conv2d):
    """``nn.Conv2d`` with quantised weights: ``(N, C, H, W)``."""

    plain = nn.Conv2d


class QuantizedConv3d(_QuantizedConv, nn.Conv3d):
    """``nn.Conv3d`` with quantised weights: ``(N, C, D, H, W)``."""

    plain = nn.Conv3d


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """``nn.Linear`` with quantised weights: ``(N, *, in)``."""

    plain = nn.Linear

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.quantized_weight(), self.quantized_bias())


class QuantizedTransposed(QuantizedLayer):
    """What quantised transposed convolutions have in common."""

    function: ClassVar[Any]

    def extra(self, input: torch.Tensor, output_size: Any) -> Any:
        """The ``output_padding`` by which the result of ``input`` has ``output_size``."""
        layer: Any = self
        return layer._output_padding(
            input, output_size, layer.stride, layer.padding, layer.kernel_size,
            self.weight.dim() - 2, layer.dilation,
        )  # fmt: skip

    def forward(self, input: torch.Tensor, output_size: Any = None) -> torch.Tensor:
        layer: Any = self
        extra, groups = self.extra(input, output_size), layer.groups
        weight, bias = self.quantized_weight(), self.quantized_bias()
        settings = (layer.stride, layer.padding, extra, groups, layer.dilation)
        result: torch.Tensor = type(self).function(input, weight, bias, *settings)
        return result


class QuantizedConvTranspose1d(QuantizedTransposed, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` with quantised weights: ``(N, C, L)``."""

    plain, function = nn.ConvTranspose1d, staticmethod(F.conv_transpose1d)


class QuantizedConvTranspose2d(QuantizedTransposed, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with quantised weights: ``(N, C, H, W)``."""

    plain, function = nn.ConvTranspose2d, staticmethod(F.conv_transpose2d)


class QuantizedConvTranspose3d(QuantizedTransposed, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` with quantised weights: ``(N, C, D, H, W)``."""

    plain, function = nn.ConvTranspose3d, staticmethod(F.conv_transpose3d)


KINDS: Mapping[type[nn.Module], type[QuantizedLayer]] = {
    kind.plain: kind
    for kind in (
        QuantizedConv1d, QuantizedConv2d, QuantizedConv3d, QuantizedLinear,
        QuantizedConvTranspose1d, QuantizedConvTranspose2d, QuantizedConvTranspose3d,
    )
}  # fmt: skip
"""The quantised layer, by the plain one."""


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
    tensors = {"weight": layer.weight, "bias": nn.Parameter(bias, trains)}
    plain = remade(layer, tensors, kind=layer.plain)
    granularity: Granularity = "channel" if layer.weight_scale.dim() else "tensor"
    made = quantized(plain, float(layer.input_scale), granularity, layer.bits)
    made.register_buffer("bias_shift", shift.to(bias.dtype), persistent=False)
    return made


def floored_channels(layer: QuantizedLayer) -> list[int]:
    """The output channels whose scale the bias, or the smallest normal number, decides."""
    largest, floor = _scales(layer)
    if layer.weight_scale.dim() == 0:
        largest = largest.max()
    return torch.nonzero(floor > largest).flatten().tolist()


def _scales(layer: QuantizedLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """``max|W|/127`` of each output channel, and the least that ``s_W`` may be there."""
    weight = layer.weight.detach()
    others = [axis for axis in range(weight.dim()) if axis != layer.axis]
    largest = weight.abs().amax(others) / layer.most
    smallest = torch.finfo(weight.dtype).tiny
    # s_x·s_W, by which the bias is divided, is a normal number too
    least = max(smallest, smallest / float(layer.input_scale))
    floor = torch.full_like(largest, least)
    if layer.bias is not None:
        bias = layer.bias.detach().abs().view(-1, len(largest)).amax(0)
        floor = torch.maximum(floor, bias / (layer.input_scale * _BIAS_ROOM))
    return largest, floor
