"""Memory plans drawn: live bytes step by step, and the arena as rectangles (time by address)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxopt.errors import ExportError
from fxopt.files import scratch_beside
from fxopt.memory_plan import MemoryPlan

FORMATS = (".svg", ".png")
KIB = 1024
LETTER = 0.06
LINE = 0.12
"""Inches that a letter and a line of the names take."""


def check_plot(path: str | os.PathLike[str]) -> None:
    """Return if a plot can be made there, before the work that would be lost.

    Raises:
        ExportError: the name does not end in .svg or .png, the file cannot be written, or
            matplotlib is missing.
    """
    target = Path(path)
    if target.suffix.lower() not in FORMATS:
        raise ExportError(f"cannot plot to '{target}': the name ends in {' or '.join(FORMATS)}")
    with scratch_beside(target):
        pass
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ExportError("plots need matplotlib: pip install 'fxopt[plot]'") from error


def plot_plans(path: str | os.PathLike[str], plans: Mapping[str, MemoryPlan]) -> None:
    """Draw plans side by side, on one scale of bytes, with their titles.

    Names are written where they fit; the file appears whole or not at all.

    Raises:
        ExportError: as from :func:`check_plot`.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    target = Path(path)
    widths = [min(45.0, max(7.0, 0.14 * len(plan.order))) for plan in plans.values()]
    figure = Figure(figsize=(sum(widths) + 1, 9), layout="constrained")
    axes = figure.subplots(
        2, len(plans), squeeze=False, sharey="row", sharex="col",
        gridspec_kw={"width_ratios": widths, "height_ratios": (1, 3)},
    )  # fmt: skip
    top = max(plan.arena.size_bytes for plan in plans.values())
    for column, (title, plan) in enumerate(plans.items()):
        _draw_live(axes[0][column], plan, title)
        _draw_arena(axes[1][column], plan, widths[column] / max(1, len(plan.order)), 6.0 / top)
        axes[1][column].set_ylim(0, top * 1.02 / KIB)
    axes[0][0].set_ylabel("live KiB")
    axes[1][0].set_ylabel("address, KiB")
    save_figure(figure, target)


def save_figure(figure: Any, target: Path) -> None:
    """Write a figure of matplotlib's; the file appears whole or not at all."""
    with scratch_beside(target) as scratch:
        written = scratch / target.name
        figure.savefig(written, dpi=110)
        written.replace(target)


def _draw_live(axes: Any, plan: MemoryPlan, title: str) -> None:
    sizes = [step.bytes / KIB for step in plan.steps]
    axes.stairs(sizes, range(len(sizes) + 1), fill=True, color="tab:blue", alpha=0.6)
    axes.axhline(plan.peak_bytes / KIB, color="tab:red", linewidth=0.8)
    step = plan.steps[plan.peak_step] if plan.steps else None
    where = f" at {step.path or step.id}" if step else ""
    axes.set_title(f"{title}: peak {plan.peak_bytes / KIB:,.1f} KiB{where}", fontsize=10)
    axes.set_xlim(0, max(1, len(sizes)))


def _draw_arena(axes: Any, plan: MemoryPlan, step_inches: float, byte_inches: float) -> None:
    """Rectangles, of each block of the model in a colour; what takes another over begins in it."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    ends = {each.takes_over: each.start for each in plan.lifetimes if each.takes_over is not None}
    paths = {step.id: step.path for step in plan.steps}
    colours: dict[str, Any] = {}
    palette = colormaps["tab20"](range(20))
    for each in plan.lifetimes:
        if not each.size_bytes:
            continue
        block = ".".join(paths.get(str(each.id), "").split(".")[:2])
        colour = colours.setdefault(block, palette[len(colours) % len(palette)])
        place = plan.arena.offsets[str(each.id)]
        end = max(each.start + 0.15, ends.get(each.id, each.end))
        axes.add_patch(
            Rectangle(
                (each.start, place / KIB), end - each.start, each.size_bytes / KIB,
                facecolor=colour, edgecolor="black", linewidth=0.4, alpha=0.85,
            )
        )  # fmt: skip
        width, height = (end - each.start) * step_inches, each.size_bytes * byte_inches
        if (turn := _turn(str(each.id), width, height)) is not None:
            axes.text(
                (each.start + end) / 2, (place + each.size_bytes / 2) / KIB, str(each.id),
                rotation=turn, ha="center", va="center", fontsize=7, clip_on=True,
            )  # fmt: skip
    size = plan.arena.size_bytes / KIB
    axes.axhline(size, color="tab:red", linewidth=0.8)
    proof = "no packing needs less" if plan.arena.optimal else "not known to be the least"
    axes.set_title(f"arena {size:,.1f} KiB: {proof}", fontsize=9)
    axes.set_xlabel("step")


def _turn(name: str, width: float, height: float) -> int | None:
    """Degrees by which a name is turned to fit a rectangle, in inches; None if it does not."""
    length = LETTER * len(name)
    if width >= length and height >= LINE:
        return 0
    return 90 if height >= length and width >= LINE else None
