"""Which operators of a program write a tensor, and which give a view of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from fxopt.operators import Description, Storage, reads
from fxopt.program import Program, tensor_types


@dataclass(frozen=True)
class Layout:
    """Where the result of one node lies.

    Attributes:
        writes: it writes a tensor.
        view_of: the operand that its result is a view of, or None.
        rearranged: its elements lie apart, or in another order than their own.
    """

    writes: bool
    view_of: fx.Node | None
    rearranged: bool


_OUTSIDE = Layout(writes=False, view_of=None, rearranged=False)


def layouts(program: Program, descriptions: Mapping[fx.Node, Description]) -> dict[fx.Node, Layout]:
    """Where every node's result lies, in time linear in the graph.

    ``descriptions`` has every node but the inputs and the output, whose results are not the
    program's to place.
    """
    found: dict[fx.Node, Layout] = {}
    for node in program.nodes:
        if node not in descriptions:
            found[node] = _OUTSIDE
            continue
        storage = descriptions[node].storage
        operand = _first_tensor(program, reads(node, descriptions[node]))
        rearranged = operand is not None and found[operand].rearranged
        if storage in (Storage.OWN, Storage.KEPT) or (storage is Storage.RESHAPED and rearranged):
            found[node] = Layout(writes=True, view_of=None, rearranged=False)
        elif storage is Storage.INTO:
            into, _ = reads(node, descriptions[node])
            found[node] = Layout(writes=False, view_of=into, rearranged=False)
        else:
            rearranges = storage is Storage.REARRANGED or rearranged
            found[node] = Layout(writes=False, view_of=operand, rearranged=rearranges)
    return found


def _first_tensor(program: Program, operands: tuple[fx.Node, ...]) -> fx.Node | None:
    """The first of ``operands`` that is a tensor or holds one, not a number."""
    for operand in operands:
        if any(True for _ in tensor_types(program.types[operand.name])):
            return operand
    return None
