"""Mean and variance that the values of a network are expected to have, without running it.

What signal propagation assumes of a fresh network (Brock et al., ICLR 2021, sections 3 and 4):
inputs are normal with mean 0 and variance 1, values are independent of one another, and a layer's
result is normal. A standardised filter takes the mean away; elementwise functions are integrated
(:mod:`fxopt.analysis.gaussian`); where two values meet, variances add. What it cannot say is None.
"""

from __future__ import annotations

import copy
import enum
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxopt.analysis.gaussian import Distribution, MeanVariance, applied
from fxopt.flow import Flow
from fxopt.graphs import call_node, member
from fxopt.kernels import InPlace
from fxopt.pads import pad_of
from fxopt.program import Program, TensorType
from fxopt.residuals import LAYERS
from fxopt.scaled_ws import ScaledWS

INPUT = MeanVariance(0.0, 1.0)
SAME_VALUES = ("view", "permute", "slice", "copy", "cast", "expand", "unfold")
"""Kinds of operators whose results have the values of their operand, at other places."""
_SAME_ELEMENTS = ("dropout", "cast")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups")
"""Arguments of the function, in order."""
UNFIT = (RuntimeError, TypeError, ValueError, IndexError, AttributeError)
"""What operators raise that are evaluated on other shapes than theirs."""
_HARDLY = 0.1
"""Times the squared mean: a variance under which a factor is taken for a number."""


class _Differs(enum.Enum):
    """Whether an elementwise function is the same at all elements."""

    NOWHERE = 0
    BY_CHANNEL = 1
    BY_PLACE = 2


