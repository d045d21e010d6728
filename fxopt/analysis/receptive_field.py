"""Which rows and columns of an operand a part of a result needs.

Positions are counted along one axis of the whole map, in half-open intervals; columns go as rows
do. What lies outside of the map is padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, order=True)
class Interval:
    """Positions ``[start, stop)``."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def within(self, size: int) -> Interval:
        """The part on a map of ``size`` positions; at least the position that is nearest to it.

        >>> Interval(-3, 5).within(4), Interval(-3, -1).within(4), Interval(6, 9).within(4)
        (Interval(start=0, stop=4), Interval(start=0, stop=1), Interval(start=3, stop=4))
        """
        start = min(max(self.start, 0), size - 1)
        return Interval(start, max(start + 1, min(self.stop, size)))

    def joined(self, other: Interval) -> Interval:
        """The least interval that holds both."""
        return Interval(min(self.start, other.start), max(self.stop, other.stop))


@dataclass(frozen=True)
class Area:
    """Rows and columns of a map."""

    rows: Interval
    cols: Interval

    def within(self, height: int, width: int) -> Area:
        return Area(self.rows.within(height), self.cols.within(width))

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), len(self.cols)


@dataclass(frozen=True)
class Window:
    """What one position of the result reads, along one axis.

    Position ``p`` reads ``kernel`` positions, ``dilation`` apart, from ``p * stride - before`` on;
    of an operand that was enlarged ``scale`` times, it reads what position ``p // scale`` does.
    """

    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    before: int = 0
    scale: int = 1

    @property
    def extent(self) -> int:
        """Positions from the first that is read to the last."""
        return (self.kernel - 1) * self.dilation + 1

    def needs(self, result: Interval) -> Interval:
        """What ``result`` reads, padding included.

        >>> Window(kernel=3, stride=2, before=1).needs(Interval(0, 4))
        Interval(start=-1, stop=8)
        """
        first = result.start // self.scale
        last = (result.stop - 1) // self.scale
        start = first * self.stride - self.before
        return Interval(start, last * self.stride - self.before + self.extent)


@dataclass(frozen=True)
class Local:
    """The windows of a spatially local operator, down and across."""

    rows: Window = Window()
    cols: Window = Window()

    @property
    def windows(self) -> tuple[Window, Window]:
        return self.rows, self.cols

    def needs(self, result: Area) -> Area:
        """What ``result`` reads, padding included."""
        return Area(self.rows.needs(result.rows), self.cols.needs(result.cols))


def cut(size: int, parts: int) -> tuple[Interval, ...]:
    """``size`` positions in ``parts``: with ``q, r = divmod(size, parts)`` the first ``r`` have
    ``q + 1``.

    >>> [len(part) for part in cut(11, 4)]
    [3, 3, 3, 2]
    """
    most, rest = divmod(size, parts)
    stops = [part * most + min(part, rest) for part in range(parts + 1)]
    return tuple(Interval(a, b) for a, b in pairwise(stops))
