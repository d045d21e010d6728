"""Offsets for blocks of which some are live together, in as few bytes as a search finds.

*Greedy*: block after block at the lowest offset at which it fits, or in the smallest gap, in
several orders; of a few blocks in all orders. *Skyline*: is there a packing in so many bytes? Over
each live set what is placed reaches up to a floor, below which nothing is left to place. Where the
floor is lower than on both sides, some block comes to lie on it, or none and the floor rises; as
soon as a live set's floor and what it has still to place exceed the capacity, the last choice was
wrong. Parts of the skyline without a common block are searched one by one. If nothing is left to
choose, no packing is so small: a lower bound.

The floors, and orders by more than one key, are from MiniMalloc (M. D. Moffitt, "MiniMalloc: a
lightweight memory allocator for hardware-accelerated machine learning", ASPLOS 2023), sections 4
and 5; to fill the skyline's valleys, blocks of several sizes and the restarts are ours.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from math import gcd
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

EFFORT = 8_000_000
"""What the searches may cost, in about a microsecond."""

EFFORT_PER_SECOND = 1_500_000
"""On the slower machines of today."""

EFFORT_PER_PAIR = 2_000
"""The same for each block and each pair that is live together: so few are searched through before.
"""

FEW = 7
"""Up to so many blocks all orders are tried."""

PLACED = 1 << 60
"""In place of the least offset of what has its place, above all offsets."""

Ints: TypeAlias = npt.NDArray[np.int64]


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
        size_bytes: from its offset to its end, at most.
        alignment: its offset is a multiple of it.
        start: the first step at which it is there.
        steps: for how many it is there.
        area: its bytes summed over the steps.
        apart: the blocks that are live together with it.
    """

    size_bytes: int
    alignment: int
    start: int
    steps: int
    area: int
    apart: tuple[Apart, ...]


LiveSet: TypeAlias = Mapping[int, int]
"""Blocks that are live at one step, by position, and the bytes that each of them has then."""


def pack(
    blocks: Sequence[Block],
    live_sets: Sequence[LiveSet],
    lower_bound: int,
    time_limit: float | None = None,
) -> tuple[list[int], int]:
    """An offset for each of ``blocks``, and ``lower_bound`` or a better one that was proved.

    ``live_sets`` are in the order of time; those that are part of another may be left out. The
    searches take about ``time_limit`` seconds, by default as long as is worth it.
    """
    best, size = [0] * len(blocks), None
    for offsets in _greedy(blocks):
        found = extent(blocks, offsets)
        if size is None or found < size:
            best, size = offsets, found
        if size <= lower_bound:
            return best, lower_bound
    if len(blocks) <= FEW:
        best = min(_in_all_orders(blocks), key=lambda offsets: extent(blocks, offsets))
        return best, extent(blocks, best)
    if sum(block.size_bytes + block.alignment for block in blocks) >= PLACED:
        return best, lower_bound
    return _improved(blocks, live_sets, best, lower_bound, time_limit)


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


def _in_all_orders(blocks: Sequence[Block]) -> Iterator[list[int]]:
    """Packings by first fit. One of them is best: of any packing take the blocks from the lowest to
    the highest, and let each fall as far as it can."""
    for order in permutations(range(len(blocks))):
        yield _placed(blocks, order, best_fit=False)


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
    blocks: Sequence[Block],
    live_sets: Sequence[LiveSet],
    best: list[int],
    bound: int,
    time_limit: float | None,
) -> tuple[list[int], int]:
    """Searches under the bound itself and under a capacity between it and the best packing."""
    deadline = math.inf if time_limit is None else time.monotonic() + time_limit
    skyline, size = _Skyline(blocks, live_sets, deadline), extent(blocks, best)
    effort = _effort(blocks) if time_limit is None else int(EFFORT_PER_SECOND * time_limit)
    share = 0.5  # of what lies between the bound and the best packing, to be saved next
    try:
        for ranks, choices in _attempts(blocks, live_sets):
            for saved in (1.0, share):
                if size <= bound or skyline.over(effort):
                    return best, bound
                capacity = size - max(1, int((size - bound) * saved))
                verdict = skyline.under(capacity, ranks, choices, effort - skyline.effort)
                if verdict:
                    best, size = skyline.offsets(), extent(blocks, skyline.offsets())
                    share = min(0.5, 1.5 * share)
                elif verdict is None:
                    share = share if saved == 1.0 else 0.8 * share
                else:
                    bound = capacity + 1
    except KeyboardInterrupt:
        return best, bound
    raise AssertionError("attempts have no end")


def _effort(blocks: Sequence[Block]) -> int:
    pairs = sum(len(block.apart) for block in blocks) // 2
    return min(EFFORT, EFFORT_PER_PAIR * (len(blocks) + pairs))


