"""Convolutions and linear layers whose weights and biases are quantised in each call.

What they become is :mod:`fxopt.quantized_tensors`. The scale of an output channel

    s_W = max(max|W|/127, |b|/(s_x·2³⁰), the smallest for which s_W and s_x·s_W are normal numbers)

is *floored* where the second or third decides: a channel whose weights are (almost) zero would have
a bias beyond int32 (ours). A channel of zeros has the scale of the largest one, and where all are
zero that of weights up to 1/√fan-in, to train from.

Weights and biases stay the user's float parameters and train, straight through the rounding; the
scales are constants. Or they are kept in quantised units, ``W/s_W`` and ``b/(s_x·s_W)``, and train
in these (:mod:`fxopt.integer_training`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn

from fxopt.channelwise import TRANSPOSED_KINDS
from fxopt.fake_quantize import check_bits
from fxopt.integer_training import UpdateRounding, cast_after_steps
from fxopt.layers import remade, standard_kind
from fxopt.quantized_tensors import (
    INT32,
    products,
    quantized_bias,
    quantized_weight,
    spread,
    whole_numbers,
)

Granularity = Literal["channel", "tensor"]

_ZERO = 2.0**-100
"""Of the largest weight: what is not above is zero, whatever else the layer does."""
_BIAS_ROOM = 2.0**30
"""Half of int32's range: a bias, and as much again for the sum that it is added to."""


class QuantizedLayer(nn.Module):
    """What quantised layers have in common; it goes before the plain one.

    They are made of plain layers by :func:`quantized`.

    Attributes:
        weight, bias: as in the plain layer, or in quantised units: ``W/s_W``, ``b/(s_x·s_W)``.
        weight_scale: s_W, ``(C_out,)`` (of a transposed convolution ``(C_out / groups,)``), or a
            number for the whole tensor.
        input_scale: s_x, a number.
        bias_shift: what calibration added to the bias, ``(C_out,)``; None if nothing.
        bits: width of the weights.
        qas: None for a weight and bias in float units. True and False for quantised ones, whose
            gradients are or are not scaled back.
        update_rounding: how weight and bias are made whole numbers again after each step of an
            optimizer; None if they are not.
    """

    plain: ClassVar[type[nn.Module]]
    """The layer that computes the same with a weight that is given."""

    weight: torch.Tensor
    bias: Any
    weight_scale: torch.Tensor
    input_scale: torch.Tensor
    bias_shift: torch.Tensor | None
    bits: int
    qas: bool | None = None
    update_rounding: UpdateRounding | None = None

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
        return products(self.bias, self.weight_scale, self.input_scale)

    def quantized_weight(self) -> torch.Tensor:
        """``Ŵ``, in the shape of ``weight``."""
        if self.update_rounding is not None and torch.is_grad_enabled():
            cast_after_steps(self)
        return quantized_weight(self.weight, self.weight_scale, self.axis, self.most, self.qas)

    def quantized_bias(self) -> torch.Tensor | None:
        """``b̂``, ``(C_out,)``."""
        if self.bias is None:
            return None
        return quantized_bias(self.bias, self.weight_scale, self.input_scale, self.qas)

    def float_weight(self) -> torch.Tensor:
        """W, without rounding."""
        if self.qas is None:
            return self.weight
        return self.weight.detach() * self._weight_steps()

    def float_bias(self) -> torch.Tensor | None:
        """b, without rounding."""
        if self.qas is None or self.bias is None:
            return self.bias  # type: ignore[no-any-return]
        return self.bias.detach() * self.bias_scale()  # type: ignore[no-any-return]

    def integer_weight(self) -> torch.Tensor:
        """What an integer kernel multiplies by, int8."""
        ends = (-self.most, self.most)
        return whole_numbers(self.weight, self._weight_steps(), ends, self.qas).to(torch.int8)

    def integer_bias(self) -> torch.Tensor:
        """What an integer kernel adds, int32."""
        return whole_numbers(self.bias, self.bias_scale(), INT32, self.qas).to(torch.int32)

    def _weight_steps(self) -> torch.Tensor:
        return spread(self.weight_scale, self.weight, self.axis)

    def cast_tensors(self) -> Iterator[tuple[torch.Tensor, int, int, UpdateRounding]]:
        """What is cast after a step, with the ends of its range."""
        if self.update_rounding is not None:
            yield self.weight, -self.most, self.most, self.update_rounding
            if self.bias is not None:
                yield self.bias, *INT32, self.update_rounding

    def fold(self) -> nn.Module:
        """The plain layer that computes the same now, with tensors of its own."""
        with torch.no_grad():
            return self.as_plain(self.quantized_weight(), self.quantized_bias())

    def as_plain(self, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
        """The plain layer with the settings of this one and these tensors."""
        plain = remade(self, {"weight": weight, "bias": bias}, kind=self.plain)
        for name in ("bits", "qas", "update_rounding"):
            plain.__dict__.pop(name, None)
        return plain.train(self.training)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None:
            metadata[_UNITS_KEY] = self.qas is not None
        if self.update_rounding is not None and not keep_vars:
            destination[f"{prefix}weight"] = self.integer_weight()
            if self.bias is not None:
                destination[f"{prefix}bias"] = self.integer_bias()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: Any,
        unexpected_keys: Any, error_msgs: list[str],
    ) -> None:  # fmt: skip
        names = [f"{prefix}{name}" for name in ("weight", "bias")]
        whole = [n for n in names if n in state_dict and not state_dict[n].is_floating_point()]
        # no metadata at all says nothing; that of a layer which knows no units says float
        given = True if whole else local_metadata.get(_UNITS_KEY, False if local_metadata else None)
        own = self.qas is not None
        if given not in (None, own):
            units = {True: "quantised", False: "float"}
            error_msgs.append(
                f"'{names[0]}' is in {units[not own]} units and the layer's in {units[own]} ones: "
                "quantise the model as the saved one was (qas), then load"
            )
            return
        state_dict |= {name: state_dict[name].to(self.weight.dtype) for name in whole}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        per = "tensor" if self.weight_scale.dim() == 0 else "channel"
        return f"{super().extra_repr()}, {self.bits} bits per {per}{_UNITS[self.qas]}"


_UNITS_KEY = "quantised_units"
"""In the metadata of a state_dict: whether a layer's weight and bias are in quantised units."""
_UNITS = {None: "", False: ", in quantised units", True: ", in quantised units with QAS"}


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
    return made.train(layer.training)


def _master(layer: QuantizedLayer, name: str, whole: bool) -> nn.Parameter:
    tensor: Any = getattr(layer, name)
    with torch.no_grad():
        if whole:
            made = layer.integer_weight() if name == "weight" else layer.integer_bias()
        elif layer.qas is None:
            made = tensor / (layer._weight_steps() if name == "weight" else layer.bias_scale())
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
