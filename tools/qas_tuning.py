"""Which run of a cell comes next: its learning rates on one grid, then the winner again.

It depends on the outcomes so far and on nothing else, so that a comparison that was stopped goes on
as if it had not been.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Final

from qas_trials import Cell, Outcome, Run

LEARNING_RATES: Final = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""The same for all, so that what is measured is not the grid."""
SEARCH_SEED: Final = 0
"""In a search; the winner has those after it."""

Outcomes = Mapping[Run, Outcome]


def searched(cell: Cell, outcomes: Outcomes) -> list[Run]:
    """The trials of the cell that are done, by learning rate."""
    return [run for run in _trials(cell) if run in outcomes]


def winner(cell: Cell, outcomes: Outcomes) -> Run | None:
    """The trial that was best on the held-out images; None until all are done."""
    done = searched(cell, outcomes)
    if len(done) < len(LEARNING_RATES):
        return None
    return max(done, key=lambda run: outcomes[run].accuracy)


def finals(best: Run, seeds: int) -> list[Run]:
    """The winner's runs that are judged on the test images; beside the main comparison only one."""
    count = seeds if is_main(best) and not best.is_real else 1
    first = SEARCH_SEED + 1
    return [replace(best, role="final", seed=seed) for seed in range(first, first + count)]


def is_main(cell: Cell) -> bool:
    """Whether the cell is of the main comparison: momentum, in float or with scales of channels."""
    return cell.optimizer == "momentum" and cell.granularity != "tensor"


def next_run(cell: Cell, outcomes: Outcomes, seeds: int) -> Run | None:
    """None when all are done."""
    best = winner(cell, outcomes)
    runs = _trials(cell) if best is None else finals(best, seeds)
    return next((run for run in runs if run not in outcomes), None)


def runs_left(cell: Cell, outcomes: Outcomes, seeds: int) -> int:
    """How many runs there are to do."""
    trials = _trials(cell)
    best = winner(cell, outcomes)
    last = finals(trials[0] if best is None else best, seeds)
    return sum(run not in outcomes for run in (*trials, *last))


def _trials(cell: Cell) -> list[Run]:
    given = asdict(cell)
    return [Run(**given, role="search", lr=lr, seed=SEARCH_SEED) for lr in LEARNING_RATES]
