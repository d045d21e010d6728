"""The exact knapsack against brute force."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.fusing.knapsack import Item, best_set

GAINS = st.integers(-20, 40).map(float)
AMOUNTS = st.integers(-6, 30)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Item], list[int]]:
    axes = draw(st.integers(0, 2))
    item = st.builds(Item, GAINS, st.tuples(*[AMOUNTS] * axes))
    return draw(st.lists(item, max_size=9)), draw(
        st.lists(st.integers(-15, 60), min_size=axes, max_size=axes)
    )


@settings(max_examples=400, deadline=None)
@given(problems())
def test_equals_brute_force(problem: tuple[list[Item], list[int]]) -> None:
    items, spare = problem
    best = None
    for size in range(len(items) + 1):
        for chosen in itertools.combinations(range(len(items)), size):
            sums = [sum(items[i].adds[axis] for i in chosen) for axis in range(len(spare))]
            if all(total <= left for total, left in zip(sums, spare, strict=True)):
                gain = sum(items[i].gain for i in chosen)
                best = gain if best is None else max(best, gain)
    found = best_set(items, spare)
    if best is None or found is None:
        assert best is found
        return
    assert sum(items[i].gain for i in found) == best
    for axis, left in enumerate(spare):
        assert sum(items[i].adds[axis] for i in found) <= left


def test_forty_blocks_with_correlated_amounts_are_done_at_once() -> None:
    """Gains close to the amounts are the hard case of a knapsack."""
    items = [
        Item(100.0 + (7 * i) % 31 / 10, (100 + (13 * i) % 37, 90 + (11 * i) % 41))
        for i in range(40)
    ]
    found = best_set(items, (2000, 1900))
    assert found is not None
    assert sum(items[i].adds[0] for i in found) <= 2000


@pytest.mark.parametrize(("spare", "expected"), [((5,), (1,)), ((0,), ()), ((-1,), None)])
def test_small_ones_by_hand(spare: tuple[int, ...], expected: tuple[int, ...] | None) -> None:
    assert best_set([Item(1.0, (5,)), Item(2.0, (5,))], spare) == expected


def test_what_frees_budget_is_taken_for_it() -> None:
    assert best_set([Item(-1.0, (-5,)), Item(3.0, (5,))], (0,)) == (0, 1)
