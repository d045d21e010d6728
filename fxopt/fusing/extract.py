"""The operators from one value of a program to another as a module of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from fxopt.analysis.padding import known_sizes
from fxopt.graphs import assemble, share_tree
from fxopt.program import Program


def extract(program: Program, entry: str, end: str) -> fx.GraphModule:
    """A module of one input that computes ``end`` from ``entry``, with the program's own weights.

    Sizes of other values are those of the example.
    """
    sizes = known_sizes(program)
    start, last = program.node(entry), program.node(end)
    inside = _inside(start, last, sizes)
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {start: graph.placeholder(entry)}

    def copied(node: fx.Node) -> Any:
        return copies[node] if node in copies else sizes[node.name]

    for node in program.nodes:
        if node in inside:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), copied)
            copies[node] = graph.create_node(node.op, node.target, args, kwargs, node.name)
    graph.output(copies[last])
    return assemble(share_tree(program.graph_module), graph, fx.GraphModule)


def _inside(start: fx.Node, last: fx.Node, sizes: Mapping[str, Any]) -> set[fx.Node]:
    """What goes into ``last``, but for ``start`` and sizes of what is not computed from it."""
    below: set[fx.Node] = {start}
    for node in start.graph.nodes:
        if not below.isdisjoint(node.all_input_nodes):
            below.add(node)
    found, todo = set[fx.Node](), [last]
    while todo:
        node = todo.pop()
        if node is start or node in found or (node not in below and node.name in sizes):
            continue
        found.add(node)
        todo += node.all_input_nodes
    return found
