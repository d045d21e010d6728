"""Residual blocks, found by structure: a sum of a branch and of a linear shortcut.

``h' = shortcut(h) + branch(h)`` (He et al., "Deep residual learning for image recognition", CVPR
2016, section 3.2): everything in both operands has come through one value; the shortcut is that
value, or a linear map of it with one layer at most, and the branch has more layers. Names say
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from fxopt.flow import Flow
from fxopt.program import Origin, TensorType

LAYERS = ("linear", "conv1d", "conv2d", "conv3d", "depthwise", "conv_transpose")
"""Kinds of layers that multiply by weights."""
_PLAIN = ("pool", "pad", "slice", "dropout", "view", "permute", "copy", "cast", "concat")
_NORMS = ("batch_norm", "norm")


@dataclass(frozen=True)
class ResidualBlock:
    """A residual block.

    Attributes:
        total: the sum.
        entry: the value that branch and shortcut are made of.
        branch: the operand of the sum in which the branch ends.
        shortcut: the other operand.
        chain: what the shortcut does to the entry, in order; empty for the identity.
        layer: the shortcut's convolution, if it has one: a transition.
        path: the user's module that adds; empty for the root.
    """

    total: fx.Node
    entry: fx.Node
    branch: fx.Node
    shortcut: fx.Node
    chain: tuple[fx.Node, ...]
    layer: fx.Node | None
    path: str


def residual_blocks(flow: Flow) -> tuple[ResidualBlock, ...]:
    """The residual blocks of a program, in its order."""
    found = (_block(flow, node) for node in flow.program.nodes)
    blocks = [block for block in found if block is not None]
    # of x + f(x) + g(x) the inner sum is a part of the branch
    parts = {(block.entry, block.branch) for block in blocks}
    return tuple(block for block in blocks if (block.entry, block.total) not in parts)


def _block(flow: Flow, total: fx.Node) -> ResidualBlock | None:
    entry = flow.before(total) if total.target is torch.add else None
    operands = flow.operands(total)
    if entry is None or len(operands) != 2 or not _are_alike(flow, total, operands):
        return None
    chains = [_linear(flow, entry, each) for each in operands]
    counts = [_count(flow, chain) for chain in chains]
    place = min((0, 1), key=lambda each: counts[each])
    branch, shortcut = operands[1 - place], operands[place]
    chain = chains[place]
    if counts[place] > 1 or counts[place] == counts[1 - place] or chain is None:
        return None
    if not _has_layers(flow, entry, branch, int(counts[place]) + 1):
        return None
    if _is_enlarged(flow, entry, branch) or _multiplies(flow, entry, branch):
        return None
    layer = next((each for each in chain if flow.kind(each) in LAYERS), None)
    path = flow.program.origins.get(total.name, Origin()).path
    return ResidualBlock(total, entry, branch, shortcut, chain, layer, path)


def _are_alike(flow: Flow, total: fx.Node, operands: list[fx.Node]) -> bool:
    """Whether a map is added to a map of its shape: no bias or mask, no multiple."""
    types = [flow.program.types[each.name] for each in (total, *operands)]
    return not total.kwargs and types.count(types[0]) == 3


def _linear(flow: Flow, entry: fx.Node, end: fx.Node) -> tuple[fx.Node, ...] | None:
    """What leads from ``entry`` to ``end`` if it is one linear chain."""
    found: list[fx.Node] = []
    at = end
    while at is not entry:
        operands = flow.operands(at)
        known = flow.kind(at) in (*LAYERS, *_PLAIN, *_NORMS) or is_multiple(at)
        if not known or len(operands) != 1 or _takes_channels(flow, at, operands[0]):
            return None
        found.append(at)
        at = operands[0]
    return tuple(reversed(found))


def is_multiple(node: fx.Node) -> bool:
    """Whether ``node`` is a number times a value."""
    numbers = [each for each in node.args if isinstance(each, (int, float))]
    return node.target is torch.mul and len(node.args) == 2 and len(numbers) == 1


def _takes_channels(flow: Flow, node: fx.Node, operand: fx.Node) -> bool:
    """Whether ``node`` is a part of the channels: branch and shortcut are made of all of them."""
    types = flow.program.types
    is_slice = flow.kind(node) == "slice"
    whole = [getattr(types[each.name], "shape", (0, 0))[1:2] for each in (node, operand)]
    return is_slice and (whole[0] != whole[1] or not isinstance(types[node.name], TensorType))


def _count(flow: Flow, chain: tuple[fx.Node, ...] | None) -> float:
    """Layers of a linear chain; without end for what is no such chain."""
    return float("inf") if chain is None else sum(flow.kind(each) in LAYERS for each in chain)


def _has_layers(flow: Flow, entry: fx.Node, branch: fx.Node, count: int) -> bool:
    """Whether there are ``count`` layers in what leads from ``entry`` to ``branch``."""
    seen, todo = {entry}, [branch]
    while todo and count:
        node = todo.pop()
        if node not in seen:
            count -= flow.kind(node) in LAYERS
            todo += flow.operands(node)
        seen.add(node)
    return count == 0


def _multiplies(flow: Flow, entry: fx.Node, branch: fx.Node) -> bool:
    """Whether the branch is ``entry`` times something, as in ``x + x·gate(x)``."""
    return branch.target is torch.mul and entry in flow.operands(branch)


def _is_enlarged(flow: Flow, entry: fx.Node, branch: fx.Node) -> bool:
    """Whether a small map is enlarged for the sum, as in pyramids: that is no residual branch."""
    at = branch
    while at is not entry and flow.kind(at) not in LAYERS:
        operands = flow.operands(at)
        if flow.kind(at) == "resize":
            return True
        if len(operands) != 1:
            return False
        at = operands[0]
    return False
