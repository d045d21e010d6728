"""Reports as plain text, for a terminal as for a pipe."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from tabulate import tabulate

from fxopt.program import TensorType
from fxopt.report import OperatorRow, Report, TransformReport
from fxopt.results import PassRecord, Verification
from fxopt.schema import plain

_SHOWN_GUARDS = 5


def bytes_text(size: int) -> str:
    """``size`` bytes in the largest unit that leaves at least 1: ``97.7 MiB`` (1 KiB = 1,024 B)."""
    if size < 1024:
        return f"{size} B"
    power = min((size.bit_length() - 1) // 10, 4)
    return f"{size / 1024**power:,.1f} {'KMGT'[power - 1]}iB"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """Columns aligned to the right but for the first ``left``."""
    align = ["left"] * left + ["right"] * (len(headers) - left)
    text = tabulate(
        rows,
        headers,
        "simple",
        disable_numparse=True,
        preserve_whitespace=True,
        colalign=align if rows else None,
    )
    return "\n".join(line.rstrip() for line in text.splitlines())


def _indented(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in text.splitlines())


def _type_text(type: TensorType) -> str:
    return f"{'x'.join(map(str, type.shape)) or 'scalar'} {str(type.dtype).removeprefix('torch.')}"


def _place(row: OperatorRow) -> str:
    """The user's module, with the node's name where the module's path does not tell it."""
    if row.path and row.name == row.path.replace(".", "_"):
        return row.path
    return f"{row.path} ({row.name})" if row.path else row.name


def _heading(report: Report) -> str:
    inputs = ", ".join(f"{name} {_type_text(type)}" for name, type in report.inputs.items())
    return f"{report.model}, {inputs}"


def report_text(report: Report) -> str:
    """Every operator that computes or holds something, then totals and what else is known."""
    shown = [
        row
        for row in report.operators
        if row.macs or row.weight_bytes or row.activation_bytes or row.kind == "opaque"
    ]
    table = _table(
        ("operator", "kind", "output", "parameters", "MACs", "weights", "activation"),
        [
            (
                _place(row),
                row.kind,
                ", ".join(map(_type_text, row.outputs)),
                f"{row.parameters:,}",
                f"{row.macs:,}",
                bytes_text(row.weight_bytes),
                bytes_text(row.activation_bytes),
            )
            for row in shown
        ],
        left=3,
    )
    hidden = len(report.operators) - len(shown)
    more = f"not shown, as they write nothing: {_count(hidden, 'operator')}" if hidden else ""
    parts = (_heading(report), table, more, _totals_text(report), _kinds_text(report))
    return _joined((*parts, _largest_text(report), _remarks_text(report)))


def _joined(parts: Iterable[str]) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


def _totals_text(report: Report) -> str:
    totals = report.totals
    least = "at least " if totals.at_least else ""
    rows = [
        ("operators", f"{len(report.operators):,}"),
        ("parameters", f"{totals.parameters:,}"),
        ("MACs", f"{least}{totals.macs:,}"),
        ("weights", bytes_text(totals.weight_bytes)),
        ("activations written", f"{least}{bytes_text(totals.activation_bytes)}"),
    ]
    if totals.unused_parameters:
        rows.insert(2, ("parameters never read", f"{totals.unused_parameters:,}"))
    return _table(("total", ""), rows, left=1)


def _kinds_text(report: Report) -> str:
    if not report.macs_by_kind:
        return ""
    rows = [
        (kind, f"{macs:,}", f"{macs / report.totals.macs:.1%}")
        for kind, macs in report.macs_by_kind.items()
    ]
    return _table(("kind", "MACs", "share"), rows, left=1)


def _largest_text(report: Report) -> str:
    rows = [
        (_place(row), ", ".join(map(_type_text, row.outputs)), bytes_text(row.activation_bytes))
        for row in report.largest_activations
    ]
    return _table(("largest activations", "output", "bytes"), rows, left=2) if rows else ""


