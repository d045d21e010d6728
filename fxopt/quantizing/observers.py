"""Which range of a tensor's values is worth having, found while they pass by.

Each observer sees a tensor batch by batch and keeps a bounded amount: two numbers, or a histogram
of ``BINS`` bins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, Protocol, get_args

import torch

from fxopt.quantizing.grid import Grid, Limits, grid_of

ObserverName = Literal["minmax", "moving_average", "percentile", "mse"]
NAMES: tuple[str, ...] = get_args(ObserverName)

BINS = 4096
"""Over ``[-R, R]``: a tensor of one sign has half of them, eight for each step of 8 bits."""
_EXACT = 2**24
"""Values that float32 can count."""
PERCENTILE = 0.9999
"""Share of the values that the range holds, half of the rest cut off at either end."""
MOMENTUM = 0.1
"""Weight of the latest batch in a moving average."""


class Range(Protocol):
    """What has seen values of a tensor and knows their range."""

    def add(self, values: torch.Tensor, low: float, high: float) -> None:
        """See one batch; ``low`` and ``high`` are its least and greatest value."""

    def grid(self, bits: int, limits: Limits) -> Grid:
        """The grid for what it has seen."""


class MinMax:
    """From the least to the greatest value of all."""

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf

    def add(self, values: torch.Tensor, low: float, high: float) -> None:
        self.low, self.high = min(self.low, low), max(self.high, high)

    def grid(self, bits: int, limits: Limits) -> Grid:
        return grid_of(self.low, self.high, bits, limits)


class MovingAverage(MinMax):
    """From the average of the batches' least values to that of their greatest (Jacob et al., 3.1).

    The later a batch, the more it counts.
    """

    def add(self, values: torch.Tensor, low: float, high: float) -> None:
        if self.low == math.inf:
            self.low, self.high = low, high
        self.low += MOMENTUM * (low - self.low)
        self.high += MOMENTUM * (high - self.high)


class Histogram:
    """How often values occur, in equal bins over ``[-R, R]``.

    ``R`` is a power of two: where a batch goes beyond, it doubles, and pairs of bins become one,
    so the counts stay exact.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.exponent = -math.inf
        self.low, self.high = math.inf, -math.inf

    def add(self, values: torch.Tensor, low: float, high: float) -> None:
        self.low, self.high = min(self.low, low), max(self.high, high)
        _, exponent = math.frexp(max(-low, high))
        if low or high:
            self._widen(max(exponent, -100))
        radius = self._radius()
        narrow = values.detach().to(torch.float32 if radius < 2.0**120 else torch.float64)
        for part in torch.split(narrow.flatten(), _EXACT):
            self.counts += torch.histc(part, BINS, -radius, radius)

    def _radius(self) -> float:
        return 2.0 ** (self.exponent if self.exponent > -math.inf else -100)

    def _widen(self, exponent: int) -> None:
        doublings = exponent - self.exponent
        if doublings <= 0:
            return
        self.exponent = exponent
        if not bool(self.counts.any()):
            return
        joined = 2 ** int(min(doublings, math.log2(BINS) - 1))
        inner = self.counts.view(-1, joined).sum(1)
        self.counts = torch.zeros_like(self.counts)
        start = (BINS - len(inner)) // 2
        self.counts[start : start + len(inner)] = inner

    def edges(self) -> torch.Tensor:
        """The ends of the bins, ``(BINS + 1,)``, float64."""
        radius = self._radius()
        return torch.linspace(-radius, radius, BINS + 1, dtype=torch.float64)

    def grid(self, bits: int, limits: Limits) -> Grid:
        return grid_of(*self._range(bits, limits), bits, limits)

    def _range(self, bits: int, limits: Limits) -> tuple[float, float]:
        raise NotImplementedError


class Percentile(Histogram):
    """Without the most extreme values: all but a share of ``1 - PERCENTILE``."""

    def _range(self, bits: int, limits: Limits) -> tuple[float, float]:
        edges, below = self.edges(), self.counts.cumsum(0) / self.counts.sum()
        cut = (1 - PERCENTILE) / 2
        first = int(torch.searchsorted(below, cut))
        last = int(torch.searchsorted(below, 1 - cut))
        low, high = float(edges[first]), float(edges[min(last, BINS - 1) + 1])
        return max(low, self.low), min(high, self.high)


class LeastError(Histogram):
    """The range whose grid has the least mean squared error: of rounding and of cutting off.

    A search over the clipping of both ends together, then of each by itself (ours; the criterion is
    that of Banner et al., "Post training 4-bit quantization", NeurIPS 2019, section 3).
    """

    def _range(self, bits: int, limits: Limits) -> tuple[float, float]:
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        edges = self.edges()
        seen = torch.nonzero(self.counts).flatten()
        centres, counts = ((edges[1:] + edges[:-1]) / 2)[seen], self.counts[seen]
        centres = centres.clamp(self.low, self.high)

        def best(ranges: list[tuple[float, float]]) -> tuple[float, float]:
            grids = [grid_of(*each, bits, limits) for each in ranges]
            return ranges[int(_errors(grids, centres, counts).argmin())]

        low, high = best([(low * part, high * part) for part in _PARTS])
        for _ in range(2):
            if low:
                low, high = best([(min(low * part, 0.0), high) for part in _NEAR])
            if high:
                low, high = best([(low, high * part) for part in _NEAR])
        return max(low, min(self.low, 0.0)), min(high, max(self.high, 0.0))


_PARTS = [2 ** (-step / 16) for step in range(96)]
_NEAR = [2 ** (step / 32) for step in range(-24, 25)]


def _errors(grids: list[Grid], centres: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The sum of squared errors of each grid."""
    scale = torch.tensor([each.scale for each in grids], dtype=torch.float64)[:, None]
    zero = torch.tensor([each.zero_point for each in grids])[:, None]
    steps = torch.div(centres, scale).round_().add_(zero).clamp_(grids[0].low, grids[0].high)
    return steps.sub_(zero).mul_(scale).sub_(centres).square_() @ counts


OBSERVERS: Mapping[str, type[Range]] = {
    "minmax": MinMax,
    "moving_average": MovingAverage,
    "percentile": Percentile,
    "mse": LeastError,
}
