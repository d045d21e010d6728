"""The runs of a comparison in a file: a line of JSON each, written when the run is done."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Generic, TextIO, TypeVar

import click

RunT = TypeVar("RunT")
"""A run: a frozen dataclass of what decides it."""
OutcomeT = TypeVar("OutcomeT")
"""What came of it, a dataclass as well."""


@dataclass(frozen=True)
class RunFile(Generic[RunT, OutcomeT]):
    """How runs and their outcomes stand in a file.

    ``recipe`` is what all runs share beside their own fields; lines of another recipe count for
    nothing.
    """

    run: type[RunT]
    outcome: type[OutcomeT]
    recipe: str

    def line(self, run: RunT, outcome: OutcomeT) -> str:
        """What the file holds of a run."""
        record = {**_values(run), **_values(outcome), "recipe": self.recipe}
        return json.dumps(record, ensure_ascii=False)

    def read(self, results: Path) -> dict[RunT, OutcomeT]:
        """The runs in the file, in their order; none if there is no file."""
        outcomes: dict[RunT, OutcomeT] = {}
        for number, text in enumerate(self._whole_lines(results).splitlines(), 1):
            try:
                record = json.loads(text)
                if record["recipe"] == self.recipe:
                    outcomes[_made(self.run, record)] = _made(self.outcome, record)
            except (ValueError, KeyError, TypeError) as wrong:
                raise click.UsageError(f"line {number} of '{results}' is no run") from wrong
        return outcomes

    def opened(self, results: Path) -> TextIO:
        """The file, to append to. The torn last line of a run that was killed is cut off."""
        results.parent.mkdir(parents=True, exist_ok=True)
        results.touch()
        os.truncate(results, len(self._whole_lines(results)))
        return results.open("a", encoding="utf-8")

    def _whole_lines(self, results: Path) -> bytes:
        content = results.read_bytes() if results.exists() else b""
        end = content.rfind(b"\n") + 1
        beginning = self._beginning()
        if not beginning.startswith(content[end:][: len(beginning)]):
            raise click.UsageError(f"the end of '{results}' is no run")
        return content[:end]

    def _beginning(self) -> bytes:
        """Of every line; a file that goes on in another way after its last one is not ours."""
        kind: Any = self.run
        return f'{{"{fields(kind)[0].name}": '.encode()


def _values(of: Any) -> dict[str, Any]:
    return asdict(of)


def _made(kind: Any, record: Mapping[str, Any]) -> Any:
    return kind(**{field.name: record[field.name] for field in fields(kind)})
