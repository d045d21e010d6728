"""A quantised program as a module from which the exporter writes integers.

Quantisers become QuantizeLinear and DequantizeLinear, weights int8 and biases int32 initialisers
(:mod:`fxopt.onnx_whole`), and what runtimes have integer kernels for is spelled as they expect it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxopt.analysis.padding import known_sizes
from fxopt.constants import constant_values
from fxopt.fake_quantize import FakeQuantize
from fxopt.onnx_whole import PADDED, ActivationType, GlobalMean, IntegerLayer, Pair, Whole
from fxopt.pads import pad_of
from fxopt.program import Program
from fxopt.quantized_layers import QuantizedLayer
from fxopt.quantizing.clamps import limits_of
from fxopt.quantizing.placement import layer_input


def is_quantized(program: Program) -> bool:
    """Whether ``program`` holds quantisers."""
    return any(isinstance(program.module(node), FakeQuantize) for node in program.nodes)


def in_input_range(program: Program, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Normal numbers spread over the grids of the inputs that have one."""
    found = []
    for name, tensor in zip(program.inputs(), inputs, strict=True):
        readers = [program.module(user) for user in program.node(name).users]
        grid = next((each for each in readers if isinstance(each, FakeQuantize)), None)
        if grid is not None and tensor.is_floating_point():
            low, high = grid.range
            tensor = tensor * ((high - low) / 6) + (high + low) / 2
        found.append(tensor)
    return found


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
        self.within = 0
        self.sizes = known_sizes(program)
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
                self._put(node, Whole.of(self.grids[node], fixed[source], self.kind))
                node.args = ()
            elif node in self.grids and self._pads_a_convolution(node):
                node.replace_all_uses_with(node.all_input_nodes[0])
                self.module.graph.erase_node(node)
            elif node in self.grids:
                self._drop_clamps(node)
                self._put(node, Pair(self.grids[node], self.kind, node.name))
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
        if pad is None or not pad.is_of_zeros or not self.grids[quantiser].settled:
            return False
        grows = all(self._width(each) >= 0 for each in pad.widths)
        takes = isinstance(layer, QuantizedLayer) and layer.plain in PADDED
        return grows and takes and getattr(layer, "padding_mode", "") == "zeros"

    def _width(self, width: Any) -> int:
        """Of a pad, for the example's sizes; -1 where it is not known."""
        known = self.sizes.get(width.name, -1) if isinstance(width, fx.Node) else width
        return int(known)

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

    def _pair(self, quantiser: fx.Node | None) -> Pair | None:
        """One more pair on the grid of ``quantiser``, within an operator."""
        if quantiser not in self.grids:
            return None
        self.within += 1
        return Pair(self.grids[quantiser], self.kind, f"{quantiser.name}_within_{self.within}")

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
            before = self._pair(layer_input(node))
            self._put(node, IntegerLayer(layer, before, after))
        elif after is not None and (keeps := self._global_mean(node, layer)) is not None:
            self._put(node, GlobalMean(keeps, after))
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
            size = (*node.args[1:], *node.kwargs.values())
            return True if size in ((1,), ((1, 1),), ([1, 1],)) else None
        if node.target not in (torch.mean, "mean"):
            return None
        given: dict[str, Any] = dict(zip(("dim", "keepdim"), node.args[1:], strict=False))
        given |= dict(node.kwargs)
        axes = given.pop("axis", given.get("dim"))
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
        self.module.add_module(path, Whole.number(constant, self.kind))
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
