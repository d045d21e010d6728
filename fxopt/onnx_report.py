"""What became of an ONNX export: values that the command line prints and JSON carries."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

from fxopt.onnx_agreement import EndToEnd, IntegerAgreement
from fxopt.onnx_deviation import Deviation
from fxopt.onnx_floats import Optimised

Shape = tuple[int | str, ...]
"""A size per axis; a name where the file leaves it open."""


@dataclass(frozen=True)
class IntegerReport:
    """What is said of an int8 file beside.

    Attributes:
        activation_type: ``uint8`` or ``int8``.
        narrow: quantisers of fewer than 8 bits, which are written as 8 with a narrower range.
        agreement: the file beside torch; None if it was not run.
        optimised: what onnxruntime makes of it; None likewise.
    """

    activation_type: str
    narrow: int
    agreement: IntegerAgreement | None = None
    optimised: Optimised | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report for JSON."""
        agreement, optimised = self.agreement, self.optimised
        return {
            "activation_type": self.activation_type,
            "narrow": self.narrow,
            "outputs": agreement and [asdict(each) for each in agreement.outputs],
            "operators": agreement and [asdict(each) for each in agreement.operators],
            "end_to_end": agreement and [asdict(each) for each in agreement.end_to_end],
            "optimised": optimised and {**asdict(optimised), "float_share": optimised.float_share},
        }

    def lines(self) -> list[str]:
        """The report as lines of text."""
        lines = [f"int8: {self.activation_type} activations, int8 weights, int32 biases"]
        if self.narrow:
            lines += [f"  {self.narrow} tensors of fewer bits, written as 8 with a narrower range"]
        if self.agreement is not None:
            found = self.agreement
            lines += [
                f"  {len(found.operators)} operators by themselves: {found.differing:,} of "
                f"{found.elements:,} numbers differ from torch's, by {found.worst} step at most"
            ]
            lines += [_end_to_end(each) for each in found.end_to_end]
        if self.optimised is not None:
            floats = Counter((each.kind, each.reason) for each in self.optimised.in_float)
            lines += [
                f"  onnxruntime runs {self.optimised.integer} operators on integers, "
                f"{len(self.optimised.in_float)} in float"
            ]
            lines += [f"    {count} {kind}: {why}" for (kind, why), count in floats.items()]
        return lines


def _end_to_end(found: EndToEnd) -> str:
    def decibels(value: float | None) -> str:
        if value is None:
            return "equal"
        return "cannot be told" if math.isnan(value) else f"{value:.1f} dB"

    def share(value: float | None) -> str:
        return "" if value is None else f", top-1 {value:.1%}"

    return (
        f"  output {found.output}: onnxruntime against torch {decibels(found.sqnr_db)}"
        f"{share(found.top1)}; torch float32 against float64 {decibels(found.own_sqnr_db)}"
        f"{share(found.own_top1)}"
    )


@dataclass(frozen=True)
class OnnxReport:
    """A written ONNX file.

    Attributes:
        path: the file, as it was asked for.
        opset: version of the operator set.
        bytes: size of the file, that of external weights beside it included.
        inputs: shape of every input by name; an open axis carries its name (``batch``).
        outputs: shape of every output by name.
        dynamic_batch: whether the file takes any batch size.
        runtime: what ran the file, empty if it was not run (``verify=False``).
        deviations: per output and batch size; empty if it was not run.
        guards_not_carried: decisions that the captured module checks on entry and the file cannot.
        notes: sentences for the reader.
        integers: of a quantised program, what there is to say beside; ``deviations`` is empty.
    """

    path: str
    opset: int
    bytes: int
    inputs: Mapping[str, Shape]
    outputs: Mapping[str, Shape]
    dynamic_batch: bool
    runtime: str
    deviations: tuple[Deviation, ...]
    guards_not_carried: tuple[str, ...]
    notes: tuple[str, ...]
    integers: IntegerReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report for JSON."""
        return {
            "path": self.path,
            "opset": self.opset,
            "bytes": self.bytes,
            "inputs": {name: list(shape) for name, shape in self.inputs.items()},
            "outputs": {name: list(shape) for name, shape in self.outputs.items()},
            "dynamic_batch": self.dynamic_batch,
            "runtime": self.runtime,
            "deviations": [vars(deviation) for deviation in self.deviations],
            "guards_not_carried": list(self.guards_not_carried),
            "notes": list(self.notes),
            **({"integers": self.integers.to_dict()} if self.integers is not None else {}),
        }

    def text(self) -> str:
        """The report as lines of text."""
        batch = "any batch size" if self.dynamic_batch else "this batch size only"
        lines = [f"ONNX: {self.path} ({self.bytes:,} bytes, opset {self.opset}, {batch})"]
        for word, values in (("input", self.inputs), ("output", self.outputs)):
            lines += [f"  {word} {name}: {shape_text(shape)}" for name, shape in values.items()]
        if self.integers is not None:
            lines += self.integers.lines()
        if self.deviations:
            lines += [f"{self.runtime} against torch, relative to each output's largest value:"]
            lines += [deviations_table(self.deviations)]
        elif not self.runtime:
            lines += ["not run against torch (verification is off)"]
        lines += [f"guard not in the file: {guard}" for guard in self.guards_not_carried]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def shape_text(shape: Shape) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def deviations_table(deviations: tuple[Deviation, ...]) -> str:
    rows = [
        (d.output, d.batch, d.remark if d.error is None else f"{d.error:.2e}", f"{d.bound:.2e}")
        for d in deviations
    ]
    headers = ("output", "batch", "deviation", "bound")
    return tabulate(rows, headers=headers, disable_numparse=True)
