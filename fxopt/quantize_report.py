"""What ``fxopt quantize`` says: tensors with their losses, sizes, agreement."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tabulate import tabulate

from fxopt import schema
from fxopt.quantize import Judged, Quantization

QUANTIZE_SCHEMA = "fxopt.quantize/1"


def quantize_text(found: Quantization) -> str:
    """The tables, and what they come to."""
    evidence = found.record.evidence
    parts = [f"{found.model} in int8: {_options(found)}", "", _tensors(evidence["tensors"]), ""]
    parts += [_weights(evidence)]
    parts += _floored(evidence["floored_channels"])
    parts += [f"in float: {each.where} ({each.reason})" for each in found.record.declined]
    if found.onnx is not None:
        parts += ["", found.onnx.text()]
    if found.judged is not None:
        parts += ["", _judged(found.judged)]
    parts += [
        f"onnxruntime against torch on the pictures, {each.output}: "
        f"{_decibels(each.sqnr_db)}; torch float32 against float64: {_decibels(each.own_sqnr_db)}"
        for each in found.executors
    ]
    parts += [f"note: {note}" for note in found.notes]
    return "\n".join(parts)


def _options(found: Quantization) -> str:
    options = found.record.options
    names = (
        "observer", "granularity", "weight_bits", "activation_bits", "bias_correction", "skip",
    )  # fmt: skip
    return ", ".join(f"{name} {options[name]}" for name in names if options[name] is not None)


def _tensors(rows: list[dict[str, Any]]) -> str:
    cells = [
        (
            row["where"].strip("'"), f"{row['range'][0]:.4g}", f"{row['range'][1]:.4g}",
            f"{row['scale']:.4g}", str(row["zero_point"]), f"{row['clipped']:.3%}",
            _decibels(row["sqnr_db"]),
        )
        for row in rows
    ]  # fmt: skip
    headers = ("tensor", "from", "to", "scale", "zero point", "clipped", "SQNR")
    return tabulate(cells, headers, disable_numparse=True, colalign=("left", *("right",) * 6))


def _weights(evidence: Mapping[str, Any]) -> str:
    sizes = evidence["weight_bytes"]
    share = sizes["after"] / max(1, sizes["before"])
    return f"weights: {sizes['before']:,} bytes in float, {sizes['after']:,} in int8 ({share:.1%})"


def _floored(channels: Mapping[str, list[int]]) -> list[str]:
    if not channels:
        return []
    count = sum(map(len, channels.values()))
    first, those = next(iter(channels.items()))
    shown = f"{first}: {', '.join(map(str, those[:4]))}{' …' if len(those) > 4 else ''}"
    return [
        f"{count} output channels of {len(channels)} layers have hardly any weights, so the bias "
        f"decides their scale ({shown}; --json has all)"
    ]


def _decibels(value: float | None) -> str:
    if value is None:
        return "exact"
    return "not finite" if math.isnan(value) else f"{value:.1f} dB"


def _judged(judged: Judged) -> str:
    lines = [
        f"{judged.pictures} pictures in {judged.runtime}: top-1 agreement with float "
        f"{judged.agreement:.1%}, SQNR {_decibels(judged.sqnr_db)}"
    ]
    for name, shares in (("top-1", judged.top1), ("top-5", judged.top5)):
        if shares is not None:
            lines.append(f"{name} accuracy: {shares[0]:.1%} in float, {shares[1]:.1%} in int8")
    return "\n".join(lines)


def quantize_json(found: Quantization) -> str:
    """One document of the schema ``fxopt.quantize/1``."""
    document = {
        "schema": QUANTIZE_SCHEMA,
        "model": found.model,
        "pass": found.record.as_dict(),
        "judged": found.judged and asdict(found.judged),
        "onnx": found.onnx and found.onnx.to_dict(),
        "executors": [asdict(each) for each in found.executors],
        "notes": list(found.notes),
    }
    return schema.to_json(document)
