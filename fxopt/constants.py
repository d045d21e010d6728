"""What follows from a program's parameters and buffers alone."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx, nn

from fxopt.graphs import call_node, member, with_sources
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
    """The value of one of them."""
    value = _evaluated(program, program.graph_module, with_sources([node]))[node.name]
    assert isinstance(value, torch.Tensor)
    return value


def constant_values(program: Program, tree: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors among them by name, with the parameters and buffers that ``tree`` has."""
    found = _evaluated(program, tree, constants(program))
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def _evaluated(program: Program, tree: nn.Module, wanted: Collection[fx.Node]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for node in program.nodes:
        if node not in wanted:
            continue
        if node.op == "get_attr":
            found[node.name] = member(tree, str(node.target))
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda each: found[each.name])
        with torch.no_grad():
            found[node.name] = call_node(node, args, kwargs, program.graph_module.get_submodule)
    return found
