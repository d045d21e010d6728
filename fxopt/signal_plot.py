"""Signal propagation drawn: squared means, variances and branches by depth."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from fxopt.analysis.signal import SignalPropagation, SignalRow
from fxopt.plot import check_plot, save_figure

_PANELS: tuple[tuple[str, Callable[[SignalRow], float | None]], ...] = (
    ("average channel squared mean", lambda row: row.squared_mean),
    ("average channel variance", lambda row: row.variance),
    ("residual branch variance", lambda row: row.branch_variance),
)
_EXPECTED = "expected"


def plot_signal(path: str | os.PathLike[str], networks: Mapping[str, SignalPropagation]) -> None:
    """Draw networks in one plot, by block and layer; the first one's expectation is dashed.

    Raises:
        ExportError: as from :func:`fxopt.plot.check_plot`.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.5), layout="constrained")
    for axes, (title, value) in zip(figure.subplots(1, 3), _PANELS, strict=True):
        for name, found in networks.items():
            axes.plot(*_points(found, value), marker=".", label=name)
        if title == _PANELS[1][0]:
            first = next(iter(networks.values()))
            points = _points(first, lambda row: row.expected)
            axes.plot(*points, "k--", linewidth=0.8, label=_EXPECTED)
        axes.set_yscale("log")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("depth: residual blocks, and layers outside of them")
    figure.axes[1].legend(fontsize=8)
    save_figure(figure, Path(path))


def _points(
    found: SignalPropagation, value: Callable[[SignalRow], float | None]
) -> tuple[list[int], list[float]]:
    """Depths and values that a logarithmic axis can show."""
    every = [(depth, value(row)) for depth, row in enumerate(found.rows)]
    shown = [(d, v) for d, v in every if v is not None and math.isfinite(v) and v > 0]
    return [depth for depth, _ in shown], [number for _, number in shown]
