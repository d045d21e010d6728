"""A memory plan as a document: totals, the peak, a bar for every block, and what would help."""

from __future__ import annotations

from fxopt.advice import advice
from fxopt.execution.compare import Execution
from fxopt.memory_plan import LiveTensor, MemoryPlan
from fxopt.render.document import Document, Lines, Table
from fxopt.render.words import type_text

BAR = 48
"""Characters of the longest bar."""


def memory_document(
    plan: MemoryPlan,
    sram_bytes: int | None = None,
    depth: int | None = None,
    execution: Execution | None = None,
) -> Document:
    """The plan; with ``sram_bytes`` whether it fits, with ``depth`` bars for finer modules, with
    ``execution`` what that has shown."""
    inputs = ", ".join(f"{name} {type_text(type)}" for name, type in plan.inputs.items())
    return Document(
        f"{plan.model}, {inputs}",
        (
            Lines((f"memory model: {_conventions(plan)}",)),
            _totals(plan),
            *_peak(plan),
            _bars(plan, depth),
            *_verdict(plan, sram_bytes),
            *([Lines((execution.sentence(),))] if execution else []),
            *_remarks(plan),
        ),
    )


def _conventions(plan: MemoryPlan) -> str:
    model = plan.memory_model
    if model.bytes_per_element is None:
        size = "elements in the model's own dtype"
    else:
        size = f"{model.bytes_per_element} B per floating-point element"
    place = "input resident" if model.input_resident else "input streamed"
    return f"{plan.preset}; {size}; {place}"


def _totals(plan: MemoryPlan) -> Table:
    least = "at least " if plan.at_least else ""
    proof = "no order needs less" if plan.optimal else "not known to be the least"
    rows = [("peak", _size(plan.peak_bytes, least), proof)]
    if not plan.optimal:
        gap = (plan.peak_bytes - plan.lower_bound_bytes) / plan.peak_bytes
        said = f"of every order; the peak is up to {gap:.1%} above the best"
        rows.append(("lower bound", _size(plan.lower_bound_bytes, least), said))
    if plan.program_order_bytes != plan.peak_bytes:
        rows.append(("in program order", _size(plan.program_order_bytes, least), ""))
    packed = (
        "no packing needs less"
        if plan.arena.optimal
        else (f"a packing needs at least {plan.arena.lower_bound_bytes:,} B")
    )
    aligned = f"aligned to {plan.memory_model.alignment} B; {packed}"
    rows.append(("arena", _size(plan.arena.size_bytes, least), aligned))
    rows.append(("weights, in flash", _size(plan.weight_bytes), "not in the peak"))
    if plan.constant_bytes:
        rows.append(("constants, in flash", _size(plan.constant_bytes), "not in the peak"))
    return Table(("memory", "bytes", ""), tuple(rows), 3, "Memory")


def _size(size: int, least: str = "") -> str:
    return f"{least}{size:,} ({size / 1024:,.1f} KiB)"


def _peak(plan: MemoryPlan) -> list[Table]:
    if not plan.steps:
        return []
    step = plan.steps[plan.peak_step]
    where = f"{step.path} ({step.id})" if step.path else step.id
    header = f"live at step {plan.peak_step} of {len(plan.steps)}: {where}"
    rows = tuple(_live_row(tensor) for tensor in plan.live_at_peak)
    return [Table((header, "module", "value", "bytes"), rows, 3, "Peak")]


def _live_row(tensor: LiveTensor) -> tuple[str, ...]:
    over = "" if tensor.over is None else f", written over {tensor.over}"
    value = "" if tensor.type is None else type_text(tensor.type)
    return (f"{tensor.id}{over}", tensor.path, value, f"{tensor.bytes:,}")


def _bars(plan: MemoryPlan, depth: int | None) -> Table:
    """One bar per block, as in MCUNetV2 (Lin et al., 2021), figure 1."""
    rows = tuple(
        (block, "#" * round(BAR * size / max(1, plan.peak_bytes)), f"{size / 1024:,.2f}")
        for block, size in plan.blocks(depth).items()
    )
    return Table(("block", "live bytes", "peak KiB"), rows, 2, "Blocks")


def _verdict(plan: MemoryPlan, sram_bytes: int | None) -> list[Lines]:
    if sram_bytes is None:
        return []
    fit = plan.fit(sram_bytes)
    there = f"{sram_bytes:,} B ({sram_bytes / 1024:,.1f} KiB)"
    if not fit.fits:
        return [Lines((f"does not fit into {there}: {-fit.spare_bytes:,} B too much", fit.reason))]
    if plan.at_least:
        return [Lines((f"fits into {there} but for what opaque operators need: see below",))]
    return [Lines((f"fits into {there}: {fit.spare_bytes:,} B spare",))]


def _remarks(plan: MemoryPlan) -> list[Lines]:
    lines = [f"at least: '{name}' keeps tensors of which nothing is known" for name in plan.opaque]
    lines += [f"hint: {hint}" for hint in advice(plan)]
    lines += [f"note: {note}" for note in plan.notes]
    return [Lines(tuple(lines))] if lines else []
