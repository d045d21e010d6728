"""What becomes of each part of a network that is to be trained from scratch without a norm.

The variance that every value is expected to have is followed along the graph (Brock et al., ICLR
2021, section 4; ICML 2021, section 2). A layer reads ``h/β`` and multiplies by γ; a residual block
is ``h' = shortcut + α·s·f(act(h)/β)``. Of a value the *unit* moments are kept, those of ``h/β``,
and β by itself: it is 1 wherever no residual stream is, and what is not of variance 1 there (sums,
concatenations) goes into the γ of the layers that read it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import fx, nn

from fxopt.analysis.expectation import INPUT, SAME_VALUES, Bookkeeping
from fxopt.analysis.gaussian import MeanVariance
from fxopt.blocks import Gate
from fxopt.channelwise import LINEAR_KINDS
from fxopt.flow import Flow
from fxopt.layers import standard_kind
from fxopt.normfree.conversion import fan_in, takes_norm
from fxopt.normfree.fresh import (
    Dropped,
    Fixed,
    Fresh,
    Gated,
    Redrawn,
    Residual,
    Standardised,
    Swap,
)
from fxopt.normfree.sites import by_sample, reads_input
from fxopt.normfree.streams import gates, grows, is_activated, is_scaled, late_starts
from fxopt.norms import batch_norms
from fxopt.obstacles import BATCH_NORMS, named, writes_tensors_of
from fxopt.program import Program
from fxopt.residuals import LAYERS, ResidualBlock, residual_blocks

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
        own = {*self._standardised, *self._redrawn, *(each.norm for each in self._norms_alone)}
        residuals = (
            replace(change, rewired=(change.start,))
            if change.reads is not None and change.start not in (change.block.total, *own)
            else change
            for change in self._residuals
        )
        return Fresh(
            (
                *self._swaps.values(), *residuals, *self._scaled_gates,
                *self._standardised.values(), *self._redrawn.values(), *self._norms_alone,
            ),
            self._declined,
        )  # fmt: skip

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
        """MeanVariance of the value itself, not divided by its β."""
        unit, beta = super().whole(node), self._betas[node]
        return MeanVariance(unit.mean * beta, unit.variance * beta**2)

    def _moments(self, node: fx.Node) -> MeanVariance | None:
        found = super()._moments(node)
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
        """A gate is scaled so that it gives what it is given."""
        gate = self._gates.get(node)
        factor = None if gate is None else self._at_rest(gate, node)
        if gate is not None and factor is not None:
            self._scaled_gates += [Gated(node, 1 / factor)] if factor != 1 else []
            self._betas[node] = self._betas[gate.source]
            return self._known[gate.source]
        self._betas[node] = 1.0
        return super().product(node, operands)

    def _at_rest(self, gate: Gate, product: fx.Node) -> float | None:
        """What a gate multiplies by where its last layer gives zero; None if that is nothing."""
        (factors,) = (each for each in self.operands(product) if each in gate.nodes)
        while self.root(factors) is factors and self.flow.kind(factors) in SAME_VALUES:
            (factors,) = self.operands(factors)
        if self.flow.kind(self.root(factors)) not in LAYERS:
            return None
        found = self.function(factors, MeanVariance(0.0, 0.0))
        value = 0.0 if found is None else found.moments.mean
        return value if abs(value) > _LEAST else None

    # ---- layers --------------------------------------------------------------------------------

    def layer(self, node: fx.Node, operand: fx.Node) -> MeanVariance | None:
        """Standardised it gives variance 1."""
        module: Any = self.program.module(node)
        if module is not None and not isinstance(module.weight, nn.Parameter):
            return self._known[operand]  # a fixed filter that smooths, as a pool does
        beta, self._betas[node] = self._betas[operand], 1.0
        norms = self._behind(node)
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
            return super().layer(node, operand)
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

    def _behind(self, layer: fx.Node) -> tuple[fx.Node, ...]:
        """The norms that read a layer's result, one after the other, and can go."""
        found: list[fx.Node] = []
        at = layer
        while len(at.users) == 1 and self._stays.get(next(iter(at.users)), "no norm") == "":
            (at,) = at.users
            found.append(at)
        return tuple(found)

    # ---- norms ---------------------------------------------------------------------------------

    def norm(self, node: fx.Node, operand: fx.Node) -> MeanVariance | None:
        """What goes gives what it reads; what stays gives variance 1."""
        reason = self._why_norm(node, operand)
        if reason:
            self._declined[node] = reason
        elif reads_input(self.program, node):
            self._norms_alone.append(Fixed(node))
        else:
            self._roots[node] = self._roots[operand]
            gone = operand in self._standardised and node in self._standardised[operand].norms
            if not gone and not self._goes_with_another(node):
                self._norms_alone.append(Dropped(node))
            return self._known[operand]
        self._betas[node] = 1.0
        return INPUT

    def _goes_with_another(self, norm: fx.Node) -> bool:
        """Whether ``norm`` is the second or a later one behind a standardised layer."""
        at = norm
        while at in self._norms:
            (at, *_) = self.operands(at)
        return at in self._standardised and norm in self._standardised[at].norms

    def _why_norm(self, norm: fx.Node, operand: fx.Node) -> str:
        """Why a norm stays, or nothing."""
        if norm not in self._norms:
            return by_sample(self.program, norm)
        reason = self._stays[norm] or self._plain.get(operand, "")
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
        stream = self.whole(block.shortcut if source is None else source)
        branch = self.whole(block.branch)
        scale = self._alpha / branch.deviation
        beta = self._betas[node] = math.sqrt(stream.variance + self._alpha**2)
        reads = source if block.entry not in self._swaps else None
        if block.chain:
            reads = self._late.get(block.chain[0], reads)
        before = self._betas[block.entry]
        self._residuals.append(Residual(block, scale, before, beta, reads))
        return MeanVariance((stream.mean + scale * branch.mean) / beta, 1.0)

    def _before_activation(self, block: ResidualBlock) -> fx.Node | None:
        """What an identity shortcut reads where the sum is activated: a value before that."""
        if block.layer is not None or not is_activated(self.flow, block.total, self._going):
            return None
        carried: list[fx.Node] = []
        at = block.entry
        while self.root(at) is at and self.flow.kind(at) in _CARRIED:
            carried.insert(0, at)
            (at,) = self.operands(at)
        source, span = self._activation(at)
        if span and carried:
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


def _why_it_stays(program: Program, norm: fx.Node) -> str:
    """Why a BatchNorm cannot go, whatever it reads, or nothing."""
    module = program.module(norm)
    if module is None:
        return "the forward computes its statistics or parameters, or it has none"
    if norm.name in program.opaque or standard_kind(module) not in BATCH_NORMS:
        return f"it was not traced, and may compute more than a BatchNorm ({type(module).__name__})"
    if writes_tensors_of(program, module):
        return "the forward writes its statistics or parameters"
    return ""


def _owners(program: Program) -> dict[int, set[int]]:
    """Of each weight, by identity, the layers that are called with it."""
    found: dict[int, set[int]] = defaultdict(set)
    for node in program.nodes:
        module = program.module(node)
        weight = getattr(module, "weight", None)
        if weight is not None:
            found[id(weight)].add(id(module))
    return found
