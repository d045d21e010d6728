"""What a stage costs: the work of its halos, and the peak of the network that holds it.

Rows and columns of tiles are independent of each other, so the work of a grid is a product of two
sums. The memory of a tile is that of the best order of its operators, beside the stage's result; it
is only computed where a bound says that it may matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import networkx as nx
from torch import fx

from fxopt.analysis.cost import cost
from fxopt.analysis.dataflow import dataflow
from fxopt.analysis.memory_model import MemoryModel
from fxopt.analysis.receptive_field import Area, Interval, cut
from fxopt.analysis.schedule import schedule
from fxopt.patching.context import NotLocal
from fxopt.patching.regions import NotClosed, Regions, patched
from fxopt.patching.stage import Plan, Step, Tile
from fxopt.program import Program


@dataclass(frozen=True)
class Choice:
    """One way to patch a program from an entry to an end.

    Attributes:
        peak_bytes: of the whole patched program, in the best order.
        overhead: multiply-accumulates that are added, as a fraction of the whole program's.
        stage_overhead: the same, as a fraction of the stage's.
        start, until: names of the entry and of the last node.
        rows, cols: into which the result is cut.
    """

    peak_bytes: int
    overhead: float
    stage_overhead: float
    start: str
    until: str
    rows: tuple[Interval, ...]
    cols: tuple[Interval, ...]

    @property
    def grid(self) -> tuple[int, int]:
        return len(self.rows), len(self.cols)


Part = Mapping[str, Interval]
TileShape = tuple[Part, Part, bool]


class Search:
    """What the regions of one program have in common."""

    def __init__(self, program: Program, model: MemoryModel, entry: fx.Node) -> None:
        self.program, self.model, self.entry = program, model, entry
        self.graph = dataflow(program, model)
        self.before_bytes = schedule(self.graph).peak_bytes
        costs = cost(program)
        self.macs = {row.node: row.macs for row in costs.operators}
        self.total_macs = costs.macs

    def regions(self, until: fx.Node | None) -> tuple[list[Region], str]:
        """The parts, and why none reaches further."""
        ends = self._ends() if until is None else [until]
        found, blocked = [], ""
        parts = Regions(self.program, self.entry)
        for end in ends:
            whole = (Interval(0, 1),)
            try:
                plan = parts.plan(end, whole, whole)
            except NotLocal as reason:
                if until is not None:
                    raise
                if not isinstance(reason, NotClosed):
                    blocked = blocked or str(reason)
                continue
            found.append(Region(self, plan, end))
        return found, blocked

    def _ends(self) -> list[fx.Node]:
        """The nodes whose values are written, of which all readers come after them."""
        written = {node for node, alias in self.graph.nodes(data="alias_of") if alias is None}
        return [n for n in self.program.nodes if n.name in written and n.op != "placeholder"]


class Region:
    """The operators from the entry to one end."""

    def __init__(self, search: Search, plan: Plan, end: fx.Node) -> None:
        self.search, self.plan, self.end = search, plan, end
        self.sizes = plan.sizes
        self.names = {step.name for step in plan.steps}
        self.macs = sum(search.macs[name] for name in self.names)
        height, width = plan.result.type.shape[-2:]
        self.height, self.width = int(height), int(width)
        self._parts: dict[tuple[int, int], list[Part]] = {}

    @property
    def is_written(self) -> bool:
        """Whether the end's value is: it is no view, nor inside of a fused kernel."""
        nodes = self.search.graph.nodes
        return self.end.name in nodes and nodes[self.end.name]["alias_of"] is None

    @cached_property
    def rest_bytes(self) -> int:
        """The peak of all that is not in the region."""
        return self.whole_bytes(0)

    def whole_bytes(self, inside: int) -> int:
        """The peak of the program whose region is one operator that needs so much beside."""
        graph = self._outside
        graph.nodes[self.end.name]["scratch_bytes"] = inside
        return schedule(graph).peak_bytes

    @cached_property
    def _outside(self) -> nx.DiGraph:
        graph: nx.DiGraph = self.search.graph.copy()
        inside = [node for node in graph if node in self.names]
        read = {other for node in inside for other in graph.pred[node]} - set(inside)
        graph.remove_nodes_from(node for node in inside if node != self.end.name)
        fields = graph.nodes[self.end.name]
        fields |= {"inplace": [], "alias_of": None}
        graph.remove_edges_from(list(graph.in_edges(self.end.name)))
        graph.add_edges_from((node, self.end.name) for node in read)
        return graph

    def can_cut(self, rows: int, cols: int) -> bool:
        return rows * cols > 1 and rows <= self.height and cols <= self.width

    def may_be_below(self, limit: int) -> bool:
        """Whether all that is not in the region is."""
        return not self.is_written or self.rest_bytes < limit

    def parts(self, axis: int, count: int) -> list[Part]:
        """For each of ``count`` parts of the result's rows or columns, those of each value."""
        key = axis, count
        if key not in self._parts:
            cuts = cut((self.height, self.width)[axis], count)
            self._parts[key] = [self.plan.needed(axis, each) for each in cuts]
        return self._parts[key]

    @cached_property
    def _kernels(self) -> list[Kernel]:
        """What runs as one, in the program's order, with bytes of one position of its value."""
        graph, steps = self.search.graph, {step.name: step for step in self.plan.steps}
        found = []
        for node in (each for each in graph if each in self.names):
            fields = graph.nodes[node]
            members = [steps[name] for name in fields["members"]]
            height, width = self.sizes[node]
            found.append(
                Kernel(
                    node,
                    fields["output_bytes"] // (height * width),
                    bool(fields["scratch_bytes"]),
                    tuple(name for name in fields["inplace"] if name != self.plan.entry),
                    fields["alias_of"],
                    fields["item_bytes"],
                    tuple(graph.pred[node]),
                    {name: step for step in members for name in step.reads},
                )
            )
        return found

    @cached_property
    def _beside(self) -> int:
        """Bytes that are live all the while, beside the entry: the result."""
        return int(self.search.graph.nodes[self.end.name]["output_bytes"])

    @cached_property
    def _entry_bytes(self) -> int:
        return int(self.search.graph.nodes[self.plan.entry]["output_bytes"])

    @property
    def live_bytes(self) -> int:
        """Bytes that are live between tiles."""
        return self._beside + self._entry_bytes

    @cached_property
    def entry_ends(self) -> bool:
        """Whether the entry is free once the last tile has read it."""
        graph = self.search.graph
        all_inside = self.names.issuperset(graph.succ[self.plan.entry])
        return all_inside and not graph.nodes[self.plan.entry]["output"]

    def least_needs(self, rows: Mapping[str, Interval], cols: Mapping[str, Interval]) -> int:
        """Bytes without which no order runs a tile."""
        size = {
            kernel.node: kernel.bytes_per_position * len(rows[kernel.node]) * len(cols[kernel.node])
            for kernel in self._kernels
        }
        most = 0
        for kernel in self._kernels:
            read = [size[other] for other in kernel.reads if other in size]
            own = 0 if kernel.node == self.end.name else size[kernel.node]
            over = max((size[other] for other in kernel.inplace if other in size), default=0)
            most = max(most, sum(read) + own - min(own, over))
        return self._beside + most

    def tile_bytes(
        self, rows: Mapping[str, Interval], cols: Mapping[str, Interval], last: bool
    ) -> int:
        """Bytes that the best order of a tile's operators needs; the last tile frees the entry."""
        tile = {name: Area(rows[name], cols[name]) for name in rows}
        graph = nx.DiGraph()
        graph.add_node(
            self.plan.entry, output_bytes=self._entry_bytes, resident=True, output=not last
        )
        graph.add_node(_BESIDE, output_bytes=self._beside, resident=True, output=True)
        for kernel in self._kernels:
            fields = kernel.fields(tile, self.sizes, last=kernel.node == self.end.name)
            graph.add_node(kernel.node, **fields)
            graph.add_edges_from((other, kernel.node) for other in kernel.reads)
        graph.add_edge(_BESIDE, self.end.name)
        return schedule(graph).peak_bytes


