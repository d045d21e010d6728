"""What would lower the peak of a memory plan, in sentences, from the plan alone."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from fxopt.memory_plan import MemoryPlan

MANY_PIXELS = 64
"""Positions of a tensor from which on running it patch by patch is worth a thought."""


def advice(plan: MemoryPlan) -> tuple[str, ...]:
    """Sentences for the report; each names what would change and by how much, if that is known."""
    return tuple(_advice(plan))


def _advice(plan: MemoryPlan) -> Iterator[str]:
    if not plan.steps:
        return
    if plan.peak_bytes > plan.lower_bound_bytes and plan.peak_bytes == plan.program_order_bytes:
        yield f"another order may need as little as {plan.lower_bound_bytes:,} bytes"
    model = plan.memory_model
    floats = {tensor.type.dtype for tensor in plan.live_at_peak if tensor.type is not None}
    if model.bytes_per_element is None and any(
        dtype.is_floating_point and dtype.itemsize > 1 for dtype in floats
    ):
        yield "int8 activations would need less: --bytes-per-element 1 says how much"
    given = sum(tensor.bytes for tensor in plan.live_at_peak if tensor.id in plan.inputs)
    if given:
        yield f"the input takes {given:,} bytes of the peak: streamed, it would not be kept"
    step = plan.steps[plan.peak_step]
    largest = max(plan.live_at_peak, key=lambda tensor: tensor.bytes)
    shape = largest.type.shape if largest.type is not None else ()
    if len(shape) == 4 and prod(shape[2:]) >= MANY_PIXELS:
        size = f"maps of {shape[2]}x{shape[3]}"
        where = _block(plan, step.path) or step.id
        yield f"the peak is in {where}, at {size}: patch_execution may run it tile by tile"


def _block(plan: MemoryPlan, path: str) -> str:
    """The block as the bars name it that holds ``path``."""
    parts = path.split(".")
    paths = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
    return next((name for name in reversed(paths) if name in plan.blocks()), path)
