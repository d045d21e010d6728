"""How values flow from a program's inputs to its outputs: what every path passes.

A *value* is a tensor that depends on an input. One value stands *before* another if all that
reaches the other comes through it (its immediate dominator), and *after* another if all that the
other reaches goes through it (its immediate post-dominator). Sizes, and tensors that are computed
from parameters alone, are no values: a batch size read at the input binds nothing together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property

import networkx as nx
from torch import fx

from fxopt import operators
from fxopt.program import Program

_SOURCE, _SINK = "source", "sink"
_MOST = 40


class Flow:
    """The values of ``program`` and the order that all paths keep."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.kinds = {
            node: operators.describe(program, node).kind
            for node in program.nodes
            if node.op not in ("placeholder", "output")
        }
        self._places = {node: place for place, node in enumerate(program.nodes)}
        graph = nx.DiGraph()
        graph.add_nodes_from((_SOURCE, _SINK))
        for node in program.nodes:
            if node.op == "placeholder":
                graph.add_edge(_SOURCE, node)
            elif node.op == "output":
                graph.add_edges_from((each, _SINK) for each in _values(graph, node))
            elif self.kinds[node] != "shape":
                graph.add_edges_from((each, node) for each in _values(graph, node))
        self._graph = graph
        self._before = nx.immediate_dominators(graph, _SOURCE)
        self._after = nx.immediate_dominators(graph.reverse(copy=False), _SINK)

    def kind(self, node: fx.Node | None) -> str:
        """The node's kind in the operator table; empty for inputs and where there is no node."""
        return self.kinds.get(node, "") if node is not None else ""

    def before(self, node: fx.Node) -> fx.Node | None:
        """The last value that everything in ``node`` has come through."""
        found = self._before.get(node)
        return found if isinstance(found, fx.Node) and found is not node else None

    def after(self, node: fx.Node) -> fx.Node | None:
        """The first value that everything made of ``node`` goes through."""
        found = self._after.get(node)
        return found if isinstance(found, fx.Node) and found is not node else None

    def on_every_path(self, node: fx.Node) -> bool:
        """Whether all that goes from the inputs to the outputs goes through ``node``."""
        return node in self._spine

    @cached_property
    def _spine(self) -> frozenset[object]:
        found: list[object] = [_SOURCE]
        while found[-1] != _SINK:
            found.append(self._after[found[-1]])
        return frozenset(found)

    def dominates(self, first: fx.Node, node: fx.Node) -> bool:
        """Whether all that is in ``node`` has come through ``first``."""
        at: fx.Node | None = node
        while at is not None and at is not first:
            at = self.before(at)
        return at is first

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """Who reads the value (the output node too), not its sizes."""
        return [user for user in node.users if self.kinds.get(user) != "shape"]

    def sizes(self, node: fx.Node) -> list[fx.Node]:
        """Who reads sizes of ``node``."""
        return [user for user in node.users if self.kinds.get(user) == "shape"]

    def between(self, first: fx.Node, last: fx.Node) -> tuple[fx.Node, ...]:
        """What is made of ``first`` up to ``last``, with ``last``, which stands after ``first``.

        In program order; empty where there are more than an activation or a gate is made of.
        """
        return self._walk(first, last, self._graph.successors, {last})

    def above(self, first: fx.Node, last: fx.Node) -> tuple[fx.Node, ...]:
        """What ``last`` is made of from ``first`` on, with ``last``, if ``first`` is before it."""
        return self._walk(last, first, self._graph.predecessors, {last})

    def _walk(
        self, start: fx.Node, stop: fx.Node, step: Callable[[fx.Node], Iterable[fx.Node]],
        found: set[fx.Node],
    ) -> tuple[fx.Node, ...]:  # fmt: skip
        todo = [start]
        while todo and len(found) <= _MOST:
            new = set(step(todo.pop())) - found - {stop}
            found |= new
            todo += new
        return () if todo else tuple(sorted(found, key=self._places.__getitem__))


def _values(graph: nx.DiGraph, node: fx.Node) -> list[fx.Node]:
    """The operands of ``node`` that are values."""
    return [each for each in node.all_input_nodes if each in graph]
