"""A quantised program as a module that exports to integers: what QuantizeLinear and
DequantizeLinear pairs, int8 weights and int32 biases are made from.

The copy is for the exporter alone: in torch its ONNX operators compute nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxopt.fake_quantize import FakeQuantize
from fxopt.constants import constant_values
from fxopt.pads import pad_of
from fxopt.program import Program
from fxopt.quantized_layers import QuantizedLayer, QuantizedTransposed
from fxopt.quantizing.clamps import limits_of

ActivationType = Literal["uint8", "int8"]
NAME = "fxopt_name"
"""An attribute that becomes the name of its ONNX node, and goes, before the file is written."""
SHIFT = {"uint8": 128, "int8": 0}
"""What is added to whole numbers from -128 to 127."""


def _onnx(name: str, inputs: Sequence[torch.Tensor], like: torch.Tensor, dtype: torch.dtype,
          shape: Sequence[Any] | None = None, **attributes: Any) -> torch.Tensor:  # fmt: skip
    made = torch.onnx.ops.symbolic(
        name, inputs, attributes, dtype=dtype, shape=like.shape if shape is None else shape
    )
    assert isinstance(made, torch.Tensor)
    return made


def _dequantized(
    whole: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int | None = None
) -> torch.Tensor:
    attributes = {} if axis is None else {"axis": axis}
    inputs = (whole, scale, zero_point)
    return _onnx("DequantizeLinear", inputs, whole, torch.float32, **attributes)


class _Pair(nn.Module):
    """QuantizeLinear and DequantizeLinear."""

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
        whole = _onnx("QuantizeLinear", inputs, input, self.dtype, **{NAME: self.name})
        if self.ends is not None:
            whole = whole.clamp(*self.ends)
        return _dequantized(whole, scale, zero_point)


class _Layer(nn.Module):
    """A layer with integer weights, dequantised; pads that repeat values come before it."""

    def __init__(self, layer: QuantizedLayer, before: _Pair | None, after: _Pair | None) -> None:
        super().__init__()
        self.plain, self.axis = layer.plain, layer.axis
        self.before, self.after = before, after
        self.settings = {n: getattr(layer, n) for n in _SETTINGS if hasattr(layer, n)}
        self.extra = layer.extra if isinstance(layer, QuantizedTransposed) else None
        self.ring = None
        if getattr(layer, "padding_mode", "zeros") != "zeros":
            self.ring = (layer._reversed_padding_repeated_twice, layer.padding_mode)
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
        if input.dim() == 2 or self.before is None or self.after is None:
            return F.linear(input, weight, bias)
        rows = self.before(input.flatten(0, -2))
        product = self.after(F.linear(rows, weight, bias))
        return product.unflatten(0, input.shape[:-1])


_PADDED = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SETTINGS = ("stride", "padding", "dilation", "groups")
_FUNCTIONS: dict[type[nn.Module], str] = {
    nn.Conv1d: "conv1d", nn.Conv2d: "conv2d", nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d", nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
}  # fmt: skip


class _GlobalMean(nn.Module):
    """GlobalAveragePool of a map, which has an integer kernel as ReduceMean has none."""

    def __init__(self, keeps: bool, after: _Pair) -> None:
        super().__init__()
        self.keeps, self.after = keeps, after

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        shape = (*input.shape[:2], 1, 1)
        pooled = _onnx("GlobalAveragePool", (input,), input, torch.float32, shape)
        return pooled if self.keeps else self.after(pooled).flatten(1)


class _Whole(nn.Module):
    """A constant in whole numbers, dequantised."""

    def __init__(self, whole: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("whole", whole)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    @classmethod
    def of(cls, grid: FakeQuantize, value: torch.Tensor, kind: ActivationType) -> _Whole:
        """``value`` on a grid."""
        pair = _Pair(grid, kind, "")
        whole = (grid.integers(value) + pair.shift).to(pair.dtype)
        return cls(whole, pair.scale, pair.zero_point)

    @classmethod
    def number(cls, value: float, kind: ActivationType) -> _Whole:
        """A number as one step of a grid of its own."""
        dtype = torch.uint8 if kind == "uint8" else torch.int8
        sign = 1 if value > 0 else -1
        whole, zero = (torch.tensor(SHIFT[kind] + step, dtype=dtype) for step in (sign, 0))
        return cls(whole, torch.tensor(abs(value)), zero)

    def forward(self) -> torch.Tensor:
        return _dequantized(self.whole, self.scale, self.zero_point)


def is_quantized(program: Program) -> bool:
    """Whether ``program`` holds quantisers."""
    return any(isinstance(program.module(node), FakeQuantize) for node in program.nodes)


def narrow_quantisers(program: Program) -> int:
    """How many quantisers of ``program`` have fewer than 8 bits, those of weights included."""
    layers = {str(node.target): program.module(node) for node in program.nodes}
    kinds = (FakeQuantize, QuantizedLayer)
    return sum(isinstance(layer, kinds) and layer.bits < 8 for layer in layers.values())


def with_integers(
    program: Program, graph_module: fx.GraphModule, kind: ActivationType
) -> fx.GraphModule:
    """``graph_module``, a copy of the program's in evaluation mode, made ready for the exporter.

    It is changed.
    """
    return _Writer(program, graph_module, kind).written()


class _Writer:
    def __init__(self, program: Program, module: fx.GraphModule, kind: ActivationType) -> None:
        self.program, self.module, self.kind = program, module, kind
        self.nodes: list[fx.Node] = list(module.graph.nodes)
        self.grids = {
            node: layer
            for node in self.nodes
            if isinstance(layer := self._layer(node), FakeQuantize)
        }
        limits = {node.name: limits_of(program, node) for node in program.nodes}
        self.limits = {name: each for name, each in limits.items() if each is not None}

    def written(self) -> fx.GraphModule:
        fixed = constant_values(self.program, self.module)
        for node in self.nodes:
            source = node.all_input_nodes[0].name if node in self.grids else None
            if source in fixed:
                self._put(node, _Whole.of(self.grids[node], fixed[source], self.kind))
                node.args = ()
            elif node in self.grids and self._pads_a_convolution(node):
                node.replace_all_uses_with(node.all_input_nodes[0])
                self.module.graph.erase_node(node)
            elif node in self.grids:
                self._drop_clamps(node)
                self._put(node, _Pair(self.grids[node], self.kind, node.name))
            else:
                self._rewrite(node)
        self.module.graph.eliminate_dead_code()
        self.module.graph.lint()
        self.module.recompile()
        return self.module

    def _layer(self, node: fx.Node) -> nn.Module | None:
        is_call = node.op == "call_module"
        return self.module.get_submodule(str(node.target)) if is_call else None

    def _put(self, node: fx.Node, layer: nn.Module) -> None:
        """Let ``node`` call ``layer``, at a path of its own."""
        path = f"{node.name}_written"
        self.module.add_module(path, layer)
        node.op, node.target = "call_module", path

    def _pads_a_convolution(self, quantiser: fx.Node) -> bool:
        """Whether it stands between zeros around a map and the one convolution of that.

        The exporter makes one operator of these, if nothing is between them.
        """
        padded = quantiser.all_input_nodes[0]
        reader = next(iter(quantiser.users), None)
        if reader is None or len(quantiser.users) != 1 or len(padded.users) != 1:
            return False
        pad, layer = pad_of(padded, self._layer(padded)), self._layer(reader)
        is_zeros = pad is not None and pad.is_of_zeros and self.grids[quantiser].settled
        return is_zeros and isinstance(layer, QuantizedLayer) and layer.plain in _PADDED

    def _drop_clamps(self, quantiser: fx.Node) -> None:
        """A clamp in front of a quantiser whose grid lies inside of it does nothing."""
        low, high = self.grids[quantiser].range
        clamp = quantiser.all_input_nodes[0]
        while (limits := self.limits.get(clamp.name)) is not None and len(clamp.users) == 1:
            if not limits.low <= low <= high <= limits.high:
                return
            quantiser.args = (clamp.all_input_nodes[0],)
            self.module.graph.erase_node(clamp)
            clamp = quantiser.all_input_nodes[0]

    def _pair(self, quantiser: fx.Node | None) -> _Pair | None:
        """One more pair on the grid of ``quantiser``, within an operator."""
        if quantiser not in self.grids:
            return None
        return _Pair(self.grids[quantiser], self.kind, f"{quantiser.name}_within")

    def _reader(self, node: fx.Node) -> fx.Node | None:
        """The quantiser that alone reads ``node``, clamps between them left out."""
        while len(node.users) == 1:
            (user,) = node.users
            if user in self.grids:
                return user
            if user.name not in self.limits:
                return None
            node = user
        return None

    def _rewrite(self, node: fx.Node) -> None:
        """Write ``node`` as integer kernels want it."""
        layer, after = self._layer(node), self._pair(self._reader(node))
        if isinstance(layer, QuantizedLayer):
            before = self._pair(node.all_input_nodes[0])
            self._put(node, _Layer(layer, before, after))
        elif after is not None and (keeps := self._global_mean(node, layer)) is not None:
            self._put(node, _GlobalMean(keeps, after))
            node.args, node.kwargs = (node.all_input_nodes[0],), {}
        elif after is not None:
            self._write_number(node)

    def _global_mean(self, node: fx.Node, layer: nn.Module | None) -> bool | None:
        """Whether a mean over a whole map keeps its axes; None for all else."""
        operand = node.all_input_nodes[0] if node.all_input_nodes else None
        if operand is None or len(getattr(self.program.types[operand.name], "shape", ())) != 4:
            return None
        if isinstance(layer, nn.AdaptiveAvgPool2d):
            return True if layer.output_size in (1, (1, 1)) else None
        if node.target is F.adaptive_avg_pool2d:
            return True if node.args[1:] in ((1,), ((1, 1),), ([1, 1],)) else None
        if node.target not in (torch.mean, "mean"):
            return None
        given: dict[str, Any] = dict(zip(("dim", "keepdim"), node.args[1:], strict=False))
        given |= dict(node.kwargs)
        axes = given.get("dim")
        if not isinstance(axes, (tuple, list)) or not all(isinstance(a, int) for a in axes):
            return None
        if {axis % 4 for axis in axes} != {2, 3} or given.keys() - {"dim", "keepdim"}:
            return None
        return bool(given.get("keepdim", False))

    def _write_number(self, node: fx.Node) -> None:
        """A number that is added or multiplied, as a tensor that is dequantised."""
        name = _ARITHMETIC.get(node.target)
        if name is None or len(node.args) != 2 or node.kwargs or len(node.all_input_nodes) != 1:
            return
        number = next((a for a in node.args if isinstance(a, (int, float))), None)
        swapped = not isinstance(node.args[0], fx.Node)
        if number is None or (swapped and name in ("sub", "div")):
            return
        value = {"sub": -float(number), "div": 1 / float(number) if number else 0.0}
        constant = value.get(name, float(number))
        if constant == 0 or constant != constant or abs(constant) == float("inf"):
            return
        path = f"{node.name}_number"
        self.module.add_module(path, _Whole.number(constant, self.kind))
        with self.module.graph.inserting_before(node):
            made = self.module.graph.call_module(path)
        node.op, node.args = "call_function", (node.all_input_nodes[0], made)
        node.target = torch.add if name in ("add", "sub") else torch.mul


_ARITHMETIC: dict[Any, str] = {
    **dict.fromkeys((torch.add, operator.add, "add"), "add"),
    **dict.fromkeys((torch.sub, operator.sub, "sub"), "sub"),
    **dict.fromkeys((torch.mul, operator.mul, "mul"), "mul"),
    **dict.fromkeys((torch.div, operator.truediv, "div"), "div"),
}
