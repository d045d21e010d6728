"""Schedules and packings as text and as JSON, for people without a model; it needs no torch."""

from __future__ import annotations

import json

from tabulate import tabulate

from fxopt.analysis.plan import ArenaPlan, Schedule


def schedule_json(schedule: Schedule) -> str:
    """One document; ids are what they are in the graph's file."""
    document = {
        "peak_bytes": schedule.peak_bytes,
        "lower_bound_bytes": schedule.lower_bound_bytes,
        "optimal": schedule.optimal,
        "order": list(schedule.order),
    }
    return json.dumps(document, indent=2)


def schedule_text(schedule: Schedule) -> str:
    """The peak, what is known of it, and the order, an operator a line."""
    proof = "no order needs less" if schedule.optimal else "another order may need less"
    lines = [
        f"peak         {schedule.peak_bytes:,} B: {proof}",
        f"lower bound  {schedule.lower_bound_bytes:,} B",
        "order",
        *(f"  {node}" for node in schedule.order),
    ]
    return "\n".join(lines)


def packing_json(arena: ArenaPlan, capacity: int | None = None) -> str:
    """One document; with a capacity whether the buffers fit into it."""
    document = {
        "size_bytes": arena.size_bytes,
        "lower_bound_bytes": arena.lower_bound_bytes,
        "optimal": arena.optimal,
        "offsets": {str(buffer): offset for buffer, offset in arena.offsets.items()},
    }
    if capacity is not None:
        document |= {"capacity_bytes": capacity, "fits": arena.size_bytes <= capacity}
    return json.dumps(document, indent=2)


def packing_text(arena: ArenaPlan, capacity: int | None = None) -> str:
    """The size, what is known of it, whether it fits, and the offsets, a buffer a line."""
    proof = "no packing needs less" if arena.optimal else "another packing may need less"
    lines = [
        f"size         {arena.size_bytes:,} B: {proof}",
        f"lower bound  {arena.lower_bound_bytes:,} B",
    ]
    if capacity is not None:
        lines.append(f"capacity     {capacity:,} B: {_verdict(arena, capacity)}")
    offsets = [(str(buffer), f"{offset:,}") for buffer, offset in arena.offsets.items()]
    table = tabulate(offsets, ("buffer", "offset"), colalign=("left", "right") if offsets else None)
    return "\n".join([*lines, table])


def _verdict(arena: ArenaPlan, capacity: int) -> str:
    missing = arena.size_bytes - capacity
    if missing <= 0:
        return f"fits, {-missing:,} B spare"
    if arena.lower_bound_bytes > capacity:
        return f"does not fit, {missing:,} B too much; no packing does"
    return f"does not fit, {missing:,} B too much; whether another packing does is not known"
