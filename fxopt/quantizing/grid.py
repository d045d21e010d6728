"""From the range of a tensor to its integer grid."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Limits:
    """Where a clamp cuts a tensor off; 0 lies within."""

    low: float = -math.inf
    high: float = math.inf

    def within(self, other: Limits) -> Limits:
        """What is left of these limits inside of the others."""
        return Limits(*(min(max(end, other.low), other.high) for end in (self.low, self.high)))


EVERYTHING = Limits()


class AffineGrid:
    """``scale·(q - zero_point)`` for the whole numbers of ``bits`` bits, negative ones included."""

    scale: Any
    zero_point: Any
    bits: int

    @property
    def low(self) -> int:
        """The least ``q``."""
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        """The greatest ``q``."""
        return (1 << (self.bits - 1)) - 1

    @property
    def range(self) -> tuple[float, float]:
        """The least and the greatest number."""
        scale, zero = float(self.scale), int(self.zero_point)
        return (self.low - zero) * scale, (self.high - zero) * scale


@dataclass(frozen=True)
class Grid(AffineGrid):
    """A grid as a value; ``scale`` is a float32 number."""

    scale: float
    zero_point: int
    bits: int


def grid_of(low: float, high: float, bits: int, limits: Limits = EVERYTHING) -> Grid:
    """The grid for values from ``low`` to ``high`` and 0, none of its numbers outside ``limits``.

    A tensor that is 0 throughout has the scale 1.

    >>> grid_of(0.5, 6.0, 8, Limits(0.0, 6.0)).range[0]
    0.0
    """
    low, high = (min(max(end, limits.low), limits.high) for end in (min(low, 0.0), max(high, 0.0)))
    least, most = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if low == high:
        return Grid(1.0, most if limits.high <= 0 else least if limits.low >= 0 else 0, bits)
    scale = max((high - low) / (most - least), _TINY)
    zero = min(max(least - round(low / scale), least), most)
    # after the rounding of the zero point an end may lie beyond the limits
    if zero > least:
        scale = min(scale, limits.low / (least - zero))
    if zero < most:
        scale = min(scale, limits.high / (most - zero))
    return Grid(_not_above(max(scale, _TINY)), zero, bits)


def _not_above(number: float) -> float:
    """The greatest float32 number that is not above ``number``, so that no end passes a limit."""
    found = torch.tensor(min(number, sys.float_info.max), dtype=torch.float32)
    if float(found) > number:
        found = torch.nextafter(found, torch.zeros(()))
    return float(found)
