"""``‖W‖/‖G‖`` drawn tensor by tensor: figure 2 of MCUNetV3 (Lin et al., NeurIPS 2022)."""

from __future__ import annotations

import os
from pathlib import Path

from fxopt.plot import check_plot, save_figure
from fxopt.qas_ratio import QasRatio


def plot_qas_ratio(path: str | os.PathLike[str], found: QasRatio) -> None:
    """Draw the three networks' ratios in the order of execution, on one logarithmic axis.

    Raises:
        ExportError: as from :func:`fxopt.plot.check_plot`.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    series = {
        "int8": [row.int8 for row in found.rows],
        "int8 + QAS": [row.qas for row in found.rows],
        "fp32": [row.fp32 for row in found.rows],
    }
    for (name, ratios), line in zip(series.items(), ("-", "-", "--"), strict=True):
        shown = {place: ratio for place, ratio in enumerate(ratios) if ratio is not None}
        axes.plot(list(shown), list(shown.values()), line, marker=".", label=name)
    axes.set_yscale("log")
    axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    axes.set_xlabel("tensor: weight, bias, weight, …")
    axes.set_ylabel("‖W‖ / ‖G‖")
    axes.set_title(f"{found.model} on {found.inputs}", fontsize=10)
    axes.legend()
    save_figure(figure, Path(path))
