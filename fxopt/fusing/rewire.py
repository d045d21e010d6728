"""The graph of a block becomes that of its fused form; what the new layers compute comes after.

The full convolution stands where the depthwise stood, under its name. Pads stay, around the
block's input instead of the expanded map, whose rows and columns are the same.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import replace

import torch.nn.functional as F
from torch import fx

from fxopt.blocks import Gate, InvertedResidual
from fxopt.edit import Edit
from fxopt.pads import Pad, pad_of


def without_expansion(edit: Edit, block: InvertedResidual) -> None:
    """Ratio e ≠ 1: the convolution reads the block's input."""
    assert block.expand is not None
    (entry,) = edit.node(block.expand.conv).all_input_nodes
    nodes = [edit.node(each) for each in (*block.expand.nodes, *block.inner)]
    _reader(edit, block).replace_input_with(nodes[-1], entry)
    _discard(edit, nodes, heir=entry)


def without_projection(edit: Edit, block: InvertedResidual, activated: bool) -> None:
    """Ratio 1: the convolution gives what the projection gave, then activated if so wished."""
    assert block.project is not None
    conv, project = edit.node(block.spatial.conv), edit.node(block.project.conv)
    norm = () if block.spatial.norm is None else (edit.node(block.spatial.norm),)
    activation = [edit.node(each) for each in (*block.activation, *block.final)]
    end = conv if block.project.norm is None else edit.node(block.project.norm)
    edit.replace_uses(project, conv)
    if activated and activation:
        _activate(edit, edit.node(block.spatial.last), activation, end)
        activation = []
    _discard(edit, [*norm, *activation], heir=conv)


def _activate(edit: Edit, start: fx.Node, activation: list[fx.Node], end: fx.Node) -> None:
    """``activation``, which read ``start``, stands after ``end``."""
    for node in reversed(activation):
        node.replace_input_with(start, end)
        end.append(node)
    edit.replace_uses(end, activation[-1])


def without_gate(edit: Edit, gate: Gate) -> None:
    """What was multiplied goes on as it is."""
    source, product = edit.node(gate.source), edit.node(gate.product)
    product.replace_all_uses_with(source)
    _discard(edit, [edit.node(each) for each in (*gate.nodes, gate.product)], heir=source)


def with_gate_on_input(edit: Edit, block: InvertedResidual) -> list[fx.Node]:
    """Ratio 1: the gate pools and multiplies the block's input; the poolings are returned."""
    assert block.gate is not None
    reader = _reader(edit, block)
    entry = reader.all_input_nodes[0]
    source, product = edit.node(block.gate.source), edit.node(block.gate.product)
    inner = {edit.node(each) for each in (*block.spatial.nodes, *block.activation)}
    moved = _after(reader, product, inner)
    product.replace_all_uses_with(source)
    for node in moved:
        for operand in inner.intersection(node.all_input_nodes):
            node.replace_input_with(operand, entry)
        reader.prepend(node)
    reader.replace_input_with(entry, product)
    return [edit.node(each) for each in block.gate.pools]


def pad_before(edit: Edit, conv: fx.Node) -> tuple[fx.Node, Pad]:
    """The pad that ``conv`` reads."""
    node = conv.all_input_nodes[0]
    pad = pad_of(node, edit.module(node) if node.op == "call_module" else None)
    assert pad is not None
    return node, pad


def cropped_pad(edit: Edit, block: InvertedResidual, crop: tuple[int, int]) -> None:
    """A pad for a kernel that lacks ``crop`` rows above and below and columns on each side."""
    node, pad = pad_before(edit, edit.node(block.spatial.conv))
    rows, cols = crop
    fewer = [
        width - by if isinstance(width, int) else
        edit.call_function(operator.sub, (width, by), after=width) if by else width
        for width, by in zip(pad.widths, (cols, cols, rows, rows), strict=True)
    ]  # fmt: skip
    arguments = replace(pad, widths=tuple(fewer)).arguments
    operand = node.all_input_nodes[0]
    edit.replace_uses(node, edit.call_function(F.pad, (operand, *arguments), after=node))


def _reader(edit: Edit, block: InvertedResidual) -> fx.Node:
    return edit.node(block.spatial.conv if block.pad is None else block.pad)


def _after(start: fx.Node, last: fx.Node, inner: set[fx.Node]) -> list[fx.Node]:
    """What ``last`` is made of that stands after ``start`` and is not ``inner``, in order."""
    places = {node: place for place, node in enumerate(last.graph.nodes)}
    found: set[fx.Node] = set()
    todo = [last]
    while todo:
        node = todo.pop()
        if node not in found and node not in inner and places[node] > places[start]:
            found.add(node)
            todo += node.all_input_nodes
    return sorted(found, key=places.__getitem__)


def _discard(edit: Edit, nodes: Iterable[fx.Node], heir: fx.Node) -> None:
    """Take ``nodes`` out; who reads sizes of theirs reads them of ``heir``."""
    gone = list(nodes)
    for node in gone:
        for user in [each for each in node.users if each not in gone]:
            user.replace_input_with(node, heir)
    for node in reversed(gone):
        edit.remove(node)