_BESIDE = ("beside",)
"""The node of all that is live while a tile runs; a name of the program is a string."""


@dataclass(frozen=True)
class Kernel:
    """One node of the dataflow graph, as it is on a tile."""

    node: str
    bytes_per_position: int
    scratch: bool
    inplace: tuple[str, ...]
    alias_of: str | None
    item_bytes: int
    reads: tuple[str, ...]
    readers: Mapping[str, Step]

    def fields(
        self, tile: Tile, sizes: Mapping[str, tuple[int, int]], last: bool
    ) -> dict[str, object]:
        """Its attributes: the last one writes into the result, a crop is not written over."""
        area = tile[self.node]
        positions = len(area.rows) * len(area.cols)
        whole = [] if last else [name for name in self.inplace if self._is_whole(name, tile, sizes)]
        plane = self.item_bytes * positions if self.scratch and whole else 0
        return {
            "output_bytes": 0 if last else self.bytes_per_position * positions,
            "scratch_bytes": plane,
            "inplace": whole,
            "alias_of": _BESIDE if last else self.alias_of,
            "output": False,
        }

    def _is_whole(self, name: str, tile: Tile, sizes: Mapping[str, tuple[int, int]]) -> bool:
        step = self.readers.get(name)
        return step is not None and step.given(tile[step.name], sizes[name]) == tile[name]


