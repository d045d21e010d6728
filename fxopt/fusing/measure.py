"""How long each block takes as it is and fused, on this device at its real shape.

A table of measurements is a value that is saved and read as JSON: a choice can be made on one
device from what was measured on another.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import nn

from fxopt.analysis.cost import Cost, cost
from fxopt.edit import Edit
from fxopt.errors import PreconditionError
from fxopt.files import scratch_beside
from fxopt.fusing.extract import extract
from fxopt.fusing.form import Form, Weights
from fxopt.fusing.fuse import fuse
from fxopt.fusing.knapsack import Item, best_set
from fxopt.program import Program

SCHEMA = "fxopt.fusing/1"
ROUNDS = 9
_KINDS: Mapping[str, Any] = {"str": str, "int": int, "float": (int, float)}
_ROUND_SECONDS = 0.02
_T = TypeVar("_T")


@dataclass(frozen=True)
class Row:
    """One block in both forms: median seconds, and what fusing adds.

    ``shape`` is that of its input, ``NxCxHxW``; ``form`` is what it becomes.
    """

    node: str
    path: str
    stage: int
    shape: str
    form: str
    seconds: float
    fused_seconds: float
    added_parameters: int
    added_macs: int


@dataclass(frozen=True)
class Measurements:
    """What was measured, where, and how."""

    device: str
    threads: int
    torch: str
    rounds: int
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}

    def best(self, now: Cost, max_params: int | None, max_macs: int | None) -> frozenset[str]:
        """The nodes of the blocks whose fusion takes the least time within the budgets.

        Args:
            now: what the whole network costs unfused.
            max_params, max_macs: of the whole network.

        Raises:
            PreconditionError: no choice meets them.
        """
        rows = self.rows
        adds = {
            "max_params": [row.added_parameters for row in rows],
            "max_macs": [row.added_macs for row in rows],
        }
        budgets = {"max_params": (max_params, now.parameters), "max_macs": (max_macs, now.macs)}
        given = {n: most - has for n, (most, has) in budgets.items() if most is not None}
        columns = list(zip(*(adds[name] for name in given), strict=True)) or [()] * len(rows)
        items = [
            Item(row.seconds - row.fused_seconds, column)
            for row, column in zip(rows, columns, strict=True)
        ]
        chosen = best_set(items, list(given.values()))
        if chosen is None:
            least = [f"{n} can be {budgets[n][1] + sum(min(a, 0) for a in adds[n]):,} at least"
                     for n in given]  # fmt: skip
            raise PreconditionError(f"no choice of blocks meets the budget: {', '.join(least)}")
        return frozenset(rows[index].node for index in chosen)


def measured(program: Program, forms: Sequence[Form], file: str | None) -> Measurements:
    """The measurements in ``file``; if there is no such file they are made, and written there.

    Raises:
        PreconditionError: the file is none of these, or is of another network.
    """
    if file is not None and Path(file).exists():
        return _of_forms(program, forms, load(file), file)
    now = cost(program)
    rows = tuple(_row(program, now, form) for form in forms)
    table = Measurements(_device(program), torch.get_num_threads(), torch.__version__, ROUNDS, rows)
    if file is not None:
        save(table, file)
    return table


def save(table: Measurements, file: str) -> None:
    """Write ``table`` as JSON."""
    with scratch_beside(Path(file)) as scratch:
        written = scratch / "measurements.json"
        written.write_text(json.dumps(table.to_dict(), indent=2) + "\n", encoding="utf-8")
        written.replace(file)


def load(file: str) -> Measurements:
    """The measurements that :func:`save` wrote.

    Raises:
        PreconditionError: the file holds something else.
    """
    try:
        document = json.loads(Path(file).read_text(encoding="utf-8"))
        if document.pop("schema") != SCHEMA:
            raise ValueError(f"its schema is not {SCHEMA}")
        rows = tuple(_read_row(row) for row in document.pop("rows"))
        table = _checked(Measurements(**document, rows=rows))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise PreconditionError(
            f"'{file}' holds no measurements of fuse_mbconv ({type(error).__name__}: {reason}); "
            "name a file that does not exist, and they are made and written there"
        ) from error
    return table


def _checked(value: _T) -> _T:
    """``value``, a dataclass, whose numbers and words are what they are called."""
    for field in fields(value):  # type: ignore[arg-type]
        given = getattr(value, field.name)
        if not isinstance(given, _KINDS.get(str(field.type), object)):
            raise ValueError(f"{field.name} is {given!r}")
    return value


def _read_row(given: Mapping[str, Any]) -> Row:
    row = _checked(Row(**given))
    if not (0 < row.seconds < math.inf and 0 < row.fused_seconds < math.inf):
        raise ValueError(f"the seconds of {row.path} are no times")
    return row


def _of_forms(
    program: Program, forms: Sequence[Form], table: Measurements, file: str
) -> Measurements:
    """The rows of ``table`` that are of ``forms``, in their order; what they add counted anew."""
    was = cost(program)
    rows = {(row.node, row.shape, row.form): row for row in table.rows}
    found = []
    for form in forms:
        key = (form.block.spatial.conv.name, _shape(program, form), _described(program, form))
        if key not in rows:
            raise PreconditionError(
                f"'{file}' holds no measurement of '{form.block.path}' on {key[1]} as {key[2]}; "
                "measure this network with these options"
            )
        _, _, (parameters, macs) = _fused(program, was, form)
        row = replace(rows[key], added_parameters=parameters, added_macs=macs)
        found.append(row)
    return replace(table, rows=tuple(found))


def _described(program: Program, form: Form) -> str:
    block = form.block
    gate = "" if block.gate is None else f", se={'keep' if form.keeps_gate else 'drop'}"
    nodes = (block.entry, block.spatial.conv, block.end)
    widths = "-".join(str(program.types[node.name].shape[1]) for node in nodes)
    return f"{form.kernel[0]}x{form.kernel[1]}, {widths}{gate}"


def _shape(program: Program, form: Form) -> str:
    return "x".join(map(str, program.types[form.block.entry.name].shape))


def _device(program: Program) -> str:
    device = next((t.device for t in program.graph_module.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def _row(program: Program, was: Cost, form: Form) -> Row:
    block = form.block
    after, end, added = _fused(program, was, form)
    plain = extract(program, block.entry.name, block.end.name)
    fused = extract(after, block.entry.name, end)
    seconds, fused_seconds = _interleaved((plain, fused), _example(program, form))
    return Row(
        block.spatial.conv.name,
        block.path,
        block.stage,
        _shape(program, form),
        _described(program, form),
        seconds,
        fused_seconds,
        *added,
    )


def _fused(program: Program, was: Cost, form: Form) -> tuple[Program, str, tuple[int, int]]:
    """``program`` with this block fused, its end, and the parameters and MACs that this adds."""
    edit = Edit(program)
    fuse(_stand_in(form), edit)
    after = edit.commit()
    end = form.block.end.name
    now = cost(after)
    added = now.parameters - was.parameters, now.macs - was.macs
    return after, edit.stands_for.get(end, end), added


def _stand_in(form: Form) -> Form:
    """A form of the same operators that needs no data."""
    if form.weights is not Weights.FIT:
        return form
    return replace(form, weights=Weights.RANDOM, carried=True)


def _example(program: Program, form: Form) -> torch.Tensor:
    kind = program.types[form.block.entry.name]
    device = next(program.graph_module.parameters()).device
    generator = torch.Generator().manual_seed(0)
    return torch.randn(kind.shape, generator=generator).to(device, kind.dtype)


def _interleaved(modules: Sequence[nn.Module], example: torch.Tensor) -> list[float]:
    """Median seconds of a call of each module, in rounds that take turns."""
    from torch.utils import benchmark  # here: its import warns where torch finds no GPU

    with torch.no_grad():
        timers = [
            benchmark.Timer("module(x)", globals={"module": module.eval(), "x": example},
                            num_threads=torch.get_num_threads())
            for module in modules
        ]  # fmt: skip
        once = [_warm(timer.timeit) for timer in timers]
        calls = [max(1, round(_ROUND_SECONDS / seconds)) for seconds in once]
        rounds = [
            [timer.timeit(count).median for timer, count in zip(timers, calls, strict=True)]
            for _ in range(ROUNDS)
        ]
    return [median(column) for column in zip(*rounds, strict=True)]


def _warm(timeit: Callable[[int], Any]) -> float:
    timeit(2)
    return float(timeit(1).median)
