"""Train small nets on Fashion-MNIST with BatchNorms, normaliser-free, and with nothing.

    python tools/train_compare.py --jobs 2
    python tools/train_compare.py --net mobile --batch 4 --method bn --method nf
    python tools/train_compare.py --table --markdown

``bn`` is the net with BatchNorms; ``nf`` is what ``bn_to_scaled_ws{init=fresh}`` makes of it, with
adaptive gradient clipping; ``none`` has identities for the norms. For each net and batch, each of
the three gets the same number of trials, judged on images held out of the training images, for its
learning rate, and ``nf`` also for λ and the initial skip gain. The winner is trained anew with
seeds of its own and judged on the test images. ``published`` is ``nf`` with λ = 0.01 and a skip
gain of 0, at the learning rate that won for ``bn``.

Every run that is done is a line of JSON in ``--results``; with the same file a comparison that was
stopped goes on where it was. The file does not know the code: after a change to it, take a new one.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Final, get_args

import click
import fashion
import tuning
from run_file import RunFile
from run_pool import Comparison, carry_on, process_pool
from small_nets import NETS
from tabulate import tabulate
from trials import MOMENTUM, Cell, Method, Outcome, Run, carry_out
from tuning import Budget

STEPS: Final = {128: 300, 4: 2500}
"""By batch."""
BATCHES: Final = tuple(map(str, STEPS))
METHODS: Final = get_args(Method)
RESULTS: Final = Path("build/train_compare.jsonl")
RECIPE: Final = (
    f"SGD, Nesterov momentum {MOMENTUM}, cosine; 1/{fashion.HELD_OUT} held out; "
    f"learning rates {tuning.LEARNING_RATES}, λ {tuning.CLIPS}, skip gains {tuning.SKIP_GAINS}; "
    f"{tuning.GRID_TRIALS} trials on a grid, samplers from {tuning.FIRST_SAMPLER}"
)
RUNS: Final = RunFile(Run, Outcome, RECIPE)
AT_LEAST_1: Final = click.IntRange(1)
Row = tuple[object, ...]
HEADERS: Final = ("net", "batch", "method", "trials", "lr", "λ", "skip gain", "held out", "test",
                  "each seed", "parameters", "ms/step")  # fmt: skip


@click.command(help=__doc__, context_settings={"max_content_width": 100})
@click.option("--net", "nets", type=click.Choice(tuple(NETS)), multiple=True, default=tuple(NETS))
@click.option("--batch", "batches", type=click.Choice(BATCHES), multiple=True, default=BATCHES)
@click.option("--method", "methods", type=click.Choice(METHODS), multiple=True, default=METHODS)
@click.option("--trials", type=AT_LEAST_1, default=12, show_default=True, help="Of each search.")
@click.option("--seeds", type=AT_LEAST_1, default=3, show_default=True, help="Of each winner.")
@click.option("--steps", type=AT_LEAST_1, help="Of each run; by default 300, of batch 4 2,500.")
@click.option("--jobs", type=AT_LEAST_1, default=1, show_default=True,
              help="Runs at a time, each in a process and on one thread.")  # fmt: skip
@click.option("--data", type=click.Path(path_type=Path), default=fashion.FOLDER,
              show_default=True, help="Folder with the four files of Fashion-MNIST.")  # fmt: skip
@click.option("--results", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS,
              show_default=True, help="Runs, one line of JSON each.")  # fmt: skip
@click.option(
    "--table", "only_table", is_flag=True, help="Print what is in the file, train nothing."
)
@click.option("--markdown", is_flag=True, help="Print the table as GitHub takes it.")
def main(
    nets: Sequence[str],
    batches: Sequence[str],
    methods: Sequence[Method],
    trials: int,
    seeds: int,
    steps: int | None,
    jobs: int,
    data: Path,
    results: Path,
    only_table: bool,
    markdown: bool,
) -> None:
    cells = [
        Cell(net, int(batch), method, steps or STEPS[int(batch)])
        for net, batch, method in product(nets, batches, methods)
    ]
    budget = Budget(trials, seeds)
    outcomes = RUNS.read(results)
    if not only_table:
        fashion.check(data)
        tuning.require_optuna()
        check(cells, outcomes, budget)
        with process_pool(jobs) as pool:
            compare(cells, budget, outcomes, results, data, pool, jobs)
    style = "github" if markdown else "simple"
    table_rows = rows(cells, outcomes, budget)
    click.echo(tabulate(table_rows, HEADERS, tablefmt=style, disable_numparse=True))


# ---- the runs ----------------------------------------------------------------------------------


def check(cells: Sequence[Cell], outcomes: tuning.Outcomes, budget: Budget) -> None:
    """Refuse ``published`` where nothing will tell its learning rate."""
    for cell in cells:
        alone = cell.method == "published" and replace(cell, method="bn") not in cells
        if alone and tuning.winner(cell, outcomes, budget) is None:
            raise click.UsageError("published takes the learning rate of bn: add --method bn")


def compare(
    cells: Sequence[Cell], budget: Budget, outcomes: dict[Run, Outcome], results: Path, data: Path,
    pool: Executor, jobs: int,
) -> None:  # fmt: skip
    """Do the runs that are left, ``jobs`` at a time, of each cell one."""
    comparison = Comparison(
        cells,
        next_run=partial(tuning.next_run, budget=budget),
        runs_left=partial(tuning.runs_left, budget=budget),
        carry_out=partial(carry_out, folder=data),
        title=lambda run: f"{run.net} {run.batch} {run.method}",
    )
    carry_on(comparison, outcomes, RUNS, results, pool, jobs)


# ---- the table ---------------------------------------------------------------------------------


def rows(cells: Sequence[Cell], outcomes: tuning.Outcomes, budget: Budget) -> Iterator[Row]:
    """A row a cell; until all of its trials are done only their number."""
    for cell in cells:
        trials = len(tuning.searched(cell, outcomes, budget))
        head = (cell.net, cell.batch, cell.method, f"{trials} of {budget.trials}")
        best = tuning.winner(cell, outcomes, budget)
        yield head if best is None else (*head, *_winner(best, outcomes, budget))


def _winner(best: Run, outcomes: tuning.Outcomes, budget: Budget) -> Row:
    """Its setting, its accuracy on the held-out images, and what came of it on the test images."""
    has_clip = best.skip_gain is not None
    clip = ("off" if best.clip is None else best.clip) if has_clip else ""
    held_out = f"{outcomes[best].accuracy:.4f}" if best in outcomes else ""
    setting = (f"{best.lr:.2g}", clip, best.skip_gain, held_out)
    judged = [outcomes[run] for run in tuning.finals(best, budget) if run in outcomes]
    if not judged:
        return setting
    return (
        *setting,
        f"{statistics.mean(each.accuracy for each in judged):.4f}",
        " ".join(f"{each.accuracy:.4f}" for each in judged),
        f"{judged[0].parameters:,}",
        f"{statistics.median(each.ms_per_step for each in judged):.1f}",
    )


if __name__ == "__main__":
    main()
