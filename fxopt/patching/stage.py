"""A part of a network that runs tile by tile.

A :class:`PatchedStage` is one node of the outer graph. It has no tensors of its own: weights are
operands, so that the user's modules keep them under the user's keys. Its steps say what each
operator of the part does to a tile, its tile table which area of each value every tile needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from fxopt.analysis.receptive_field import Area, Interval, Local
from fxopt.errors import PassError
from fxopt.graphs import NodeRecord, Operand, mapped
from fxopt.patching import tiles
from fxopt.program import Origin, TensorType

Tile = Mapping[str, Area]
"""The area of each value, by name, that one tile of the result needs."""

MAP = (-2, -1)
"""The axes of rows and columns where channels come first."""

Emit = Callable[["Step | None", Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Calls a function, or writes the call down; it is of a step, or crops an operand."""


@dataclass(frozen=True)
class Step:
    """One operator of a stage.

    Attributes:
        name: of the node that it was.
        function: takes ``args`` and ``kwargs``, and by name what depends on the tile.
        args, kwargs: the same for every tile; an :class:`Operand` is a value or a weight.
        local: which area of its operands an area of the result needs.
        type: of the whole result, ``(N, ..., H, W)`` unless ``axes`` differ.
        axes: those of rows and columns, counted from the last.
        pads: it takes ``pads``, the padding of each side.
        factors: it takes ``row_factors`` and ``col_factors``: these, of the whole result.
        places: it takes ``rows`` and ``cols`` of its result within what it makes of its operand.
        untrained: why it does not run in training mode; empty if it does.
        origin: where it comes from, in the user's names.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    local: Local
    type: TensorType
    axes: tuple[int, int] = MAP
    pads: bool = False
    factors: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    places: bool = False
    untrained: str = ""
    origin: Origin = field(default_factory=Origin)

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """Names of values and weights, in order."""
        found: list[str] = []

        def note(argument: Any) -> Any:
            if isinstance(argument, Operand):
                found.append(argument.name)
                return argument
            return mapped(note, argument)

        mapped(note, (self.args, self.kwargs))
        return tuple(found)

    def given(self, area: Area, size: tuple[int, int]) -> Area:
        """What ``area`` of the result reads of a map of ``size``, without padding."""
        return self.local.needs(area).within(*size)

    def settings(self, area: Area, size: tuple[int, int]) -> dict[str, Any]:
        """The arguments that depend on the tile, where its operands' maps have ``size``."""
        need, given = self.local.needs(area), self.given(area, size)
        found: dict[str, Any] = {}
        if self.pads:
            found["pads"] = (*_sides(need.cols, given.cols), *_sides(need.rows, given.rows))
        if self.factors is not None:
            found["row_factors"] = _part(self.factors[0], area.rows)
            found["col_factors"] = _part(self.factors[1], area.cols)
        if self.places:
            found["rows"] = _shifted(area.rows, given.rows.start * self.local.rows.scale)
            found["cols"] = _shifted(area.cols, given.cols.start * self.local.cols.scale)
        return found


def _sides(need: Interval, given: Interval) -> tuple[int, int]:
    return given.start - need.start, need.stop - given.stop


def _part(factors: tuple[float, ...], interval: Interval) -> tuple[float, ...] | None:
    """None where all of them are 1."""
    part = factors[interval.start : interval.stop]
    return None if all(factor == 1 for factor in part) else part


def _shifted(interval: Interval, by: int) -> tuple[int, int]:
    return interval.start - by, interval.stop - by


@dataclass(frozen=True)
class Plan:
    """What a stage does, as plain values.

    Attributes:
        entry: name of the value that it reads, of which tiles are taken.
        entry_type: its whole type, ``(N, C, H, W)``.
        weights: names of its other operands, which are read whole.
        steps: in a topological order; the last one gives the result.
        rows, cols: into which the result is cut.
        written: the nodes that the stage stands for.
        layers: those modules that they call and of which the stage reads no tensor, by path.
    """

    entry: str
    entry_type: TensorType
    weights: tuple[str, ...]
    steps: tuple[Step, ...]
    rows: tuple[Interval, ...]
    cols: tuple[Interval, ...]
    written: tuple[NodeRecord, ...] = ()
    layers: Mapping[str, nn.Module] = field(default_factory=dict)

    @property
    def result(self) -> Step:
        return self.steps[-1]

    @cached_property
    def sizes(self) -> Mapping[str, tuple[int, int]]:
        """Height and width of every whole map."""
        found = {self.entry: (self.entry_type.shape[-2], self.entry_type.shape[-1])}
        for step in self.steps:
            rows, cols = step.axes
            found[step.name] = (step.type.shape[rows], step.type.shape[cols])
        return found

    @cached_property
    def axes(self) -> Mapping[str, tuple[int, int]]:
        """Where the rows and columns of every map lie."""
        return {self.entry: MAP, **{step.name: step.axes for step in self.steps}}

    def tiles(self) -> list[Tile]:
        """Row after row, the areas that each tile needs."""
        down = [self.needed(0, rows) for rows in self.rows]
        across = [self.needed(1, cols) for cols in self.cols]
        return [{n: Area(rows[n], cols[n]) for n in rows} for rows in down for cols in across]

    def needed(self, axis: int, result: Interval) -> dict[str, Interval]:
        """The rows (``axis`` 0) or columns (1) of every value that a part of the result needs.

        It walks backwards: of each value the hull of what its readers need.
        """
        found = {self.result.name: result}
        for step, operands in reversed(self.operands):
            need = step.local.windows[axis].needs(found[step.name])
            for name, size in operands:
                part = need.within(size[axis])
                found[name] = part.joined(found[name]) if name in found else part
        return found

    @cached_property
    def last_read(self) -> Mapping[str, tuple[str, ...]]:
        """By the name of a step, the maps that nothing reads after it."""
        reader = {name: step.name for step in self.steps for name in step.reads}
        return {
            step.name: tuple(n for n in self.sizes if reader.get(n) == step.name)
            for step in self.steps
        }

    @cached_property
    def operands(self) -> list[tuple[Step, list[tuple[str, tuple[int, int]]]]]:
        """Each step with those of its operands that are maps, and their sizes."""
        sizes = self.sizes
        return [(s, [(n, sizes[n]) for n in s.reads if n in sizes]) for s in self.steps]


