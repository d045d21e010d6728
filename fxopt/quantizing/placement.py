"""Which tensors of a program get a quantiser, which share one, and what stays in float.

An operator with an integer form reads and gives quantised tensors. Tensors of operators that only
move or pick values are one *group*, with one scale, and so are all that one shared layer reads. A
clamp is fused into what comes before it: no quantiser stands between them.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from networkx.utils import UnionFind
from torch import fx, nn

from fxopt.constants import constant_value, constants
from fxopt.fake_quantize import FakeQuantize
from fxopt.flow import Flow
from fxopt.kernels import Integer
from fxopt.layers import standard_kind
from fxopt.obstacles import writes_tensors_of
from fxopt.pads import pad_of
from fxopt.program import Program, TensorType
from fxopt.quantized_layers import KINDS, QuantizedLayer
from fxopt.quantizing.clamps import limits_of
from fxopt.quantizing.grid import EVERYTHING, Limits

_UNBOUNDED = (
    "div", "truediv", "true_divide", "rsqrt", "reciprocal", "log", "log2", "log10", "log1p",
    "sqrt", "pow",
)  # fmt: skip
"""Functions that magnify the rounding of their operand without bound, near 0 say."""
_OF_NORMS = ("elementwise", "reduce", "expand", "view", "cast")


@dataclass(frozen=True, eq=False)
class Group:
    """Tensors on one grid.

    Attributes:
        members: the nodes that give them, in the program's order.
        limits: what a clamp leaves of all that is written to them.
        constants: numbers that they must hold besides what is observed: what pads write.
    """

    members: tuple[fx.Node, ...]
    limits: Limits = EVERYTHING
    constants: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class Placement:
    """Where the quantisers of a program stand.

    Attributes:
        groups: by node, the group of the tensor that it gives.
        layers: the calls of layers whose weights are quantised.
        settled: the nodes whose value lies on the grid of their operands.
        fused: the clamps that stand between a producer and its quantiser.
        in_float: the operators that stay as they are, with the reason.
    """

    groups: Mapping[fx.Node, Group]
    layers: tuple[fx.Node, ...]
    settled: frozenset[fx.Node]
    fused: frozenset[fx.Node]
    in_float: Mapping[fx.Node, str]


def placed(program: Program, skipped: Mapping[fx.Node, str]) -> Placement:
    """The quantisers of ``program``; the operators ``skipped`` stay in float, with the reason."""
    return _Placing(program, skipped).placement()


def layer_input(node: fx.Node) -> fx.Node:
    """What a call of a layer reads; an ``output_size`` may come before it."""
    found = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(found, fx.Node)
    return found


def is_float(program: Program, node: fx.Node) -> bool:
    kind = program.types.get(node.name)
    return isinstance(kind, TensorType) and kind.dtype.is_floating_point


@dataclass
class _Placing:
    program: Program
    skipped: Mapping[fx.Node, str]
    forms: dict[fx.Node, Integer] = field(default_factory=dict)
    reasons: dict[fx.Node, str] = field(default_factory=dict)
    fused: dict[fx.Node, Limits] = field(default_factory=dict)
    """By clamp, what it leaves."""
    kept: dict[fx.Node, Limits] = field(default_factory=dict)
    """By clamp that is an operator by itself, what it leaves."""
    inner: set[fx.Node] = field(default_factory=set)
    """What stands before a fused clamp: its value has no quantiser."""

    def __post_init__(self) -> None:
        self.flow = Flow(self.program)
        self.constants = constants(self.program)
        self.written_norms = _parts_of_norms(self.flow)

    def placement(self) -> Placement:
        for node in self.program.nodes:
            if node.op not in ("placeholder", "get_attr", "output") and self._is_operator(node):
                self.forms[node] = self._form(node)
        self._fuse_clamps()
        groups = self._groups()
        for node in self.fused.keys() - groups.keys() - self.inner:
            del self.fused[node]
            self.reasons.setdefault(node, "it follows an operator that stays in float")
        return Placement(
            groups,
            tuple(n for n, form in self.forms.items() if form is Integer.WEIGHTED),
            frozenset(n for n in groups if self._is_settled(n)),
            frozenset(self.fused),
            self.reasons,
        )

    def _is_operator(self, node: fx.Node) -> bool:
        return node not in self.constants and self.flow.kind(node) != "shape"

    def _form(self, node: fx.Node) -> Integer:
        known = self.flow.described[node]
        form = known.integer
        if form is Integer.NONE and known.kind == "elementwise" and _by_a_number(node):
            form = Integer.RESCALED
        reason = self._obstacle(node, form)
        if reason:
            self.reasons[node] = reason
            return Integer.NONE
        return form

    def _obstacle(self, node: fx.Node, form: Integer) -> str:
        """Why ``node`` stays in float, or nothing."""
        program, module = self.program, self.program.module(node)
        if node.name in program.opaque:
            return "it could not be traced"
        if isinstance(module, FakeQuantize):
            return ""
        if node in self.skipped:
            return self.skipped[node]
        if node in self.written_norms:
            return f"it is part of a norm that is written out, around '{self.written_norms[node]}'"
        if form is Integer.NONE:
            reads = any(is_float(program, each) for each in self.flow.operands(node))
            named = getattr(node.target, "__name__", node.target)
            name = type(module).__name__ if module else named
            return f"'{name}' has no integer form" if reads else ""
        if form is Integer.WEIGHTED:
            return self._no_layer(node, module)
        for each in self.constants.intersection(node.all_input_nodes):
            if not self._is_finite(each):
                return f"it reads '{each.name}', which is not finite"
        return ""

    def _is_finite(self, constant: fx.Node) -> bool:
        if not is_float(self.program, constant):
            return True
        value = constant_value(self.program, constant)
        return bool(torch.isfinite(value).all())

    def _no_layer(self, node: fx.Node, module: nn.Module | None) -> str:
        if module is None:
            return (
                "its weight or bias is computed in the forward; fold=auto computes it once, unless "
                "it depends on the input"
            )
        if standard_kind(module) not in KINDS and not isinstance(module, QuantizedLayer):
            return f"'{type(module).__name__}' has no integer form"
        if writes_tensors_of(self.program, module):
            return "the forward writes its weight or bias"
        floating = is_float(self.program, layer_input(node))
        return "" if floating else "its operand is no float tensor"

    # ---- clamps ----------------------------------------------------------------------------

    def _fuse_clamps(self) -> None:
        for node, form in self.forms.items():
            limits = limits_of(self.program, node) if form is Integer.RESCALED else None
            if limits is None:
                continue
            way = self._way_back(node)
            before = self.forms.get(way[-1], Integer.SAME) if way else Integer.SAME
            if before is Integer.SAME:
                continue
            operand = way[-1]
            self.fused[node] = self.fused.get(operand, Limits()).within(limits)
            self.inner.update(way)
            if before is Integer.NONE:
                self.forms[node] = Integer.NONE

    def _way_back(self, clamp: fx.Node) -> list[fx.Node]:
        """From what alone stands before ``clamp`` back to an operator; empty if others read it.

        What gives back its operand in evaluation lies on the way.
        """
        found: list[fx.Node] = []
        reader = clamp
        while not found or self.flow.kind(reader) == "dropout":
            operand = reader.all_input_nodes[0]
            if self.flow.readers(operand) != [reader]:
                return []
            found.append(operand)
            reader = operand
        return found

    def _keep(self, clamp: fx.Node) -> None:
        """Let ``clamp`` be an operator by itself: something wider is on its grid."""
        self.kept[clamp] = self.fused.pop(clamp)
        self.inner.difference_update(self._way_back(clamp))
        self.forms[clamp] = Integer.RESCALED

    # ---- groups ----------------------------------------------------------------------------

    def _groups(self) -> dict[fx.Node, Group]:
        union = UnionFind()
        read_by_layer: dict[str, fx.Node] = {}
        for node, form in self.forms.items():
            operands = self._tensors(node)
            if form is Integer.SAME:
                union.union(node, *(each for each in operands if not self._own_results(each)))
            elif form is Integer.WEIGHTED and operands:
                read = layer_input(node)
                union.union(read_by_layer.setdefault(str(node.target), read), read)
        for each in [n for n in self.program.nodes if n.op != "output"]:
            union[each]
        for members in self._classes(union).values():
            self._limits(members)
        classes = self._classes(union)
        wanted = {union[node] for node in self._wanted()}
        made = [self._group(members) for root, members in classes.items() if root in wanted]
        return {node: group for group in made for node in group.members}

    def _own_results(self, results: fx.Node) -> bool:
        """Whether ``results`` are several of an operator that rescales: each has its own grid."""
        if not isinstance(self.program.types[results.name], tuple):
            return False
        while results.target is operator.getitem:
            results = results.all_input_nodes[0]
        return self.forms.get(results) is not Integer.SAME

    def _classes(self, union: Any) -> dict[fx.Node, list[fx.Node]]:
        """The float tensors of each class, in the program's order."""
        classes: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in self.program.nodes:
            if node.op != "output" and is_float(self.program, node) and node not in self.inner:
                classes[union[node]].append(node)
        return classes

    def _limits(self, members: Sequence[fx.Node]) -> Limits:
        """What clamps leave of all that is written on a grid; a narrower clamp is kept."""
        each = {node: self._written(node) for node in members if self._writes(node)}
        low = min((limits.low for limits in each.values()), default=-math.inf)
        high = max((limits.high for limits in each.values()), default=math.inf)
        for node, limits in each.items():
            if limits != Limits(low, high) and node in self.fused:
                self._keep(node)
        return Limits(low, high)

    def _writes(self, node: fx.Node) -> bool:
        """Whether ``node`` gives numbers that its operands may not have."""
        if self.forms.get(node) is not Integer.SAME:
            return True
        pad, module = pad_of(node, self.program.module(node)), self.program.module(node)
        if pad is not None:
            return pad.mode == "constant" and pad.value != 0
        return self.flow.kind(node) == "resize" and _mode(node, module) == "bicubic"

    def _written(self, node: fx.Node) -> Limits:
        pad = pad_of(node, self.program.module(node))
        if self.forms.get(node) is Integer.SAME and pad is not None:
            return Limits(min(pad.value, 0.0), max(pad.value, 0.0))
        return self.fused.get(node) or self.kept.get(node, Limits())

    def _group(self, members: Sequence[fx.Node]) -> Group:
        pads = [pad_of(node, self.program.module(node)) for node in members]
        values = [float(pad.value) for pad in pads if pad is not None]
        constants = tuple(filter(math.isfinite, values))
        return Group(tuple(members), self._limits(members), constants)

    def _tensors(self, node: fx.Node) -> list[fx.Node]:
        """The operands of ``node`` that are float tensors, or tuples of them."""
        return [
            each
            for each in node.all_input_nodes
            if node not in self.flow.shape_readers(each)
            and (is_float(self.program, each) or isinstance(self.program.types[each.name], tuple))
        ]

    def _wanted(self) -> Iterator[fx.Node]:
        """Values that an operator with an integer form and a scale of its own reads or gives."""
        for node, form in self.forms.items():
            if form in (Integer.WEIGHTED, Integer.RESCALED):
                if node not in self.fused:
                    yield from self._tensors(node)
                if node not in self.inner:
                    yield node

    def _is_settled(self, node: fx.Node) -> bool:
        """Whether ``node`` only picks from values on the grid."""
        is_same = self.forms.get(node) is Integer.SAME
        if not is_same or any(map(self._own_results, self._tensors(node))):
            return False
        kind, module = self.flow.kind(node), self.program.module(node)
        if kind == "dropout":
            return isinstance(module, nn.Identity)
        if kind == "resize":
            return _mode(node, module).startswith("nearest")
        pad = pad_of(node, module)
        return pad is None or pad.mode != "constant" or pad.value == 0


