"""Elementwise expressions of a graph as functions of one value, however they are spelled."""

from __future__ import annotations

import copy
import enum
from typing import Any

import torch
from torch import fx, nn

from fxopt.analysis.gaussian import Distribution, MeanVariance, applied
from fxopt.flow import Flow
from fxopt.graphs import call_node, member
from fxopt.kernels import InPlace
from fxopt.program import Program, TensorType

_SAME_ELEMENTS = ("dropout", "cast")
UNFIT = (RuntimeError, TypeError, ValueError, IndexError, AttributeError)
"""What operators raise that are evaluated on other shapes than theirs."""


class _Differs(enum.Enum):
    """Whether an elementwise function is the same at all elements."""

    NOWHERE = 0
    BY_CHANNEL = 1
    BY_PLACE = 2


class Pointwise:
    """Values of a program, each with its *root*: what it is an elementwise function of."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.program: Program = flow.program
        self._roots: dict[fx.Node, fx.Node] = {}
        self._identities: dict[fx.Node, bool] = {}
        self._spread: dict[fx.Node, _Differs] = {}
        self._numbers: dict[fx.Node, float] = {}
        """Factors that are taken for their means."""

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """The values that ``node`` is made of."""
        return self.flow.operands(node)

    def is_elementwise(self, node: fx.Node) -> bool:
        """Whether each element of ``node`` is a function of the same element of its operands."""
        known = self.flow.described[node]
        return known.inplace is InPlace.ELEMENTWISE and known.kind in ("activation", "elementwise")

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
