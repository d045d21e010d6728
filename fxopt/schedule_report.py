"""A schedule as text and as JSON, for people without a model; it needs no torch."""

from __future__ import annotations

import json

from fxopt.analysis.plan import Schedule


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