def _mode(node: fx.Node, module: nn.Module | None) -> str:
    """How a map is enlarged; what shuffles pixels picks, as ``nearest`` does."""
    positional = node.args[3] if len(node.args) > 3 else "nearest"
    given = node.kwargs.get("mode", positional) if module is None else None
    return str(getattr(module, "mode", given or "nearest"))


def _by_a_number(node: fx.Node) -> bool:
    """Whether ``node`` divides by a number, or raises to a positive whole power."""
    if len(node.args) < 2 or node.all_input_nodes != [node.args[0]]:
        return False
    name, by = str(getattr(node.target, "__name__", node.target)), node.args[1]
    if not isinstance(by, (int, float)) or node.kwargs:
        return False
    raises = name == "pow" and float(by) in (1.0, 2.0, 3.0, 4.0)
    return raises or name in ("div", "truediv", "true_divide")


def _parts_of_norms(flow: Flow) -> dict[fx.Node, str]:
    """What leads to a function without bound, and what reads its result, with its name.

    That is a norm written out. Quantised, a small variance would become 0.
    """
    found: dict[fx.Node, str] = {}
    for node in flow.program.nodes:
        name = str(getattr(node.target, "__name__", node.target)).strip("_")
        calls = node.op in ("call_function", "call_method") and is_float(flow.program, node)
        if calls and name in _UNBOUNDED and not _by_a_number(node):
            found[node] = name
            found |= {user: name for user in node.users if flow.kind(user) == "elementwise"}
    for node in reversed(flow.program.nodes):
        names = [found.get(user) for user in flow.readers(node)]
        if names and all(names) and flow.kind(node) in _OF_NORMS:
            found.setdefault(node, str(names[0]))
    return found
