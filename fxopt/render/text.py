"""Documents as plain text, for a terminal as for a pipe."""

from __future__ import annotations

from tabulate import tabulate

from fxopt.render.document import Block, Document, Lines, Section, Table


def to_text(document: Document) -> str:
    """``document`` with a blank line between its blocks."""
    parts = [document.title, *map(_block, document.blocks)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _block(block: Block) -> str:
    match block:
        case Lines(lines):
            return "\n".join(lines)
        case Table():
            return _table(block)
        case Section(title, blocks):
            parts = [_block(inner) for inner in blocks]
            return "\n".join([title, *(_indented(part) for part in parts if part)])


def _table(table: Table) -> str:
    align = ["left"] * table.left + ["right"] * (len(table.headers) - table.left)
    text = tabulate(
        table.rows,
        table.headers,
        "simple",
        disable_numparse=True,
        preserve_whitespace=True,
        colalign=align if table.rows else None,
    )
    return "\n".join(line.rstrip() for line in text.splitlines())


def _indented(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in text.splitlines())
