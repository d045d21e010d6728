"""Order and packing together: an order that packs at the least peak, where there is one."""

from __future__ import annotations

import random

import networkx as nx
import pytest

from fxopt.analysis.arena import plan_arena
from fxopt.analysis.joint import packed
from fxopt.analysis.liveness import timeline
from fxopt.analysis.schedule import schedule
from fxopt.analysis.validate import validate_plan, validate_schedule


def random_graph(seed: int) -> nx.DiGraph:
    rng = random.Random(seed)
    graph = nx.DiGraph()
    for node in range(rng.randint(12, 22)):
        graph.add_node(node, output_bytes=rng.randint(1, 9), output=False)
        count, near = rng.choice([0, 1, 1, 2]), list(range(max(0, node - 6), node))
        graph.add_edges_from((other, node) for other in rng.sample(near, min(count, len(near))))
    return graph


@pytest.mark.parametrize("seed", [442, 947, 1179])
def test_finds_an_order_that_packs(seed: int) -> None:
    graph = random_graph(seed)
    found = schedule(graph)
    first = plan_arena(timeline(graph, found.order).lifetimes, 1)
    assert first.size_bytes > found.peak_bytes
    other, line, arena = packed(graph, found, 1)
    validate_schedule(graph, other)
    validate_plan(graph, other.order, arena)
    assert line == timeline(graph, other.order)
    assert arena.size_bytes == other.peak_bytes == found.peak_bytes
    assert packed(graph, found, 1) == (other, line, arena)


def test_leaves_an_order_that_packs() -> None:
    graph = random_graph(0)
    found = schedule(graph)
    assert packed(graph, found, 1)[0] is found
