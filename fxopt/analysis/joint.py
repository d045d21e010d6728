"""Order and packing together: of the orders with the least peak, one that packs well.

The least peak is a promise that only the arena can keep: tensors that would fit at every step may
still not fit together, and then another order of the same peak may do better.
"""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import accumulate

import networkx as nx

from fxopt.analysis.arena import plan_arena
from fxopt.analysis.graph import normalised
from fxopt.analysis.liveness import Timeline, timeline
from fxopt.analysis.plan import ArenaPlan, NodeId, Schedule
from fxopt.analysis.validate import validate_schedule

ORDERS, PACKINGS = 200, 20
"""Other orders that are looked at, and how many of them, with the same peak, are packed."""

SECONDS_PER_PACKING = 0.1
"""For the packing of one of them."""


def packed(
    graph: nx.DiGraph, found: Schedule, alignment: int
) -> tuple[Schedule, Timeline, ArenaPlan]:
    """``found``, or another order of the same peak whose arena is smaller, with that arena.

    Others are tried only where the arena is larger than the peak, and by more than alignment can
    cost: a few operators at a time are moved as far as their operands and readers allow. The same
    graph gives the same order.

    >>> graph = nx.path_graph(3, create_using=nx.DiGraph)
    >>> nx.set_node_attributes(graph, 16, "output_bytes")
    >>> schedule, line, arena = packed(graph, Schedule((0, 1, 2), 32, 32, True), alignment=16)
    >>> schedule.order, arena.size_bytes
    ((0, 1, 2), 32)
    """
    line = timeline(graph, found.order)
    arena = plan_arena(line.lifetimes, alignment)
    enough = found.peak_bytes + _alignment_bytes(line, alignment)
    if arena.size_bytes <= enough:
        return found, line, arena
    graph = normalised(graph)
    order, best = found.order, (found, line, arena)
    generator, left = random.Random(0), PACKINGS
    for _ in range(ORDERS):
        other = _moved(graph, order, generator)
        line = timeline(graph, other)
        if line.peak_bytes > found.peak_bytes:
            continue
        left -= 1
        arena = plan_arena(line.lifetimes, alignment, SECONDS_PER_PACKING)
        if arena.size_bytes <= best[2].size_bytes:
            order = other  # also where nothing is won: it leads to others
            if arena.size_bytes < best[2].size_bytes:
                best = replace(found, order=other), line, arena
        if best[2].size_bytes <= enough or not left:
            break
    validate_schedule(graph, best[0])
    return best


def _moved(
    graph: nx.DiGraph, order: tuple[NodeId, ...], generator: random.Random
) -> tuple[NodeId, ...]:
    """``order`` with up to three operators at other places between operands and readers."""
    moved = list(order)
    for _ in range(generator.randint(1, 3)):
        at = generator.randrange(len(moved))
        node = moved.pop(at)
        first, last = _window(graph, moved, node)
        moved.insert(generator.randint(first, last), node)
    return tuple(moved)


def _window(graph: nx.DiGraph, order: list[NodeId], node: NodeId) -> tuple[int, int]:
    """Positions of ``order`` before which ``node`` may run: after its operands, before readers."""
    places = {other: place for place, other in enumerate(order)}
    first = max((places[other] + 1 for other in graph.pred[node]), default=0)
    return first, min((places[other] for other in graph.succ[node]), default=len(order))


def _alignment_bytes(line: Timeline, alignment: int) -> int:
    """What aligned offsets can cost at most where the most tensors are live."""
    change = [0] * (len(line.step_bytes) + 1)
    for tensor in line.lifetimes:
        change[tensor.start] += 1
        change[tensor.end] -= 1
    return (alignment - 1) * max(accumulate(change), default=0)
