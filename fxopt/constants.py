"""What follows from a program's parameters and buffers alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from fxopt.graphs import call_node, member
from fxopt.program import Program


def constants(program: Program) -> frozenset[fx.Node]:
    """The nodes whose values depend on no input."""
    found: set[fx.Node] = set()
    for node in program.nodes:
        operands = node.all_input_nodes
        computed = node.op.startswith("call") and operands and found.issuperset(operands)
        if node.op == "get_attr" or computed:
            found.add(node)
    return frozenset(found)


def constant_value(program: Program, node: fx.Node) -> torch.Tensor:
    """The value of one of them, in the time that its own sources take."""
    value = _evaluated(node, program.graph_module, {})
    assert isinstance(value, torch.Tensor)
    return value


def constant_values(program: Program, tree: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors among them by name, with the parameters and buffers that ``tree`` has."""
    known: dict[fx.Node, Any] = {}
    fixed = constants(program)
    for node in program.nodes:
        if node in fixed:
            _evaluated(node, tree, known)
    return {n.name: value for n, value in known.items() if isinstance(value, torch.Tensor)}


def _evaluated(node: fx.Node, tree: nn.Module, known: dict[fx.Node, Any]) -> Any:
    """What ``node`` gives, kept in ``known`` with all that it is computed from."""
    if node not in known and node.op == "get_attr":
        known[node] = member(tree, str(node.target))
    elif node not in known:
        read: Any = (node.args, node.kwargs)
        args, kwargs = fx.node.map_arg(read, lambda each: _evaluated(each, tree, known))
        with torch.no_grad():
            known[node] = call_node(node, args, kwargs, tree.get_submodule)
    return known[node]
