"""The runs of a comparison in a file: a line of JSON each, written when the run is done."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Final, TextIO, TypeVar

import click
import tuning
from fashion import HELD_OUT
from trials import MOMENTUM, Outcome, Run

RECIPE: Final = (
    f"SGD, Nesterov momentum {MOMENTUM}, cosine; 1/{HELD_OUT} held out; "
    f"learning rates {tuning.LEARNING_RATES}, λ {tuning.CLIPS}, skip gains {tuning.SKIP_GAINS}; "
    f"{tuning.GRID_TRIALS} trials on a grid, samplers from {tuning.FIRST_SAMPLER}"
)
"""What all runs share beside their own fields; lines of another recipe count for nothing."""

_BEGINNING: Final = b'{"net": '
"""Of every line; a file that goes on in another way after its last one is not ours."""

T = TypeVar("T", Run, Outcome)


def line(run: Run, outcome: Outcome) -> str:
    """What the file holds of a run."""
    return json.dumps({**asdict(run), **asdict(outcome), "recipe": RECIPE}, ensure_ascii=False)


def read(results: Path) -> dict[Run, Outcome]:
    """The runs in the file, in their order; none if there is no file."""
    outcomes: dict[Run, Outcome] = {}
    for number, text in enumerate(_whole_lines(results).splitlines(), 1):
        try:
            record = json.loads(text)
            if record["recipe"] == RECIPE:
                outcomes[_made(Run, record)] = _made(Outcome, record)
        except (ValueError, KeyError, TypeError) as wrong:
            raise click.UsageError(f"line {number} of '{results}' is no run") from wrong
    return outcomes


def opened(results: Path) -> TextIO:
    """The file, to append to. The torn last line of a run that was killed is cut off."""
    results.parent.mkdir(parents=True, exist_ok=True)
    results.touch()
    os.truncate(results, len(_whole_lines(results)))
    return results.open("a", encoding="utf-8")


def _whole_lines(results: Path) -> bytes:
    content = results.read_bytes() if results.exists() else b""
    end = content.rfind(b"\n") + 1
    if not _BEGINNING.startswith(content[end:][: len(_BEGINNING)]):
        raise click.UsageError(f"the end of '{results}' is no run")
    return content[:end]


def _made(kind: type[T], record: Mapping[str, Any]) -> T:
    return kind(**{field.name: record[field.name] for field in fields(kind)})