class Expectation:
    """Expected moments of the values of a program, as it is."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.program: Program = flow.program
        self._known: dict[fx.Node, MeanVariance | None] = {}
        self._roots: dict[fx.Node, fx.Node] = {}
        self._identities: dict[fx.Node, bool] = {}
        self._spread: dict[fx.Node, _Differs] = {}
        self._numbers: dict[fx.Node, float] = {}
        """Factors that are taken for their means."""

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
        return self._known[node]

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """The values that ``node`` is made of."""
        return self.flow.operands(node)

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
        filters = self._filters(node, weight)
        squares = weight.double().square().sum().item() / filters
        mean = 0.0
        if is_fixed_filter(self.program.module(node)):
            mean = self.whole(operand).mean * weight.double().sum().item() / filters
        return MeanVariance(mean, squares * self.seen(node, operand, weight))

    def seen(self, node: fx.Node, operand: fx.Node, weight: torch.Tensor) -> float:
        """What a filter of norm 1 makes of the variance of its operand, on the average over places.

        At the border a filter sees a share ``f`` of its operand and zeros. Of a standardised one
        the ``N`` weights add up to zero, and there only a part of them is: a variance of
        ``f·(1 - f)·N/(N - 1)`` times the squared mean.
        """
        read, layer = self.whole(operand), self.program.module(node)
        shares = border_shares(layer, self.program.types[operand.name].shape)
        found = shares.mean().item() * read.variance
        if isinstance(layer, ScaledWS):
            count = weight[0].numel()
            uneven = (shares * (1 - shares)).mean().item() * count / max(1, count - 1)
            found += uneven * read.mean**2
        return found

    def norm(self, node: fx.Node, operand: fx.Node) -> MeanVariance | None:
        """A norm of activations, which takes mean and variance away, whatever they were."""
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
        """Zeros around a map are a part of the result, as channels of zeros are."""
        pad = pad_of(node, self.program.module(node))
        if pad is None or pad.mode != "constant":
            return self.whole(operand)
        if not pad.is_of_zeros:
            return None
        before, after = (self.program.types[each.name].elements for each in (operand, node))
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
        return _mixed([*map(self.whole, operands), MeanVariance(0.0, 0.0)], [*sizes, constant])

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
        first, second = map(self.whole, operands)
        mean = first.mean * second.mean
        squares = (first.variance + first.mean**2) * (second.variance + second.mean**2)
        return MeanVariance(mean, squares - mean**2)

    # ---- elementwise functions -----------------------------------------------------------------

    def is_elementwise(self, node: fx.Node) -> bool:
        """Whether each element of ``node`` is a function of the same element of its operands."""
        known = self.flow.described[node]
        return known.inplace is InPlace.ELEMENTWISE and known.kind in ("activation", "elementwise")

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

    def function(self, node: fx.Node, argument: MeanVariance) -> Distribution | None:
        """``node`` as a function of the value that it is an elementwise function of."""
        shape = self.program.types[node.name].shape
        differs = self._differs(node)
        if differs is _Differs.BY_PLACE:
            return None
        channels = shape[1:2] if differs is _Differs.BY_CHANNEL else (1,)
        axes = (*channels, *(1,) * (len(shape) - 2)) if len(shape) > 1 else ()

        def of_points(points: torch.Tensor) -> torch.Tensor:
            return self.evaluated(node, {self._roots[node]: points})

        try:
            found = applied(of_points, argument, axes)
        except UNFIT:
            return None  # an operator that does not take a column of points
        spread = found.values
        return None if spread.is_meta or not bool(torch.isfinite(spread).all()) else found

    def _differs(self, node: fx.Node) -> _Differs:
        """Where the function of its root that ``node`` is differs."""
        if node is self._roots[node] or node in self._numbers:
            return _Differs.NOWHERE
        if node not in self._spread:
            self._spread[node] = self._most(node)
        return self._spread[node]

    def _most(self, node: fx.Node) -> _Differs:
        operands = self.operands(node)
        found = [self._differs(each) for each in operands]
        module = self.program.module(node)
        if module is not None and any(p.numel() > 1 for p in module.parameters()):
            found.append(_Differs.BY_CHANNEL)
        rank = len(self.program.types[node.name].shape)
        for weight in node.all_input_nodes:
            type = self.program.types[weight.name]
            if weight not in operands and isinstance(type, TensorType) and type.elements > 1:
                shape = (*(1,) * (rank - len(type.shape)), *type.shape)
                along = all(size == 1 for axis, size in enumerate(shape) if axis != 1)
                found.append(_Differs.BY_CHANNEL if along else _Differs.BY_PLACE)
        return max(found, key=lambda each: each.value)

    def evaluated(self, node: fx.Node, values: dict[fx.Node, torch.Tensor]) -> torch.Tensor:
        """``node`` computed from the values of what it is an elementwise function of, float64."""
        if node in values:
            return values[node]
        if node in self._numbers:
            return torch.tensor(self._numbers[node], dtype=torch.float64)
        operands = self.operands(node)
        if self.is_same(node):
            result = self.evaluated(operands[0], values)
        else:

            def given(each: fx.Node) -> Any:
                return self.evaluated(each, values) if each in operands else self.constant(each)

            args, kwargs = fx.node.map_arg((node.args, node.kwargs), given)
            result = call_node(node, args, kwargs, self._wide)
        values[node] = result
        return result

    def is_same(self, node: fx.Node) -> bool:
        """Whether ``node`` gives what it is given, as stochastic depth does in evaluation."""
        if self.flow.kind(node) in _SAME_ELEMENTS:
            return True
        if node not in self._identities:
            self._identities[node] = self._is_identity(node)
        return self._identities[node]

    def _is_identity(self, node: fx.Node) -> bool:
        module = self.program.module(node)
        type = self.program.types[node.name]
        alone = len(node.all_input_nodes) == len(node.args) == 1 and not node.kwargs
        if module is None or self.flow.kind(node) not in ("opaque", "other") or not alone:
            return False
        if any(True for _ in module.state_dict()) or not isinstance(type, TensorType):
            return False
        given = torch.linspace(-1, 1, type.elements).view(type.shape).to(type.dtype)
        with torch.no_grad():
            found = module(given)
        return isinstance(found, torch.Tensor) and found.equal(given)

    def _wide(self, path: str) -> nn.Module:
        return copy.deepcopy(self.program.graph_module.get_submodule(path)).double()

    def constant(self, node: fx.Node) -> Any:
        """A value that depends on no input, in float64 if it is real."""
        type = self.program.types[node.name]
        if not isinstance(type, (TensorType, tuple)):
            return type
        if node.op == "get_attr":
            value = member(self.program.graph_module, str(node.target))
            is_real = isinstance(value, torch.Tensor) and value.is_floating_point()
            return value.detach().double() if is_real else value
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.constant)
        return call_node(node, args, kwargs, self._wide)

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

    def _filters(self, node: fx.Node, weight: torch.Tensor) -> float:
        """Filters that an element of the result sees all of, on the average over positions."""
        if self.flow.kind(node) != "conv_transpose":
            return len(weight)
        layer: Any = self.program.module(node)
        rank = weight.dim() - 2
        given: Any = dict(zip(_TRANSPOSED, node.args, strict=False)) | node.kwargs
        if layer is not None:
            given = {"stride": layer.stride, "groups": layer.groups}
        stride = given.get("stride", 1)
        strides = (stride,) * rank if isinstance(stride, int) else stride
        return float(weight.shape[1] * given.get("groups", 1) * math.prod(strides))

    def _window(self, operand: fx.Node, result: TensorType, module: Any) -> int:
        """Positions that a pool sees at once."""
        read = self.program.types[operand.name]
        kernel = getattr(module, "kernel_size", None)
        if kernel is None:
            return int(max(1, read.elements // max(1, result.elements)))
        rank = len(read.shape) - 2
        sizes = (kernel,) * rank if isinstance(kernel, int) else tuple(kernel)
        return math.prod(map(min, sizes, read.shape[2:]))


def is_fixed_filter(layer: Any) -> bool:
    """Whether a layer's weight is a buffer: it smooths, say, and is not trained."""
    weight = getattr(layer, "weight", None)
    return weight is not None and not isinstance(weight, nn.Parameter)