def _attempts(
    blocks: Sequence[Block], live_sets: Sequence[LiveSet]
) -> Iterator[tuple[list[float], int]]:
    """Of each search the rank of each block and how many choices it has at most; without end."""
    fullest = [0] * len(blocks)
    for live in live_sets:
        total = sum(live.values())
        for index in live:
            fullest[index] = max(fullest[index], total)
    keys = (
        [(-block.steps, -block.area) for block in blocks],
        [(-block.steps, -full) for block, full in zip(blocks, fullest, strict=True)],
        [(-full, -block.area) for block, full in zip(blocks, fullest, strict=True)],
        [(-block.size_bytes, -block.area) for block in blocks],
    )
    noise, generator = 0.0, random.Random(0)
    choices = 5 * len(blocks) // 2
    while True:
        for key in keys:
            order = sorted(range(len(blocks)), key=key.__getitem__)
            ranks = [0.0] * len(blocks)
            for rank, index in enumerate(order):
                ranks[index] = rank + generator.gauss(0, noise)
            yield ranks, choices
        # A search that goes wrong early rarely recovers: new orders rather than long searches.
        noise, choices = len(blocks) / 20, choices * 5 // 4


@dataclass(frozen=True)
class _State:
    """Floors of the live sets and what each has still to place; the least offset of each block."""

    floor: Ints
    to_place: Ints
    least: Ints


@dataclass(frozen=True)
class _Part:
    """Live sets ``[first, last)``, connected by blocks to place; the choice that split them off."""

    first: int
    last: int
    parent: int


