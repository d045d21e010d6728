"""What the exporter writes of a quantised program: ONNX operators on whole numbers, as modules.

They are for the exporter alone: in torch ``torch.onnx.ops.symbolic`` computes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from fxopt.fake_quantize import FakeQuantize
from fxopt.quantized_layers import QuantizedLayer, QuantizedTransposed

ActivationType = Literal["uint8", "int8"]
NAME = "fxopt_name"
"""An attribute that becomes the name of its ONNX node, and goes, before the file is written."""
SHIFT = {"uint8": 128, "int8": 0}
"""What is added to whole numbers from -128 to 127."""


def _onnx(
    name: str, inputs: Sequence[torch.Tensor], shape: Sequence[Any], dtype: torch.dtype,
    attributes: Mapping[str, Any] = MappingProxyType({}),
) -> torch.Tensor:  # fmt: skip
    made = torch.onnx.ops.symbolic(name, inputs, dict(attributes), dtype=dtype, shape=shape)
    assert isinstance(made, torch.Tensor)
    return made


def _dequantized(
    whole: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int | None = None
) -> torch.Tensor:
    attributes = {} if axis is None else {"axis": axis}
    inputs = (whole, scale, zero_point)
    return _onnx("DequantizeLinear", inputs, whole.shape, torch.float32, attributes)


class Pair(nn.Module):
    """QuantizeLinear and DequantizeLinear."""

    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(self, grid: FakeQuantize, kind: ActivationType, name: str) -> None:
        super().__init__()
        self.name = name
        self.shift = SHIFT[kind]
        self.dtype = torch.uint8 if kind == "uint8" else torch.int8
        self.ends = (grid.low + self.shift, grid.high + self.shift) if grid.bits < 8 else None
        self.register_buffer("scale", grid.scale.detach().float())
        zero_point = grid.zero_point + self.shift
        self.register_buffer("zero_point", zero_point.to(self.dtype))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        scale, zero_point = self.scale, self.zero_point
        inputs = (input, scale, zero_point)
        whole = _onnx("QuantizeLinear", inputs, input.shape, self.dtype, {NAME: self.name})
        if self.ends is not None:
            whole = whole.clamp(*self.ends)
        return _dequantized(whole, scale, zero_point)


class IntegerLayer(nn.Module):
    """A layer with integer weights, dequantised; pads that repeat values come before it."""

    weight: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    bias: torch.Tensor | None
    bias_scale: torch.Tensor
    bias_zero: torch.Tensor

    def __init__(self, layer: QuantizedLayer, before: Pair | None, after: Pair | None) -> None:
        super().__init__()
        self.plain, self.axis = layer.plain, layer.axis
        self.before, self.after = before, after
        self.settings = {n: getattr(layer, n) for n in _SETTINGS if hasattr(layer, n)}
        self.extra: Any = layer.extra if isinstance(layer, QuantizedTransposed) else None
        self.ring: Any = None
        settings: Any = layer
        if getattr(layer, "padding_mode", "zeros") != "zeros":
            self.ring = (settings._reversed_padding_repeated_twice, settings.padding_mode)
            self.settings["padding"] = 0
        self.register_buffer("weight", layer.integer_weight())
        self.register_buffer("scale", layer.weight_scale.detach().float())
        self.register_buffer("zero", torch.zeros(layer.weight_scale.shape, dtype=torch.int8))
        self.register_buffer("bias", None if layer.bias is None else layer.integer_bias())
        if layer.bias is not None:
            self.register_buffer("bias_scale", layer.bias_scale().detach().float())
            self.register_buffer("bias_zero", torch.zeros(len(layer.bias), dtype=torch.int32))

    def forward(self, input: torch.Tensor, output_size: Any = None) -> torch.Tensor:
        axis = self.axis if self.scale.dim() else None
        weight = _dequantized(self.weight, self.scale, self.zero, axis)
        bias = None
        if self.bias is not None:
            bias = _dequantized(self.bias, self.bias_scale, self.bias_zero, 0)
        if self.plain is nn.Linear:
            return self._linear(input, weight, bias)
        function = getattr(F, _FUNCTIONS[self.plain])
        if self.ring is not None:
            input = F.pad(input, self.ring[0], self.ring[1])
            input = input if self.before is None else self.before(input)
        extra = {} if self.extra is None else {"output_padding": self.extra(input, output_size)}
        result: torch.Tensor = function(input, weight, bias, **self.settings, **extra)
        return result

    def _linear(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """A matrix is multiplied at once; of more axes a matrix is made first."""
        if input.dim() <= 2 or self.before is None or self.after is None:
            return F.linear(input, weight, bias)
        rows = self.before(input.flatten(0, -2))
        product = self.after(F.linear(rows, weight, bias))
        result: torch.Tensor = product.unflatten(0, input.shape[:-1])
        return result


PADDED = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SETTINGS = ("stride", "padding", "dilation", "groups")
_FUNCTIONS: dict[type[nn.Module], str] = {
    nn.Conv1d: "conv1d", nn.Conv2d: "conv2d", nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d", nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
}  # fmt: skip


class GlobalMean(nn.Module):
    """GlobalAveragePool of a map, which has an integer kernel as ReduceMean has none."""

    def __init__(self, keeps: bool, after: Pair) -> None:
        super().__init__()
        self.keeps, self.after = keeps, after

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        shape = (*input.shape[:2], 1, 1)
        pooled = _onnx("GlobalAveragePool", (input,), shape, torch.float32)
        return pooled if self.keeps else self.after(pooled).flatten(1)


class Whole(nn.Module):
    """A constant in whole numbers, dequantised."""

    whole: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(self, whole: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("whole", whole)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    @classmethod
    def of(cls, grid: FakeQuantize, value: torch.Tensor, kind: ActivationType) -> Whole:
        """``value`` on a grid."""
        pair = Pair(grid, kind, "")
        whole = (grid.integers(value) + pair.shift).to(pair.dtype)
        return cls(whole, pair.scale, pair.zero_point)

    @classmethod
    def number(cls, value: float, kind: ActivationType) -> Whole:
        """A number as one step of a grid of its own."""
        dtype = torch.uint8 if kind == "uint8" else torch.int8
        sign = 1 if value > 0 else -1
        whole, zero = (torch.tensor(SHIFT[kind] + step, dtype=dtype) for step in (sign, 0))
        return cls(whole, torch.tensor(abs(value)), zero)

    def forward(self) -> torch.Tensor:
        return _dequantized(self.whole, self.scale, self.zero_point)