def _remarks_text(report: Report) -> str:
    lines = [
        f"opaque: '{leaf.path or leaf.name}' runs as it is and is not in the totals of MACs and "
        f"activations: {leaf.reason}"
        for leaf in report.opaque
    ]
    if report.eval_only:
        lines.append(f"evaluation only: {report.eval_only}")
    if report.unused.parameters or report.unused.batch_norms:
        count, norms = len(report.unused.parameters), len(report.unused.batch_norms)
        lines.append(
            f"never read by forward: {_count(count, 'parameter tensor')}"
            + (f" and {_count(norms, 'BatchNorm')}" if norms else "")
        )
    lines += [f"guard: {guard}" for guard in report.guards[:_SHOWN_GUARDS]]
    if len(report.guards) > _SHOWN_GUARDS:
        lines.append(f"and {len(report.guards) - _SHOWN_GUARDS} more guards")
    lines += [f"note: {note}" for note in report.notes]
    return "\n".join(lines)


def transform_text(report: TransformReport) -> str:
    """The change in a table, then each pass: what it did, how it was verified, what it left."""
    parts = [_heading(report.before), _change_text(report.before, report.after)]
    parts += [_pass_text(record) for record in report.passes]
    return _joined((*parts, _remarks_text(report.after)))


def _change_text(before: Report, after: Report) -> str:
    kinds_before = Counter(row.kind for row in before.operators)
    kinds_after = Counter(row.kind for row in after.operators)
    counts = {"operators": (len(before.operators), len(after.operators))}
    for kind in dict.fromkeys((*kinds_before, *kinds_after)):
        counts[f"  {kind}"] = (kinds_before[kind], kinds_after[kind])
    old, new = before.totals, after.totals
    counts["parameters"] = (old.parameters, new.parameters)
    if old.unused_parameters or new.unused_parameters:
        counts["parameters never read"] = (old.unused_parameters, new.unused_parameters)
    least = " (at least)" if old.at_least or new.at_least else ""
    counts[f"MACs{least}"] = (old.macs, new.macs)
    counts["weight bytes"] = (old.weight_bytes, new.weight_bytes)
    counts[f"activation bytes written{least}"] = (old.activation_bytes, new.activation_bytes)
    rows = [
        (name, f"{was:,}", f"{now:,}", f"{now - was:+,}" if now != was else "")
        for name, (was, now) in counts.items()
    ]
    return _table(("", "before", "after", "change"), rows, left=1)


def _option(value: object) -> str:
    return str(value).removeprefix("torch.")


def _pass_text(record: PassRecord) -> str:
    options = ",".join(f"{name}={_option(value)}" for name, value in record.options.items())
    spec = f"{record.name}{{{options}}}" if options else record.name
    sites = _count(len(record.rewritten), "site")
    lines = [
        f"{spec}: {sites} rewritten, {len(record.declined)} declined",
        _verification_text(record.verification),
    ]
    lines += [f"  {name}: {plain(value)}" for name, value in record.evidence.items()]
    noted = [(site.where, site.note) for site in record.rewritten if site.note]
    if noted:
        lines.append(_indented(_table(("rewritten", "note"), noted, left=2)))
    declined = [(site.node, site.where, site.reason) for site in record.declined]
    if declined:
        lines.append(_indented(_table(("declined", "where", "reason"), declined, left=3)))
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "no evidence" if value is None else f"{value:.1e}"


def _bound(value: float) -> str:
    return f"bound {value:.1e}" if math.isfinite(value) else "no bound"


def _verification_text(verification: Verification | None) -> str:
    if verification is None:
        return "  not verified"
    found = verification
    lines = [
        f"verified in {found.dtype}: largest error {_number(found.max_error)}, "
        f"{_bound(found.bound)}",
        f"as shipped in {found.shipped_dtype}: error {_number(found.shipped_error)}, the "
        f"original's own {_number(found.original_error)}, {_bound(found.shipped_bound)}",
        f"compared: {found.method}, batch {found.batch}, {found.seconds:.1f} s",
    ]
    if len(found.outputs) > 1 or any(output.remark for output in found.outputs):
        rows = [(output.output, _number(output.error), output.remark) for output in found.outputs]
        lines.append(_table(("output", "error", "remark"), rows, left=1))
    lines += [f"remark: {remark}" for remark in found.remarks]
    return _indented("\n".join(lines))
