"""A program as a dataflow graph: what each operator writes and reads on a device.

The graph has the attributes of :mod:`fxopt.analysis.graph`. Operators that a kernel runs together
are one node, called by the last of them, whose value is written. Weights, and what is computed of
them and of shapes alone, lie in flash: they are no nodes. Patched stages are written out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import networkx as nx
from torch import fx

from fxopt.analysis.fusion import Group, groups
from fxopt.analysis.inplace import overwritable, reads_of
from fxopt.analysis.memory_model import MemoryModel
from fxopt.analysis.placement import Place, Placement, placement
from fxopt.analysis.sizes import item_bytes, value_bytes
from fxopt.kernels import InPlace
from fxopt.patching.unroll import unrolled
from fxopt.program import Origin, Program, tensor_types


def dataflow(program: Program, model: MemoryModel) -> nx.DiGraph:
    """The operators of ``program`` as kernels under ``model`` run them, in the program's order.

    Beside the attributes that planning reads, every node has ``kind`` (of its main operator, as in
    the operator table; ``input`` for an input), ``path`` (the user's module that it is of) and
    ``members`` (the program's nodes that it runs). The graph itself has

    ``opaque``
        operators that keep tensors inside of which nothing is known: a peak is "at least".
    ``notes``
        sentences on what the graph takes for granted.
    ``constant_bytes``
        of tensors in flash that are no weights: they are computed once, from weights and shapes.

    It takes time linear in the program's graph.

    >>> import torch
    >>> from fxopt.analysis.memory_model import MemoryModel
    >>> from fxopt.capture import capture
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
    >>> graph = dataflow(capture(net.eval(), torch.zeros(1, 3, 6, 6)), MemoryModel.preset("tflm"))
    >>> [size for _, size in graph.nodes(data="output_bytes")]  # input; convolution and ReLU; pool
    [432, 512, 128]
    """
    placed = placement(unrolled(program), clip_padding=model.fuse_padding)
    graph = nx.DiGraph()
    for group in groups(placed, model):
        name = group.value.name
        graph.add_node(name, **_attributes(placed, group, model))
        graph.add_edges_from((read.operand.name, name) for read in reads_of(placed, group))
    graph.graph["opaque"] = list(dict.fromkeys(_unknown_inside(placed)))
    graph.graph["notes"] = [*_unknown_operators(placed), *_constant_outputs(placed)]
    graph.graph["constant_bytes"] = _constant_bytes(placed, model)
    return graph


def _attributes(placed: Placement, group: Group, model: MemoryModel) -> dict[str, Any]:
    value = placed.values[group.value]
    given = group.main.op == "placeholder"
    description = placed.descriptions.get(group.main)
    type = placed.program.types[group.value.name]
    item = max((item_bytes(each, model) for each in tensor_types(type)), default=1)
    streamed = given and not model.input_resident
    inplace = [] if value.view_of else overwritable(placed, group, model)
    scratch = 0
    if description and description.inplace is InPlace.PLANES and model.inplace_depthwise_scratch:
        over_input = placed.operands[group.main][0].name in inplace
        scratch = description.scratch * item if over_input else 0
    return {
        "output_bytes": 0 if value.view_of or streamed else value_bytes(type, model),
        "scratch_bytes": scratch,
        "inplace": inplace,
        "alias_of": value.view_of.name if value.view_of else None,
        # Buffers are written when everything that reads their old values has run: last.
        "output": group.value in placed.returned or placed.is_kept(group.value),
        "resident": given and model.input_resident,
        "item_bytes": item,
        "kind": description.kind if description else "input",
        "path": placed.program.origins.get(group.main.name, Origin()).path,
        "members": [node.name for node in group.members],
    }


def _constant_bytes(placed: Placement, model: MemoryModel) -> int:
    """Of tensors that are computed before anything runs and that operators or the caller read."""
    roots = {
        placed.values[operand].root: None
        for node in placed.descriptions
        if placed.in_arena(node)
        for operand in placed.operands[node]
        if placed.values[operand].place is Place.FLASH
    }
    roots |= {
        placed.values[node].root: None
        for node in placed.returned
        if placed.values[node].place is Place.FLASH
    }
    types = placed.program.types
    return sum(value_bytes(types[n.name], model) for n in roots if n.op != "get_attr")


def _unknown_inside(placed: Placement) -> Iterator[str]:
    """The modules (or nodes, where the root calls them) that keep tensors of their own."""
    for node, description in placed.descriptions.items():
        if placed.in_arena(node) and (description.kind == "opaque" or description.composite):
            yield placed.program.origins.get(node.name, Origin()).path or node.name


def _unknown_operators(placed: Placement) -> Iterator[str]:
    calls: dict[str, list[fx.Node]] = {}
    for node, description in placed.descriptions.items():
        if description.kind == "other" and placed.in_arena(node):
            module = placed.program.module(node)
            target = type(module) if module is not None else node.target
            calls.setdefault(str(getattr(target, "__name__", target)), []).append(node)
    for operator, nodes in calls.items():
        more = f" and {len(nodes) - 1} more" if len(nodes) > 1 else ""
        yield (
            f"'{operator}' ({placed.program.where(nodes[0])}{more}) is not in the operator table; "
            "it is taken to write a tensor of its own and to keep nothing inside"
        )


def _constant_outputs(placed: Placement) -> Iterator[str]:
    for node, value in placed.values.items():
        if node in placed.returned and value.place is Place.FLASH:
            yield f"the output '{node.name}' depends on no input; it lies in flash"
