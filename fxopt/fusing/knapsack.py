"""The set of blocks whose fusion saves most time within budgets: an exact 0/1 knapsack.

Dynamic programming over sets (Kellerer, Pferschy & Pisinger, *Knapsack Problems*, 2004, section
9.3): block after block, with and without it, keeping the sets that no other beats in gain and in
every amount at once. A set goes early where even fractions of the remaining blocks (Dantzig, 1957),
under each budget and under their sum, could not make it better than the best set so far. A fused
block may also need fewer parameters than before; then it frees budget.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

_SLACK = 1e-9
"""Of the largest gain: a bound that is lower by rounding only must not lose a set."""


@dataclass(frozen=True)
class Item:
    """A block: seconds that its fusion saves, and what it adds to each budgeted amount."""

    gain: float
    adds: tuple[float, ...]


class _Set(NamedTuple):
    """A choice among the first items: its gain, what is left of each budget, members as bits."""

    gain: float
    left: tuple[float, ...]
    members: int


def best_set(items: Sequence[Item], spare: Sequence[float]) -> tuple[int, ...] | None:
    """Indices of the items with the largest gain whose sums stay within ``spare``.

    At most two budgets. None if no set meets them, the empty one included (``spare`` is negative
    where a budget is broken already).

    >>> best_set([Item(3.0, (2,)), Item(2.0, (1,)), Item(2.0, (1,))], [2])
    (1, 2)
    """
    useful = [i for i, item in enumerate(items) if item.gain > 0 or min(item.adds, default=0) < 0]
    useful.sort(key=lambda i: -items[i].gain)
    chosen = [items[i] for i in useful]
    sets = [_Set(0.0, tuple(spare), 0)]
    slack = _SLACK * max((abs(item.gain) for item in chosen), default=0.0)
    for place, item in enumerate(chosen):
        rest = _Rest(chosen[place + 1 :], spare)
        taken = [
            _Set(one.gain + item.gain, _minus(one.left, item.adds), one.members | 1 << place)
            for one in sets
        ]
        possible = [one for one in (*sets, *taken) if rest.can_meet(one.left)]
        best = max((one.gain for one in possible if min(one.left, default=0) >= 0), default=-1e300)
        best = max([best, *map(rest.completed, possible[:1])]) - slack
        sets = _unbeaten(one for one in possible if one.gain + rest.most(one.left) >= best)
    met = [one for one in sets if min(one.left, default=0) >= 0]
    if not met:
        return None
    members = max(met, key=lambda one: one.gain).members
    return tuple(sorted(index for place, index in enumerate(useful) if members >> place & 1))


def _minus(left: tuple[float, ...], adds: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(have - add for have, add in zip(left, adds, strict=True))


def _unbeaten(sets: Iterable[_Set]) -> list[_Set]:
    """The sets than which no other has as much gain and as much left of every budget."""
    kept: list[_Set] = []
    stairs: list[tuple[float, float]] = []  # the first amount rises, the second falls
    for one in sorted(sets, key=lambda one: (-one.gain, [-left for left in one.left])):
        first, second = (*one.left, 0.0, 0.0)[:2]
        place = bisect_left(stairs, (first, float("-inf")))
        if place < len(stairs) and stairs[place][1] >= second:
            continue
        kept.append(one)
        while place < len(stairs) and stairs[place][0] == first:
            del stairs[place]
        while place and stairs[place - 1][1] <= second:
            place -= 1
            del stairs[place]
        insort(stairs, (first, second))
    return kept


class _Rest:
    """What the items that are not decided yet can still do."""

    def __init__(self, items: Sequence[Item], spare: Sequence[float]) -> None:
        self.items = items
        self.freed = tuple(
            -sum(min(item.adds[axis], 0) for item in items) for axis in range(len(spare))
        )
        scales = [1 / max(abs(left), 1.0) for left in spare]
        weights = [[float(a == b) for b in range(len(spare))] for a in range(len(spare))]
        self._weights = [*weights, scales] if len(spare) > 1 else weights
        self._relaxed = [_Fractions(items, each) for each in self._weights]
        self._all = sum(max(item.gain, 0.0) for item in items)

    def can_meet(self, left: tuple[float, ...]) -> bool:
        """Whether some of the items bring a set within every budget, each taken alone."""
        return all(have + free >= 0 for have, free in zip(left, self.freed, strict=True))

    def most(self, left: tuple[float, ...]) -> float:
        """More than any of the items can gain within what is left."""
        budgets = [have + free for have, free in zip(left, self.freed, strict=True)]
        bounds = (
            fractions.most(sum(w * b for w, b in zip(weights, budgets, strict=True)))
            for weights, fractions in zip(self._weights, self._relaxed, strict=True)
        )
        return min(bounds, default=self._all)

    def completed(self, one: _Set) -> float:
        """The gain of ``one`` with every item that still fits, in their order."""
        gain, left = one.gain, one.left
        for item in self.items:
            after = _minus(left, item.adds)
            if item.gain > 0 and min(after, default=0) >= 0:
                gain, left = gain + item.gain, after
        return gain if min(left, default=0) >= 0 else float("-inf")


class _Fractions:
    """The most that fractions of items gain, by budget; what frees some costs nothing."""

    def __init__(self, items: Sequence[Item], weights: Sequence[float]) -> None:
        def amount(item: Item) -> float:
            return sum(w * max(add, 0) for w, add in zip(weights, item.adds, strict=True))

        wanted = sorted((i for i in items if i.gain > 0), key=lambda i: amount(i) / i.gain)
        self._amounts = [0.0, *accumulate(map(amount, wanted))]
        self._gains = [0.0, *accumulate(item.gain for item in wanted)]

    def most(self, budget: float) -> float:
        place = bisect_right(self._amounts, budget) - 1
        if place < 0:
            return 0.0
        gain = self._gains[place]
        if place + 1 < len(self._gains):
            step = self._amounts[place + 1] - self._amounts[place]
            share = (budget - self._amounts[place]) / step
            gain += share * (self._gains[place + 1] - gain)
        return gain
