"""Which operators of a program run in one loop of one kernel, under a memory model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from fxopt.analysis.memory_model import MemoryModel
from fxopt.analysis.placement import Placement
from fxopt.kernels import Fusion


@dataclass(frozen=True)
class Group:
    """Operators that run as one.

    Attributes:
        main: the one in whose loop the others run.
        members: all of them, in the program's order; the last one's value is what is written.
        sums: those among them that add a tensor from elsewhere.
    """

    main: fx.Node
    members: tuple[fx.Node, ...]
    sums: tuple[fx.Node, ...] = ()

    @property
    def value(self) -> fx.Node:
        return self.members[-1]


def groups(placed: Placement, model: MemoryModel) -> tuple[Group, ...]:
    """The nodes whose values lie in the arena, each in one group, in the order of the last members.

    That order is topological: within a group nothing else reads what a member hands on. A
    convolution or linear layer takes in what alone reads its value, so far as ``model`` says.
    """
    rank = _ranks(placed)
    found: dict[fx.Node, Group] = {}
    for node in placed.values:
        if not placed.in_arena(node):
            continue
        group = Group(node, (node,))
        if placed.writes_tile(node):
            found[node] = _writing(placed, found, node)
            continue
        for operand in _producers(placed, model, rank, node):
            host = _host(placed, found, operand, node)
            if host is not None:
                group = _taken_in(placed, found, host, operand, node)
                break
        found[group.value] = group
    return tuple(found.values())


def _producers(
    placed: Placement, model: MemoryModel, rank: Mapping[fx.Node, int], node: fx.Node
) -> tuple[fx.Node, ...]:
    """The operands of ``node`` in whose producer's loop it could run, the best first."""
    if node not in placed.descriptions:
        return ()
    fusion, operands = placed.descriptions[node].fusion, placed.operands[node]
    activations = [operand for operand in operands if placed.in_arena(operand)]
    if fusion is Fusion.RESULT:
        return operands
    if fusion is Fusion.EPILOGUE and model.fuse_epilogues:
        return (operands[0],) if activations == [operands[0]] else ()
    if fusion is Fusion.SUM and model.fuse_add and len(set(activations)) == 2:
        return tuple(sorted(activations, key=rank.__getitem__, reverse=True))
    return ()


def _writing(placed: Placement, found: dict[fx.Node, Group], node: fx.Node) -> Group:
    """The last operator of a tile, which writes its value where it belongs; or a copy of that."""
    value = placed.operands[node][1]
    read_once = placed.readers[value] == (node,) and value not in placed.returned
    if placed.values[value].view_of is not None or not read_once or value not in found:
        return Group(node, (node,))
    host = found.pop(value)
    return Group(host.main, (*host.members, node), host.sums)


def _ranks(placed: Placement) -> dict[fx.Node, int]:
    """Positions in the program; a view that does nothing has that of its operand."""
    ranks: dict[fx.Node, int] = {}
    for position, node in enumerate(placed.values):
        ranks[node] = ranks[_operand(placed, node)] if placed.is_no_op(node) else position
    return ranks


def _operand(placed: Placement, view: fx.Node) -> fx.Node:
    operand = placed.values[view].view_of
    assert operand is not None
    return operand


def _host(
    placed: Placement, found: Mapping[fx.Node, Group], operand: fx.Node, node: fx.Node
) -> Group | None:
    """The group that produces ``operand`` and can take in ``node``, its only reader."""
    reader = node
    while True:
        if operand in placed.returned or placed.readers[operand] != (reader,):
            return None
        if not placed.is_no_op(operand):
            break
        reader, operand = operand, _operand(placed, operand)
    group = found[operand]
    if placed.writes_tile(group.value):  # its loop runs over one tile only
        return None
    types = placed.program.types
    if group.main not in placed.descriptions or types[operand.name] != types[node.name]:
        return None
    into_any = placed.descriptions[node].fusion is Fusion.RESULT
    is_host = placed.descriptions[group.main].fusion is Fusion.HOST
    return group if is_host or into_any else None


def _taken_in(
    placed: Placement, found: dict[fx.Node, Group], host: Group, operand: fx.Node, node: fx.Node
) -> Group:
    """``host`` with ``node`` and the views between them that do nothing; ``found`` loses both."""
    between: list[fx.Node] = []
    while operand is not host.value:
        between.append(operand)
        operand = _operand(placed, operand)
    for value in (host.value, *between):
        del found[value]
    sums = (node,) if placed.descriptions[node].fusion is Fusion.SUM else ()
    return Group(host.main, (*host.members, *reversed(between), node), (*host.sums, *sums))
