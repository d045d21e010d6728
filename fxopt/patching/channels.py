"""Steps of operators that join, part and move channels, each position for itself."""

from __future__ import annotations

import copy
from itertools import accumulate
from typing import Any

import torch
from torch import fx

from fxopt.graphs import Operand
from fxopt.patching import tiles
from fxopt.patching.context import Context, NotLocal, arguments, operand, operand_of, step
from fxopt.patching.stage import Step
from fxopt.program import Program


def cat(program: Program, node: fx.Node, _: Any, context: Context) -> Step:
    given = arguments(node, "tensors", "dim")
    if given.get("dim", 0) % len(program.types[node.name].shape) != 1:
        raise NotLocal("joins along another axis than the channels")
    operands = [Operand(each.name) for each in given["tensors"]]
    return step(program, node, torch.cat, (operands, 1))


def split(program: Program, node: fx.Node, _: Any, context: Context) -> Step:
    """It is its operand; each of its items is a part of that."""
    whole = program.types[operand_of(node).name]
    given = arguments(node, "x", "parts", "dim")
    if given.get("dim", 0) % len(whole.shape) != 1:
        raise NotLocal("splits another axis than the channels")
    return step(program, node, tiles.same, (operand_of(node),), type=whole)


def item(program: Program, node: fx.Node, _: Any, context: Context) -> Step:
    operand: Any
    index: Any
    operand, index = node.args
    whole = program.types[operand.name]
    if isinstance(whole, tuple) and isinstance(index, int):
        stops = list(accumulate(part.shape[1] for part in whole))
        index = (slice(None), slice(stops[index] - whole[index].shape[1], stops[index]))
    parts = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(part, slice) for part in parts) or any(
        part != slice(None) for axis, part in enumerate(parts) if axis != 1
    ):
        raise NotLocal("takes a part of other axes than the channels")
    part = parts[1] if len(parts) > 1 else slice(None)
    bounds = [context.number(bound) for bound in (part.start, part.stop, part.step)]
    if any(isinstance(bound, fx.Node) for bound in bounds):
        raise NotLocal("takes channels that are computed")
    part = slice(*bounds)
    return step(program, node, tiles.channels, (Operand(operand.name), part))


def view(program: Program, node: fx.Node, _: Any, context: Context) -> Step:
    before, after = program.types[operand_of(node).name].shape, program.types[node.name].shape
    kept = (before[0], *before[-2:]) == (after[0], *after[-2:])
    if not kept or min(len(before), len(after)) < 4:
        raise NotLocal(f"views {before} as {after}, not channels alone")
    function = tiles.regroup if context.is_view(node) else tiles.regrouped
    return step(program, node, function, (operand_of(node), tuple(after[1:-2])))


def contiguous(program: Program, node: fx.Node, _: Any, context: Context) -> Step:
    function = tiles.same if context.is_view(node) else torch.clone
    return step(program, node, function, (operand_of(node),))


def transpose(program: Program, node: fx.Node, _: Any, context: Context) -> Step:
    rank = len(program.types[node.name].shape)
    given = arguments(node, "x", "dim0", "dim1")
    first, second = given["dim0"] % rank, given["dim1"] % rank
    order = list(range(rank))
    order[first], order[second] = second, first
    return _permuted(program, node, order, context)


def permute(program: Program, node: fx.Node, _: Any, context: Context) -> Step:
    given: Any = arguments(node, "x", "dims")["dims"]
    dims: Any = given if isinstance(given, (tuple, list)) else node.args[1:]
    return _permuted(program, node, [axis % len(dims) for axis in dims], context)


def _permuted(program: Program, node: fx.Node, order: list[int], context: Context) -> Step:
    """Rows and columns may go elsewhere; samples come first."""
    rank = len(order)
    if order[0] != 0:
        raise NotLocal("moves the axis of the samples")
    rows, cols = (order.index(rank + axis) - rank for axis in context.axes_of(node))
    return step(program, node, torch.permute, (operand_of(node), order), axes=(rows, cols))


def channelwise(program: Program, node: fx.Node, module: Any, context: Context) -> Step:
    """Each position for itself: the same call on a part of the operand."""
    call: Any = (node.args, node.kwargs)
    args, kwargs = fx.node.map_arg(call, operand)
    function: Any = node.target if module is None else copy.deepcopy(module)
    if node.op == "call_method":
        name = str(node.target)
        function = getattr(torch, name, None) or getattr(torch.Tensor, name)
    return step(program, node, function, args, kwargs)
