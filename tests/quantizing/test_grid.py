"""Grids: what they hold, for any range."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from fxopt.quantizing.grid import Grid, Limits, grid_of

TINY = torch.finfo(torch.float32).tiny
numbers = st.floats(-(2.0**126), 2.0**126, width=32)
widths = st.integers(2, 8)
lower = st.one_of(st.just(-math.inf), st.floats(-1e6, -1e-3), st.just(0.0))
upper = st.one_of(st.just(math.inf), st.floats(1e-3, 1e6), st.just(0.0))


@settings(max_examples=300, deadline=None)
@given(low=numbers, high=numbers, bits=widths, least=lower, most=upper)
@example(low=1e-44, high=1e-44, bits=8, least=0.0, most=math.inf)
@example(low=-1e38, high=1e38, bits=2, least=-math.inf, most=math.inf)
@example(low=-1e-44, high=1e38, bits=8, least=-1e-3, most=6.0)
@example(low=-5.0, high=-5.0, bits=3, least=0.0, most=0.0)
@example(low=0.0, high=6.0, bits=8, least=0.0, most=6.0)
def test_every_grid(low: float, high: float, bits: int, least: float, most: float) -> None:
    assume(low <= high)
    grid = grid_of(low, high, bits, Limits(least, most))
    assert grid.bits == bits
    assert -(2 ** (bits - 1)) == grid.low <= grid.zero_point <= grid.high == 2 ** (bits - 1) - 1
    assert math.isfinite(grid.scale)
    assert grid.scale >= TINY
    assert float(torch.tensor(grid.scale, dtype=torch.float32)) == grid.scale
    first, last = grid.range
    assert first <= 0.0 <= last
    if grid.scale > TINY and (low, high) != (0.0, 0.0) and min(low, 0) < max(high, 0):
        within = [min(max(end, least), most) for end in (min(low, 0.0), max(high, 0.0))]
        if within[0] < within[1]:
            assert least <= first
            assert last <= most
            # the zero point is rounded: an end may lie half a step inside of the range, and where
            # a limit makes the scale less, that much of every step too
            slack = 0.5 * grid.scale + 2**-23 * (last - first)
            bounded = least > -math.inf or most < math.inf
            step = (within[1] - within[0]) / (2**bits - 1)
            slack += (2**bits - 1) * (step - grid.scale) if bounded else 0.0
            assert first <= within[0] + slack
            assert last >= within[1] - slack


@settings(max_examples=100, deadline=None)
@given(high=st.floats(2.0**-100, 2.0**126, width=32), bits=widths)
def test_of_one_sign_uses_all_numbers(high: float, bits: int) -> None:
    above, below = grid_of(high / 2, high, bits), grid_of(-high, -high / 2, bits)
    assert (above.zero_point, below.zero_point) == (above.low, below.high)
    assert above.range == (0.0, pytest.approx(high, rel=3e-7))
    assert below.range == (pytest.approx(-high, rel=3e-7), 0.0)


def test_by_hand() -> None:
    """[-1, 2] in 4 bits: s = 3/15 = 0.2, z = -8 + 5 = -3."""
    grid = grid_of(-1.0, 2.0, 4)
    assert grid == Grid(pytest.approx(0.2), -3, 4)
    assert grid.range == pytest.approx((-1.0, 2.0))


@pytest.mark.parametrize(
    ("limits", "zero"),
    [(Limits(), 0), (Limits(0.0), -128), (Limits(high=0.0), 127), (Limits(0.0, 6.0), -128)],
)
def test_all_zero(limits: Limits, zero: int) -> None:
    assert grid_of(0.0, 0.0, 8, limits) == Grid(1.0, zero, 8)


@pytest.mark.parametrize("bits", range(2, 9))
def test_clamp_to_six_ends_there(bits: int) -> None:
    """The last number is the greatest float32 multiple of the steps that is not above 6."""
    first, last = grid_of(0.0, 6.0, bits, Limits(0.0, 6.0)).range
    assert first == 0
    assert 6 * (1 - 2**-22) <= last <= 6


@pytest.mark.parametrize("bits", range(2, 9))
def test_clamp_around_zero_leaves_no_number_outside(bits: int) -> None:
    """[-1, 0.3]: the zero point is rounded, so the scale gives way."""
    first, last = grid_of(-9.0, 9.0, bits, Limits(-1.0, 0.3)).range
    assert -1 <= first <= 0 <= last <= 0.3


@given(low=st.floats(-9, 0), high=st.floats(0, 9), other_low=lower, other_high=upper)
def test_limits_within_limits(low: float, high: float, other_low: float, other_high: float) -> None:
    found = Limits(low, high).within(Limits(other_low, other_high))
    assert found == Limits(max(low, other_low), min(high, other_high))
