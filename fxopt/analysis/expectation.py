"""Mean and variance that the values of a network are expected to have, without running it.

What signal propagation assumes of a fresh network (Brock et al., ICLR 2021, sections 3 and 4):
inputs are normal with mean 0 and variance 1, values are independent of one another, and a layer's
result is normal. A standardised filter takes the mean away; elementwise functions are integrated
(:mod:`fxopt.analysis.gaussian`); where two values meet, variances add. What it cannot say is None.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxopt.analysis.filters import border_of, filters_seen, is_fixed_filter
from fxopt.analysis.gaussian import Distribution, MeanVariance, beside_zeros, mixed, multiplied
from fxopt.analysis.pointwise import UNFIT, Pointwise
from fxopt.flow import Flow
from fxopt.pads import pad_of
from fxopt.program import TensorType
from fxopt.residuals import LAYERS
from fxopt.scaled_ws import ScaledWS

INPUT = MeanVariance(0.0, 1.0)
SAME_VALUES = ("view", "permute", "slice", "copy", "cast", "expand", "unfold")
"""Kinds of operators whose results have the values of their operand, at other places."""
_HARDLY = 0.1
"""Times the squared mean: a variance under which a factor is taken for a number."""


class Expectation(Pointwise):
    """Expected moments of the values of a program, as it is."""

    def __init__(self, flow: Flow) -> None:
        super().__init__(flow)
        self._known: dict[fx.Node, MeanVariance | None] = {}
        self._shares: dict[fx.Node, float] = {}
        """What borders leave of variances; the moments are those far from any."""

    def run(self) -> None:
        """Follow all values, in their order: :meth:`of` then finds each."""
        for node in self.program.nodes:
            self.of(node)

    def of(self, node: fx.Node) -> MeanVariance | None:
        """The moments of ``node``, None where they cannot be told."""
        if node not in self._known:
            for operand in self.operands(node):
                self.of(operand)
            self._roots[node] = node
            self._known[node] = self._moments(node)
            if node not in self._shares:
                self._shares[node] = self._share_of(self.operands(node))
        return self._known[node]

    def variance(self, node: fx.Node) -> float | None:
        """The expected variance, on the average over places; None where it cannot be told."""
        found = self.of(node)
        return None if found is None else found.variance * self._shares[node]

    def _share_of(self, operands: list[fx.Node]) -> float:
        """The average of the operands' shares, by their variances."""
        variances = {each: getattr(self._known[each], "variance", 0.0) for each in operands}
        total = sum(variances.values())
        if not total:
            return 1.0
        return sum(v * self._shares[each] for each, v in variances.items()) / total

    def root(self, node: fx.Node) -> fx.Node:
        """The value that ``node`` is an elementwise function of; itself if of none."""
        self.of(node)
        return self._roots[node]

    # ---- what operators do ---------------------------------------------------------------------

    def _moments(self, node: fx.Node) -> MeanVariance | None:
        type = self.program.types.get(node.name)
        if node.op == "placeholder":
            is_real = isinstance(type, TensorType) and type.dtype.is_floating_point
            return INPUT if is_real else None
        operands = self.operands(node)
        read = [self._known[each] for each in operands]
        if not operands or node.op == "output":
            return None
        kind = self.flow.kind(node)
        if kind in LAYERS:
            return self.layer(node, operands[0])
        if kind in ("batch_norm", "norm"):
            return self.norm(node, operands[0])
        if None in read:
            return None
        if kind == "concat":
            return self.together(node, operands)
        if self.is_elementwise(node):
            return self._elementwise(node, operands)
        moments = read[0]
        if len(operands) > 1 or moments is None:
            return None
        if kind in ("pool", "reduce"):
            return self.pooled(node, operands[0])
        if kind == "pad":
            return self.padded(node, operands[0])
        if kind == "resize":
            return self.resized(node, operands[0])
        if self.is_same(node):
            self._roots[node] = self._roots[operands[0]]
            return moments
        return moments if kind in SAME_VALUES else None

    def whole(self, node: fx.Node) -> MeanVariance:
        """The moments of an operand that has some."""
        found = self._known[node]
        assert found is not None
        return found

    def layer(self, node: fx.Node, operand: fx.Node) -> MeanVariance | None:
        """A convolution or linear layer."""
        return self.by_weights(node, operand)

    def by_weights(self, node: fx.Node, operand: fx.Node) -> MeanVariance | None:
        """What a layer gives, by its weights and the zeros around its operand.

        Filters that are drawn have means of both signs; one that is fixed keeps its own.
        """
        weight = self._weight(node)
        if self._known[operand] is None or weight is None:
            return None
        layer = self.program.module(node)
        filters = filters_seen(layer, node, weight)
        squares = weight.double().square().sum().item() / filters
        mean = 0.0
        if is_fixed_filter(layer):
            mean = self.whole(operand).mean * weight.double().sum().item() / filters
        self._shares[node] = self.left_by_border(node, operand, weight)
        return MeanVariance(mean, squares * self.whole(operand).variance)

    def left_by_border(self, node: fx.Node, operand: fx.Node, weight: torch.Tensor) -> float:
        """What a filter that sees zeros at the border leaves of the variance that it would give.

        There the weights that see the map add up to another sum than elsewhere: times the mean
        that varies over the map. Activations pass the loss on: it is of some places, not of all.
        """
        read, layer = self.whole(operand), self.program.module(node)
        at, zeros = operand, ()
        pad = pad_of(operand, self.program.module(operand)) if operand.op != "placeholder" else None
        if pad is not None and pad.is_of_zeros:
            (at,) = self.operands(operand)
            zeros = pad.widths
        border = border_of(layer, self.program.types[at.name].shape, zeros)
        uneven = border.uneven(weight[0].numel(), isinstance(layer, ScaledWS))
        mean = read.mean**2 / read.variance if read.variance else 0.0
        return self._shares[operand] * border.seen + uneven * mean

    def norm(self, node: fx.Node, operand: fx.Node) -> MeanVariance | None:
        """A norm of activations, which takes mean and variance away, whatever they were."""
        self._shares[node] = 1.0
        norm: Any = self.program.module(node)
        if node.target is F.normalize:
            return None
        weight, bias = (getattr(norm, name, None) for name in ("weight", "bias"))
        if any(each is not None and each.is_meta for each in (weight, bias)):
            return None
        mean = 0.0 if bias is None else bias.double().mean().item()
        return MeanVariance(mean, 1.0 if weight is None else weight.double().square().mean().item())

    def pooled(self, node: fx.Node, operand: fx.Node) -> MeanVariance | None:
        """A pool over values that are independent of one another, as white noise has them."""
        read, module = self._known[operand], self.program.module(node)
        assert read is not None
        name = str(getattr(node.target, "__name__", node.target))
        if module is not None:
            name = type(module).__name__
        type_ = self.program.types[node.name]
        if not isinstance(type_, TensorType) or not type_.dtype.is_floating_point:
            return None
        count = self._window(operand, type_, module)
        if name in ("max", "amax") or "Max" in name or "max_pool" in name:
            distribution = self._distribution(operand)
            return None if distribution is None else distribution.largest_of(count)
        averages = name == "mean" or "Avg" in name or "avg_pool" in name
        counts = getattr(module, "divisor_override", None) is None
        return MeanVariance(read.mean, read.variance / count) if averages and counts else None

    def padded(self, node: fx.Node, operand: fx.Node) -> MeanVariance | None:
        """Channels of zeros are a part of the result; the layer that reads a border counts it."""
        pad = pad_of(node, self.program.module(node))
        if pad is not None and pad.mode == "constant" and not pad.is_of_zeros:
            return None
        before, after = (self.program.types[each.name].shape[1] for each in (operand, node))
        return beside_zeros(self.whole(operand), before, max(0, after - before))

    def resized(self, node: fx.Node, operand: fx.Node) -> MeanVariance | None:
        """The nearest value is the same value; a mixture of neighbours is none."""
        module: Any = self.program.module(node)
        mode = str(getattr(module, "mode", node.kwargs.get("mode", "nearest")))
        name = getattr(node.target, "__name__", type(module).__name__)
        keeps = mode.startswith("nearest") and "grid_sample" not in name
        return self.whole(operand) if keeps else None

    def together(self, node: fx.Node, operands: list[fx.Node]) -> MeanVariance:
        """Maps side by side, by their sizes; what depends on no input does not vary."""
        sizes = [self.program.types[each.name].elements for each in operands]
        constant = self.program.types[node.name].elements - sum(sizes)
        return mixed([*map(self.whole, operands), MeanVariance(0.0, 0.0)], [*sizes, constant])

    def total(self, node: fx.Node, operands: list[fx.Node]) -> MeanVariance | None:
        """The sum or difference of two values that are independent of each other."""
        first, second = map(self.whole, operands)
        mean = first.mean + (second.mean if node.target is torch.add else -second.mean)
        return MeanVariance(mean, first.variance + second.variance)

    def product(self, node: fx.Node, operands: list[fx.Node]) -> MeanVariance | None:
        """The product of two values that are independent of each other.

        A factor that hardly varies, as those of a fresh gate, is a number.
        """
        for value, factor in (operands, operands[::-1]):
            known = self.whole(factor)
            if known.variance < _HARDLY * known.mean**2:
                self._numbers[factor] = known.mean
                self._roots[node] = self._roots[value]
                distribution = self._distribution(node)
                return None if distribution is None else distribution.moments
        return multiplied(*map(self.whole, operands))

    # ---- elementwise functions -----------------------------------------------------------------

    def _elementwise(self, node: fx.Node, operands: list[fx.Node]) -> MeanVariance | None:
        roots = {self._roots[each] for each in operands}
        if len(roots) == 1:
            (self._roots[node],) = roots
            distribution = self._distribution(node)
            return None if distribution is None else distribution.moments
        both = len(operands) == 2 and not node.kwargs
        if both and node.target in (torch.add, torch.sub):
            return self.total(node, operands)
        if both and node.target is torch.mul:
            return self.product(node, operands)
        return None

    def _distribution(self, node: fx.Node) -> Distribution | None:
        """Of an elementwise function of a normal value."""
        root = self._roots[node]
        given = self._known.get(root)
        return None if given is None else self.function(node, given)

    # ---- layers, pools, concatenations ---------------------------------------------------------

    def _weight(self, node: fx.Node) -> torch.Tensor | None:
        """What a layer multiplies by."""
        layer: Any = self.program.module(node)
        weight: torch.Tensor | None
        with torch.no_grad():
            if isinstance(layer, ScaledWS):
                weight = layer.standardised_weight()
            elif layer is not None:
                weight = layer.weight
            else:
                weight = self._computed_weight(node)
        return None if weight is None or weight.is_meta else weight

    def _computed_weight(self, node: fx.Node) -> torch.Tensor | None:
        weights = [each for each in node.all_input_nodes if each not in self.operands(node)]
        try:
            return self.constant(weights[0]) if weights else None  # type: ignore[no-any-return]
        except UNFIT:
            return None

    def _window(self, operand: fx.Node, result: TensorType, module: Any) -> int:
        """Positions that a pool sees at once."""
        read = self.program.types[operand.name]
        kernel = getattr(module, "kernel_size", None)
        if kernel is None:
            return int(max(1, read.elements // max(1, result.elements)))
        rank = len(read.shape) - 2
        sizes = (kernel,) * rank if isinstance(kernel, int) else tuple(kernel)
        return math.prod(map(min, sizes, read.shape[2:]))
