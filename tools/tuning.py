"""Which run of a comparison comes next: a search for hyper-parameters, then its winner again.

It depends on the outcomes so far and on nothing else, so that a comparison that was stopped goes on
as if it had not been.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from types import ModuleType
from typing import Any, Final

import click
from trials import Cell, Outcome, Run

LEARNING_RATES: Final = {128: (3e-3, 3.0), 4: (3e-4, 0.3)}
"""The lowest and the highest, by batch."""
CLIPS: Final = (0.01, 0.04, 0.16, None)
SKIP_GAINS: Final = (0.0, 1.0)
PUBLISHED_CLIP, PUBLISHED_SKIP_GAIN = 0.01, 0.0
"""Of NFNets (Brock et al., ICML 2021)."""

GRID_TRIALS: Final = len(CLIPS) * len(SKIP_GAINS)
"""The first trials of a search, which lie on a grid: of ``nf`` every λ with every skip gain."""
FIRST_SAMPLER: Final = 1000
"""Seed of the sampler of a search's first trial; later trials have those after it."""
SEARCH_SEED: Final = 0
"""Of weights and order in a search; the winner has those after it."""

Outcomes = Mapping[Run, Outcome]
"""In the order in which they came."""


@dataclass(frozen=True)
class Budget:
    """Trials of each search, and seeds of its winner."""

    trials: int
    seeds: int


def searched(cell: Cell, outcomes: Outcomes, budget: Budget) -> list[Run]:
    """The trials that are done of the search that the cell lives on: ``published`` on bn's."""
    own = replace(cell, method="bn") if cell.method == "published" else cell
    done = [run for run in outcomes if run.role == "search" and run.cell == own]
    return done[: budget.trials]


def winner(cell: Cell, outcomes: Outcomes, budget: Budget) -> Run | None:
    """The trial that was best on the held-out images; None until all are done."""
    done = searched(cell, outcomes, budget)
    if len(done) < budget.trials:
        return None
    best = max(done, key=lambda run: outcomes[run].accuracy)
    if cell.method == "published":
        return replace(best, method="published", clip=PUBLISHED_CLIP, skip_gain=PUBLISHED_SKIP_GAIN)
    return best


def finals(best: Run, budget: Budget) -> list[Run]:
    """The winner's runs that are judged on the test images."""
    seeds = range(SEARCH_SEED + 1, SEARCH_SEED + 1 + budget.seeds)
    return [replace(best, role="final", seed=seed) for seed in seeds]


def next_run(cell: Cell, outcomes: Outcomes, budget: Budget) -> Run | None:
    """None when all are done, and while ``published`` waits for bn's search."""
    best = winner(cell, outcomes, budget)
    if best is not None:
        return next((run for run in finals(best, budget) if run not in outcomes), None)
    return None if cell.method == "published" else _trial(cell, outcomes, budget)


def runs_left(cell: Cell, outcomes: Outcomes, budget: Budget) -> int:
    """How many runs of the cell's own there are to do."""
    best = winner(cell, outcomes, budget)
    if best is not None:
        return sum(run not in outcomes for run in finals(best, budget))
    if cell.method == "published":
        return budget.seeds
    return budget.trials - len(searched(cell, outcomes, budget)) + budget.seeds


def _trial(cell: Cell, outcomes: Outcomes, budget: Budget) -> Run:
    """The next of the grid, or of TPE (Bergstra et al., NeurIPS 2011), told what is done."""
    optuna = require_optuna()
    done = searched(cell, outcomes, budget)
    setting: dict[str, Any] = {"clip": None, "skip_gain": None}
    if len(done) < GRID_TRIALS:
        setting |= _grid(cell)[len(done)]
    else:
        setting |= _suggested(done, outcomes, _space(cell, optuna), optuna)
    return Run(**asdict(cell), role="search", seed=SEARCH_SEED, **setting)


def _grid(cell: Cell) -> list[dict[str, Any]]:
    low, high = LEARNING_RATES[cell.batch]
    if cell.method == "nf":
        middle = math.sqrt(low * high)
        pairs = product(SKIP_GAINS, CLIPS)
        return [{"lr": middle, "clip": clip, "skip_gain": gain} for gain, clip in pairs]
    step = (high / low) ** (1 / (GRID_TRIALS - 1))
    return [{"lr": min(high, low * step**place)} for place in range(GRID_TRIALS)]


def _suggested(
    done: list[Run], outcomes: Outcomes, space: dict[str, Any], optuna: ModuleType
) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the multivariate sampler is experimental
        sampler = optuna.samplers.TPESampler(
            seed=FIRST_SAMPLER + len(done), n_startup_trials=0, multivariate=True
        )
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for run in done:
        params = {name: getattr(run, name) for name in space}
        value = outcomes[run].accuracy
        study.add_trial(optuna.trial.create_trial(params=params, distributions=space, value=value))
    suggested: dict[str, Any] = study.ask(space).params
    return suggested


def _space(cell: Cell, optuna: ModuleType) -> dict[str, Any]:
    kinds = optuna.distributions
    space = {"lr": kinds.FloatDistribution(*LEARNING_RATES[cell.batch], log=True)}
    if cell.method == "nf":
        space["clip"] = kinds.CategoricalDistribution(CLIPS)
        space["skip_gain"] = kinds.CategoricalDistribution(SKIP_GAINS)
    return space


def require_optuna() -> ModuleType:
    """The module, without its log; an error that says how to get it where it is missing."""
    try:
        import optuna
    except ImportError as missing:
        raise click.UsageError("the search needs optuna: pip install optuna") from missing
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    module: ModuleType = optuna
    return module
