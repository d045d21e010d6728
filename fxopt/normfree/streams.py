"""Where residual streams, gates and growing concatenations are in a graph."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import fx

from fxopt.blocks import Gate
from fxopt.flow import Flow
from fxopt.layers import SkipInit
from fxopt.residuals import ResidualBlock
from fxopt.spans import gate_of, is_activation


def gates(flow: Flow) -> dict[fx.Node, Gate]:
    """The gates on maps, by their products."""
    found = {}
    for node in flow.program.nodes:
        source = flow.before(node) if node.target is torch.mul else None
        span = () if source is None else flow.between(source, node)
        gate = gate_of(flow, source, span) if source is not None else None
        if gate is not None:
            found[node] = gate
    return found


def is_scaled(flow: Flow, block: ResidualBlock) -> bool:
    """Whether the branch of ``block`` has a skip gain already."""
    at = block.branch
    while flow.kind(at) == "dropout":
        (at,) = flow.operands(at)
    return isinstance(flow.program.module(at), SkipInit)


def grows(flow: Flow, value: fx.Node) -> bool:
    """Whether ``value`` is a concatenation of what is concatenated again and again."""
    if flow.kind(value) != "concat":
        return False
    parts = flow.operands(value)
    readers = [user for part in (value, *parts) for user in part.users if user is not value]
    return any(flow.kind(each) == "concat" for each in (*parts, *readers))


def is_activated(flow: Flow, total: fx.Node, going: Collection[fx.Node]) -> bool:
    """Whether an activation alone reads ``total``, however it is written, norms that go aside."""
    at = total
    while len(readers := flow.readers(at)) == 1 and readers[0] in going:
        at = readers[0]
    reader = flow.after(at)
    span = () if reader is None else flow.between(at, reader)
    acts = any(flow.kind(each) == "activation" for each in span)
    return acts and is_activation(flow, span)


def late_starts(flow: Flow, blocks: Iterable[ResidualBlock]) -> dict[fx.Node, fx.Node]:
    """What shortcuts with a layer are to read where they read what the branch first activates.

    By the shortcut's first operator.
    """
    found = {}
    for block in blocks:
        if block.layer is not None and all(len(each.users) == 1 for each in block.chain):
            activated = _activated(flow, block.entry)
            if activated is not None and flow.dominates(activated, block.branch):
                found[block.chain[0]] = activated
    return found


def _activated(flow: Flow, value: fx.Node) -> fx.Node | None:
    """What an activation, perhaps behind a norm, makes of ``value``."""
    for start in (value, *(user for user in value.users if flow.kind(user) == "batch_norm")):
        inside = [start]
        for each in inside:
            for user in flow.readers(each):
                mine = set(flow.operands(user)).issubset(inside) and user not in inside
                if mine and is_activation(flow, (user,)):
                    inside.append(user)
        ends = [each for each in inside[1:] if not set(flow.readers(each)).issubset(inside)]
        if len(ends) == 1 and any(flow.kind(each) == "activation" for each in inside):
            return ends[0]
    return None
