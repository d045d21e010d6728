"""Convolutions and linear layers whose weights and biases are quantised in each call.

What they become is :mod:`fxopt.quantized_tensors`, how the layers are made
:mod:`fxopt.quantizing.layers`.

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
from fxopt.integer_training import UpdateRounding, cast_after_steps
from fxopt.layers import remade
from fxopt.quantized_tensors import (
    INT32,
    products,
    quantized_bias,
    quantized_weight,
    spread,
    whole_numbers,
)

Granularity = Literal["channel", "tensor"]


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
        return self.weight.detach() * self.weight_steps()

    def float_bias(self) -> torch.Tensor | None:
        """b, without rounding."""
        if self.qas is None or self.bias is None:
            return self.bias  # type: ignore[no-any-return]
        return self.bias.detach() * self.bias_scale()  # type: ignore[no-any-return]

    def integer_weight(self) -> torch.Tensor:
        """What an integer kernel multiplies by, int8."""
        ends = (-self.most, self.most)
        return whole_numbers(self.weight, self.weight_steps(), ends, self.qas).to(torch.int8)

    def integer_bias(self) -> torch.Tensor:
        """What an integer kernel adds, int32."""
        return whole_numbers(self.bias, self.bias_scale(), INT32, self.qas).to(torch.int32)

    def weight_steps(self) -> torch.Tensor:
        """s_W in a shape that broadcasts to the weight's."""
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

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # of a copy or a pickle
        if self.update_rounding is not None:
            cast_after_steps(self)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.qas is None:
            return
        destination[f"{prefix}{_MARK}"] = torch.tensor(True)
        if self.update_rounding is not None and not keep_vars:
            destination[f"{prefix}weight"] = self.integer_weight()
            if self.bias is not None:
                destination[f"{prefix}bias"] = self.integer_bias()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: Any,
        unexpected_keys: Any, error_msgs: list[str],
    ) -> None:  # fmt: skip
        present = [n for n in ("weight", "bias") if f"{prefix}{n}" in state_dict]
        given, own = state_dict.pop(f"{prefix}{_MARK}", None) is not None, self.qas is not None
        if present and given is not own:
            units = {True: "quantised", False: "float"}
            error_msgs.append(
                f"'{prefix}{present[0]}' is in {units[given]} units and the layer's in {units[own]}"
                " ones: quantise the model as the saved one was (qas), then load"
            )
            return
        for name in present:
            tensor = state_dict[f"{prefix}{name}"]
            if isinstance(tensor, torch.Tensor) and not tensor.is_floating_point():
                state_dict[f"{prefix}{name}"] = tensor.to(self.weight.dtype)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        per = "tensor" if self.weight_scale.dim() == 0 else "channel"
        return f"{super().extra_repr()}, {self.bits} bits per {per}{_SHOWN[self.qas]}"


_MARK = "quantised_units"
"""A key beside weight and bias that says that they are; it outlives what loses the metadata."""
_SHOWN = {None: "", False: ", in quantised units", True: ", in quantised units with QAS"}


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
