"""Run the memory-hungry part of a network tile by tile (Lin et al., MCUNetV2, 2021, section 3)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxopt.analysis.receptive_field import cut
from fxopt.edit import Edit
from fxopt.program import Program
from fxopt.regions import ATTRIBUTE, NotLocal, plan_of
from fxopt.results import Declined
from fxopt.rewrite import Preserves, Site, declined, site
from fxopt.stage import PatchedStage


class Grid(str):
    """Rows and columns of tiles as a text, ``4x4``."""

    def __new__(cls, text: str) -> Grid:
        if not re.fullmatch(r"[1-9][0-9]*x[1-9][0-9]*", text):
            raise ValueError(text)
        return super().__new__(cls, text)

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.split("x")
        return int(rows), int(cols)


@dataclass(frozen=True)
class PatchExecution:
    """Run the operators from the input to ``until`` on tiles, a ``grid`` of them."""

    name: ClassVar[str] = "patch_execution"
    preserves: ClassVar[Preserves] = Preserves.VALUES
    until: str
    grid: Grid

    def sites(self, program: Program) -> Iterator[Site | Declined]:
        entry = next(node for node in program.nodes if node.op == "placeholder")
        end = _end(program, self.until)
        rows, cols = _cuts(program, end, self.grid)
        try:
            plan = plan_of(program, entry, end, rows, cols)
        except NotLocal as reason:
            yield declined(program, end, str(reason))
            return
        nodes = [program.node(step.name) for step in plan.steps]
        yield site(end, *nodes, facts=(entry.name, end.name))

    def rewrite(self, site: Site, edit: Edit) -> str | None:
        program = edit.program
        entry, end = (program.node(name) for name in site.facts)
        plan = plan_of(program, entry, end, *_cuts(program, end, self.grid))
        last, operands = edit.node(end), [edit.node(entry)]
        anchor = last
        for name in plan.weights:
            if name.startswith(ATTRIBUTE):
                anchor = edit.attribute(name.removeprefix(ATTRIBUTE), after=anchor)
                operands.append(anchor)
            else:
                operands.append(edit.node(name))
        stage = edit.call_module(
            PatchedStage(plan), tuple(operands), after=anchor, name="patched_stage"
        )
        edit.replace_uses(last, stage)
        return f"{self.grid} tiles"


def _end(program: Program, until: str) -> fx.Node:
    """The last node of the module at ``until``, or the node of that name."""
    for node in reversed(program.nodes):
        path = program.origins[node.name].path if node.name in program.origins else ""
        if node.name == until or path == until or path.startswith(f"{until}."):
            return node
    raise ValueError(until)


def _cuts(program: Program, end: fx.Node, grid: Grid):
    height, width = program.types[end.name].shape[2:]
    rows, cols = grid.shape
    return cut(height, rows), cut(width, cols)
