"""What lies between two values: an activation, or a squeeze-excite gate, however it is written."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from fxopt.blocks import Gate
from fxopt.flow import Flow
from fxopt.program import TensorType

ELEMENTWISE = ("activation", "elementwise")


def operand(node: fx.Node) -> fx.Node:
    found: fx.Node = node.all_input_nodes[0]
    return found


def is_activation(flow: Flow, span: tuple[fx.Node, ...]) -> bool:
    """Whether ``span`` is elementwise, dropouts and what changes no value included."""
    return bool(span) and all(
        flow.kind(each) in (*ELEMENTWISE, "dropout") or _changes_nothing(flow, each)
        for each in span
    )


def _changes_nothing(flow: Flow, node: fx.Node) -> bool:
    """A copy, a cast to the dtype that is there, or a layer that gives what it is given."""
    if isinstance(flow.program.module(node), nn.Identity):
        return True
    name = str(getattr(node.target, "__name__", node.target))
    types = flow.program.types
    same = bool(node.all_input_nodes) and types[operand(node).name] == types[node.name]
    return same and (name in ("clone", "contiguous", "detach") or flow.kind(node) == "cast")


def gate_of(flow: Flow, source: fx.Node, span: tuple[fx.Node, ...]) -> Gate | None:
    """The gate on ``source`` that ``span`` is: its last node multiplies by factors per channel."""
    if len(span) < 2 or span[-1].target is not torch.mul or source not in span[-1].args:
        return None
    *nodes, product = span
    types = flow.program.types
    rank = len(types[source.name].shape)
    if rank < 3:
        return None
    squeeze = _squeeze(flow, source, product)
    factors = [_unexpanded(flow, each) for each in product.all_input_nodes if each in nodes]
    is_per_channel = [types[each.name].shape[1:] for each in factors] == [
        (types[source.name].shape[1], *(1,) * (rank - 2))
    ]
    if squeeze is None or not is_per_channel:
        return None
    pools = tuple(each for each in squeeze if _is_pooled(flow, each, source))
    return Gate(source, squeeze, pools, tuple(nodes), product)


def _squeeze(flow: Flow, source: fx.Node, product: fx.Node) -> tuple[fx.Node, ...] | None:
    """What leads from ``source`` to its poolings; None if something goes past them."""
    found: dict[fx.Node, None] = {}
    todo = [each for each in flow.readers(source) if each is not product]
    while todo:
        node = todo.pop()
        if node is product or node.op == "output":
            return None
        if node not in found and not _is_pooled(flow, node, source):
            todo += flow.readers(node)
        found[node] = None
    return tuple(found) or None


def _is_pooled(flow: Flow, node: fx.Node, source: fx.Node) -> bool:
    types = flow.program.types
    batch, channels = types[source.name].shape[:2]
    kind: Any = types.get(node.name)
    elements = kind.elements if isinstance(kind, TensorType) else 0
    return flow.kind(node) in ("pool", "reduce") and elements == batch * channels


def _unexpanded(flow: Flow, node: fx.Node) -> fx.Node:
    while flow.kind(node) == "expand":
        node = operand(node)
    return node
