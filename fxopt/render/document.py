"""What a report says, whatever it is written in: a title and blocks, as values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Lines:
    """Sentences, each on a line of its own."""

    lines: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Cells under headers; the first ``left`` columns are words, the others figures.

    Leading spaces in a cell put its row below the one above. Where there are headings the table
    has its ``title``; in plain text the header of its first column says enough.
    """

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int
    title: str = ""


@dataclass(frozen=True)
class Section:
    """A title and what belongs to it."""

    title: str
    blocks: tuple[Lines | Table, ...]


Block = Lines | Table | Section


@dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str
    blocks: tuple[Block, ...]
