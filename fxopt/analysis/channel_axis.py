"""The axis of a value along which its channels lie."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from fxopt.flow import Flow
from fxopt.graphs import call_node
from fxopt.program import TensorType
from fxopt.residuals import LAYERS

_SIZES = (2, 3, 5, 7, 11, 13, 17)
"""Sizes that tell axes apart."""


def channel_axis(flow: Flow, value: fx.Node) -> int:
    """Where the outputs of the layer are that ``value`` comes from: 1 where none is found."""
    path: list[fx.Node] = []
    at: fx.Node | None = value
    while at is not None and flow.kind(at) not in LAYERS:
        path.append(at)
        at = next((each for each in flow.operands(at) if len(_shape(flow, each)) >= 2), None)
    if at is None:
        return 1
    axis = len(_shape(flow, at)) - 1 if flow.kind(at) == "linear" else 1
    before = at
    for node in reversed(path):
        axis = _moved(flow, before, node, axis)
        before = node
    return axis


def _moved(flow: Flow, operand: fx.Node, node: fx.Node, axis: int) -> int:
    """Where an axis of ``operand`` is in ``node``."""
    before, after = _shape(flow, operand), _shape(flow, node)
    if flow.kind(node) == "permute" and len(before) <= len(_SIZES):
        probe = torch.empty(_SIZES[: len(before)], device="meta")
        read: Any = (node.args, node.kwargs)
        args, kwargs = fx.node.map_arg(read, lambda each: probe)
        found = call_node(node, args, kwargs, lambda path: nn.Identity())
        return list(found.shape).index(_SIZES[axis])
    if before[: axis + 1] == after[: axis + 1]:
        return axis
    from_end = axis - len(before)
    kept = -from_end <= len(after) and before[from_end:] == after[from_end:]
    return len(after) + from_end if kept else min(axis, len(after) - 1)


def _shape(flow: Flow, node: fx.Node) -> tuple[int, ...]:
    type = flow.program.types.get(node.name)
    return type.shape if isinstance(type, TensorType) else ()
