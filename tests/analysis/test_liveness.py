"""Lifetimes and bytes of a step: by hand, and against counting every tensor at every step."""

from __future__ import annotations

from typing import Any

import networkx as nx
import pytest
from analysis.dags import needs, random_dag

from fxopt.analysis.liveness import storages, timeline
from fxopt.analysis.plan import Lifetime, Scratch


def graph_of(edges: str, **nodes: dict[str, Any]) -> nx.DiGraph:
    graph = nx.DiGraph()
    for name, fields in nodes.items():
        graph.add_node(name, **fields)
    graph.add_edges_from(tuple(edge) for edge in edges.split())
    return graph


def size(count: int, **more: Any) -> dict[str, Any]:
    return {"output_bytes": count, **more}


@pytest.mark.parametrize("seed", range(300))
def test_steps_need_what_is_counted_tensor_by_tensor(seed: int) -> None:
    graph = random_dag(seed)
    order = list(nx.topological_sort(graph))
    line = timeline(graph, order)
    assert list(line.step_bytes) == needs(graph, order)
    assert line.peak_bytes == max(needs(graph, order))
    assert line.step_bytes[line.peak_step] == line.peak_bytes


def test_a_view_keeps_its_tensor_alive() -> None:
    graph = graph_of("ab bc cd", a=size(8), b={"alias_of": "a"}, c={"alias_of": "b"}, d=size(2))
    assert storages(graph_normal(graph), "abcd") == {"a": "a", "b": "a", "c": "a", "d": "d"}
    line = timeline(graph, "abcd")
    assert line.lifetimes == (Lifetime("a", 8, 0, 4), Lifetime("d", 2, 3, 4))
    assert line.step_bytes == (8, 8, 8, 10)


def graph_normal(graph: nx.DiGraph) -> nx.DiGraph:
    from fxopt.analysis.graph import normalised

    return normalised(graph)


def test_the_largest_dying_operand_is_taken_over() -> None:
    graph = graph_of("ac bc", a=size(4), b=size(9), c=size(6, inplace=["a", "b"]))
    line = timeline(graph, "abc")
    assert line.lifetimes[-1] == Lifetime("c", 6, 2, 3, takes_over="b")
    assert line.step_bytes == (4, 13, 13)


@pytest.mark.parametrize("edges", ["ab ac", "ab"], ids=["another reader", "an output"])
def test_what_is_needed_later_is_not_taken_over(edges: str) -> None:
    kept = {"output": True} if edges == "ab" else {}
    graph = graph_of(edges, a=size(4, **kept), b=size(4, inplace=["a"]), c=size(1))
    line = timeline(graph, "abc")
    assert all(tensor.takes_over is None for tensor in line.lifetimes)
    assert line.step_bytes[1] == 8


def test_residents_are_live_from_the_start_and_outputs_to_the_end() -> None:
    graph = graph_of("bc", a=size(2, output=True), b=size(4, resident=True), c=size(1))
    line = timeline(graph, "abc")
    assert set(line.lifetimes) == {
        Lifetime("b", 4, 0, 3),
        Lifetime("a", 2, 0, 3),
        Lifetime("c", 1, 2, 3),
    }


def test_scratch_is_live_for_its_step() -> None:
    graph = graph_of("ab", a=size(2), b=size(3, scratch_bytes=5))
    line = timeline(graph, "ab")
    assert Lifetime(Scratch("b"), 5, 1, 2) in line.lifetimes
    assert line.step_bytes == (2, 10)


def test_nothing_needs_nothing() -> None:
    line = timeline(nx.DiGraph(), ())
    assert (line.lifetimes, line.step_bytes, line.peak_bytes, line.peak_step) == ((), (), 0, 0)
