"""The runs of a comparison done in processes, each written into a file as soon as it is done."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Generic, TypeVar

import torch
from run_file import RunFile
from tqdm import tqdm

CellT = TypeVar("CellT")
"""A cell: what is compared."""
RunT = TypeVar("RunT")
OutcomeT = TypeVar("OutcomeT")


@dataclass(frozen=True)
class Comparison(Generic[CellT, RunT, OutcomeT]):
    """Cells, and how their runs follow from the outcomes so far.

    ``next_run`` gives None when a cell has no run to do now, ``runs_left`` how many it has in all;
    ``carry_out`` goes to other processes; ``title`` is what the progress says of a run.
    """

    cells: Sequence[CellT]
    next_run: Callable[[CellT, Mapping[RunT, OutcomeT]], RunT | None]
    runs_left: Callable[[CellT, Mapping[RunT, OutcomeT]], int]
    carry_out: Callable[[RunT], OutcomeT]
    title: Callable[[RunT], str]


def process_pool(jobs: int) -> ProcessPoolExecutor:
    """Processes of one thread each, which end with their parent."""
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _start_worker)


def _start_worker() -> None:
    """One thread for training; another ends the process with its parent, which pools do not."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def carry_on(
    comparison: Comparison[CellT, RunT, OutcomeT],
    outcomes: dict[RunT, OutcomeT],
    runs: RunFile[RunT, OutcomeT],
    results: Path,
    pool: Executor,
    jobs: int,
) -> None:
    """Do the runs that are left, ``jobs`` at a time, of each cell one."""
    running: dict[Future[OutcomeT], tuple[CellT, RunT]] = {}
    cells = comparison.cells
    total = sum(comparison.runs_left(cell, outcomes) for cell in cells)
    with runs.opened(results) as lines, tqdm(total=total, file=sys.stderr) as bar:
        while True:
            busy = [cell for cell, _ in running.values()]
            idle = [cell for cell in cells if cell not in busy]
            following = ((cell, comparison.next_run(cell, outcomes)) for cell in idle)
            ready = ((cell, run) for cell, run in following if run is not None)
            for cell, run in islice(ready, jobs - len(running)):
                running[pool.submit(comparison.carry_out, run)] = (cell, run)
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                _, run = running.pop(future)
                outcomes[run] = future.result()
                print(runs.line(run, outcomes[run]), file=lines, flush=True)
                bar.set_postfix_str(comparison.title(run))
                bar.update()
