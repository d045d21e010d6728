"""The judge of schedules and arena plans: it believes nothing that a plan says of itself.

Lifetimes, peaks and what shares a storage are derived here from the graph and the order alone, and
no code is shared with what makes plans. Each check yields its faults in words; the first is raised.
Sizes and offsets are in bytes, times in steps: step ``i`` runs ``order[i]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import lcm

import networkx as nx

from fxopt.analysis.graph import normalised
from fxopt.analysis.plan import ArenaPlan, Lifetime, NodeId, Schedule, Scratch
from fxopt.errors import InvalidPlanError


def validate_schedule(graph: nx.DiGraph, schedule: Schedule) -> None:
    """Check an order of ``graph``, its peak in bytes and what it claims of it.

    Raises:
        InvalidPlanError: a node is missing, unknown or there twice, or runs before one that it
            reads; the peak is another, below the lower bound, or above it and said to be optimal.
        InvalidGraphError: the graph is malformed.

    >>> graph = nx.DiGraph([("conv", "relu")])
    >>> graph.add_node("conv", output_bytes=16)
    >>> graph.add_node("relu", output_bytes=16, inplace=["conv"])
    >>> validate_schedule(graph, Schedule(("conv", "relu"), 16, 16, optimal=True))
    """
    graph, order = normalised(graph), schedule.order
    _raise_first(_order_faults(graph, order))
    needs = [0] * len(order)
    for tensor, offered in _storages(graph, order).items():
        for step in range(tensor.start, tensor.end):
            needs[step] += tensor.size_bytes
        # In place, the smaller of the two lies within the larger.
        largest = max((other.size_bytes for other in offered), default=0)
        # A resident takes nothing over: for any other tensor its start is the step that writes it.
        needs[tensor.start] -= min(largest, tensor.size_bytes)
    peak = max(needs, default=0)
    if schedule.peak_bytes != peak:
        where = f", at step {needs.index(peak)} ({order[needs.index(peak)]!r})" if needs else ""
        raise InvalidPlanError(f"the peak is {peak} bytes{where}, not {schedule.peak_bytes}")
    _raise_first(_claim_faults("peak", peak, schedule))


def validate_plan(
    graph: nx.DiGraph, order: Sequence[NodeId], arena: ArenaPlan, alignment: int = 1
) -> None:
    """Check offsets in bytes for the tensors of ``graph``, run in ``order``.

    A view has the offset of what it views, or none. An operator may put its result over a tensor
    of its ``inplace`` list that nothing needs any more, at that one's offset, and need not.

    Raises:
        InvalidPlanError: as from the other two; or a view is elsewhere than what it views.
        InvalidGraphError: the graph is malformed.
    """
    graph = normalised(graph)
    _raise_first(_order_faults(graph, order))
    lifetimes = []
    for tensor, offered in _storages(graph, order).items():
        # What it lies on of what it may take over, it took over; a second one is an overlap.
        under = (other.id for other in offered if _meet(other, tensor, arena))
        lifetimes.append(replace(tensor, takes_over=next(under, None)))
    views = {node: v for node in order if (v := graph.nodes[node]["alias_of"]) is not None}
    places = {node: offset for node, offset in arena.offsets.items() if node not in views}
    validate_packing(lifetimes, replace(arena, offsets=places), alignment)
    for view, viewed in views.items():
        place = places[view] = places[viewed]
        if (offset := arena.offsets.get(view, place)) != place:
            where = f"offset {offset}, but {viewed!r}, which it views, at {place}"
            raise InvalidPlanError(f"{view!r} is at {where}")


def validate_packing(lifetimes: Sequence[Lifetime], arena: ArenaPlan, alignment: int = 1) -> None:
    """Check offsets in bytes for tensors of the given lifetimes.

    Raises:
        InvalidPlanError: a lifetime is malformed or takes over what it cannot; a tensor has no
            offset or one that is negative or misaligned, ends beyond the arena, is elsewhere than
            what it takes over, or overlaps another that is live at the same step; an offset is of
            no tensor; the size is below the lower bound, or above it and said to be optimal; the
            alignment is below 1.

    >>> lifetimes = [Lifetime("a", 8, start=0, end=2), Lifetime("b", 8, start=1, end=3)]
    >>> validate_packing(lifetimes, ArenaPlan({"a": 0, "b": 8}, 16, 16, optimal=True))
    """
    _raise_first(_lifetime_faults(lifetimes))
    _raise_first(_place_faults(lifetimes, arena, alignment))
    live: list[Lifetime] = []
    for tensor in sorted(lifetimes, key=lambda each: each.start):
        live = [other for other in live if other.end > tensor.start]
        for other in live:
            paired = tensor.takes_over == other.id or other.takes_over == tensor.id
            if not paired and _meet(other, tensor, arena):
                raise InvalidPlanError(f"{_text(other, arena)} overlaps {_text(tensor, arena)}")
        live.append(tensor)
    _raise_first(_claim_faults("arena", arena.size_bytes, arena))


def _raise_first(faults: Iterator[str]) -> None:
    for fault in faults:
        raise InvalidPlanError(fault)


def _storages(graph: nx.DiGraph, order: Sequence[NodeId]) -> dict[Lifetime, list[Lifetime]]:
    """The lifetime of every storage, and of those that it may take over where it is written.

    A storage is a node that is no view, with the views of it and theirs; or the scratch memory of
    such a node, for the step at which it runs.
    """
    step = {node: position for position, node in enumerate(order)}
    root: dict[NodeId, NodeId] = {}
    ends: dict[NodeId, int] = {}
    outputs: set[NodeId] = set()
    for node, given in ((node, graph.nodes[node]) for node in order):
        of = root[node] = node if given["alias_of"] is None else root[given["alias_of"]]
        ends[of] = max(ends.get(of, 0), *(1 + step[user] for user in (node, *graph[node])))
        if given["output"]:
            outputs.add(of)
    tensors: dict[NodeId, Lifetime] = {}
    offered: dict[Lifetime, list[Lifetime]] = {}
    for node, given in ((node, graph.nodes[node]) for node in ends):
        start = 0 if given["resident"] else step[node]
        end = len(order) if node in outputs else ends[node]
        tensors[node] = Lifetime(node, given["output_bytes"], start, end, given["item_bytes"])
        over = [] if given["resident"] else [root[other] for other in given["inplace"]]
        over = [other for other in over if ends[other] == step[node] + 1 and other not in outputs]
        offered[tensors[node]] = [tensors[other] for other in over]
        if given["scratch_bytes"]:
            scratch = Lifetime(Scratch(node), given["scratch_bytes"], step[node], step[node] + 1)
            offered[scratch] = []
    return offered


def _order_faults(graph: nx.DiGraph, order: Sequence[NodeId]) -> Iterator[str]:
    step: dict[NodeId, int] = {}
    for position, node in enumerate(order):
        if node not in graph:
            yield f"step {position} runs {node!r}, which is no node of the graph"
        if node in step:
            yield f"{node!r} runs twice, at the steps {step[node]} and {position}"
        step[node] = position
    for node in (each for each in graph if each not in step):
        yield f"the order lacks {node!r}"
    for writer, reader in graph.edges():
        if step[writer] > step[reader]:
            at = f"step {step[reader]}, but {writer!r}, which it reads, at step {step[writer]}"
            yield f"the order breaks a dependency: {reader!r} runs at {at}"


def _lifetime_faults(lifetimes: Sequence[Lifetime]) -> Iterator[str]:
    tensors: dict[NodeId, Lifetime] = {}
    for tensor in lifetimes:
        if tensor.id in tensors:
            yield f"{tensor.id!r} has two lifetimes"
        if tensor.end <= tensor.start:
            yield f"{tensor.id!r} is live at no step: [{tensor.start}, {tensor.end})"
        if tensor.size_bytes < 0 or tensor.item_bytes < 1:
            size = f"{tensor.size_bytes} bytes, in elements of {tensor.item_bytes}"
            yield f"{tensor.id!r} has {size}; the least are 0 and 1"
        tensors[tensor.id] = tensor
    takers: dict[NodeId, NodeId] = {}
    for tensor in (each for each in lifetimes if each.takes_over is not None):
        taken = tensors.get(tensor.takes_over)
        what = f"{tensor.id!r} takes over {tensor.takes_over!r}"
        if taken is None:
            yield f"{what}, which has no lifetime"
        elif tensor.start != taken.end - 1:
            yield f"{what} at step {tensor.start}, but that one's last step is {taken.end - 1}"
        elif taken.id in takers:
            yield f"{what}, and so does {takers[taken.id]!r}"
        takers[tensor.takes_over] = tensor.id
    # Steps do not rule this out where all of them live at one step only.
    for circle in nx.simple_cycles(nx.DiGraph(list(takers.items()))):
        yield f"in a circle, tensors take over one another: {circle}"


def _place_faults(lifetimes: Sequence[Lifetime], arena: ArenaPlan, alignment: int) -> Iterator[str]:
    if alignment < 1:
        yield f"the alignment is {alignment}; the least is 1"
    for stranger in sorted(arena.offsets.keys() - {each.id for each in lifetimes}, key=repr):
        yield f"there is an offset for {stranger!r}, which is no tensor"
    for tensor in lifetimes:
        offset = arena.offsets.get(tensor.id)
        multiple = lcm(alignment, tensor.item_bytes)
        if offset is None:
            yield f"{tensor.id!r} has no offset"
        elif offset < 0:
            yield f"{tensor.id!r} has the negative offset {offset}"
        elif offset % multiple != 0:
            yield f"{tensor.id!r} is misaligned: offset {offset} is no multiple of {multiple}"
        elif offset != arena.offsets.get(tensor.takes_over, offset):
            there = f"{tensor.takes_over!r}, at offset {arena.offsets[tensor.takes_over]}"
            yield f"{tensor.id!r} is at offset {offset}, but takes over {there}"
        elif offset + tensor.size_bytes > arena.size_bytes:
            yield f"{_text(tensor, arena)} ends beyond the arena of {arena.size_bytes} bytes"


def _claim_faults(what: str, size: int, plan: Schedule | ArenaPlan) -> Iterator[str]:
    if plan.lower_bound_bytes > size:
        yield f"the lower bound of {plan.lower_bound_bytes} bytes is above the {what}, {size}"
    if plan.optimal and plan.lower_bound_bytes != size:
        bound = f"the lower bound of {plan.lower_bound_bytes} bytes"
        yield f"the {what} of {size} bytes is claimed to be optimal, but is above {bound}"


def _meet(one: Lifetime, other: Lifetime, arena: ArenaPlan) -> bool:
    """Whether they have a byte in common; what has no bytes or no offset has none."""
    first, second = arena.offsets.get(one.id), arena.offsets.get(other.id)
    if first is None or second is None:
        return False
    return max(first, second) < min(first + one.size_bytes, second + other.size_bytes)


def _text(tensor: Lifetime, arena: ArenaPlan) -> str:
    offset = arena.offsets[tensor.id]
    where = f"bytes [{offset}, {offset + tensor.size_bytes})"
    return f"{tensor.id!r} ({where}, steps [{tensor.start}, {tensor.end}))"
