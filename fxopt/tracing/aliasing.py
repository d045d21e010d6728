"""Which traced tensors share storage, so that a write to one is seen through the others.

The user's code may overwrite tensors (``x += y``, ``relu_``, ``x[:, 0] = 0``) that have views. The
graph is pure. Each traced tensor has a :class:`Value`: the node that computes it now, and for a
view how it follows from its parent. A write replaces the node, rebuilds the parents up to the
base, and makes every other view of that base stale: read again, it is replayed from its parent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

Replay = Callable[[fx.Node], fx.Node]
Scatter = Callable[[fx.Node, fx.Node], fx.Node]


@dataclass(eq=False)
class Storage:
    """One block of memory of the user's; ``version`` counts the writes to it."""

    settle: Callable[[Any], None]
    version: int = 0
    doubts: list[Doubt] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Doubt:
    """Two values share memory for the example's layout, and for another they may not (or reverse).

    It matters only once one is read after the other was overwritten; then ``guard`` must hold.
    ``other`` is the other storage, where they are two, and ``version`` its writes at the time.
    """

    guard: Any
    other: Storage | None = None
    version: int = 0


@dataclass(eq=False)
class View:
    """How a value follows from ``parent``: ``replay(parent)`` computes it, ``scatter(parent, it)``
    computes the parent after the value was overwritten."""

    parent: Value
    replay: Replay
    scatter: Scatter


@dataclass(eq=False)
class Value:
    """A tensor of the user's code while it is traced: its meta twin and its current node."""

    tensor: torch.Tensor
    current: fx.Node
    storage: Storage
    view: View | None = None
    version: int = 0
    source: str = ""
    """Name of the parameter, buffer or input that it is, or empty."""
    fresh: int = 0
    """Version of its storage when it was made or itself overwritten."""
    learns: bool = False
    """Whether gradients flow through it."""

    def base(self) -> Value:
        """The value that this one is a view of, or itself."""
        value = self
        while value.view is not None:
            value = value.view.parent
        return value

    def read(self) -> fx.Node:
        """The node that computes what the tensor holds now."""
        for doubt in self.storage.doubts:
            if doubt.other is None:
                matters = self.fresh < self.storage.version
            else:
                matters = doubt.version < doubt.other.version
            if matters:
                self.storage.settle(doubt.guard)
        if self.version < self.storage.version and self.view is not None:
            self.current = self.view.replay(self.view.parent.read())
            self.version = self.storage.version
        return self.current

    def write(self, node: fx.Node, *, learns: bool) -> None:
        """The tensor now holds what ``node`` computes, and so does all that shares its memory."""
        chain = [(self, node)]
        value = self
        while value.view is not None:
            parent = value.view.parent
            node = value.view.scatter(parent.read(), node)
            chain.append((parent, node))
            value = parent
        self.storage.version += 1
        self.fresh = self.storage.version
        for changed, new in chain:
            changed.current, changed.version = new, self.storage.version
            changed.learns = changed.learns or learns


class Storages:
    """The storages of all traced tensors, found by the identity of their meta twin's memory."""

    def __init__(self, settle: Callable[[Any], None]) -> None:
        self._settle = settle
        self._by_memory: dict[int, Storage] = {}

    def of(self, tensor: torch.Tensor) -> Storage:
        """The storage of ``tensor``, which must stay alive while this object is used."""
        memory = tensor.untyped_storage()._cdata
        if memory not in self._by_memory:
            self._by_memory[memory] = Storage(self._settle)
        return self._by_memory[memory]

    def doubt(self, guard: Any, first: Storage, second: Storage) -> None:
        """Remember that layouts decide whether values of these storages share memory."""
        if first is second:
            first.doubts.append(Doubt(guard))
        else:
            first.doubts.append(Doubt(guard, second, second.version))
            second.doubts.append(Doubt(guard, first, first.version))
