"""The set of blocks whose fusion saves most time within two budgets: an exact 0/1 knapsack.

Branch and bound: blocks are decided one after the other, and a branch is left where even fractions
of the remaining blocks, under each budget alone (Dantzig, 1957), could not save more than the best
set so far. A fused block may also need fewer parameters than before; then it frees budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """A block: seconds that its fusion saves, and what it adds to each budgeted amount."""

    gain: float
    adds: tuple[float, ...]


def best_set(items: Sequence[Item], spare: Sequence[float]) -> tuple[int, ...] | None:
    """Indices of the items with the largest gain whose sums stay within ``spare``.

    None if no set does, the empty one included (``spare`` is negative where the budget is broken
    already). Of sets with the same gain the first that is found.

    >>> best_set([Item(3.0, (2,)), Item(2.0, (1,)), Item(2.0, (1,))], [2])
    (1, 2)
    """
    useful = [i for i, item in enumerate(items) if item.gain > 0 or min(item.adds, default=0) < 0]
    search = _Search([items[i] for i in sorted(useful, key=lambda i: -items[i].gain)])
    found = search.run(tuple(spare))
    order = sorted(useful, key=lambda i: -items[i].gain)
    return None if found is None else tuple(sorted(order[place] for place in found))


class _Search:
    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items
        self.best_gain = float("-inf")
        self.best: tuple[int, ...] | None = None

    def run(self, spare: tuple[float, ...]) -> tuple[int, ...] | None:
        self._decide(0, 0.0, spare, ())
        return self.best

    def _decide(
        self, place: int, gain: float, spare: tuple[float, ...], taken: tuple[int, ...]
    ) -> None:
        rest = self.items[place:]
        if any(left + _freed(rest, axis) < 0 for axis, left in enumerate(spare)):
            return
        bounds = (_fractional(rest, axis, left) for axis, left in enumerate(spare))
        most = min(bounds, default=sum(max(item.gain, 0.0) for item in rest))
        if gain + most <= self.best_gain:
            return
        if not rest:
            self.best_gain, self.best = gain, taken
            return
        item = rest[0]
        with_it = tuple(left - add for left, add in zip(spare, item.adds, strict=True))
        self._decide(place + 1, gain + item.gain, with_it, (*taken, place))
        self._decide(place + 1, gain, spare, taken)


def _freed(items: Sequence[Item], axis: int) -> float:
    return -sum(min(item.adds[axis], 0) for item in items)


def _fractional(items: Sequence[Item], axis: int, spare: float) -> float:
    """The most that fractions of ``items`` gain within one budget; what frees it costs nothing."""
    spare += _freed(items, axis)
    total = 0.0
    wanted = [item for item in items if item.gain > 0]
    for item in sorted(wanted, key=lambda i: max(i.adds[axis], 0) / i.gain):
        add = max(item.adds[axis], 0)
        share = 1.0 if add <= spare else spare / add
        total += share * item.gain
        spare -= share * add
        if share < 1:
            break
    return total
