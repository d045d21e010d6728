"""The tables of EfficientNetV2 (Tan & Le, 2021): stages of EfficientNet-B4 fused, model sizes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import timm
import torch
from torch import nn

import fxopt
from fxopt import MemoryModel, plan_memory
from fxopt.passes import FuseMBConv
from fxopt.report import Report

Row = tuple[object, ...]
GIGA = 1e9
ROUNDS = 5
INT8 = MemoryModel.preset("tinyengine", bytes_per_element=1)
PLANNED = (("efficientnet_b4", 380), ("tf_efficientnet_lite0", 224), ("mobilenetv2_100", 224))


@dataclass(frozen=True)
class Published:
    """A row of table 3: millions of parameters, billions of FLOPs, accuracy, images a second."""

    parameters: float
    flops: float
    top1: float
    tpu: int
    v100: int


@dataclass(frozen=True)
class Variant:
    """A row of table 3 with what must come out to the digit, at the size ``size``."""

    name: str
    options: Mapping[str, Any] | None
    parameters: int
    macs: int
    size: int
    published: Published


VARIANTS = (
    Variant("no fused", None, 19_341_616, 4_393_771_024, 380, Published(19.3, 4.5, 82.8, 262, 155)),
    Variant("stage 1-3, 3x3, SE kept", {"stages": "1-3", "kernel": 3}, 19_990_168, 7_395_864_928,
            384, Published(20.0, 7.5, 83.1, 362, 216)),
    Variant("stage 1-5, SE dropped", {"stages": "1-5", "se": "drop"}, 43_528_144, 22_995_292_864,
            380, Published(43.4, 21.3, 83.1, 327, 223)),
    Variant("stage 1-7, SE dropped", {"stages": "1-7", "se": "drop"}, 132_121_624, 36_044_712_640,
            380, Published(132.0, 34.4, 81.7, 254, 206)),
)  # fmt: skip

SIZES = (
    ("efficientnet_b3", 300, 12_233_232, 1.827, "12M 1.9B"),
    ("efficientnet_b4", 380, 19_341_616, 4.394, "19M 4.2B"),
    ("efficientnet_b5", 456, 30_389_784, 10.266, "30M 10B"),
    ("efficientnet_b6", 528, 43_040_704, 19.068, "43M 19B"),
    ("efficientnet_b7", 600, 66_347_960, 37.746, "66M 38B"),
    ("efficientnetv2_s", 384, 21_458_488, 8.366, "22M 8.8B"),
    ("efficientnetv2_m", 480, 54_139_356, 24.582, "54M 24B"),
    ("efficientnetv2_l", 480, 118_515_272, 56.080, "120M 53B"),
)
"""Names in timm, image sizes, parameters and G MACs that must come out, what the paper says."""

REMARK = """\
MACs are those of convolutions and linear layers. The paper's way adds an operation for every
normalised element and half of one for every element of a squeeze-excite product, a global mean or
a residual sum: so its first two rows are met to the digit at 384. Its rows 1-5 and 1-7 (43.4 M and
21.3 B, 132.0 M and 34.4 B) come from no single rule: no choice of kernel, squeeze-excite, ratio-1
blocks and strides gives both, and the nearest is shown. The paper's FLOPs of V2-S, M and L are of
an earlier version of these models."""


def table3(check: Callable[..., Row], timed: bool) -> Iterator[Row]:
    """Parameters, MACs in both ways and images a second of the variants, the paper's beside."""
    yield ("EfficientNet-B4", "parameters", "exact", "MACs", "exact", "at", "paper's way at 384",
           "paper M", "paper B", "img/s", "over unfused", "V100's", "TPU's",
           "top-1 (paper)")  # fmt: skip
    rates = _rates() if timed else {}
    first = VARIANTS[0].published
    for variant in VARIANTS:
        totals = fxopt.report(_program(variant.options, variant.size)).totals
        widely = papers_way(fxopt.report(_program(variant.options, 384)))
        _, parameters, _, exact = check(variant.name, totals.parameters, variant.parameters)
        _, macs, _, also = check(variant.name, totals.macs, variant.macs)
        rate = rates.get(variant.name)
        base = rates.get(VARIANTS[0].name, 1.0)
        published = variant.published
        yield (variant.name, parameters, exact, macs, also, variant.size, widely / GIGA,
               published.parameters, published.flops, rate, rate and rate / base,
               published.v100 / first.v100, published.tpu / first.tpu, published.top1)  # fmt: skip


