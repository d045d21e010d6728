"""What becomes of each part of a network that is to be trained from scratch without a norm.

The variance that every value is expected to have is followed along the graph (Brock et al., ICLR
2021, section 4; ICML 2021, section 2). A layer reads ``h/β`` and multiplies by γ; a residual block
is ``h' = shortcut + α·s·f(act(h)/β)``. Of a value the *unit* moments are kept, those of ``h/β``,
and β by itself: it is 1 wherever no residual stream is, and what is not of variance 1 there (sums,
concatenations) goes into the γ of the layers that read it.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxopt.analysis.bookkeeping import Bookkeeping
from fxopt.analysis.expectation import INPUT, SAME_VALUES
from fxopt.analysis.filters import is_fixed_filter
from fxopt.analysis.gaussian import MeanVariance, beside_zeros, multiplied
from fxopt.analysis.pointwise import UNFIT
from fxopt.channelwise import LINEAR_KINDS
from fxopt.errors import InvalidProgramError
from fxopt.flow import Flow
from fxopt.graphs import member
from fxopt.layers import standard_kind
from fxopt.normfree.conversion import fan_in, takes_norm
from fxopt.normfree.fresh import (
    Change,
    Dropped,
    Fixed,
    Fresh,
    Gated,
    Redrawn,
    Residual,
    Standardised,
    Swap,
)
from fxopt.normfree.sites import by_sample, is_of_samples, reads_input
from fxopt.normfree.streams import gates, grows, is_activated, is_scaled, late_starts
from fxopt.norms import batch_norms, other_axis
from fxopt.obstacles import BATCH_NORMS, named, writes_tensors_of
from fxopt.program import Program
from fxopt.residuals import LAYERS, ResidualBlock, is_multiple, residual_blocks

_LEAST = 1e-6
"""A variance, or a gate at rest, under which nothing is divided by it."""
_CARRIED = ("pool", "dropout", "copy")


def planned(program: Program, alpha: float, kept: Mapping[fx.Node, str]) -> Fresh:
    """What becomes of each layer, norm, gate and residual sum.

    Args:
        program: as it was captured.
        alpha: α.
        kept: norms that stay, with the reasons.
    """
    if not batch_norms(program):
        samples = [node for node in program.nodes if is_of_samples(program, node)]
        return Fresh((), {node: by_sample(program, node) for node in samples})
    flow = Flow(program)
    refused: dict[int, str] = {}
    while True:
        plan = _Plan(flow, alpha, kept, refused)
        more = plan.inconsistent()
        if not more:
            return plan.fresh()
        refused |= more


class _Plan(Bookkeeping):
    def __init__(
        self, flow: Flow, alpha: float, kept: Mapping[fx.Node, str], refused: Mapping[int, str]
    ) -> None:
        super().__init__(flow)
        self._alpha, self._refused = alpha, refused
        self._betas: dict[fx.Node, float] = {}
        self._gammas: dict[int, float] = {}
        self._standardised: dict[fx.Node, Standardised] = {}
        self._residuals: list[Residual] = []
        self._swaps: dict[fx.Node, Swap] = {}
        self._scaled_gates: list[Gated] = []
        self._redrawn: dict[fx.Node, Redrawn] = {}
        self._norms_alone: list[Dropped | Fixed] = []
        self._declined: dict[fx.Node, str] = {}
        self._plain: dict[fx.Node, str] = {}
        """Layers that stay plain though norms may follow, with the reasons."""
        self._behind: dict[fx.Node, fx.Node] = {}
        """Norms by the layer whose result they alone read, perhaps in another shape."""
        self._norms = frozenset(batch_norms(self.program))
        self._stays = {n: kept.get(n) or _why_it_stays(self.program, n) for n in self._norms}
        self._going = {norm for norm, reason in self._stays.items() if not reason}
        self._owners = _owners(self.program)
        self._gates = gates(flow)
        self._inside = {node for gate in self._gates.values() for node in gate.nodes}
        self._blocks = {b.total: b for b in residual_blocks(flow) if not is_scaled(flow, b)}
        self._late = late_starts(flow, self._blocks.values())
        self.run()

    def fresh(self) -> Fresh:
        """In an order in which each change finds what it looks for: layers and norms come last."""
        own = {*self._standardised, *self._redrawn, *(each.node for each in self._norms_alone)}
        residuals = (
            replace(change, rewired=(change.start,))
            if change.reads is not None and change.start not in (change.block.total, *own)
            else change
            for change in self._residuals
        )
        changes: tuple[Change, ...] = (
            *self._swaps.values(), *residuals, *self._scaled_gates,
            *self._standardised.values(), *self._redrawn.values(), *self._norms_alone,
        )  # fmt: skip
        _check_disjoint(changes)
        return Fresh(changes, self._declined)

    def inconsistent(self) -> dict[int, str]:
        """Layers that would be standardised at one call and not at another, by identity."""
        converted = {id(self.program.module(node)) for node in self._standardised}
        found = {}
        for node in self.program.nodes:
            key = id(self.program.module(node))
            if key in converted and node not in self._standardised:
                why = self._plain.get(node, "no norm follows it there")
                found[key] = f"its layer is shared, and at {named(node)} ({node.name}) stays: {why}"
        return found

    # ---- values --------------------------------------------------------------------------------

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """As they will be: a shortcut that starts later reads what is activated."""
        return [self._late[node]] if node in self._late else super().operands(node)

    def whole(self, node: fx.Node) -> MeanVariance:
        """Moments of the value itself, not divided by its β."""
        unit, beta = super().whole(node), self._betas[node]
        return MeanVariance(unit.mean * beta, unit.variance * beta**2)

    def _moments(self, node: fx.Node) -> MeanVariance | None:
        found = self._gated(node) or super()._moments(node)
        if node not in self._betas:
            betas = {self._betas[each] for each in self.operands(node)}
            self._betas[node] = betas.pop() if len(betas) == 1 else 1.0
        return found

    def together(self, node: fx.Node, operands: list[fx.Node]) -> MeanVariance:
        """Where all parts have one β, so has the concatenation."""
        betas = {self._betas[each] for each in operands}
        beta = self._betas[node] = betas.pop() if len(betas) == 1 else 1.0
        found = super().together(node, operands)
        return MeanVariance(found.mean / beta, found.variance / beta**2)

    def product(self, node: fx.Node, operands: list[fx.Node]) -> MeanVariance | None:
        """Of two values that are no gate and what it gates."""
        self._betas[node] = 1.0
        return multiplied(*map(self.whole, operands))

    def _gated(self, node: fx.Node) -> MeanVariance | None:
        """A gate is scaled so that it gives what it is given; None for what is no gate."""
        gate = self._gates.get(node)
        source = None if gate is None else self._known[gate.source]
        if gate is None or source is None:
            return None
        factors = next(each for each in self.operands(node) if each in gate.nodes)
        rest = self._at_rest(factors)
        value = 0.0 if rest is None else rest.mean().item()
        if abs(value) < _LEAST:
            return None
        self._scaled_gates += [Gated(node, 1 / value)] if value != 1 else []
        self._betas[node] = self._betas[gate.source]
        return source

    def _at_rest(self, node: fx.Node) -> torch.Tensor | None:
        """What a gate's value is where its layers give zero; None where that cannot be told."""
        operands = self.operands(node)
        if self.flow.kind(node) in LAYERS:
            return torch.zeros((), dtype=torch.float64)
        if self.is_elementwise(node):
            rests = {each: self._at_rest(each) for each in operands}
            known = {each: rest for each, rest in rests.items() if rest is not None}
            try:
                return self.evaluated(node, known) if len(known) == len(rests) else None
            except UNFIT:
                return None
        same = self.flow.kind(node) in SAME_VALUES or self.is_same(node)
        return self._at_rest(operands[0]) if same and len(operands) == 1 else None

    # ---- layers --------------------------------------------------------------------------------

    def layer(self, node: fx.Node, operand: fx.Node) -> MeanVariance | None:
        """Standardised it gives variance 1."""
        module: Any = self.program.module(node)
        if is_fixed_filter(module):
            return super().layer(node, operand)
        beta, self._betas[node] = self._betas[operand], 1.0
        norms = self._norms_behind(node)
        if not norms and (node in self._inside or self.flow.kind(node) == "linear"):
            return self._redraw(node, operand)
        reason = self._why_plain(node, module, operand)
        if reason:
            self._plain[node] = reason
            if not norms and not any(self._stays.get(user) for user in node.users):
                self._declined[node] = reason
            return self._redraw(node, operand)
        gamma = 1 / super().whole(operand).deviation
        own = self._gammas.setdefault(id(module), gamma)
        self._standardised[node] = Standardised(node, norms, own, beta * own / gamma)
        return INPUT

    def _redraw(self, node: fx.Node, operand: fx.Node) -> MeanVariance | None:
        """A plain layer; its weights are drawn so that it gives the variance that it reads."""
        if not self._is_drawable(node):
            return self.by_weights(node, operand)
        self._redrawn[node] = Redrawn(node)
        known = self._known[operand] is not None
        return MeanVariance(0.0, self.whole(operand).variance) if known else None

    def _is_drawable(self, node: fx.Node) -> bool:
        module: Any = self.program.module(node)
        if module is None or len(self._owners[id(module.weight)]) > 1:
            return False
        return standard_kind(module) in LINEAR_KINDS or takes_norm(module)

    def _why_plain(self, node: fx.Node, module: Any, operand: fx.Node) -> str:
        """Why a layer's weight is not standardised, or nothing."""
        if module is None:
            return "the forward computes its weight"
        what = f"'{node.target}' ({type(module).__name__})"
        if not takes_norm(module):
            return f"a standardised weight is not defined for {what}: outputs see parts of a filter"
        if fan_in(module) == 1:
            return f"the filters of {what} have one weight each, and standardised that is zero"
        if writes_tensors_of(self.program, module):
            return f"the forward writes the weight or bias of {what}"
        if len(self._owners[id(module.weight)]) > 1:
            return f"the weight of {what} is another layer's too"
        if id(module) in self._refused:
            return self._refused[id(module)]
        stays = next((user for user in node.users if self._stays.get(user)), None)
        if stays is not None:
            return f"its norm {named(stays)} stays"
        read = self._known[operand]
        if read is None:
            return f"the variance of what {what} reads is not known: {self._lost(node)}"
        faint = f"what {what} reads has a variance of {read.variance:.1g}"
        return "" if read.variance > _LEAST else f"{faint}: it would be scaled up by that"

    def _lost(self, node: fx.Node) -> str:
        """The operator at which the variance was lost."""
        at = node
        while True:
            unknown = [each for each in self.operands(at) if self._known[each] is None]
            if not unknown:
                called = type(self.program.module(at)).__name__
                name = called if at.op == "call_module" else getattr(at.target, "__name__", "")
                return f"{named(at)} loses it ({name or at.target})"
            at = unknown[0]

    def _norms_behind(self, layer: fx.Node) -> tuple[fx.Node, ...]:
        """The norms that read a layer's result, one after the other, and can go."""
        found: list[fx.Node] = []
        module: Any = self.program.module(layer)
        filters = getattr(module, "out_channels", getattr(module, "out_features", None))
        at = layer
        while len(readers := self.flow.readers(at)) == 1 and readers[0].op != "output":
            (at,) = readers
            norm: Any = self.program.module(at) if self._stays.get(at) == "" else None
            if norm is not None and norm.num_features == filters:
                found.append(at)
            elif self.flow.kind(at) not in SAME_VALUES or len(self.operands(at)) != 1:
                break
        self._behind |= dict.fromkeys(found, layer)
        return tuple(found)

    # ---- norms ---------------------------------------------------------------------------------

    def norm(self, node: fx.Node, operand: fx.Node) -> MeanVariance | None:
        """What goes gives what it reads; what stays gives variance 1."""
        reason = self._why_norm(node, operand)
        module: Any = self.program.module(node)
        if reason:
            self._declined[node] = reason
        elif reads_input(self.program, node) and module.running_mean is not None:
            self._norms_alone.append(Fixed(node))
        else:
            self._roots[node] = self._roots[operand]
            if self._behind.get(node) not in self._standardised:
                self._norms_alone.append(Dropped(node))
            return self._known[operand]
        self._betas[node] = 1.0
        return INPUT

    def _why_norm(self, norm: fx.Node, operand: fx.Node) -> str:
        """Why a norm stays, or nothing."""
        if norm not in self._norms:
            return by_sample(self.program, norm)
        layer = self._behind.get(norm, operand)
        reason = self._stays[norm] or self._plain.get(layer, "")
        if reason or reads_input(self.program, norm):
            return reason
        if self._known[operand] is None:
            return f"the variance of what it reads is not known: {self._lost(norm)}"
        if grows(self.flow, operand):
            return "it normalises a concatenation that grows from layer to layer, as in DenseNets"
        return ""

    def is_same(self, node: fx.Node) -> bool:
        """A norm that goes gives what it is given."""
        return node in self._norms or super().is_same(node)

    # ---- residual streams ----------------------------------------------------------------------

    def total(self, node: fx.Node, operands: list[fx.Node]) -> MeanVariance | None:
        """A residual sum is a value of the stream; of other sums the variances add."""
        block = self._blocks.get(node)
        if block is None or super().whole(block.branch).variance < _LEAST:
            self._betas[node] = 1.0
            return super().total(node, operands)
        source = self._before_activation(block)
        stream = self.whole(block.shortcut)
        if source is not None:
            stream = self._along(block.chain, self.whole(source))
        branch = self.whole(block.branch)
        scale = self._alpha / branch.deviation
        beta = self._betas[node] = math.sqrt(stream.variance + self._alpha**2)
        reads = source if block.entry not in self._swaps else None
        if block.chain:
            reads = self._late.get(block.chain[0], reads)
        before = self._betas[block.entry]
        self._residuals.append(Residual(block, scale, before, beta, reads))
        return MeanVariance((stream.mean + scale * branch.mean) / beta, 1.0)

    def _along(self, chain: Sequence[fx.Node], moments: MeanVariance) -> MeanVariance:
        """What a shortcut without a layer makes of another value than it read."""
        for node in chain:
            (read,) = self.operands(node)
            if is_multiple(node):
                (factor,) = (each for each in node.args if isinstance(each, (int, float)))
                moments = MeanVariance(moments.mean * factor, moments.variance * factor**2)
            elif self.flow.kind(node) in ("pad", "concat"):
                channels = [self.program.types[each.name].shape[1] for each in (read, node)]
                moments = beside_zeros(moments, channels[0], max(0, channels[1] - channels[0]))
        return moments

    def _before_activation(self, block: ResidualBlock) -> fx.Node | None:
        """What an identity shortcut reads where the sum is activated: a value before that."""
        if block.layer is not None or not is_activated(self.flow, block.total, self._going):
            return None
        if any(len(each.users) > 1 for each in block.chain):
            return None
        carried: list[fx.Node] = []
        at = block.entry
        while self.flow.kind(at) in _CARRIED and (at is block.entry or len(at.users) == 1):
            carried.insert(0, at)
            (at,) = self.operands(at)
        source, span = self._activation(at)
        if span and any(self.flow.kind(each) == "pool" for each in carried):
            reader = block.chain[0] if block.chain else block.total
            known = self._swaps.get(block.entry)
            readers = (*(known.shortcuts if known else ()), reader)
            self._swaps[block.entry] = Swap(source, span, tuple(carried), readers)
        return source if span else None

    def _activation(self, end: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
        """What is activated to give ``end``, and by which nodes; none if nothing is."""
        source = self.root(end)
        found: dict[fx.Node, None] = {}
        todo = [end]
        while todo:
            node = todo.pop()
            if node is not source and node not in found:
                found[node] = None
                todo += self.operands(node)
        span = [each for each in self.program.nodes if each in found]
        while span and span[0] in self._norms:
            source = span.pop(0)
        acts = any(self.flow.kind(each) == "activation" for each in span)
        return source, tuple(span) if acts else ()


def _check_disjoint(changes: Sequence[Change]) -> None:
    """One that the driver leaves out would make β wrong behind it."""
    counts = Counter(node for change in changes for node in change.nodes)
    node, count = counts.most_common(1)[0] if counts else (None, 0)
    if count > 1:
        raise InvalidProgramError(
            f"bn_to_scaled_ws has two plans for {named(node)}; this is a bug in fxopt, please "  # type: ignore[arg-type]
            "report it"
        )


def _why_it_stays(program: Program, norm: fx.Node) -> str:
    """Why a BatchNorm cannot go, whatever it reads, or nothing."""
    module = program.module(norm)
    if module is None:
        return "the forward computes its statistics or parameters, or it has none"
    if norm.name in program.opaque or standard_kind(module) not in BATCH_NORMS:
        return f"it was not traced, and may compute more than a BatchNorm ({type(module).__name__})"
    if writes_tensors_of(program, module):
        return "the forward writes its statistics or parameters"
    producer = norm.all_input_nodes[0]
    layer = program.module(producer)
    is_layer = layer is not None and takes_norm(layer)
    return other_axis(program, producer, producer) if is_layer else ""


def _owners(program: Program) -> dict[int, set[int]]:
    """Of each weight, by identity, the layers that are called with it, and other readers."""
    found: dict[int, set[int]] = defaultdict(set)
    for node in program.nodes:
        module = program.module(node)
        weight = getattr(module, "weight", None)
        if node.op == "get_attr":
            found[id(member(program.graph_module, str(node.target)))].add(id(node))
        elif weight is not None:
            found[id(weight)].add(id(module))
    return found
