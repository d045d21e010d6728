"""Documents as GitHub's Markdown, for pasting into a pull request."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tabulate import tabulate

from fxopt.render.document import Block, Document, Lines, Section, Table

_FOLDED_FROM = 40
"""Rows from which a table is folded away: a reader of a pull request scrolls past a shorter one."""


def to_markdown(document: Document) -> str:
    """``document`` with headings from the second level down; long tables are folded away."""
    parts = [f"## {escaped(document.title)}", *map(_block, document.blocks)]
    return _joined(parts) + "\n"


def fenced(text: str) -> str:
    """``text`` as it is, in a block of code."""
    return f"```\n{text.strip()}\n```\n"


def escaped(text: str) -> str:
    """``text`` on one line, with what Markdown would take for markup made plain.

    >>> print(escaped("forward(*xs) | <lambda> of __init__, not of batch_norm"))
    forward(\\*xs) \\| \\<lambda> of \\_\\_init\\_\\_, not of batch_norm
    """
    bare = text.lstrip(" ")
    marked = re.sub(r"[\\`*<|~]", r"\\\g<0>", " ".join(bare.split()))
    # Inside a word an underscore is one on GitHub, and is easier to read in the source.
    marked = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", marked)
    return "&nbsp;" * (len(text) - len(bare)) + marked


def _block(block: Block) -> str:
    match block:
        case Lines(lines):
            mark = "- " if len(lines) > 1 else ""
            return "\n".join(f"{mark}{escaped(line)}" for line in lines)
        case Table():
            return _table(block)
        case Section(title, blocks):
            return _joined([f"### {escaped(title)}", *map(_block, blocks)])


def _table(table: Table) -> str:
    rows = [[escaped(cell) for cell in row] for row in table.rows]
    headers = [escaped(header) for header in table.headers]
    align = ["left"] * table.left + ["right"] * (len(headers) - table.left)
    text = tabulate(rows, headers, "pipe", disable_numparse=True, colalign=align if rows else None)
    if len(rows) >= _FOLDED_FROM:
        # GitHub reads Markdown inside of HTML only after a blank line.
        text = f"<details><summary>{len(rows)} rows</summary>\n\n{text}\n\n</details>"
    return _joined([f"### {table.title}" if table.title else "", text])


def _joined(parts: Sequence[str]) -> str:
    return "\n\n".join(part for part in parts if part)
