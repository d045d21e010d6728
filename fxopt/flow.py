"""How values flow from a program's inputs to its outputs: what every path passes.

A *value* is a tensor that depends on an input. One value stands *before* another if all that
reaches the other comes through it (its immediate dominator), and *after* another if all that the
other reaches goes through it (its immediate post-dominator). Sizes, and tensors that are computed
from parameters alone, are no values: a batch size read at the input binds nothing together. Nor
does an operand of which only the shape is read (``expand_as``).
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
    """The values of ``program`` and the order that all paths keep.

    Attributes:
        described: what the operator table says of each node but inputs and output.
        kinds: its kind by node.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        described = {
            node: operators.describe(program, node)
            for node in program.nodes
            if node.op not in ("placeholder", "output")
        }
        self.described = described
        self.kinds = {node: description.kind for node, description in described.items()}
        self._places = {node: place for place, node in enumerate(program.nodes)}
        self._read = {node: _read(node, described[node].template) for node in described}
        graph = nx.DiGraph()
        graph.add_nodes_from((_SOURCE, _SINK))
        for node in program.nodes:
            if node.op == "placeholder":
                graph.add_edge(_SOURCE, node)
            elif node.op == "output":
                results = node.all_input_nodes
                graph.add_edges_from((each, _SINK) for each in results if each in graph)
            elif self.kinds[node] != "shape":
                graph.add_edges_from((each, node) for each in self._read[node] if each in graph)
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
        """Who reads the value (the output node too), not only its shape."""
        return [user for user in node.users if user not in self.shape_readers(node)]

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """The values that ``node`` reads: no sizes, weights, or what is computed from them."""
        if node.op == "output":
            return [each for each in node.all_input_nodes if each in self._graph]
        return [each for each in self._read.get(node, ()) if each in self._graph]

    def shape_readers(self, node: fx.Node) -> list[fx.Node]:
        """Who reads sizes of ``node``, or its shape as a whole."""
        return [
            user
            for user in node.users
            if self.kinds.get(user) == "shape" or node not in self._read.get(user, (node,))
        ]

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
            new = set(step(todo.pop())) - found - {stop, _SOURCE, _SINK}
            found |= new
            todo += new
        return () if todo else tuple(sorted(found, key=self._places.__getitem__))


def _read(node: fx.Node, template: tuple[int, str] | None) -> list[fx.Node]:
    """The operands of ``node``, without the one of which it reads the shape alone."""
    position, name = template or (len(node.args), "")
    args = (*node.args[:position], *node.args[position + 1 :])
    kwargs = {key: value for key, value in node.kwargs.items() if key != name}
    found: dict[fx.Node, None] = {}
    fx.node.map_arg((args, kwargs), lambda each: found.setdefault(each))
    return list(found)
