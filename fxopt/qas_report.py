"""What ``fxopt qas-ratio`` says: ``‖W‖/‖G‖`` tensor by tensor, of fp32, int8 and int8 with QAS."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict

from tabulate import tabulate

from fxopt import schema
from fxopt.qas_ratio import QasRatio, RatioRow

QAS_RATIO_SCHEMA = "fxopt.qas-ratio/1"
_HEADERS = (
    "tensor",
    "shape",
    "scale per",
    "fp32",
    "int8",
    "int8+QAS",
    "int8/fp32",
    "QAS/fp32",
    "channels",
)


def qas_ratio_text(found: QasRatio) -> str:
    """A table with a row for each weight and bias, and what it came to."""
    rows = [
        (
            row.tensor, "x".join(map(str, row.shape)), row.per,
            *map(_short, (row.fp32, row.int8, row.qas, row.int8_over_fp32, row.qas_over_fp32)),
            _compared(row),
        )
        for row in found.rows
    ]  # fmt: skip
    align = ("left", "left", "left", *("right",) * 6)
    return "\n".join(
        [
            f"{found.model}, norm over gradient's norm on {found.inputs} ({found.loss})",
            "",
            tabulate(rows, _HEADERS, disable_numparse=True, colalign=align),
            "",
            *_summary(found),
            *(f"in float units: '{path}': {reason}" for path, reason in found.in_float_units),
        ]
    )


def _compared(row: RatioRow) -> str:
    return "" if row.per == "tensor" else f"{row.compared} of {row.channels}"


def _short(number: float | None) -> str:
    return "-" if number is None else f"{number:.3g}"


def _summary(found: QasRatio) -> Iterator[str]:
    """From what to what the quotients go, and over how many decades each network's ratios."""
    quotients = {
        "int8+QAS": [row.qas_over_fp32 for row in found.rows],
        "int8": [row.int8_over_fp32 for row in found.rows],
    }
    for name, each in quotients.items():
        known = [value for value in each if value is not None]
        if known:
            yield f"{name} is {min(known):.3g} to {max(known):.3g} times fp32"
    series: dict[str, Callable[[RatioRow], float | None]] = {
        "fp32": lambda row: row.fp32, "int8": lambda row: row.int8, "int8+QAS": lambda row: row.qas,
    }  # fmt: skip
    if not any(row.fp32 for row in found.rows):
        yield "no tensor has a ratio: weights or gradients are all zero"
        return
    spans = {name: _decades([value(row) for row in found.rows]) for name, value in series.items()}
    yield "decades from the smallest ratio to the largest: " + ", ".join(
        f"{name} {span:.1f}" for name, span in spans.items() if span is not None
    )


def _decades(ratios: list[float | None]) -> float | None:
    known = [ratio for ratio in ratios if ratio]
    return math.log10(max(known) / min(known)) if known else None


def qas_ratio_json(found: QasRatio) -> str:
    """One document of the schema ``fxopt.qas-ratio/1``."""
    layers = [{"layer": path, "reason": reason} for path, reason in found.in_float_units]
    document = {**asdict(found), "in_float_units": layers}
    return schema.to_json({"schema": QAS_RATIO_SCHEMA, **document})
