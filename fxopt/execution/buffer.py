"""The one buffer in which all tensors of a program lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from fxopt.errors import InvalidPlanError
from fxopt.graphs import mapped
from fxopt.program import TensorType, ValueType, tensor_types

POISON = 0xFF
"""A byte: four or eight of them are NaN as floating point, -1 as integers."""

Range = tuple[int, int]
"""Bytes ``[first, last)``."""


class Buffer:
    """``size`` bytes on ``device``, at first all poison; tensors in it are contiguous."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._bytes = torch.full((size,), POISON, dtype=torch.uint8, device=device)

    def at(self, name: str, offset: int, type: ValueType) -> Any:
        """The tensors of ``type`` from ``offset`` on; of several the widest elements come first.

        Raises:
            InvalidPlanError: they do not lie in the buffer, or not at multiples of their elements.
        """
        widest_first = sorted(tensor_types(type), key=lambda each: -each.dtype.itemsize)
        offsets: dict[int, int] = {}
        for each in widest_first:
            offsets[id(each)] = offset
            offset += each.bytes

        def placed(value: Any) -> Any:
            if isinstance(value, TensorType):
                return self._tensor(name, offsets[id(value)], value)
            return mapped(placed, value)

        return placed(type)

    def _tensor(self, name: str, offset: int, type: TensorType) -> torch.Tensor:
        if offset < 0 or offset + type.bytes > len(self._bytes):
            where = f"bytes [{offset}, {offset + type.bytes})"
            raise InvalidPlanError(
                f"'{name}' ({where}) does not lie in the arena of {len(self._bytes)} bytes"
            )
        if offset % type.dtype.itemsize:
            raise InvalidPlanError(f"'{name}' is misaligned: offset {offset} for {type}")
        return self._bytes[offset : offset + type.bytes].view(type.dtype).view(type.shape)

    def poison(self, dead: Range, live: Sequence[Range] = ()) -> None:
        """Overwrite what no live tensor has of some bytes."""
        first = dead[0]
        for low, high in [*sorted(live), (dead[1], dead[1])]:
            if first < min(low, dead[1]):
                self._bytes[first : min(low, dead[1])] = POISON
            first = max(first, high)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the elements of ``tensor`` lie in the buffer."""
        mine = self._bytes.untyped_storage().data_ptr()
        return not tensor.numel() or tensor.untyped_storage().data_ptr() == mine


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor inside a value."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_of(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)
