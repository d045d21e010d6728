"""A transformation as a document: the change, what each pass did, how it was verified."""

from __future__ import annotations

import enum
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fxopt.render.document import Block, Document, Lines, Section, Table
from fxopt.render.modules import change_blocks
from fxopt.render.report import remarks, title
from fxopt.render.words import count_text
from fxopt.report import Report, TransformReport
from fxopt.results import PassRecord
from fxopt.schema import plain


def transform_document(report: TransformReport, depth: int | None = None) -> Document:
    """The change (by module down to ``depth`` too), then each pass with every declined site."""
    norms = sum(operator.kind == "batch_norm" for operator in report.after.operators)
    modules: list[Block] = [] if depth is None else change_blocks(report, depth)
    return Document(
        title(report.before),
        (
            _change(report.before, report.after),
            *modules,
            *map(_pass, report.passes),
            *remarks(report.after),
            Lines((f"BatchNorms left in the graph: {norms}",)),
        ),
    )


def _change(before: Report, after: Report) -> Table:
    kinds_before = Counter(row.kind for row in before.operators)
    kinds_after = Counter(row.kind for row in after.operators)
    counts = {"operators": (len(before.operators), len(after.operators))}
    for kind in dict.fromkeys((*kinds_before, *kinds_after)):
        counts[f"  {kind}"] = (kinds_before[kind], kinds_after[kind])
    blocks_before = Counter(block.kind for block in before.blocks)
    blocks_after = Counter(block.kind for block in after.blocks)
    for kind in dict.fromkeys((*blocks_before, *blocks_after)):
        counts[f"{kind} blocks"] = (blocks_before[kind], blocks_after[kind])
    old, new = before.totals, after.totals
    counts["parameters"] = (old.parameters, new.parameters)
    if old.unused_parameters or new.unused_parameters:
        counts["parameters never read"] = (old.unused_parameters, new.unused_parameters)
    least = " (at least)" if old.at_least or new.at_least else ""
    counts[f"MACs{least}"] = (old.macs, new.macs)
    counts["weight bytes"] = (old.weight_bytes, new.weight_bytes)
    counts[f"activation bytes written{least}"] = (old.activation_bytes, new.activation_bytes)
    rows = tuple(
        (name, f"{was:,}", f"{now:,}", f"{now - was:+,}" if now != was else "")
        for name, (was, now) in counts.items()
    )
    return Table(("", "before", "after", "change"), rows, 1, "Change")


def _option(value: object) -> str:
    return str(value.value if isinstance(value, enum.Enum) else value).removeprefix("torch.")


def _figure(value: Any) -> str:
    """Evidence in a line; what has a structure of its own is for the JSON."""
    if isinstance(value, Mapping):
        flat = {k: v for k, v in value.items() if _is_flat(v)}
        return ", ".join(f"{name} {_rounded(each)}" for name, each in flat.items())
    if isinstance(value, Sequence) and any(isinstance(each, Mapping) for each in value):
        return f"{len(value)} (in the JSON)"
    return str(plain(value))


def _is_flat(value: Any) -> bool:
    return isinstance(value, (str, int, float))


def _is_table(value: Any) -> bool:
    """Whether a piece of evidence is rows of the same plain figures."""
    rows = value if isinstance(value, (list, tuple)) else ()
    flat = [isinstance(row, Mapping) and all(map(_is_flat, row.values())) for row in rows]
    return bool(rows) and all(flat) and len({tuple(row) for row in rows}) == 1


def _rows_table(name: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    cells = tuple(tuple(_rounded(value) for value in row.values()) for row in rows)
    return Table(tuple(rows[0]), cells, len(rows[0]), name)


def _rounded(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if type(value) is int else str(value)


def _pass(record: PassRecord) -> Section:
    given = {name: value for name, value in record.options.items() if value is not None}
    options = ",".join(f"{name}={_option(value)}" for name, value in given.items())
    spec = f"{record.name}{{{options}}}" if options else record.name
    sites = count_text(len(record.rewritten), "site")
    said = ((n, v) for n, v in record.evidence.items() if not _is_table(v))
    evidence = [f"{name}: {_figure(value)}" for name, value in said]
    blocks = _verification(record, evidence)
    blocks += [_rows_table(n, v) for n, v in record.evidence.items() if _is_table(v)]
    noted = tuple((site.where, site.note) for site in record.rewritten if site.note)
    if noted:
        blocks.append(Table(("rewritten", "note"), noted, 2))
    declined = tuple((site.node, site.where, site.reason) for site in record.declined)
    if declined:
        blocks.append(Table(("declined", "where", "reason"), declined, 3))
    return Section(f"{spec}: {sites} rewritten, {len(record.declined)} declined", tuple(blocks))


def _number(value: float | None) -> str:
    return "no evidence" if value is None else f"{value:.1e}"


def _bound(value: float) -> str:
    return f"bound {value:.1e}" if math.isfinite(value) else "no bound"


def _verification(record: PassRecord, evidence: Sequence[str]) -> list[Lines | Table]:
    """What was compared and found, then the pass's own ``evidence``."""
    found = record.verification
    if found is None:
        return [Lines((f"verified: {record.verified}", *evidence))]
    lines = (
        f"verified in {found.dtype}: largest error {_number(found.max_error)}, "
        f"{_bound(found.bound)}",
        f"as shipped in {found.shipped_dtype}: error {_number(found.shipped_error)}, the "
        f"original's own {_number(found.original_error)}, {_bound(found.shipped_bound)}",
        f"compared: {found.method}, batch {found.batch}, {found.seconds:.1f} s",
    )
    said = (*(f"remark: {remark}" for remark in found.remarks), *evidence)
    if len(found.outputs) == 1 and not found.outputs[0].remark:
        return [Lines((*lines, *said))]
    rows = tuple((o.output, _number(o.error), o.remark) for o in found.outputs)
    return [Lines(lines), Table(("output", "error", "remark"), rows, 1), Lines(said)]
