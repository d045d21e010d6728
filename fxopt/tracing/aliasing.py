"""Which traced tensors share storage, so that a write to one is seen through the others.

The user's code may overwrite tensors (``x += y``, ``relu_``, ``x[:, 0] = 0``) that have views. The
graph is pure. Each traced tensor has a :class:`Value`: the node that computes it now, and for a
view how it follows from its parent. A write replaces the node, rebuilds the parents up to the
base, and makes every other view of that base stale: read again, it is replayed from its parent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

Replay = Callable[[fx.Node], fx.Node]
Scatter = Callable[[fx.Node, fx.Node], fx.Node]


@dataclass(eq=False)
class Storage:
    """One block of memory of the user's; ``version`` counts the writes to it."""

    base: Value | None = None
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

    def base(self) -> Value:
        """The value that this one is a view of, or itself."""
        value = self
        while value.view is not None:
            value = value.view.parent
        return value

    def read(self) -> fx.Node:
        """The node that computes what the tensor holds now."""
        if self.version < self.storage.version and self.view is not None:
            self.current = self.view.replay(self.view.parent.read())
            self.version = self.storage.version
        return self.current

    def write(self, node: fx.Node) -> None:
        """The tensor now holds what ``node`` computes, and so does all that shares its memory."""
        chain = [(self, node)]
        value = self
        while value.view is not None:
            parent = value.view.parent
            node = value.view.scatter(parent.read(), node)
            chain.append((parent, node))
            value = parent
        self.storage.version += 1
        for changed, new in chain:
            changed.current, changed.version = new, self.storage.version


class Storages:
    """The storages of all traced tensors, found by the identity of their meta twin's memory."""

    def __init__(self) -> None:
        self._by_memory: dict[int, Storage] = {}

    def of(self, tensor: torch.Tensor) -> Storage:
        """The storage of ``tensor``, which must stay alive while this object is used."""
        return self._by_memory.setdefault(tensor.untyped_storage()._cdata, Storage())
