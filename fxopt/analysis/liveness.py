"""Which tensors are live at each step of an order, and what each step needs.

The bytes of a step are those of the tensors that are live there, plus what the operator adds: its
result (beyond the storage that it takes over, if it runs in place) and its scratch memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import networkx as nx

from fxopt.analysis.graph import normalised
from fxopt.analysis.plan import Lifetime, NodeId, Scratch


@dataclass(frozen=True)
class Timeline:
    """An order played through.

    Attributes:
        lifetimes: of every tensor that takes bytes of its own and of scratch memory, in the order
            in which they start.
        step_bytes: what each step needs.
    """

    lifetimes: tuple[Lifetime, ...]
    step_bytes: tuple[int, ...]

    @property
    def peak_bytes(self) -> int:
        return max(self.step_bytes, default=0)

    @property
    def peak_step(self) -> int:
        """The first step that needs the most."""
        return self.step_bytes.index(self.peak_bytes) if self.step_bytes else 0


def storages(graph: nx.DiGraph, order: Sequence[NodeId]) -> dict[NodeId, NodeId]:
    """The tensor in whose bytes each node's result lies: its own, or the one that it views."""
    storage: dict[NodeId, NodeId] = {}
    for node in order:
        alias = graph.nodes[node]["alias_of"]
        storage[node] = node if alias is None else storage[alias]
    return storage


def timeline(graph: nx.DiGraph, order: Sequence[NodeId]) -> Timeline:
    """``graph`` run in ``order``, in time linear in its edges.

    Of several storages that an operator may take over the largest is taken; of equals the first.
    """
    graph = normalised(graph)
    storage = storages(graph, order)
    spans = _spans(graph, order, storage)
    kept = {storage[node] for node in order if graph.nodes[node]["output"]}
    lifetimes = []
    for step, node in enumerate(order):
        if storage[node] != node:
            continue
        fields = graph.nodes[node]
        operands = () if fields["resident"] else fields["inplace"]
        ending = [r for r in (storage[o] for o in operands) if spans[r][1] == step + 1]
        taken = max(
            (root for root in ending if root not in kept),
            key=lambda root: graph.nodes[root]["output_bytes"],
            default=None,
        )
        size, item = fields["output_bytes"], fields["item_bytes"]
        end = len(order) if node in kept else spans[node][1]
        lifetimes.append(Lifetime(node, size, spans[node][0], end, item, taken))
        if fields["scratch_bytes"]:
            lifetimes.append(Lifetime(Scratch(node), fields["scratch_bytes"], step, step + 1))
    lifetimes.sort(key=lambda tensor: tensor.start)
    return Timeline(tuple(lifetimes), _step_bytes(len(order), lifetimes))


def _spans(
    graph: nx.DiGraph, order: Sequence[NodeId], storage: dict[NodeId, NodeId]
) -> dict[NodeId, tuple[int, int]]:
    """First step of every tensor, and the step after that of its last reader."""
    spans: dict[NodeId, tuple[int, int]] = {}
    for step, node in enumerate(order):
        if storage[node] == node:
            spans[node] = (0 if graph.nodes[node]["resident"] else step, step + 1)
        for read in {storage[other] for other in (node, *graph.pred[node])}:
            spans[read] = (spans[read][0], step + 1)
    return spans


def _step_bytes(steps: int, lifetimes: Sequence[Lifetime]) -> tuple[int, ...]:
    change = [0] * (steps + 1)
    size = {tensor.id: tensor.size_bytes for tensor in lifetimes}
    shared = [0] * steps
    for tensor in lifetimes:
        change[tensor.start] += tensor.size_bytes
        change[tensor.end] -= tensor.size_bytes
        if tensor.takes_over is not None:
            shared[tensor.start] = min(tensor.size_bytes, size[tensor.takes_over])
    return tuple(live - shared[step] for step, live in enumerate(accumulate(change[:steps])))