def papers_way(report: Report) -> float:
    """The paper's FLOPs, as its published figures come out."""
    extra = 0.0
    means = {row.name for row in report.operators if row.kind in ("reduce", "pool")}
    for row in report.operators:
        elements = sum(output.elements for output in row.outputs)
        if row.kind == "batch_norm":
            extra += elements
        elif row.kind == "elementwise" and elements > prod(row.outputs[0].shape[:2]):
            extra += elements / 2
        elif row.name in means:
            extra += _read(report, row.name) / 2
    return report.totals.macs + extra


def _read(report: Report, name: str) -> int:
    """Elements that a global mean reads: those of the operator before it."""
    place = next(i for i, row in enumerate(report.operators) if row.name == name)
    before = (row for row in reversed(report.operators[:place]) if row.outputs)
    return next(sum(output.elements for output in row.outputs) for row in before)


def _program(options: Mapping[str, Any] | None, size: int, device: str = "meta") -> fxopt.Program:
    with torch.device(device):
        model, example = timm.create_model("efficientnet_b4").eval(), torch.zeros(1, 3, size, size)
    program = fxopt.capture(model, example, verify=False)
    if options is None:
        return program
    which = FuseMBConv(**options, weights="random")
    return fxopt.run_pass(which, program, verify=False).after


def _rates() -> dict[str, float]:
    """Images a second of each variant at 380, batch 1, in rounds that take turns."""
    torch.manual_seed(0)
    image = torch.randn(1, 3, 380, 380)
    modules = {v.name: _program(v.options, 380, "cpu").graph_module for v in VARIANTS}
    seconds: dict[str, list[float]] = {name: [] for name in modules}
    with torch.no_grad():
        for _ in range(ROUNDS + 1):
            for name, module in modules.items():
                seconds[name].append(_seconds(module, image))
    return {name: 1 / statistics.median(times[1:]) for name, times in seconds.items()}


def _seconds(module: nn.Module, image: torch.Tensor) -> float:
    started = time.perf_counter()
    module(image)
    return time.perf_counter() - started


def sizes(check: Callable[..., Row]) -> Iterator[Row]:
    """Model sizes, from models without weights."""
    yield "model", "at", "parameters", "exact", "G MACs", "exact", "paper", "captured"
    for name, size, parameters, macs, published in SIZES:
        with torch.device("meta"):
            model, example = timm.create_model(name).eval(), torch.zeros(1, 3, size, size)
        program = fxopt.capture(model, example)
        totals = fxopt.report(program).totals
        _, _, _, exact = check(name, totals.parameters, parameters)
        _, giga, _, also = check(name, round(totals.macs / GIGA, 3), macs)
        note = "no (meta)" if any("meta device" in note for note in program.notes) else "yes"
        found = totals.parameters, exact, giga, also
        yield name, size, *found, published, f"verified: {note}"


def peaks() -> Iterator[Row]:
    """Peak memory by the planner: a fused block has no expanded map of its input's size."""
    yield "network", "KiB before", *(f"stages 1-{n}" for n in (1, 3, 5, 7)), "lowest, of before"
    for name, size in PLANNED:
        with torch.device("meta"):
            model, example = timm.create_model(name).eval(), torch.zeros(1, 3, size, size)
        program = fxopt.capture(model, example)
        found = [_peak(program)]
        for last in (1, 3, 5, 7):
            which = FuseMBConv(stages=f"1-{last}", weights="random")
            found.append(_peak(fxopt.run_pass(which, program).after))
        yield f"{name} at {size}", *(size / 1024 for size in found), min(found) / found[0]


def _peak(program: fxopt.Program) -> int:
    return plan_memory(program, memory_model=INT8).peak_bytes
