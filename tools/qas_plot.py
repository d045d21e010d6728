"""The searches of a comparison drawn: held-out accuracy against the learning rate."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qas_trials import Cell, Granularity
from qas_tuning import Outcomes, searched

from fxopt.plot import check_plot, save_figure


def plot_searches(path: str | os.PathLike[str], cells: Sequence[Cell], outcomes: Outcomes) -> None:
    """A line a method: a panel for each optimizer and, below each other, each granularity.

    fp32, which has none, is in all. A trial whose loss was not finite has an accuracy of 0.

    Raises:
        ExportError: as from :func:`fxopt.plot.check_plot`.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    optimizers = list(dict.fromkeys(cell.optimizer for cell in cells))
    named = dict.fromkeys(cell.granularity for cell in cells if cell.granularity)
    rows: list[Granularity] = [*named] or [""]
    figure = Figure(figsize=(4 * len(optimizers), 3.5 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), len(optimizers), squeeze=False, sharex=True, sharey=True)
    for row, granularity in enumerate(rows):
        for column, optimizer in enumerate(optimizers):
            axes = panels[row][column]
            shown = [cell for cell in cells if cell.optimizer == optimizer]
            _draw(axes, [cell for cell in shown if cell.granularity in (granularity, "")], outcomes)
            axes.set_title(f"{optimizer}, per {granularity}" if granularity else optimizer)
            axes.set_xscale("log")
    for axes in panels[-1]:
        axes.set_xlabel("learning rate")
    for axes in panels[:, 0]:
        axes.set_ylabel("accuracy, held out")
    save_figure(figure, Path(path))


def _draw(axes: Any, cells: Sequence[Cell], outcomes: Outcomes) -> None:
    for cell in cells:
        runs = searched(cell, outcomes)
        accuracies = [outcomes[run].accuracy for run in runs]
        axes.plot([run.lr for run in runs], accuracies, marker=".", label=cell.method)
    axes.legend(fontsize=8)
