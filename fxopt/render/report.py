"""A report as a document: operators or modules, totals, and what else is known."""

from __future__ import annotations

from fxopt.render.document import Block, Document, Lines, Table
from fxopt.render.modules import module_blocks
from fxopt.render.words import bytes_text, count_text, share_text, stages_text, type_text
from fxopt.report import OperatorRow, Report

_SHOWN_GUARDS = 5


def report_document(report: Report, depth: int | None = None) -> Document:
    """Every operator that computes or holds something, or every module down to ``depth``."""
    rows = _operators(report) if depth is None else module_blocks(report, depth)
    return Document(
        title(report),
        (
            *rows,
            _totals(report),
            *_kinds(report),
            *_blocks(report),
            *_largest(report),
            *remarks(report),
        ),
    )


def title(report: Report) -> str:
    """The model and its inputs."""
    inputs = ", ".join(f"{name} {type_text(type)}" for name, type in report.inputs.items())
    return f"{report.model}, {inputs}"


def _operators(report: Report) -> list[Block]:
    shown = [
        row
        for row in report.operators
        if row.macs or row.weight_bytes or row.activation_bytes or row.kind == "opaque"
    ]
    headers = ("operator", "kind", "output", "parameters", "MACs", "weights", "activation")
    blocks: list[Block] = [Table(headers, tuple(map(_cells, shown)), 3, "Operators")]
    if hidden := len(report.operators) - len(shown):
        said = f"not shown, as they write nothing: {count_text(hidden, 'operator')}"
        blocks.append(Lines((said,)))
    return blocks


def _cells(row: OperatorRow) -> tuple[str, ...]:
    return (
        _place(row),
        row.kind,
        _outputs(row),
        f"{row.parameters:,}",
        f"{row.macs:,}",
        bytes_text(row.weight_bytes),
        bytes_text(row.activation_bytes),
    )


def _place(row: OperatorRow) -> str:
    """The user's module, with the node's name where the module's path does not tell it."""
    if row.path and row.name == row.path.replace(".", "_"):
        return row.path
    return f"{row.path} ({row.name})" if row.path else row.name


def _outputs(row: OperatorRow) -> str:
    return ", ".join(map(type_text, row.outputs))


def _totals(report: Report) -> Table:
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
    return Table(("total", ""), tuple(rows), 1, "Totals")


def _kinds(report: Report) -> list[Table]:
    rows = tuple(
        (kind, f"{macs:,}", share_text(macs, report.totals.macs))
        for kind, macs in report.macs_by_kind.items()
    )
    return [Table(("kind", "MACs", "share"), rows, 1, "MACs by kind")] if rows else []


def _blocks(report: Report) -> list[Table]:
    """Inverted residual blocks by kind, with the stages that they are in."""
    rows = []
    for kind in dict.fromkeys(block.kind for block in report.blocks):
        own = [block for block in report.blocks if block.kind == kind]
        parameters, macs = sum(b.parameters for b in own), sum(b.macs for b in own)
        stages = stages_text({block.stage for block in own})
        share = share_text(macs, report.totals.macs)
        rows.append((kind, stages, f"{len(own)}", f"{parameters:,}", f"{macs:,}", share))
    headers = ("block", "stages", "blocks", "parameters", "MACs", "share")
    return [Table(headers, tuple(rows), 2, "Blocks")] if rows else []


def _largest(report: Report) -> list[Table]:
    rows = tuple(
        (_place(row), _outputs(row), bytes_text(row.activation_bytes))
        for row in report.largest_activations
    )
    headers = ("largest activations", "output", "bytes")
    return [Table(headers, rows, 2, "Largest activations")] if rows else []


def remarks(report: Report) -> list[Lines]:
    """What the figures do not say: opaque leaves, the modes, unused members, guards, notes."""
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
            f"never read by forward: {count_text(count, 'parameter tensor')}"
            + (f" and {count_text(norms, 'BatchNorm')}" if norms else "")
        )
    lines += [f"guard: {guard}" for guard in report.guards[:_SHOWN_GUARDS]]
    if len(report.guards) > _SHOWN_GUARDS:
        lines.append(f"and {len(report.guards) - _SHOWN_GUARDS} more guards")
    lines += [f"note: {note}" for note in report.notes]
    return [Lines(tuple(lines))] if lines else []
