"""Offsets for blocks of which some must lie apart, in as few bytes as a search finds.

Two searches, both ours in the details. *Greedy*: block after block at the lowest offset at which
it fits, or in the smallest gap, in several orders. *Guided ejection*: under a capacity a bit
smaller than the best packing, a block without a place goes where the blocks that it ousts weigh
least; those look for a place in turn, and a block weighs more the more often it had to oust. The
idea is from vehicle routing (Y. Nagata, O. Bräysy, "A powerful route minimization heuristic for
the vehicle routing problem with time windows", Operations Research Letters 37, 2009). A step costs
one look at the neighbours of one block; climbing over greedy orders pays for all blocks at a step.
"""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

EFFORT = 2_000_000
"""Visits of neighbours that a packing may cost; a million takes about a second."""

EFFORT_PER_PAIR = 1_000
"""The same for each block and each pair: so small a problem is searched through long before."""


@dataclass(frozen=True)
class Apart:
    """What keeps a block away from another: it is ``below`` bytes under it or ``above`` over it.

    Attributes:
        other: position of the other block.
        below: bytes of the block itself that the other must not touch.
        above: bytes of the other that the block must not touch.
    """

    other: int
    below: int
    above: int


@dataclass(frozen=True)
class Block:
    """Bytes with one offset.

    Attributes:
        size_bytes: from its offset to its end.
        alignment: its offset is a multiple of it.
        start: the first step at which it is there.
        steps: for how many it is there.
        area: its bytes summed over the steps.
        apart: the blocks that share a step with it.
    """

    size_bytes: int
    alignment: int
    start: int
    steps: int
    area: int
    apart: tuple[Apart, ...]


def pack(blocks: Sequence[Block], lower_bound: int) -> list[int]:
    """An offset for each of ``blocks``; the search ends early where they end at ``lower_bound``."""
    best, size = [0] * len(blocks), None
    for offsets in _greedy(blocks):
        found = extent(blocks, offsets)
        if size is None or found < size:
            best, size = offsets, found
        if size <= lower_bound:
            return best
    pairs = sum(len(block.apart) for block in blocks) // 2
    effort = min(EFFORT, EFFORT_PER_PAIR * (len(blocks) + pairs))
    return _improved(blocks, best, lower_bound, effort)


def extent(blocks: Sequence[Block], offsets: Sequence[int]) -> int:
    """Where the last of ``blocks`` ends."""
    return max(
        (at + block.size_bytes for at, block in zip(offsets, blocks, strict=True)), default=0
    )


def _greedy(blocks: Sequence[Block]) -> Iterator[list[int]]:
    """Packings by size, area, steps and start, each by first fit and by best fit."""
    keys = (
        [(-block.size_bytes, -block.steps) for block in blocks],
        [(-block.area, -block.steps) for block in blocks],
        [(-block.steps, -block.size_bytes) for block in blocks],
        [(block.start, -block.size_bytes) for block in blocks],
    )
    for key in keys:
        order = sorted(range(len(blocks)), key=key.__getitem__)
        for best_fit in (False, True):
            yield _placed(blocks, order, best_fit)


def _placed(blocks: Sequence[Block], order: Sequence[int], best_fit: bool) -> list[int]:
    offsets = [-1] * len(blocks)
    for index in order:
        offsets[index] = _fit(blocks[index], offsets, best_fit)
    return offsets


def _fit(block: Block, offsets: Sequence[int], best_fit: bool) -> int:
    """The lowest offset clear of what is placed, or the one in the smallest gap."""
    unit = block.alignment
    taken = sorted(
        (offsets[apart.other] - apart.below, offsets[apart.other] + apart.above)
        for apart in block.apart
        if offsets[apart.other] >= 0
    )
    at, gap, smallest = 0, -1, -1
    for low, high in taken:
        if at <= low:
            if not best_fit:
                return at
            if gap < 0 or low - at < smallest:
                gap, smallest = at, low - at
        if high > at:
            at = -(-high // unit) * unit
    return at if gap < 0 else gap


def _improved(
    blocks: Sequence[Block], offsets: list[int], lower_bound: int, effort: int
) -> list[int]:
    """The packing after guided ejection under ever smaller capacities."""
    search, best, size = _Ejection(blocks, effort), offsets, extent(blocks, offsets)
    share = 1.0  # of what lies above the bound, to be saved next: at first all
    while size > lower_bound and search.effort > 0:
        capacity = max(lower_bound, min(size - 1, int(size - share * (size - lower_bound))))
        found = search.under(capacity, best, effort // 16)
        if found is None:
            share = 0.25 if share == 1.0 else share / 2
        else:
            best, size = found, extent(blocks, found)
    return best


class _Ejection:
    """Guided ejection; what it learned about weights serves the next capacity."""

    def __init__(self, blocks: Sequence[Block], effort: int) -> None:
        self.effort = effort
        self._blocks = blocks
        self._apart = [[(a.other, a.below, a.above) for a in block.apart] for block in blocks]
        self._weights = [len(block.apart) for block in blocks]
        self._random = random.Random(0)

    def under(self, capacity: int, start: Sequence[int], effort: int) -> list[int] | None:
        """A packing that ends at ``capacity``, from ``start`` on, or None if effort ran out."""
        ends = [at + block.size_bytes for at, block in zip(start, self._blocks, strict=True)]
        offsets = [at if end <= capacity else -1 for at, end in zip(start, ends, strict=True)]
        homeless = deque(index for index, at in enumerate(offsets) if at < 0)
        least = max(0, self.effort - effort)
        while homeless:
            if self.effort <= least:
                return None
            index = homeless.popleft()
            for other in self._settle(index, offsets, capacity):
                offsets[other] = -1
                homeless.append(other)
        return offsets

    def _settle(self, index: int, offsets: list[int], capacity: int) -> list[int]:
        """Give the block a place; the blocks that lie in its way."""
        placed = [
            (other, offsets[other] - below, offsets[other] + above)
            for other, below, above in self._apart[index]
            if offsets[other] >= 0
        ]
        self.effort -= len(placed) + 8
        at = self._cheapest(index, placed, capacity)
        offsets[index] = at
        ousted = [other for other, low, high in placed if low < at < high]
        if ousted:
            self._weights[index] += len(self._apart[index])
        return ousted

    def _cheapest(self, index: int, placed: list[tuple[int, int, int]], capacity: int) -> int:
        """The lowest free place, or one where the blocks in the way weigh least."""
        block, weights = self._blocks[index], self._weights
        unit, last = block.alignment, capacity - block.size_bytes
        lows = sorted([(low, weights[other]) for other, low, _ in placed])
        highs = sorted([(high, weights[other]) for other, _, high in placed])
        entered = [0, *accumulate(weight for _, weight in lows)]
        left = [0, *accumulate(weight for _, weight in highs)]
        low_ends, high_ends = [low for low, _ in lows], [high for high, _ in highs]
        places = {0, last // unit * unit}
        places.update([low // unit * unit for low in low_ends])
        places.update([-(-high // unit) * unit for high in high_ends])
        least, cheapest = -1, [0]
        for at in sorted(places):
            if not 0 <= at <= last:
                continue
            weight = entered[bisect_left(low_ends, at)] - left[bisect_right(high_ends, at)]
            if weight == 0:
                return at
            if least < 0 or weight < least:
                least, cheapest = weight, [at]
            elif weight == least:
                cheapest.append(at)
        return self._random.choice(cheapest)
