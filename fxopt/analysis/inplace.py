"""Which operands the result of a group of operators may be written over, under a memory model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from fxopt.analysis.fusion import Group
from fxopt.analysis.memory_model import MemoryModel
from fxopt.analysis.placement import Placement
from fxopt.analysis.sizes import item_bytes, value_bytes
from fxopt.kernels import InPlace
from fxopt.program import TensorType


@dataclass(frozen=True)
class Read:
    """One operand of one member of a group, written outside of the group."""

    member: fx.Node
    operand: fx.Node


def reads_of(placed: Placement, group: Group) -> Iterator[Read]:
    inside = set(group.members)
    for member in group.members:
        for operand in placed.operands[member]:
            if placed.in_arena(operand) and operand not in inside:
                yield Read(member, operand)


def overwritable(placed: Placement, group: Group, model: MemoryModel) -> list[str]:
    """The operands over which the group may write its result, each once.

    Not one whose tensor the group reads in any other way than element by element in that order,
    or plane by plane: it would read what it has overwritten.
    """
    reads = list(reads_of(placed, group))
    found: dict[str, None] = {}
    for read in reads:
        if not _may_overwrite(placed, group, model, read):
            continue
        root = placed.values[read.operand].root
        of_root = [other for other in reads if placed.values[other.operand].root is root]
        harmless = len(of_root) == 1 or all(_elementwise(placed, other) for other in of_root)
        if harmless and _takes_bytes(placed, model, root):
            found[read.operand.name] = None
    return list(found)


def _may_overwrite(placed: Placement, group: Group, model: MemoryModel, read: Read) -> bool:
    """Whether ``model`` lets the reading member write over this operand."""
    inplace = placed.descriptions[read.member].inplace
    first = read.operand is placed.operands[read.member][0]
    if inplace is InPlace.PLANES:
        return model.inplace_depthwise and first and _fits(placed, model, read)
    if not _fits(placed, model, read) or not _same_shape(placed, read):
        return False
    if read.member in group.sums or _written_over(placed, model, read):
        return True
    if inplace is InPlace.FIRST:
        # The user's code overwrote it: there is no other way to such an operator.
        return first and (model.inplace_elementwise or model.inplace_as_written)
    return inplace is InPlace.ELEMENTWISE and model.inplace_elementwise


def _fits(placed: Placement, model: MemoryModel, read: Read) -> bool:
    """Whether the operand is a whole tensor of elements as large as the result's."""
    types = placed.program.types
    operand, result = types[read.operand.name], types[read.member.name]
    return (
        placed.values[read.operand].whole
        and isinstance(operand, TensorType)
        and isinstance(result, TensorType)
        and item_bytes(operand, model) == item_bytes(result, model)
    )


def _same_shape(placed: Placement, read: Read) -> bool:
    types = placed.program.types
    return bool(types[read.operand.name].shape == types[read.member.name].shape)


def _elementwise(placed: Placement, read: Read) -> bool:
    """Whether every element is read at its place, just before the result's is written there.

    Two whole views of one tensor, of which one has the result's shape, differ by axes of size 1 at
    most where the other fits the result too.
    """
    inplace = placed.descriptions[read.member].inplace
    return inplace is InPlace.ELEMENTWISE and placed.values[read.operand].whole


def _written_over(placed: Placement, model: MemoryModel, read: Read) -> bool:
    """Whether the user's code wrote the member's result over this operand."""
    first = read.operand is placed.operands[read.member][0]
    return model.inplace_as_written and first and read.member in placed.overwriting


def _takes_bytes(placed: Placement, model: MemoryModel, root: fx.Node) -> bool:
    """Whether there is memory of the operand to take over, and it is the network's own."""
    if root.op == "placeholder" and (model.inplace_as_written or not model.input_resident):
        return False
    return value_bytes(placed.program.types[root.name], model) > 0
