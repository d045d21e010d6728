"""Where the value of every node of a program lies on a device: flash, kept state, or the arena."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxopt.analysis.padding import clipped_pads, known_sizes
from fxopt.analysis.uses import Uses, uses
from fxopt.graphs import member
from fxopt.operators import Storage
from fxopt.program import Program, TensorType, tensor_types


class Place(enum.Enum):
    """Where a value lies.

    ``FLASH``: weights, and what follows from them and from shapes alone, known before anything
    runs; ``STATE``: buffers that the model writes, kept between calls; ``ARENA``: what is computed
    from inputs, state or random draws; ``NOWHERE``: a number, no tensor.
    """

    FLASH = "flash"
    STATE = "state"
    ARENA = "arena"
    NOWHERE = "nowhere"


@dataclass(frozen=True)
class Value:
    """What one node gives.

    Attributes:
        place: where it lies.
        root: the node that writes the tensor in whose bytes it lies.
        view_of: the operand that it is a view of; None for a tensor of its own.
        whole: it is all of that tensor, its elements in their order.
    """

    place: Place
    root: fx.Node
    view_of: fx.Node | None = None
    whole: bool = True


@dataclass(frozen=True)
class Placement(Uses):
    """Who reads which value, and where each lies.

    Attributes:
        values: of every node but the output.
    """

    values: Mapping[fx.Node, Value]

    def in_arena(self, node: fx.Node) -> bool:
        return self.values[node].place is Place.ARENA

    def is_no_op(self, node: fx.Node) -> bool:
        """Whether ``node`` gives its operand as it is (dropout, a cast to the same dtype)."""
        value, types = self.values[node], self.program.types
        return (
            value.view_of is not None
            and not self.writes_tile(node)
            and value.whole
            and isinstance(types[node.name], TensorType)
            and types[node.name] == types[value.view_of.name]
        )

    def writes_tile(self, node: fx.Node) -> bool:
        """Whether ``node`` writes into a part of a tensor that is there."""
        known = self.descriptions.get(node)
        return known is not None and known.storage is Storage.INTO

    def is_kept(self, node: fx.Node) -> bool:
        """Whether ``node`` writes a buffer of the model's."""
        known = self.descriptions.get(node)
        return known is not None and known.storage is Storage.KEPT


def placement(program: Program, *, clip_padding: bool) -> Placement:
    """Where the values of ``program`` lie, in time linear in its graph.

    With ``clip_padding`` a constant pad that only convolutions and pools read is a view of its
    operand: their kernels supply the constant at the border.
    """
    used = uses(program, known_sizes(program) if clip_padding else {})
    clipped = set(clipped_pads(used)) if clip_padding else set()
    state = _written_buffers(used)
    values: dict[fx.Node, Value] = {}
    for node in used.operands:
        if node.op == "placeholder":
            tensor = isinstance(program.types[node.name], TensorType)
            values[node] = Value(Place.ARENA if tensor else Place.NOWHERE, node)
        elif node.op == "get_attr":
            values[node] = Value(Place.STATE if node in state else Place.FLASH, node)
        elif used.descriptions[node].kind == "shape":
            values[node] = Value(Place.NOWHERE, node)
        elif used.descriptions[node].storage is Storage.KEPT:
            values[node] = _kept(values, node, source=used.operands[node][1])
        elif node in clipped:
            under = values[used.operands[node][0]]
            values[node] = Value(under.place, under.root, used.operands[node][0], under.whole)
        else:
            values[node] = _computed(used, values, node)
    return Placement(**vars(used), values=values)


def _kept(values: Mapping[fx.Node, Value], node: fx.Node, source: fx.Node) -> Value:
    """The buffer is no part of the arena; what goes into it must last until it is written."""
    value = values[source]
    if value.place is not Place.ARENA:
        return Value(Place.STATE, node)
    return Value(Place.ARENA, value.root, source, whole=False)


def _computed(used: Uses, values: Mapping[fx.Node, Value], node: fx.Node) -> Value:
    layout, types = used.layout[node], used.program.types
    if layout.view_of is not None:
        under = values[layout.view_of]
        all_of_it = _bytes(types[node.name]) == _bytes(types[under.root.name])
        whole = all_of_it and not layout.rearranged
        return Value(under.place, under.root, layout.view_of, whole)
    foreseen = all(
        values[operand].place in (Place.FLASH, Place.NOWHERE) for operand in used.operands[node]
    )
    drawn = used.descriptions[node].kind in ("random", "opaque", "buffer")
    return Value(Place.FLASH if foreseen and not drawn else Place.ARENA, node)


def _bytes(value: Any) -> int:
    return sum(type.bytes for type in tensor_types(value))


def _written_buffers(used: Uses) -> set[fx.Node]:
    """The nodes that read a buffer into which the program writes."""
    model = used.program.graph_module
    written = {
        id(member(model, str(used.operands[node][0].target)))
        for node, description in used.descriptions.items()
        if description.storage is Storage.KEPT
    }
    return {
        node
        for node in used.descriptions
        if node.op == "get_attr" and id(member(model, str(node.target))) in written
    }
