"""What memory planning gives: an order, lifetimes, offsets. Sizes are in bytes, times in steps."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

NodeId = Hashable
"""A node of a dataflow graph: a string or a number in JSON, anything hashable in Python."""


@dataclass(frozen=True)
class Schedule:
    """An order in which the operators run.

    Attributes:
        order: every node, each after its predecessors; its position is its step.
        peak_bytes: the most bytes that are needed at any step.
        lower_bound_bytes: no order of the graph has a smaller peak.
        optimal: the two are equal: no order is better.
    """

    order: tuple[NodeId, ...]
    peak_bytes: int
    lower_bound_bytes: int
    optimal: bool


@dataclass(frozen=True)
class Scratch:
    """The id of the scratch memory that a node needs while it runs, one more tensor to place."""

    node: NodeId

    def __str__(self) -> str:
        return f"{self.node} (scratch)"


@dataclass(frozen=True)
class Lifetime:
    """A tensor and the steps at which its bytes must be kept.

    Attributes:
        id: the node that writes it, or whose :class:`Scratch` memory it is.
        size_bytes: what it takes.
        start, end: it is live at the steps ``[start, end)``.
        item_bytes: of one element; its offset is a multiple of it.
        takes_over: the tensor whose storage it takes over, at the same offset, or None. The two
            share bytes at the step at which this one is written and that one is read last.
    """

    id: NodeId
    size_bytes: int
    start: int
    end: int
    item_bytes: int = 1
    takes_over: NodeId | None = None


@dataclass(frozen=True)
class ArenaPlan:
    """A place for every tensor in one buffer.

    Attributes:
        offsets: of the first byte of each tensor, from the start of the buffer.
        size_bytes: of the buffer.
        lower_bound_bytes: no placement of these lifetimes needs less.
        optimal: the two are equal.
    """

    offsets: Mapping[NodeId, int]
    size_bytes: int
    lower_bound_bytes: int
    optimal: bool
