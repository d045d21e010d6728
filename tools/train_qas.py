"""Fine-tune a small int8 net with and without quantisation-aware scaling, and in float.

    python tools/train_qas.py --jobs 2
    python tools/train_qas.py --optimizer momentum --granularity channel --plot build/qas.svg
    python tools/train_qas.py --table --markdown

A net that knows five classes of Fashion-MNIST learns the five others with a new head, which stays
in float. ``fp32`` trains the folded net in float; ``int8`` trains its weights and biases in
quantised units, rounded in each call; ``qas`` scales the gradients of these back (Lin et al.,
NeurIPS 2022). ``real_nearest`` and ``real_stochastic`` are ``qas`` without float masters: int8
weights, rounded after each step; of them there is only momentum, per channel.

Each learning rate of one grid is tried on images held out of the training images; the winner is
trained anew with seeds of its own and judged on the test images, and so is its int8 file in
onnxruntime. The net that is fine-tuned is made first, and kept beside the results.

Every run that is done is a line of JSON in ``--results``; with the same file a comparison that was
stopped goes on where it was. The file does not know the code: after a change to it, take a new one.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Final, get_args

import click
import fashion
import qas_base
import qas_tuning
from qas_base import Base
from qas_plot import plot_searches
from qas_trials import (
    CALIBRATED,
    MOMENTUM,
    WARMUP,
    Cell,
    Granularity,
    Method,
    OptimizerName,
    Outcome,
    Run,
    carry_out,
    require_lars,
)
from qas_tuning import is_main
from run_file import RunFile
from run_pool import Comparison, carry_on, process_pool
from tabulate import tabulate

from fxopt.errors import ExportError
from fxopt.plot import check_plot

OPTIMIZERS: Final = get_args(OptimizerName)
GRANULARITIES: Final = tuple(filter(None, get_args(Granularity)))
METHODS: Final = get_args(Method)
RESULTS: Final = Path("build/train_qas.jsonl")
RECIPE: Final = (
    f"base {qas_base.RECIPE}; classes {qas_base.NEW_CLASSES}; 1/{fashion.HELD_OUT} held out; "
    f"momentum {MOMENTUM}, warm-up 1/{WARMUP}, cosine; calibrated on {CALIBRATED}"
)
RUNS: Final = RunFile(Run, Outcome, RECIPE)
AT_LEAST_1: Final = click.IntRange(1)
Row = tuple[object, ...]
HEADERS: Final = ("optimizer", "scales", "method", "trials", "lr", "held out", "test", "each seed",
                  "ONNX", "ms/step")  # fmt: skip


@click.command(help=__doc__, context_settings={"max_content_width": 100})
@click.option("--optimizer", "optimizers", type=click.Choice(OPTIMIZERS), multiple=True,
              default=OPTIMIZERS)  # fmt: skip
@click.option("--granularity", "granularities", type=click.Choice(GRANULARITIES), multiple=True,
              default=GRANULARITIES)  # fmt: skip
@click.option("--method", "methods", type=click.Choice(METHODS), multiple=True, default=METHODS)
@click.option("--seeds", type=AT_LEAST_1, default=3, show_default=True,
              help="For momentum per channel, but real int8; of all others one.")  # fmt: skip
@click.option("--steps", type=AT_LEAST_1, default=250, show_default=True, help="Of each run.")
@click.option("--batch", type=AT_LEAST_1, default=64, show_default=True, help="Images a step.")
@click.option("--base-steps", type=AT_LEAST_1, default=1500, show_default=True,
              help="Of the net that is fine-tuned.")  # fmt: skip
@click.option("--jobs", type=AT_LEAST_1, default=1, show_default=True,
              help="Runs at a time, each in a process and on one thread.")  # fmt: skip
@click.option("--data", type=click.Path(path_type=Path), default=fashion.FOLDER,
              show_default=True, help="Folder with the four files of Fashion-MNIST.")  # fmt: skip
@click.option("--results", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS,
              show_default=True, help="Runs, a line of JSON each; beside it the net.")  # fmt: skip
@click.option(
    "--table", "only_table", is_flag=True, help="Print what is in the file, train nothing."
)
@click.option("--markdown", is_flag=True, help="Print the table as GitHub takes it.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path),
              help="Draw accuracies by learning rate into this file (.svg or .png).")  # fmt: skip
def main(
    optimizers: Sequence[OptimizerName],
    granularities: Sequence[Granularity],
    methods: Sequence[Method],
    seeds: int,
    steps: int,
    batch: int,
    base_steps: int,
    jobs: int,
    data: Path,
    results: Path,
    only_table: bool,
    markdown: bool,
    plot: Path | None,
) -> None:
    every = (
        Cell(optimizer, "" if method == "fp32" else granularity, method, steps, batch, base_steps)
        for optimizer, granularity, method in product(optimizers, granularities, methods)
    )
    cells = [each for each in dict.fromkeys(every) if is_main(each) or not each.is_real]
    outcomes = RUNS.read(results)
    try:
        if plot is not None:
            check_plot(plot)
        if not only_table:
            fashion.check(data)
            if "lars" in optimizers:
                require_lars()
            base = Base(data, results.with_suffix(".pt"), base_steps)
            with process_pool(jobs) as pool:
                compare(cells, seeds, outcomes, results, base, pool, jobs)
        if plot is not None:
            plot_searches(plot, cells, outcomes)
    except ExportError as error:
        raise click.ClickException(str(error)) from error
    style = "github" if markdown else "simple"
    table_rows = rows(cells, outcomes, seeds)
    click.echo(tabulate(table_rows, HEADERS, tablefmt=style, disable_numparse=True))


# ---- the runs ----------------------------------------------------------------------------------


def compare(
    cells: Sequence[Cell], seeds: int, outcomes: dict[Run, Outcome], results: Path, base: Base,
    pool: Executor, jobs: int,
) -> None:  # fmt: skip
    """Make the net, then do the runs that are left, ``jobs`` at a time, of each cell one."""
    pool.submit(base.make).result()
    comparison = Comparison(
        cells,
        next_run=partial(qas_tuning.next_run, seeds=seeds),
        runs_left=partial(qas_tuning.runs_left, seeds=seeds),
        carry_out=partial(carry_out, base=base),
        title=lambda run: f"{run.optimizer} {run.granularity} {run.method}",
    )
    carry_on(comparison, outcomes, RUNS, results, pool, jobs)


# ---- the table ---------------------------------------------------------------------------------


def rows(cells: Sequence[Cell], outcomes: qas_tuning.Outcomes, seeds: int) -> Iterator[Row]:
    """A row a cell; until all of its trials are done only their number."""
    for cell in cells:
        trials = len(qas_tuning.searched(cell, outcomes))
        done = f"{trials} of {len(qas_tuning.LEARNING_RATES)}"
        head = (cell.optimizer, cell.granularity, cell.method, done)
        best = qas_tuning.winner(cell, outcomes)
        yield head if best is None else (*head, *_winner(best, outcomes, seeds))


def _winner(best: Run, outcomes: qas_tuning.Outcomes, seeds: int) -> Row:
    """What it is, and what came of it on the test images."""
    rates = qas_tuning.LEARNING_RATES
    at_end = " (end)" if best.lr in (rates[0], rates[-1]) else ""
    setting = (f"{best.lr:g}{at_end}", f"{outcomes[best].accuracy:.4f}")
    judged = [outcomes[run] for run in qas_tuning.finals(best, seeds) if run in outcomes]
    if not judged:
        return setting
    files = [each.onnx_accuracy for each in judged if each.onnx_accuracy is not None]
    return (
        *setting,
        f"{statistics.mean(each.accuracy for each in judged):.4f}",
        " ".join(f"{each.accuracy:.4f}" for each in judged),
        f"{statistics.mean(files):.4f}" if files else "",
        f"{statistics.median(each.ms_per_step for each in judged):.1f}",
    )


if __name__ == "__main__":
    main()