class _Skyline:
    """Searches for packings; offsets and floors are in the unit of which all offsets are multiples.

    Attributes:
        effort: what the searches have cost.
    """

    def __init__(
        self, blocks: Sequence[Block], live_sets: Sequence[LiveSet], deadline: float
    ) -> None:
        self.effort = 0
        self._deadline = deadline
        self._unit = unit = gcd(*(block.alignment for block in blocks))
        self._blocks = blocks
        self._live = live_sets
        self._multiple = np.array([block.alignment // unit for block in blocks], np.int64)
        where: list[list[int]] = [[] for _ in blocks]
        height: list[list[int]] = [[] for _ in blocks]
        for position, live in enumerate(live_sets):
            for index, size in live.items():
                where[index].append(position)
                height[index].append(-(-size // unit))
        self._where = [np.array(each, np.int64) for each in where]
        self._height = [np.array(each, np.int64) for each in height]
        beside = [[apart.other for apart in block.apart] for block in blocks]
        below = [[-(-apart.below // unit) for apart in block.apart] for block in blocks]
        self._beside = [np.array(each, np.int64) for each in beside]
        self._below = [np.array(each, np.int64) for each in below]
        self._first = np.array([each[0] if each else 0 for each in where], np.int64)
        self._last = np.array([each[-1] + 1 if each else 0 for each in where], np.int64)
        self._lowest = np.array([min(each, default=0) for each in height], np.int64)
        self._in_time = np.argsort(self._first, kind="stable")
        self._members = [np.array(list(live), np.int64) for live in live_sets]
        self._flat = np.concatenate(self._members)
        self._begin = np.cumsum([0] + [len(live) for live in live_sets])
        # A valley is all that a block upon it lies on only if no block skips a live set.
        self._complete = all(len(each) == each[-1] - each[0] + 1 for each in where if each)
        self._offsets = np.zeros(len(blocks), np.int64)

    def over(self, effort: int) -> bool:
        """Whether the searches have cost so much, or the time is up."""
        return self.effort >= effort or time.monotonic() >= self._deadline

    def offsets(self) -> list[int]:
        """Of the packing that was found last, in bytes."""
        return [int(offset) * self._unit for offset in self._offsets]

    def under(
        self, capacity: int, ranks: Sequence[float], choices: int, effort: int
    ) -> bool | None:
        """Whether a packing in ``capacity`` bytes was found (False: there is none)."""
        unit, stop = self._unit, self.effort + effort
        self.effort += 200 + len(self._flat)
        self._ranks = ranks
        sizes = [block.size_bytes for block in self._blocks]
        self._highest = np.array([(capacity - size) // unit for size in sizes], np.int64)
        # Only what lies on top may end off alignment: that counts as a unit more room.
        room = [max((capacity - s) // unit - (-s // unit) for s in x.values()) for x in self._live]
        self._room = np.array(room, np.int64)
        least = np.where(self._last > 0, 0, PLACED)
        to_place = [sum(-(-size // unit) for size in live.values()) for live in self._live]
        floor = np.zeros(len(self._live), np.int64)
        state = _State(floor, np.array(to_place, np.int64), least)
        if (self._highest < 0).any() or (state.to_place > self._room).any():
            return False
        stack: list[tuple[_Part, Iterator[_State], tuple[_Part, ...]]] = []
        pending = self._parts(state, 0, len(self._live), -1)
        while pending:
            part, *rest = pending
            choices -= 1
            if choices < 0 or self.over(stop):
                return None
            stack.append((part, self._choices(state, part.first, part.last), tuple(rest)))
            while (following := next(stack[-1][1], None)) is None:
                if stack[-1][0].parent < 0:
                    return False if self._complete else None
                # What the other parts chose makes no difference to this one.
                del stack[stack[-1][0].parent + 1 :]
            part, _, after = stack[-1]
            state = following
            pending = self._parts(state, part.first, part.last, len(stack) - 1) + after
        return True

    def _parts(self, state: _State, first: int, last: int, parent: int) -> tuple[_Part, ...]:
        """What is to place there, in parts without a common block, the tightest first."""
        found = self._to_place(state, first, last)
        if len(found) == 0:
            return ()
        firsts, reach = self._first[found], np.maximum.accumulate(self._last[found])
        cuts = np.flatnonzero(firsts[1:] >= reach[:-1])
        ends = [*reach[cuts].tolist(), int(reach[-1])]
        starts = [int(firsts[0]), *firsts[cuts + 1].tolist()]
        parts = [_Part(*span, parent) for span in zip(starts, ends, strict=True)]
        if len(parts) == 1:
            return tuple(parts)
        slack = self._room - state.floor - state.to_place
        slack[state.floor >= PLACED] = PLACED
        return tuple(sorted(parts, key=lambda part: int(slack[part.first : part.last].min())))

    def _choices(self, state: _State, first: int, last: int) -> Iterator[_State]:
        """What may come to lie in the tightest valley: each block that fits, or none."""
        position = self._valley(state, first, last)
        floor = int(state.floor[position])
        members = self._members[position]
        least = state.least[members]
        fitting = members[least == floor].tolist()
        for index in sorted(fitting, key=self._ranks.__getitem__):
            floors, to_place, leasts = (
                state.floor.copy(),
                state.to_place.copy(),
                state.least.copy(),
            )
            floors[self._where[index]] = floor + self._height[index]
            to_place[self._where[index]] -= self._height[index]
            leasts[index] = PLACED
            self._offsets[index] = floor
            after = _State(floors, to_place, leasts)
            if self._raised(after, self._beside[index], floor + self._below[index], first, last):
                yield after
        higher = least[(least > floor) & (least < PLACED)].tolist()
        if fitting:
            # What fits but comes to lie higher lies on something else.
            lowest = self._lowest[self._to_place(state, first, last)].min()
            higher.append(floor + int(lowest))
        rise = min(higher)
        floors = state.floor.copy()
        floors[position] = rise
        after = _State(floors, state.to_place, state.least.copy())
        if self._raised(after, members, rise, first, last):
            yield after

    def _valley(self, state: _State, first: int, last: int) -> int:
        """The tightest live set of those whose floor is lower than on both sides."""
        floor = state.floor[first:last]
        slack = self._room[first:last] - floor - state.to_place[first:last]
        starts = np.concatenate(([0], np.flatnonzero(np.diff(floor)) + 1))
        heights = np.concatenate(([PLACED], floor[starts], [PLACED]))
        low = (heights[:-2] > heights[1:-1]) & (heights[1:-1] < heights[2:])
        lengths = np.diff(np.append(starts, len(floor)))
        return first + int(np.where(np.repeat(low, lengths), slack, PLACED).argmin())

    def _to_place(self, state: _State, first: int, last: int) -> Ints:
        """The blocks to place that lie within live sets ``[first, last)``, in the order of time."""
        there = (state.least < PLACED) & (self._first >= first) & (self._last <= last)
        return self._in_time[there[self._in_time]]

    def _raised(self, state: _State, which: Ints, least: Ints | int, first: int, last: int) -> bool:
        """Raise least offsets, and floors to the least of what is to place; whether all may fit."""
        raised = np.maximum(state.least[which], least)
        multiple = self._multiple[which]
        raised = np.where(raised < PLACED, -(-raised // multiple) * multiple, PLACED)
        if ((raised > self._highest[which]) & (raised < PLACED)).any():
            return False
        state.least[which] = raised
        begin = self._begin[first : last + 1]
        self.effort += 50 + int(begin[-1] - begin[0]) // 200
        least_there = state.least[self._flat[begin[0] : begin[-1]]]
        lowest = np.minimum.reduceat(least_there, begin[:-1] - begin[0])
        floor = state.floor[first:last]
        np.maximum(floor, lowest, out=floor)
        excess = floor + state.to_place[first:last] > self._room[first:last]
        return not bool((excess & (lowest < PLACED)).any())
