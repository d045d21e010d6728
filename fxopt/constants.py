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


def constant_values(program: Program, tree: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors among them by name, with the parameters and buffers that ``tree`` has."""
    fixed = constants(program)
    found: dict[str, Any] = {}
    for node in program.nodes:
        if node not in fixed:
            continue
        if node.op == "get_attr":
            found[node.name] = member(tree, str(node.target))
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda each: found[each.name])
        with torch.no_grad():
            found[node.name] = call_node(node, args, kwargs, program.graph_module.get_submodule)
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
