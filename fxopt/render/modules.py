"""Tables of a program's modules, and of what a transformation changed in them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fxopt.modules import ModuleChange, ModuleRow
from fxopt.render.document import Block, Lines, Table
from fxopt.render.words import bytes_text, share_text
from fxopt.report import Report, TransformReport


def module_blocks(report: Report, depth: int) -> list[Block]:
    """A row per module; where rows share weights a column and a sentence say so."""
    rows = report.by_module(depth)
    names = _names(report.model, [row.path for row in rows])
    shared = any(row.shared_weight_bytes for row in rows)
    headers = ["module", "operators", "parameters", "MACs", "share", "weights", "activation"]
    cells = [[names[row.path], *_figures(row, report.totals.macs)] for row in rows]
    if shared:
        headers.append("shared weights")
        for row, line in zip(rows, cells, strict=True):
            line.append(bytes_text(row.shared_weight_bytes) if row.shared_weight_bytes else "")
    blocks: list[Block] = [Table(tuple(headers), tuple(map(tuple, cells)), 1, "Modules")]
    if shared:
        blocks.append(Lines(("shared weights: read here too, counted in a module above",)))
    return blocks


def _figures(row: ModuleRow, macs: int) -> list[str]:
    least = "at least " if row.at_least else ""
    return [
        f"{row.operators:,}",
        f"{row.parameters:,}",
        f"{least}{row.macs:,}",
        share_text(row.macs, macs),
        bytes_text(row.weight_bytes),
        f"{least}{bytes_text(row.activation_bytes)}",
    ]


def _names(model: str, paths: Collection[str]) -> dict[str, str]:
    """Paths as they are shown: a module above the others has only its own forward's operators."""
    above = {path.rpartition(".")[0] for path in paths}
    while longer := {path.rpartition(".")[0] for path in above} - above:
        above |= longer
    return {
        path: f"{path or model} (own forward)" if path in above or not path else path
        for path in paths
    }


def change_blocks(report: TransformReport, depth: int) -> list[Block]:
    """A row per module with each figure before and after, and how many modules changed."""
    changes = report.by_module(depth)
    names = _names(report.before.model, [change.path for change in changes])
    headers = ("module", "operators", "parameters", "MACs", "weight bytes", "activation bytes")
    rows = tuple((names[change.path], *_change_cells(change)) for change in changes)
    changed = sum(change.changed for change in changes)
    said = f"changed: {changed} of {len(changes)} modules"
    return [Table(headers, rows, 1, "Change by module"), Lines((said,))]


def _change_cells(change: ModuleChange) -> list[str]:
    before, after = _sizes(change.before), _sizes(change.after)
    return [
        f"{now:,}" if was == now else f"{was:,} -> {now:,}"
        for was, now in zip(before, after, strict=True)
    ]


def _sizes(row: ModuleRow | None) -> Sequence[int]:
    if row is None:
        return (0, 0, 0, 0, 0)
    return (row.operators, row.parameters, row.macs, row.weight_bytes, row.activation_bytes)
