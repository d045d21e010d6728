"""What ``fxopt patch`` says: the choice, what else could be chosen, tiles and halos."""

from __future__ import annotations

from dataclasses import asdict
from math import prod
from typing import Any

from tabulate import tabulate

from fxopt import schema
from fxopt.memory_plan import MemoryPlan
from fxopt.onnx_report import OnnxReport
from fxopt.patching.stage import PatchedStage, Plan
from fxopt.results import PassResult

PATCH_SCHEMA = "fxopt.patch/1"
KIB = 1024


def patch_json(
    result: PassResult, before: MemoryPlan, after: MemoryPlan, onnx: OnnxReport | None
) -> str:
    """One document of the schema ``fxopt.patch/1``; ``choice`` is null if nothing was patched."""
    evidence = result.record.evidence
    document = {
        "schema": PATCH_SCHEMA,
        "model": before.model,
        "preset": before.preset,
        "memory_model": asdict(before.memory_model),
        **{key: evidence[key] for key in ("before", "choice", "front")},
        "arena": {"before_bytes": before.arena.size_bytes, "after_bytes": after.arena.size_bytes},
        "halos": _halos(result),
        "declined": [each.reason for each in result.record.declined],
        **({} if onnx is None else {"onnx": onnx.to_dict()}),
    }
    return schema.to_json(dict(schema.plain(document)))


def patch_text(
    result: PassResult, before: MemoryPlan, after: MemoryPlan, onnx: OnnxReport | None
) -> str:
    """The same for people."""
    evidence, model = result.record.evidence, before.memory_model
    size = "own dtype" if model.bytes_per_element is None else f"{model.bytes_per_element} B each"
    image = "resident" if model.input_resident else "streamed"
    title = f"{before.model}, memory model {before.preset}, elements {size}, input {image}"
    lines = [title, ""]
    choice = evidence["choice"]
    if choice is None:
        reasons = [f"not patched: {each.reason}" for each in result.record.declined]
        return "\n".join([*lines, *reasons])
    (region,) = choice["regions"]
    rows, cols = region["grid"]
    lines += [
        f"from '{region['start']}' to '{region['until']}' on {rows}x{cols} tiles "
        f"(rows {_spans(region['rows'])}; columns {_spans(region['cols'])})",
        f"peak   {_size(before.peak_bytes)} -> {_size(after.peak_bytes)}, "
        f"{before.peak_bytes / after.peak_bytes:.2f} times less",
        f"arena  {_size(before.arena.size_bytes)} -> {_size(after.arena.size_bytes)}",
        f"MACs   +{choice['overhead']:.2%} of the network, "
        f"+{choice['stage_overhead']:.2%} of the stage",
    ]
    verification = result.record.verification
    if verification is not None:
        lines.append(f"equal  float64, largest error {verification.max_error:.1e}")
    halos = [tuple(row.values()) for row in _halos(result)]
    headers = ("operator", "map", "largest tile", "halo", "computed")
    lines += ["", tabulate(halos, headers, floatfmt=".2f", disable_numparse=[0])]
    if evidence["front"] != [choice]:
        lines += ["", "what can be chosen", _front(evidence["front"])]
    if onnx is not None:
        lines += ["", onnx.text()]
    return "\n".join(lines)


def _front(front: list[dict[str, Any]]) -> str:
    rows = [
        (f"{each['peak_bytes'] / KIB:,.1f}", f"{each['overhead']:.2%}", each["regions"][0]["until"],
         "x".join(map(str, each["regions"][0]["grid"])))
        for each in front
    ]  # fmt: skip
    headers = ("peak KiB", "MACs +", "until", "grid")
    align = ("right", "right", "left", "left")
    return tabulate(rows, headers, disable_numparse=True, colalign=align)


def _halos(result: PassResult) -> list[dict[str, Any]]:
    """Of each operator of the stage its map, its largest tile, and how often it is computed.

    The halo is what the largest tile has more than an even share of the map, in rows and columns.
    """
    modules = map(result.after.module, result.after.nodes)
    return [
        row
        for module in modules
        if isinstance(module, PatchedStage)
        for row in _plan_halos(module.plan)
    ]


def _plan_halos(plan: Plan) -> list[dict[str, Any]]:
    tiles, sizes = plan.tiles(), plan.sizes
    found = []
    for step in plan.steps:
        shapes = [tile[step.name].shape for tile in tiles]
        height, width = sizes[step.name]
        rows, cols = (max(sizes) for sizes in zip(*shapes, strict=True))
        share = -(-height // len(plan.rows)), -(-width // len(plan.cols))
        found.append(
            {
                "node": step.origin.path or step.name,
                "map": f"{height}x{width}",
                "tile": f"{rows}x{cols}",
                "halo": f"{rows - share[0]}x{cols - share[1]}",
                "macs_ratio": sum(map(prod, shapes)) / (height * width),
            }
        )
    return found


def _size(size: int) -> str:
    return f"{size:,} B ({size / KIB:,.1f} KiB)"


def _spans(intervals: list[list[int]]) -> str:
    return ", ".join(str(stop - start) for start, stop in intervals)
