"""What a node computes from given operands, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from fxopt.graphs import call_node, member
from fxopt.layers import unborrowed


def evaluated(node: fx.Node, given: Mapping[fx.Node, Any], tree: nn.Module) -> Any:
    """What ``node`` computes in float64 from the values in ``given``."""
    known: dict[fx.Node, Any] = dict(given)

    def module_at(path: str) -> nn.Module:
        return copy.deepcopy(unborrowed(tree.get_submodule(path))).double()

    def value(each: fx.Node) -> Any:
        if each not in known:
            known[each] = _value(each, value, module_at, tree)
        return known[each]

    with torch.no_grad():
        return value(node)


def _value(
    node: fx.Node, read: Callable[[fx.Node], Any], module_at: Callable[[str], nn.Module],
    tree: nn.Module,
) -> Any:  # fmt: skip
    if node.op == "get_attr":
        found = member(tree, str(node.target))
        return found.double() if isinstance(found, torch.Tensor) else found
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), read)
    return call_node(node, args, kwargs, module_at)
