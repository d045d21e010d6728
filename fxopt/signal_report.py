"""What ``fxopt signal`` says: variances by block, measured and expected, beside other networks'."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from tabulate import tabulate

from fxopt import schema
from fxopt.analysis.signal import SignalPropagation, SignalRow

SIGNAL_SCHEMA = "fxopt.signal/1"
_NORMS = {"batch": "norms normalise by the batch", "deleted": "BatchNorms deleted"}
_HEADERS = ("", "kind", "squared mean", "variance", "beta²", "expected", "ratio", "branch")


def signal_text(found: SignalPropagation, beside: Mapping[str, SignalPropagation]) -> str:
    """A table with a row for each block and layer, and what it came to.

    Args:
        found: the network.
        beside: variances of other networks, in columns under these names.
    """
    others = [{row.node: row for row in other.rows} for other in beside.values()]
    rows = [
        (*_figures(row), *(_short(each[row.node].variance) if row.node in each else "-"
                           for each in others))
        for row in found.rows
    ]  # fmt: skip
    gain = "their own" if found.skip_gain is None else f"{found.skip_gain:g}"
    return "\n".join(
        [
            f"{found.model} on {found.inputs}, skip gains {gain}; {_NORMS[found.norms]}",
            "",
            tabulate(rows, (*_HEADERS, *beside), disable_numparse=True,
                     colalign=("left", "left", *("right",) * (6 + len(others)))),
            "",
            _summary(found),
        ]
    )  # fmt: skip


def _figures(row: SignalRow) -> tuple[str, ...]:
    numbers = (
        row.squared_mean, row.variance, row.beta_squared, row.expected, row.ratio,
        row.branch_variance,
    )  # fmt: skip
    return row.path or row.node, row.kind, *map(_short, numbers)


def _short(number: float | None) -> str:
    return "-" if number is None else f"{number:.3g}"


def _summary(found: SignalPropagation) -> str:
    ratios = [row.ratio for row in found.blocks if row.ratio is not None]
    if not ratios:
        return "no residual block with an expected variance"
    span = f"{min(ratios):.2f} to {max(ratios):.2f}"
    return f"{len(ratios)} residual blocks: measured over expected variance {span}"


def signal_json(found: SignalPropagation, beside: Mapping[str, SignalPropagation]) -> str:
    """One document of the schema ``fxopt.signal/1``."""
    document = {
        "schema": SIGNAL_SCHEMA,
        **_plain(found),
        "beside": {name: _plain(other) for name, other in beside.items()},
    }
    return schema.to_json(document)


def _plain(found: SignalPropagation) -> dict[str, object]:
    rows = [{**asdict(row), "ratio": row.ratio} for row in found.rows]
    return {**asdict(found), "rows": rows}