def emit_tile(plan: Plan, tile: Tile, values: dict[str, Any], emit: Emit) -> Any:
    """Run one tile through the steps, or write it down: ``values`` has its entry and weights.

    A value is let go once nothing reads it any more.
    """
    values = dict(values)
    for step, maps in plan.operands:
        area = tile[step.name]
        operands = {name: values[name] for name in step.reads}
        for name, size in maps:
            given = step.given(area, size)
            if given != tile[name]:
                part = _within(given, tile[name])
                operands[name] = emit(None, tiles.crop, (values[name], *part, plan.axes[name]), {})
        args, kwargs = _with(step.args, operands), _with(step.kwargs, operands)
        settings = step.settings(area, maps[0][1])
        values[step.name] = emit(step, step.function, args, {**kwargs, **settings})
        del operands, args, kwargs
        for name in plan.last_read[step.name]:
            del values[name]
    return values[plan.result.name]


def _with(argument: Any, operands: Mapping[str, Any]) -> Any:
    """``argument`` with the operands that it names."""
    if isinstance(argument, Operand):
        return operands[argument.name]
    return mapped(lambda each: _with(each, operands), argument)


def _within(area: Area, whole: Area) -> tuple[tuple[int, int], tuple[int, int]]:
    rows, cols = whole.rows.start, whole.cols.start
    return _shifted(area.rows, rows), _shifted(area.cols, cols)


def _run(_: Step | None, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return function(*args, **kwargs)


def places(area: Area) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns as arguments."""
    return _within(area, Area(Interval(0, 0), Interval(0, 0)))


class PatchedStage(nn.Module):
    """Runs a part of a network tile by tile: MCUNetV2 (Lin et al., 2021), section 3.

    ``forward(x, *weights)`` takes ``(N, C, H, W)`` of the one size that it was made for, any N, and
    the weights in the order of ``plan.weights``; it gives what the part gives.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.table = plan.tiles()

    def train(self, mode: bool = True) -> PatchedStage:
        """As for any module.

        Raises:
            PassError: it holds an operator that does another thing in training, which a tile of the
                batch is not enough for.
        """
        step = next((step for step in self.plan.steps if step.untrained), None)
        if mode and step is not None:
            raise PassError(
                f"the patched stage ({self.extra_repr()}) runs in evaluation only: "
                f"'{step.name}' ({step.origin}) {step.untrained}"
            )
        return super().train(mode)

    def forward(self, x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        self._check(x)
        if torch.compiler.is_exporting():
            return self._assembled(x, weights)
        type = self.plan.result.type
        result = tiles.buffer(x, type.shape[1:], self._dtype(x))
        for tile in self.table:
            value = self._tile(x, weights, tile)
            result = tiles.write_tile(result, value, *places(tile[self.plan.result.name]))
        return result

    def _tile(self, x: torch.Tensor, weights: Sequence[torch.Tensor], tile: Tile) -> torch.Tensor:
        plan = self.plan
        values: dict[str, Any] = dict(zip(plan.weights, weights, strict=True))
        values[plan.entry] = tiles.crop(x, *places(tile[plan.entry]))
        result: torch.Tensor = emit_tile(plan, tile, values, _run)
        return result

    def _assembled(self, x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """Tiles joined to rows, and these to the result: what exports as plain operators."""
        values = iter([self._tile(x, weights, tile) for tile in self.table])
        rows = [torch.cat([next(values) for _ in self.plan.cols], 3) for _ in self.plan.rows]
        return torch.cat(rows, 2)

    def _dtype(self, x: torch.Tensor) -> torch.dtype:
        """The result's; one that is the entry's follows it (a stage may be converted)."""
        same = self.plan.result.type.dtype == self.plan.entry_type.dtype
        return x.dtype if same else self.plan.result.type.dtype

    def _check(self, x: torch.Tensor) -> None:
        wanted = self.plan.entry_type.shape[1:]
        if tuple(x.shape[1:]) != tuple(wanted):
            made, got = ("x".join(map(str, shape)) for shape in (wanted, x.shape[1:]))
            raise PassError(
                f"the patched stage from '{self.plan.entry}' to '{self.plan.result.name}' was made "
                f"for inputs of {made}, not {got}: run patch_execution for this size"
            )

    def layers(self) -> list[nn.Module]:
        """The modules without tensors that steps call, each once."""
        functions = (step.function for step in self.plan.steps)
        return list({id(f): f for f in functions if isinstance(f, nn.Module)}.values())

    def extra_repr(self) -> str:
        grid = f"{len(self.plan.rows)}x{len(self.plan.cols)}"
        return f"{self.plan.entry} to {self.plan.result.name}, {grid} tiles"
