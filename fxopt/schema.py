"""Reports as JSON documents; ``docs/report.md`` describes the schemas."""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fxopt.execution.compare import Execution
    from fxopt.memory_plan import MemoryPlan
    from fxopt.report import OperatorRow, Report, TransformReport

REPORT_SCHEMA = "fxopt.report/1"
MEMORY_SCHEMA = "fxopt.memory/1"
TRANSFORM_SCHEMA = "fxopt.transform/1"


def plain(value: Any) -> Any:
    """``value`` in JSON's own types: a number that is not finite becomes None, a dtype its name."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(plain, value), key=repr)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # a tensor or a NumPy number
        return plain(value.tolist())
    return str(value)


def to_json(value: Mapping[str, Any]) -> str:
    """Strict JSON: no NaN, no infinity."""
    return json.dumps(plain(value), indent=2, allow_nan=False)


def report_dict(report: Report, depth: int | None = None) -> dict[str, Any]:
    """The schema ``fxopt.report/1``, with the keys by module if a depth is given."""
    totals = report.totals
    document: dict[str, Any] = {
        "schema": REPORT_SCHEMA,
        "model": report.model,
        "input_shapes": {name: type.shape for name, type in report.inputs.items()},
        "input_dtypes": {name: type.dtype for name, type in report.inputs.items()},
        "operators": [_row_dict(row) for row in report.operators],
        "totals": {
            "parameters": totals.parameters,
            "macs": totals.macs,
            "weight_bytes": totals.weight_bytes,
            "activation_bytes": totals.activation_bytes,
            "unused_parameters": totals.unused_parameters,
            "at_least": totals.at_least,
        },
        "macs_by_kind": report.macs_by_kind,
        "blocks": [asdict(block) for block in report.blocks],
        "largest_activations": [
            {"name": row.name, "path": row.path, "activation_bytes": row.activation_bytes}
            for row in report.largest_activations
        ],
        "opaque": [
            {"name": leaf.name, "path": leaf.path, "reason": leaf.reason} for leaf in report.opaque
        ],
        "unused": {
            "parameters": report.unused.parameters,
            "batch_norms": report.unused.batch_norms,
        },
        "eval_only": report.eval_only,
        "guards": report.guards,
        "notes": report.notes,
    }
    if depth is not None:
        modules = [asdict(row) for row in report.by_module(depth)]
        document.update(module_depth=depth, modules=modules)
    return dict(plain(document))


def _row_dict(row: OperatorRow) -> dict[str, Any]:
    shapes = [output.shape for output in row.outputs]
    dtypes = [output.dtype for output in row.outputs]
    single = len(row.outputs) == 1
    return {
        "name": row.name,
        "kind": row.kind,
        "path": row.path,
        "output_shape": shapes[0] if single else shapes or None,
        "dtype": dtypes[0] if single else dtypes or None,
        "parameters": row.parameters,
        "macs": row.macs,
        "weight_bytes": row.weight_bytes,
        "activation_bytes": row.activation_bytes,
    }


def transform_dict(report: TransformReport, depth: int | None = None) -> dict[str, Any]:
    """The schema ``fxopt.transform/1``, with the keys by module if a depth is given."""
    document = {
        "schema": TRANSFORM_SCHEMA,
        "before": report_dict(report.before, depth),
        "after": report_dict(report.after, depth),
        "passes": [record.as_dict() for record in report.passes],
    }
    if depth is not None:
        changed = [change.path for change in report.by_module(depth) if change.changed]
        document["changed_modules"] = changed
    return dict(plain(document))


def memory_dict(
    plan: MemoryPlan,
    sram_bytes: int | None = None,
    depth: int | None = None,
    execution: Execution | None = None,
) -> dict[str, Any]:
    """The schema ``fxopt.memory/1``; whether it fits if a size is given, what a run has shown."""
    from fxopt.advice import advice

    document: dict[str, Any] = {
        "schema": MEMORY_SCHEMA,
        "model": plan.model,
        "input_shapes": {name: type.shape for name, type in plan.inputs.items()},
        "input_dtypes": {name: type.dtype for name, type in plan.inputs.items()},
        "preset": plan.preset,
        "memory_model": asdict(plan.memory_model),
        "peak_bytes": plan.peak_bytes,
        "lower_bound_bytes": plan.lower_bound_bytes,
        "optimal": plan.optimal,
        "program_order_bytes": plan.program_order_bytes,
        "order": plan.order,
        "arena": {
            "size_bytes": plan.arena.size_bytes,
            "lower_bound_bytes": plan.arena.lower_bound_bytes,
            "optimal": plan.arena.optimal,
            "offsets": plan.arena.offsets,
        },
        "tensors": [
            {
                "id": str(tensor.id),
                "bytes": tensor.size_bytes,
                "start": tensor.start,
                "end": tensor.end,
                "over": None if tensor.takes_over is None else str(tensor.takes_over),
            }
            for tensor in plan.lifetimes
        ],
        "peak_step": plan.peak_step,
        "live_at_peak": [
            {
                "id": tensor.id,
                "path": tensor.path,
                "bytes": tensor.bytes,
                "over": tensor.over,
                "shape": tensor.type and tensor.type.shape,
                "dtype": tensor.type and tensor.type.dtype,
            }
            for tensor in plan.live_at_peak
        ],
        "steps": [asdict(step) for step in plan.steps],
        "blocks": [{"path": path, "bytes": size} for path, size in plan.blocks(depth).items()],
        "weight_bytes": plan.weight_bytes,
        "constant_bytes": plan.constant_bytes,
        "at_least": plan.at_least,
        "opaque": plan.opaque,
        "hints": advice(plan),
        "notes": plan.notes,
    }
    if sram_bytes is not None:
        document["sram"] = asdict(plan.fit(sram_bytes))
    if execution is not None:
        document["execution"] = asdict(execution)
    return dict(plain(document))
