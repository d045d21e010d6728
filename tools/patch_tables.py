"""MCUNetV2's figures beside ours, and what the pass finds by itself for other networks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from math import prod
from typing import Any

import torch
from torch import nn

import fxopt
from fxopt import MemoryModel, PreconditionError, Program, plan_memory
from fxopt.analysis.receptive_field import Interval
from fxopt.demo import trained_model
from fxopt.passes.patch_execution import PatchExecution
from fxopt.patching.stage import PatchedStage, Plan
from fxopt.zoo import load_model

KIB = 1024
UNTIL = "features.4"
GRIDS = (
    # grid, peak KiB, overhead of the net in %
    ("2x2", 431.48, 2.93),
    ("3x3", 226.73, 6.02),
    ("4x4", 171.50, 9.28),
    ("3x5", 171.50, 9.20),
)
STAGE = {"4x4": (158.48, 30.59, 41.9)}
"""KiB of the stage alone; its overhead in % with tiles clipped at the border, and without (the
paper's 42 %)."""

RESIDENT = ("4x4", 305.48)
LEAST_FP32 = 686.0
"""KiB: with one region at the head, in fp32, features.5 is the peak whatever the tiles."""

NETS = (
    ("torchvision:resnet18", 224),
    ("torchvision:resnet50", 224),
    ("torchvision:regnet_x_400mf", 224),
    ("torchvision:vgg11_bn", 224),
    ("torchvision:mobilenet_v2", 224),
    ("torchvision:mobilenet_v3_large", 224),
    ("torchvision:shufflenet_v2_x1_0", 224),
    ("torchvision:densenet121", 224),
    ("torchvision:efficientnet_b4", 380),
    ("torchvision:fcn_resnet50", 512),
    ("timm:tf_efficientnet_lite4", 300),
)


def options(**more: Any) -> dict[str, Any]:
    return {"bytes_per_element": 1, "input_resident": False, **more}


def patched(program: Program, **more: Any) -> tuple[dict[str, Any], Program]:
    """The choice, and the program that it gives."""
    result = fxopt.run_pass(PatchExecution(**more), program)
    choice: dict[str, Any] = result.evidence["choice"]
    return choice, result.after


def grids(net: Program, check: Any) -> Iterator[tuple[object, ...]]:
    """MobileNetV2 1.0 at 224, int8, tinyengine, features.0 to features.4 tile by tile."""
    yield "figure", "ours", "published", ""
    for grid, peak, overhead in GRIDS:
        choice, after = patched(net, **options(until=UNTIL, grid=grid))
        yield check(f"{grid}, peak KiB", round(choice["peak_bytes"] / KIB, 2), peak)
        yield check(f"{grid}, MACs + %", round(100 * choice["overhead"], 2), overhead)
        if grid in STAGE:
            stage, clipped, whole = STAGE[grid]
            yield check(f"{grid}, the stage's KiB", round(stage_bytes(after) / KIB, 2), stage)
            found = round(100 * choice["stage_overhead"], 2)
            yield check(f"{grid}, the stage's MACs + %", found, clipped)
            found = round(100 * unclipped_overhead(stage_of(after).plan), 1)
            yield check(f"{grid}, the same with tiles that are not clipped", found, whole)
    grid, peak = RESIDENT
    choice, _ = patched(net, **options(until=UNTIL, grid=grid, input_resident=True))
    yield check(f"{grid}, image resident, KiB", round(choice["peak_bytes"] / KIB, 2), peak)
    yield check("fp32 in 256 KiB: refused, the least reached, KiB", least_reached(net), LEAST_FP32)


def least_reached(net: Program) -> float:
    """KiB, as the refusal has it."""
    with suppress(PreconditionError):
        patched(net, input_resident=False, sram=256 * KIB)
        return 0.0
    front = PatchExecution(input_resident=False).choices(net).front
    return min(choice.peak_bytes for choice in front) / KIB


def stage_of(program: Program) -> PatchedStage:
    (found,) = (m for m in map(program.module, program.nodes) if isinstance(m, PatchedStage))
    return found


def stage_bytes(program: Program) -> int:
    """The peak of the stage's own steps."""
    model = MemoryModel.preset("tinyengine", **options())
    blocks = plan_memory(program, memory_model=model).blocks(2)
    return max(blocks[f"features.{index}"] for index in range(5))


def unclipped_overhead(plan: Plan) -> float:
    """Of equal tiles that are padded instead of clipped, as TinyEngine runs them."""
    once = tiled = 0
    count = len(plan.rows) * len(plan.cols)
    sizes = plan.sizes
    needed = {plan.result.name: (len(plan.rows[0]), len(plan.cols[0]))}
    for step in reversed(plan.steps):
        tile = needed[step.name]
        windows = (step.local.rows, step.local.cols)
        need = tuple(len(w.needs(Interval(0, n))) for w, n in zip(windows, tile, strict=True))
        for name in step.reads:
            if name in sizes:
                known = needed.get(name, (0, 0))
                needed[name] = (max(known[0], need[0]), max(known[1], need[1]))
        if step.kwargs.get("groups"):
            channels = step.type.shape[1] * _depth(step, plan)
            kernel = step.local.rows.kernel * step.local.cols.kernel
            once += channels * kernel * prod(sizes[step.name])
            tiled += channels * kernel * prod(tile) * count
    return tiled / once - 1


def _depth(step: Any, plan: Plan) -> int:
    types = {plan.entry: plan.entry_type, **{each.name: each.type for each in plan.steps}}
    return int(types[step.reads[0]].shape[1] // step.kwargs["groups"])


def found(small: Program) -> Iterator[tuple[object, ...]]:
    """What the pass chooses within its 15 % of MACs, int8, tinyengine, the image streamed."""
    yield "net", "KiB", "patched", "times", "MACs + %", "until", "grid", "front", "choice s"
    yield _row("mobilenet_v2 0.35 @ 144", small)
    yield _row("EfficientNet-Lite0, trained @ 224", program_of(trained_model(), 224))
    for spec, size in NETS:
        yield _row(f"{spec} @ {size}", program_of(load_model(spec), size))


def program_of(model: nn.Module, size: int) -> Program:
    return fxopt.capture(model.eval(), torch.randn(1, 3, size, size), verify=False)


def _row(name: str, program: Program) -> tuple[object, ...]:
    which = PatchExecution(**options())
    started = time.perf_counter()
    before = which.choices(program).before_bytes
    seconds = time.perf_counter() - started
    result = fxopt.run_pass(which, program)
    choice = result.evidence["choice"]
    if choice is None:
        return name, before / KIB, "", "", "", result.declined[0].reason[-60:], "", 0, seconds
    (region,) = choice["regions"]
    peak = choice["peak_bytes"]
    return (
        name, before / KIB, peak / KIB, before / peak, 100 * choice["overhead"], region["until"],
        "x".join(map(str, region["grid"])), len(result.evidence["front"]), seconds,
    )  # fmt: skip
