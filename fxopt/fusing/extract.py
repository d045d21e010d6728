"""The operators from one value of a program to another as a module of their own."""

from __future__ import annotations

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
    inside = _between(start, last)
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {start: graph.placeholder(entry)}

    def copied(node: fx.Node) -> Any:
        return copies[node] if node in copies else sizes[node.name]

    for node in program.nodes:
        if node in inside or (node.op == "get_attr" and not inside.isdisjoint(node.users)):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), copied)
            copies[node] = graph.create_node(node.op, node.target, args, kwargs, node.name)
    graph.output(copies[last])
    return assemble(share_tree(program.graph_module), graph, fx.GraphModule)


def _between(start: fx.Node, last: fx.Node) -> set[fx.Node]:
    """What is computed from ``start`` and goes into ``last``."""
    below: set[fx.Node] = {start}
    for node in start.graph.nodes:
        if not below.isdisjoint(node.all_input_nodes):
            below.add(node)
    above, todo = set[fx.Node](), [last]
    while todo:
        node = todo.pop()
        if node in below and node is not start and node not in above:
            above.add(node)
            todo += node.all_input_nodes
    return above
