"""Buffers to pack, from and to the CSV files of MiniMalloc (github.com/google/minimalloc).

A row is a buffer: its ``id``, the first step at which it is there (``lower``) and the first at
which it is not (``upper``), its ``size`` in bytes. Columns may come in any order; ``alignment``, of
which the offset is a multiple, may be there. ``offset`` and ``hint`` are not read.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from fxopt.analysis.plan import ArenaPlan, Lifetime
from fxopt.errors import InvalidPlanError
from fxopt.files import scratch_beside

NEEDED = ("id", "lower", "upper", "size")
OTHERS = ("alignment", "offset", "hint")


def load_buffers(path: str | Path) -> list[Lifetime]:
    """The buffers of a CSV file.

    Raises:
        InvalidPlanError: the file cannot be read or is no such table; with the line.
    """
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, strict=True)
            _check_header(path, rows.fieldnames or ())
            buffers = [_buffer(f"'{path}', line {rows.line_num}", row) for row in rows]
    except OSError as error:
        raise InvalidPlanError(f"cannot read '{path}': {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidPlanError(f"'{path}' is no CSV: {error}") from error
    seen: dict[object, int] = {}
    for number, buffer in enumerate(buffers):
        if buffer.id in seen:
            raise InvalidPlanError(f"'{path}': the id '{buffer.id}' is there twice")
        seen[buffer.id] = number
    return buffers


def _check_header(path: str | Path, names: Sequence[str]) -> None:
    columns = [name.strip() for name in names]
    for name in NEEDED:
        if name not in columns:
            raise InvalidPlanError(
                f"'{path}' has no column '{name}'; the first line names the columns: "
                "id,lower,upper,size"
            )
    for name in columns:
        if name not in (*NEEDED, *OTHERS):
            known = ", ".join((*NEEDED, *OTHERS))
            raise InvalidPlanError(f"'{path}' has a column '{name}'; known are {known}")


def _buffer(where: str, row: Mapping[str | None, str | None]) -> Lifetime:
    fields = {str(name).strip(): value for name, value in row.items()}
    if None in row or None in row.values():
        raise InvalidPlanError(f"{where}: the row has not as many fields as the first line")

    def number(name: str, least: int) -> int:
        text = str(fields[name]).strip()
        if not text.removeprefix("-").isdecimal():
            raise InvalidPlanError(f"{where}: {name} is '{text}', which is no whole number")
        if int(text) < least:
            raise InvalidPlanError(f"{where}: {name} is {text}; the least is {least}")
        return int(text)

    buffer = Lifetime(
        str(fields["id"]).strip(),
        number("size", 0),
        number("lower", 0),
        number("upper", 0),
        number("alignment", 1) if fields.get("alignment") else 1,
    )
    if buffer.end <= buffer.start:
        steps = f"[{buffer.start}, {buffer.end})"
        raise InvalidPlanError(f"{where}: '{buffer.id}' is there at no step: {steps}")
    return buffer


def save_packing(path: str | Path, buffers: Sequence[Lifetime], arena: ArenaPlan) -> None:
    """Write the buffers with their offsets to a CSV file, which appears whole or not at all.

    Raises:
        ExportError: the file cannot be written.
    """
    target = Path(path)
    aligned = any(buffer.item_bytes > 1 for buffer in buffers)
    with scratch_beside(target) as scratch:
        written = scratch / target.name
        with written.open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow((*NEEDED, *(["alignment"] if aligned else []), "offset"))
            for each in buffers:
                alignment = [each.item_bytes] if aligned else []
                fields = (each.id, each.start, each.end, each.size_bytes)
                rows.writerow((*fields, *alignment, arena.offsets[each.id]))
        written.replace(target)
