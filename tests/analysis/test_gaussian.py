"""Moments by quadrature against closed forms and against sampling."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.analysis.gaussian import MeanVariance, applied, gain

PUBLISHED: dict[str, tuple[Any, float]] = {
    "celu": (F.celu, 1.270926833152771), "elu": (F.elu, 1.2716004848480225),
    "gelu": (F.gelu, 1.7015043497085571), "leaky_relu": (F.leaky_relu, 1.70590341091156),
    "log_sigmoid": (F.logsigmoid, 1.9193484783172607), "relu": (F.relu, 1.7139588594436646),
    "relu6": (F.relu6, 1.7131484746932983), "selu": (F.selu, 1.0008515119552612),
    "sigmoid": (torch.sigmoid, 4.803835391998291), "silu": (F.silu, 1.7881293296813965),
    "softsign": (F.softsign, 2.338853120803833), "softplus": (F.softplus, 1.9203323125839233),
    "tanh": (torch.tanh, 1.5939117670059204),
}  # fmt: skip
"""Gains of the published code, which are estimates: off by up to 9e-4."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_gains_are_the_published_ones(name: str) -> None:
    function, published = PUBLISHED[name]
    assert gain(function) == pytest.approx(published, rel=9e-4)


def test_gain_of_relu_in_closed_form() -> None:
    assert gain(torch.relu) == pytest.approx(math.sqrt(2 / (1 - 1 / math.pi)), rel=1e-14)
    assert gain(lambda x: x) == pytest.approx(1.0, rel=1e-14)
    assert gain(torch.abs) == pytest.approx((1 - 2 / math.pi) ** -0.5, rel=1e-14)


@given(mean=st.floats(-50, 50), deviation=st.floats(1e-3, 50))
@settings(max_examples=50, deadline=None)
def test_identity_square_and_exponential(mean: float, deviation: float) -> None:
    argument = MeanVariance(mean, deviation**2)
    same = applied(lambda x: x, argument).moments
    assert same.mean == pytest.approx(mean, rel=1e-12, abs=1e-12)
    assert same.variance == pytest.approx(deviation**2, rel=1e-10)
    square = applied(torch.square, argument).moments
    assert square.mean == pytest.approx(mean**2 + deviation**2, rel=1e-12)
    variance = 2 * deviation**4 + 4 * (mean * deviation) ** 2
    assert square.variance == pytest.approx(variance, rel=1e-9)


def test_relu_of_any_normal() -> None:
    """Rectified normal: E = μΦ(μ/σ) + σφ(μ/σ)."""
    for mean, deviation in ((0.3, 0.7), (-2.0, 3.0), (5.0, 0.1)):
        ratio = mean / deviation
        density = math.exp(-(ratio**2) / 2) / math.sqrt(2 * math.pi)
        below = 0.5 * (1 + math.erf(ratio / math.sqrt(2)))
        expected = mean * below + deviation * density
        squares = (mean**2 + deviation**2) * below + mean * deviation * density
        found = applied(torch.relu, MeanVariance(mean, deviation**2)).moments
        assert found.mean == pytest.approx(expected, rel=1e-12)
        assert found.variance == pytest.approx(squares - expected**2, rel=1e-10)


def test_no_variance() -> None:
    assert applied(torch.exp, MeanVariance(1.0, 0.0)).moments == MeanVariance(math.e, 0.0)


def test_channels_that_differ() -> None:
    """The average of the variances, and not the variance of all."""
    slopes = torch.tensor([1.0, 3.0], dtype=torch.float64).view(2, 1, 1)
    found = applied(lambda x: slopes * x + slopes, MeanVariance(0.0, 1.0), (2, 1, 1)).moments
    assert found.mean == pytest.approx(2.0)
    assert found.variance == pytest.approx((1 + 9) / 2)


@pytest.mark.parametrize("function", [lambda x: x, torch.relu, torch.square])
@pytest.mark.parametrize("count", [1, 4, 9])
def test_largest_of_several(function: Any, count: int) -> None:
    argument = MeanVariance(0.2, 2.0)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(400_000, count, generator=generator, dtype=torch.float64)
    sampled = function(0.2 + math.sqrt(2) * drawn).amax(1)
    found = applied(function, argument).largest_of(count)
    assert found.mean == pytest.approx(sampled.mean().item(), abs=0.02)
    assert found.variance == pytest.approx(sampled.var().item(), rel=0.02)
