"""Run the memory-hungry part of a network tile by tile (Lin et al., MCUNetV2, 2021, section 3).

The part reaches from the program's first input to one operator and becomes one node, a
:class:`fxopt.patching.stage.PatchedStage`. Its end and its grid are the user's, or the best that
:mod:`fxopt.patching.choice` finds for the memory model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from torch import fx

from fxopt.analysis.dataflow import dataflow
from fxopt.analysis.memory_model import MemoryModel
from fxopt.analysis.schedule import schedule
from fxopt.edit import Edit
from fxopt.errors import PreconditionError
from fxopt.memory import plan_memory
from fxopt.patching.choice import Choices, choices
from fxopt.patching.context import NotLocal
from fxopt.patching.cost import Choice
from fxopt.patching.regions import Regions, patch, patched
from fxopt.patching.stage import PatchedStage, Plan
from fxopt.program import Origin, Program
from fxopt.results import Declined
from fxopt.rewrite import Preserves, Site, declined, site
from fxopt.sizes import parse_size

MAX_OVERHEAD = 0.15


class Grid(str):
    """Rows and columns of tiles as a text.

    >>> Grid("3x5").shape
    (3, 5)
    """

    form: ClassVar[str] = "ROWSxCOLUMNS"

    def __new__(cls, text: str) -> Grid:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
            raise ValueError(f"'{text}' is no grid; write ROWSxCOLUMNS, 4x4 say")
        return super().__new__(cls, text)

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.split("x")
        return int(rows), int(cols)


class Bytes(int):
    """A size in bytes, as a number or a text: ``256kB``."""

    form: ClassVar[str] = "SIZE"

    def __new__(cls, size: str | int) -> Bytes:
        return super().__new__(cls, parse_size(size) if isinstance(size, str) else size)


_DECISIONS: WeakKeyDictionary[Program, dict[PatchExecution, tuple[Choices, Choice | None]]] = (
    WeakKeyDictionary()
)


@dataclass(frozen=True)
class PatchExecution:
    """Run the operators from the input to ``until`` tile by tile, on a ``grid`` of tiles.

    What is not given is chosen: with ``sram`` the least overhead that fits, else the least peak
    within ``max_overhead`` (0.15: of the whole network's MACs). ``preset`` and the options below it
    are the memory model that the choice is for.
    """

    name: ClassVar[str] = "patch_execution"
    once: ClassVar[bool] = True
    preserves: ClassVar[Preserves] = Preserves.VALUES
    until: str | None = None
    grid: Grid | None = None
    sram: Bytes | None = None
    max_overhead: float | None = None
    preset: str = "tinyengine"
    bytes_per_element: int | None = None
    fuse_epilogues: bool | None = None
    fuse_add: bool | None = None
    fuse_padding: bool | None = None
    inplace_elementwise: bool | None = None
    inplace_as_written: bool | None = None
    inplace_depthwise: bool | None = None
    inplace_depthwise_scratch: bool | None = None
    input_resident: bool | None = None
    alignment: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.grid, str):
            object.__setattr__(self, "grid", Grid(self.grid))
        if self.sram is not None:
            object.__setattr__(self, "sram", Bytes(self.sram))
        if self.sram is not None and self.max_overhead is not None:
            raise ValueError("give sram or max_overhead, not both")
        if self.max_overhead is not None and self.max_overhead < 0:
            raise ValueError(f"max_overhead is {self.max_overhead}; the least is 0")
        self.memory_model()

    def memory_model(self) -> MemoryModel:
        """The kernels that the choice is for."""
        names = MemoryModel.__dataclass_fields__
        changes = {n: v for n in names if (v := getattr(self, n)) is not None}
        return MemoryModel.preset(self.preset, **changes)

    def sites(self, program: Program) -> Iterator[Site | Declined]:
        found, choice = self._decision(program)
        if choice is None:
            entry = next(node for node in program.nodes if node.op == "placeholder")
            yield declined(program, entry, self._not_patched(found))
            return
        parts = Regions(program, program.node(choice.start))
        end, *others = reversed(parts.nodes(program.node(choice.until)))
        yield site(end, *others, facts=choice)

    def rewrite(self, site: Site, edit: Edit) -> str | None:
        choice = site.facts
        plan = _plan(edit.program, choice)
        patch(edit, plan)
        rows, cols = choice.grid
        return f"{len(plan.steps)} operators on {rows}x{cols} tiles"

    def evidence(self, before: Program, after: Program) -> Mapping[str, Any]:
        """The choice, what else could be chosen, and the peak before."""
        found, choice = self._decision(before)
        return {
            "before": {"peak_bytes": found.before_bytes},
            "choice": choice and choice_dict(before, choice),
            "front": [choice_dict(before, each) for each in found.front],
        }

    def _decision(self, program: Program) -> tuple[Choices, Choice | None]:
        """What can be chosen and what is; once for the sites and for the evidence."""
        known = _DECISIONS.setdefault(program, {})
        if self not in known:
            found = self.choices(program)
            known[self] = found, self._chosen(program, found)
        return known[self]

    def choices(self, program: Program) -> Choices:
        """What can be chosen from.

        Raises:
            PreconditionError: ``until`` names nothing or cannot be reached, or the grid is larger
                than the map.
        """
        for node in program.nodes:
            if isinstance(program.module(node), PatchedStage):
                peak = schedule(dataflow(program, self.memory_model())).peak_bytes
                return Choices((), peak, f"'{node.name}' runs tile by tile already")
        until = None if self.until is None else _end(program, self.until)
        grid = self.grid.shape if self.grid is not None else None
        try:
            found = choices(program, self.memory_model(), until, grid)
        except NotLocal as reason:
            raise PreconditionError(
                f"patch_execution cannot reach '{self.until}': {reason}; let until name an "
                "operator before it"
            ) from None
        if self.grid is not None and found.largest_map and not found.tried:
            height, width = found.largest_map
            place = "" if self.until is None else f" at '{self.until}'"
            raise PreconditionError(
                f"grid {self.grid} does not cut a map of {height}x{width}{place} into tiles; give "
                "fewer, and more than one"
            )
        return found

    def _chosen(self, program: Program, found: Choices) -> Choice | None:
        """One of ``found``; None if there is nothing to do, or nothing that does it.

        Raises:
            PreconditionError: none fits into ``sram``, or what the user wants does not.
        """
        if self._is_given and found.front:
            return self._given(found.front[0])
        if self.sram is None:
            return found.within(self._limit)
        if found.before_bytes <= self.sram and self._arena_bytes(program) <= self.sram:
            return None
        fitting = found.fitting(self.sram)
        sizes = ((c, self._arena_bytes(patched(program, _plan(program, c)))) for c in fitting)
        choice = next((c for c, size in sizes if size <= self.sram), None)
        if choice is None:
            least = min([each.peak_bytes for each in found.front], default=found.before_bytes)
            more = f"; no part reaches further: {found.blocked}" if found.blocked else ""
            raise PreconditionError(
                f"no patching fits into {self.sram:,} bytes: the least that is reached is "
                f"{_size(least)}{more}"
            )
        return choice

    def _arena_bytes(self, program: Program) -> int:
        return plan_memory(program, memory_model=self.memory_model()).arena.size_bytes

    @property
    def _is_given(self) -> bool:
        return self.until is not None and self.grid is not None

    @property
    def _limit(self) -> float:
        return MAX_OVERHEAD if self.max_overhead is None else self.max_overhead

    def _given(self, choice: Choice) -> Choice:
        """The user's own end and grid, if they keep to the user's own limit."""
        what = f"grid {self.grid} until '{self.until}'"
        if self.sram is not None and choice.peak_bytes > self.sram:
            raise PreconditionError(
                f"{what} needs {_size(choice.peak_bytes)}, more than {self.sram:,}; leave one of "
                "them to the choice"
            )
        if self.max_overhead is not None and choice.overhead > self.max_overhead:
            raise PreconditionError(
                f"{what} adds {choice.overhead:.2%} of MACs, more than {self.max_overhead:.2%}; "
                "leave one of them to the choice"
            )
        return choice

    def _not_patched(self, found: Choices) -> str:
        if self.sram is not None:
            return f"the network fits as it is: its peak is {found.before_bytes:,} bytes"
        if found.front:
            least = found.front[0]
            return f"each patching adds more MACs; the least {least.overhead:.2%}"
        reason = found.blocked or "what can run tile by tile is not where the peak is"
        return f"no patching has a smaller peak than {found.before_bytes:,} bytes: {reason}"


def choice_dict(program: Program, choice: Choice) -> dict[str, Any]:
    """A choice as it is in reports; intervals are ``[start, stop]``."""
    region = {
        "start": _name(program, choice.start),
        "until": _name(program, choice.until),
        "grid": list(choice.grid),
        "halo": "recompute",
        "rows": [[each.start, each.stop] for each in choice.rows],
        "cols": [[each.start, each.stop] for each in choice.cols],
    }
    return {
        "peak_bytes": choice.peak_bytes,
        "overhead": choice.overhead,
        "stage_overhead": choice.stage_overhead,
        "regions": [region],
    }


def _name(program: Program, node: str) -> str:
    """The outermost of the user's modules that end with ``node``; the node if none does."""
    path = program.origins.get(node, Origin()).path
    parts = path.split(".") if path else []
    outer = (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
    return next((each for each in outer if _end(program, each).name == node), node)


def _size(size: int) -> str:
    return f"{size:,} ({size / 1024:,.1f} KiB)"


def _plan(program: Program, choice: Choice) -> Plan:
    parts = Regions(program, program.node(choice.start))
    return parts.plan(program.node(choice.until), choice.rows, choice.cols)


def _end(program: Program, until: str) -> fx.Node:
    """The node of that name, or the last one of the module at that path."""
    for node in reversed(program.nodes[:-1]):
        path = program.origins.get(node.name, Origin()).path
        inside = path == until or path.startswith(f"{until}.")
        if node.name == until or (inside and node.op not in ("placeholder", "get_attr")):
            return node
    raise PreconditionError(
        f"patch_execution: until '{until}' names no module that runs and no node of the program"
    )