class Bookkeeping(Expectation):
    """The variances that normaliser-free networks are built on.

    Neither pools, fixed filters nor borders count. After a residual block it is β² of the next.
    """

    def layer(self, node: fx.Node, operand: fx.Node) -> MeanVariance | None:
        """A fixed filter is taken for a pool."""
        if is_fixed_filter(self.program.module(node)):
            return self._known[operand]
        return super().layer(node, operand)

    def resized(self, node: fx.Node, operand: fx.Node) -> MeanVariance | None:
        """As it was."""
        return self._known[operand]

    def pooled(self, node: fx.Node, operand: fx.Node) -> MeanVariance | None:
        """As it was: neighbours in images are alike."""
        name = getattr(node.target, "__name__", str(node.target))
        pools = self.flow.kind(node) == "pool" or name in ("mean", "amax")
        return self._known[operand] if pools else None

    def padded(self, node: fx.Node, operand: fx.Node) -> MeanVariance | None:
        """Channels of zeros count, and a border does not."""
        before, after = (self.program.types[each.name].shape[1] for each in (operand, node))
        return beside_zeros(self.whole(operand), before, max(0, after - before))

    def seen(self, node: fx.Node, operand: fx.Node, weight: torch.Tensor) -> float:
        """As if the map had no border."""
        return self.whole(operand).variance


def border_shares(layer: Any, shape: tuple[int, ...]) -> torch.Tensor:
    """Of each place of a convolution's result the share of taps that see its operand, not zeros.

    Of what is no convolution with a padding of zeros: 1.
    """
    shares = torch.ones((), dtype=torch.float64)
    padding = getattr(layer, "_reversed_padding_repeated_twice", None)
    if padding is None or getattr(layer, "transposed", True) or layer.padding_mode != "zeros":
        return shares
    for axis, size in enumerate(shape[2:]):
        place = 2 * (len(shape) - 3 - axis)
        before, after = padding[place : place + 2]
        reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
        starts = torch.arange(-before, size + after - reach, layer.stride[axis])
        taps = starts[:, None] + layer.dilation[axis] * torch.arange(layer.kernel_size[axis])
        inside = ((taps >= 0) & (taps < size)).double().mean(1)
        shares = shares[..., None] * inside
    return shares


def beside_zeros(moments: MeanVariance, size: int, zeros: int) -> MeanVariance:
    """A map of ``size`` elements and as many zeros as are given, each a part of the channels."""
    return _mixed([moments, MeanVariance(0.0, 0.0)], [size, zeros])


def _mixed(moments: list[MeanVariance], sizes: list[int]) -> MeanVariance:
    mean = sum(size * each.mean for size, each in zip(sizes, moments, strict=True))
    variance = sum(size * each.variance for size, each in zip(sizes, moments, strict=True))
    return MeanVariance(mean / sum(sizes), variance / sum(sizes))