class Candidate:
    """A region with a grid: what it costs, as far as that is asked."""

    def __init__(self, region: Region, rows: int, cols: int) -> None:
        self._region = region
        self._cuts = cut(region.height, rows), cut(region.width, cols)
        self._rows, self._cols = region.parts(0, rows), region.parts(1, cols)
        self._known: dict[int, int] = {}
        self._added = self._patched_macs() - region.macs

    @property
    def overhead(self) -> float:
        return self._added / max(1, self._region.search.total_macs)

    def _patched_macs(self) -> int:
        total = 0
        for name in self._region.names:
            macs = self._region.search.macs[name]
            if macs:
                height, width = self._region.sizes[name]
                computed = [sum(len(p[name]) for p in parts) for parts in (self._rows, self._cols)]
                total += macs // (height * width) * computed[0] * computed[1]
        return total

    def is_below(self, limit: int) -> bool:
        """Whether the peak is below ``limit``: what is cheap to know comes first."""
        region = self._region
        if not region.is_written:
            return self.peak_bytes < limit
        if not region.may_be_below(limit):
            return False
        needs = [region.least_needs(rows, cols) for rows, cols, _ in self._tiles]
        if max(needs) >= limit:
            return False
        largest = sorted(zip(needs, range(len(needs)), strict=True), reverse=True)
        tiles = all(self._tile_bytes(number) < limit for _, number in largest)
        return tiles and self.peak_bytes < limit

    def _tile_bytes(self, number: int) -> int:
        if number not in self._known:
            self._known[number] = self._region.tile_bytes(*self._tiles[number])
        return self._known[number]

    @cached_property
    def _tiles(self) -> list[TileShape]:
        """A tile of every shape; and whether it is the last one, which frees the entry."""
        ends = self._region.entry_ends
        pairs = product(_of_each_shape(self._rows), _of_each_shape(self._cols))
        return [
            (rows, cols, ends and rows is self._rows[-1] and cols is self._cols[-1])
            for rows, cols in pairs
        ]

    @cached_property
    def peak_bytes(self) -> int:
        """Of the whole patched program, in the best order."""
        region = self._region
        if region.is_written:
            most = max(map(self._tile_bytes, range(len(self._tiles))))
            return region.whole_bytes(max(0, most - region.live_bytes))
        plan = replace(region.plan, rows=self._cuts[0], cols=self._cuts[1])
        after = patched(region.search.program, plan)
        return schedule(dataflow(after, region.search.model)).peak_bytes

    def choice(self) -> Choice:
        region = self._region
        return Choice(
            self.peak_bytes, self.overhead, self._added / max(1, region.macs),
            region.plan.entry, region.plan.result.name, *self._cuts,
        )  # fmt: skip


def _of_each_shape(parts: Sequence[Part]) -> list[Part]:
    """The first of each, so that the last of all is there only if no other has its shape."""
    found: dict[tuple[int, ...], Part] = {}
    for part in parts:
        found.setdefault(tuple(map(len, part.values())), part)
    return list(found.values())
