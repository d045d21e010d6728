"""Models examined in processes of their own, several at once, each with a time limit."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil

from sweep.selection import Choice

# Large allocations can be slow; fxopt and its peers run under the same setting.
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "268435456",
}
ROOM_BYTES = 4 << 30
"""Free memory under which no second model is started."""


@dataclass
class _Running:
    process: Any
    messages: Connection
    started: float
    record: dict[str, Any] = field(default_factory=dict)


def examine_all(
    choices: Sequence[Choice], questions: Any, *, jobs: int, limit: float
) -> Iterator[dict[str, Any]]:
    """The record of each model as it is done, in no fixed order."""
    context = _context()
    waiting, running = list(choices), list[_Running]()
    while waiting or running:
        while waiting and len(running) < jobs and (not running or _room()):
            running.append(_start(context, waiting.pop(0), questions))
        wait([worker.messages for worker in running], timeout=1.0)
        for worker in list(running):
            if _finished(worker, limit):
                running.remove(worker)
                worker.record["seconds"] = time.monotonic() - worker.started
                yield worker.record


def _context() -> Any:
    os.environ.update({name: os.environ.get(name, value) for name, value in MALLOC.items()})
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    here = str(Path(__file__).resolve().parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sweep.preload"])
    return context


def _room() -> bool:
    return psutil.virtual_memory().available > ROOM_BYTES


def _start(context: Any, choice: Choice, questions: Any) -> _Running:
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(choice.spec, questions, send), daemon=True)
    process.start()
    send.close()
    record = {"model": choice.spec, "family": choice.family}
    return _Running(process, receive, time.monotonic(), record)


def _work(spec: str, questions: Any, messages: Connection) -> None:
    from sweep.examine import examine

    try:
        examine(spec, questions, messages.send)
    except Exception:
        return  # the record says what it was, and in which stage


def _finished(worker: _Running, limit: float) -> bool:
    try:
        while worker.messages.poll():
            worker.record |= worker.messages.recv()
    except EOFError:
        worker.process.join()
        if worker.process.exitcode:
            worker.record["crashed"] = f"the process ended with status {worker.process.exitcode}"
        return True
    if time.monotonic() - worker.started > limit:
        worker.process.kill()
        worker.process.join()
        worker.record["timeout"] = limit
        return True
    return False
