"""Ranges of tensors that pass by in batches, beside the tensors themselves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.quantizing.grid import Grid, Limits, grid_of
from fxopt.quantizing.observers import (
    BINS,
    MOMENTUM,
    NAMES,
    OBSERVERS,
    PERCENTILE,
    Histogram,
    LeastError,
    MinMax,
    Percentile,
    Range,
)

FREE = Limits()


def seen(observer: Range, batches: Sequence[torch.Tensor]) -> Range:
    for batch in batches:
        observer.add(batch, float(batch.min()), float(batch.max()))
    return observer


def grid(name: str, *batches: torch.Tensor, bits: int = 8, limits: Limits = FREE) -> Grid:
    return seen(OBSERVERS[name](), batches).grid(bits, limits)


def squared_error(x: torch.Tensor, of: Grid) -> float:
    """Independent of the package: numpy, float64."""
    values = x.double().numpy()
    steps = np.clip(np.rint(values / of.scale) + of.zero_point, of.low, of.high)
    return float((((steps - of.zero_point) * of.scale - values) ** 2).sum())


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_names() -> None:
    assert tuple(OBSERVERS) == NAMES == ("minmax", "moving_average", "percentile", "mse")


ADVERSARIAL = {
    "subnormal": torch.full((9,), 1e-44),
    "negative subnormal": torch.full((9,), -1e-44),
    "huge": torch.tensor([-1e38, 3e38, 1.0]),
    "greatest": torch.tensor([-torch.finfo(torch.float32).max, torch.finfo(torch.float32).max]),
    "constant": torch.full((9,), 3.0),
    "negative constant": torch.full((9,), -3.0),
    "zero": torch.zeros(9),
    "negative zero": -torch.zeros(9),
    "one": torch.tensor([0.7]),
    "positive": normal(500).abs() + 5,
    "negative": -normal(500).abs() - 5,
    "outlier": torch.cat([normal(5000), torch.tensor([1e6])]),
    "tiny outlier": torch.cat([normal(5000) * 1e-30, torch.tensor([1.0])]),
    "two sizes": torch.tensor([1e-38, 1e38]),
    "float64": normal(50).double() * 1e300,
}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("data", ADVERSARIAL)
def test_adversarial_tensors_have_a_sound_grid(data: str, name: str, bits: int) -> None:
    x = ADVERSARIAL[data]
    found = grid(name, x, bits=bits)
    assert 0 < found.scale < math.inf
    first, last = found.range
    assert first <= 0 <= last
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    as_zero = max(-low, high) < 2.0**-100 and found.scale == 1  # a histogram sees no less
    if low < high and not as_zero:
        # no wider than the values, but for the rounding of the zero point and the least scale
        slack = found.scale + 1e-6 * (high - low) + 2**bits * torch.finfo(torch.float32).tiny
        assert low - slack <= first
        assert last <= high + slack
    else:
        assert found.scale == 1


# ---- two numbers -------------------------------------------------------------------------------


def test_minmax_is_the_range_of_all() -> None:
    batches = [torch.tensor([0.5, 2.0]), torch.tensor([-1.0, 1.0]), torch.tensor([0.0])]
    assert grid("minmax", *batches) == grid_of(-1.0, 2.0, 8)


def test_moving_average_by_hand() -> None:
    """From the first batch on, a tenth of the way to each later one."""
    batches = [torch.tensor([-1.0, 2.0]), torch.tensor([-2.0, 4.0]), torch.tensor([0.0, 1.0])]
    low = (-1.0 * (1 - MOMENTUM) - 2.0 * MOMENTUM) * (1 - MOMENTUM)
    high = (2.0 * (1 - MOMENTUM) + 4.0 * MOMENTUM) * (1 - MOMENTUM) + MOMENTUM
    assert grid("moving_average", *batches) == grid_of(low, high, 8)
    assert grid("moving_average", batches[0]) == grid_of(-1.0, 2.0, 8)


# ---- histograms --------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=12),
        min_size=1,
        max_size=5,
    )
)
def test_histogram_is_that_of_all_values_at_once(batches: list[list[float]]) -> None:
    """However often it doubled; the bins are bounded and their edges powers of two."""
    found, tensors = Histogram(), [torch.tensor(each) for each in batches]
    seen(found, tensors)
    every = torch.cat(tensors).double()
    edges = found.edges().numpy()
    assert (len(found.counts), len(edges)) == (BINS, BINS + 1)
    radius = edges[-1]
    assert math.frexp(radius)[0] == 0.5
    largest = float(every.abs().max())
    assert largest <= radius
    assert radius <= 2 * max(largest, 2.0**-101)
    expected, _ = np.histogram(every.numpy(), edges)
    assert int(found.counts.sum()) == every.numel()
    difference = np.abs(np.cumsum(found.counts.numpy() - expected))
    assert difference.max() <= every.numel()
    # histc counts in float32: 2^-23 of 4096 bins, so a value that near to an edge may lie beyond
    places = every.numpy() / (edges[1] - edges[0])
    assert difference.max() <= (np.abs(places - np.rint(places)) < 2.0**-10).sum()


def test_histogram_survives_doublings() -> None:
    """In one order and in the other: the counts of the same values are the same."""
    batches = [normal(300, seed=seed) * 10.0**seed for seed in range(5)]
    up, down = Histogram(), Histogram()
    seen(up, batches), seen(down, batches[::-1])
    assert torch.equal(up.edges(), down.edges())
    assert torch.equal(up.counts, down.counts)
    assert up.counts.sum() == 1500


def test_histogram_widens_beyond_all_its_bins() -> None:
    found = seen(Histogram(), [torch.tensor([1e-20, -1e-20]), torch.tensor([1e20])])
    assert isinstance(found, Histogram)
    assert found.counts.sum() == 3
    assert found.counts[BINS // 2 - 1 : BINS // 2 + 1].tolist() == [1, 1]


def test_zeros_first_and_values_later() -> None:
    for name in ("percentile", "mse"):
        later = grid(name, torch.zeros(4), normal(400))
        assert later.scale == pytest.approx(grid(name, normal(400), torch.zeros(4)).scale)


def test_percentile_cuts_the_share_that_it_says() -> None:
    x = normal(200_000)
    found = Percentile()
    seen(found, [x[:70_000], x[70_000:]])
    low, high = found._range(8, FREE)
    cut = (1 - PERCENTILE) / 2
    expected = torch.quantile(x.double()[:], torch.tensor([cut, 1 - cut], dtype=torch.float64))
    bin_width = float(found.edges()[1] - found.edges()[0])
    assert [low, high] == pytest.approx(expected.tolist(), abs=2 * bin_width)
    assert x.min() < low
    assert high < x.max()


def test_percentile_keeps_all_of_few_values() -> None:
    x = torch.cat([normal(500), torch.tensor([50.0])])
    assert grid("percentile", x) == grid("minmax", x)


def test_percentile_leaves_an_outlier_out() -> None:
    x = torch.cat([normal(40_000), torch.tensor([1000.0])])
    assert grid("percentile", x).range[1] < 10
    assert grid("minmax", x).range[1] == pytest.approx(1000, rel=0.01)


# ---- the least squared error -------------------------------------------------------------------

SAMPLES = {
    "normal": normal(600),
    "cubed": normal(600) ** 3,
    "positive": normal(600).relu(),
    "negative": -normal(600).abs(),
    "outlier": torch.cat([normal(600), torch.tensor([40.0])]),
    "lopsided": torch.cat([normal(600).abs() * 9, -normal(600).abs()]),
    "uniform": torch.linspace(-1, 3, 900),
    "shifted": normal(600) * 0.5 + 3,
}


def best_of_many(x: torch.Tensor, bits: int) -> float:
    """The least squared error over a net of ranges, by brute force."""
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    parts = [step / 24 for step in range(1, 25)]
    ranges = itertools.product(
        [low * part for part in parts] if low else [0.0],
        [high * part for part in parts] if high else [0.0],
    )
    return min(squared_error(x, grid_of(*each, bits)) for each in ranges)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", SAMPLES)
def test_error_is_near_the_least(name: str, bits: int) -> None:
    """Within 5 %: bins and steps of the search are finite."""
    x = SAMPLES[name]
    error = squared_error(x, grid("mse", x, bits=bits))
    assert error <= 1.05 * best_of_many(x, bits)
    assert error <= 1.001 * squared_error(x, grid("minmax", x, bits=bits))


def test_few_bits_clip() -> None:
    x = normal(5000)
    wide, found = (squared_error(x, grid(name, x, bits=2)) for name in ("minmax", "mse"))
    assert found < 0.5 * wide


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40),
    st.integers(2, 8),
    st.sampled_from([Limits(), Limits(0.0), Limits(0.0, 6.0), Limits(-1.0, 1.0)]),
)
def test_least_error_stays_inside(values: list[float], bits: int, limits: Limits) -> None:
    """Of the values and of the limits."""
    x = torch.tensor(values).clamp(limits.low, limits.high)
    found = seen(LeastError(), [x]).grid(bits, limits)
    first, last = found.range
    assert first <= 0 <= last
    if float(x.abs().max()) > 1e-30:
        slack = 1e-6 * float(x.abs().max()) + found.scale
        assert min(float(x.min()), 0.0) - slack <= first
        assert last <= max(float(x.max()), 0.0) + slack
        assert limits.low <= first
        assert last <= limits.high


def test_minmax_range_is_a_base_class_matter() -> None:
    with pytest.raises(NotImplementedError):
        seen(Histogram(), [normal(3)]).grid(8, FREE)
    assert isinstance(OBSERVERS["moving_average"](), MinMax)
