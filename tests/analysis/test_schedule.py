"""The least peak: against all orders of small graphs, published optima, and cut-off searches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import networkx as nx
import pytest
from analysis.dags import few_orders, needs, random_dag

from fxopt.analysis import schedule as module
from fxopt.analysis.frontier import OutOfTime, sweep
from fxopt.analysis.graph import load_graph, normalised
from fxopt.analysis.problem import problem_of
from fxopt.analysis.schedule import program_order, schedule
from fxopt.errors import InvalidGraphError

INSTANCES = Path(__file__).parent.parent / "data" / "ordering"

# Nodes, bytes in the file's order, proven optimum: the table of the instances' README.
OPTIMA = {
    "darts_imagenet_fp32": (571, 5_017_600, 3_813_376),
    "darts_normal_28x28x48_fp32": (40, 1_204_224, 1_204_224),
    "nasnet_imagenet_fp32": (703, 4_917_248, 3_763_200),
    "randwire_ws32_seed0": (117, 550_368, 458_640),
    "randwire_ws32_seed1": (117, 580_944, 428_064),
    "randwire_ws32_seed2": (116, 642_096, 458_640),
    "swiftnet_vww": (86, 351_232, 301_056),
}


def branches(count: int) -> nx.DiGraph:
    """A source, ``count`` branches of a large and a small tensor, and their sum; large ones first."""
    graph = nx.DiGraph()
    graph.add_node("source", output_bytes=8)
    for index in range(count):
        graph.add_node(f"large{index}", output_bytes=64)
        graph.add_edge("source", f"large{index}")
    for index in range(count):
        graph.add_node(f"small{index}", output_bytes=1)
        graph.add_edge(f"large{index}", f"small{index}")
    graph.add_node("sum", output_bytes=1)
    graph.add_edges_from((f"small{index}", "sum") for index in range(count))
    return graph


def tangle() -> nx.DiGraph:
    """Too wide for the narrowest search: 24 operators on two layers, each reading two."""
    graph = nx.DiGraph()
    for index in range(12):
        graph.add_node(index, output_bytes=7 + index * 5 % 11)
    for index in range(12):
        graph.add_node(12 + index, output_bytes=3 + index * 7 % 13)
        graph.add_edges_from([(index, 12 + index), (index * 5 % 12, 12 + index)])
    return graph


def test_no_order_of_a_small_graph_is_better() -> None:
    for seed, graph, orders in few_orders(200):
        best = min(max(needs(graph, order)) for order in orders)
        found = schedule(graph)
        assert (found.peak_bytes, found.lower_bound_bytes, found.optimal) == (best, best, True), (
            seed
        )
        assert list(found.order) in orders
        assert max(needs(graph, found.order)) == best


def test_both_directions_find_the_optimum_and_refuse_less() -> None:
    for seed, graph, orders in few_orders(100):
        best = min(max(needs(graph, order)) for order in orders)
        start = program_order(normalised(graph))
        problem = problem_of(graph, start)
        for backwards in (False, True):
            until = time.monotonic() + 60
            found = sweep(problem, best, 10**5, backwards=backwards, deadline=until)
            assert found.order is not None, (seed, backwards)
            assert max(needs(graph, [start[n] for n in found.order])) <= best
            less = sweep(problem, best - 1, 10**5, backwards=backwards, deadline=until)
            assert (less.order, less.complete) == (None, True), (seed, backwards)
            assert best - 1 < less.refused <= best, (seed, backwards)


@pytest.mark.parametrize("name", OPTIMA)
def test_published_graphs_have_their_proven_optimum(name: str) -> None:
    nodes, own, best = OPTIMA[name]
    graph = load_graph(INSTANCES / f"{name}.json")
    assert len(graph) == nodes
    assert max(needs(graph, list(graph))) == own
    found = schedule(graph)
    assert (found.peak_bytes, found.lower_bound_bytes, found.optimal) == (best, best, True)


def test_a_search_too_narrow_claims_nothing_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WIDTHS", (1,))
    unproven = 0
    for seed, graph, orders in few_orders(200):
        best = min(max(needs(graph, order)) for order in orders)
        found = schedule(graph)
        assert found.lower_bound_bytes <= best <= found.peak_bytes, seed
        assert found.optimal == (found.lower_bound_bytes == found.peak_bytes)
        unproven += not found.optimal
    assert unproven  # the width was felt


def test_at_its_time_limit_the_best_so_far_is_given() -> None:
    graph = tangle()
    found = schedule(graph, time_limit=0.0)
    best = schedule(graph)
    assert best.optimal
    assert found.lower_bound_bytes <= best.peak_bytes <= found.peak_bytes
    assert max(needs(graph, found.order)) == found.peak_bytes
    assert not found.optimal


def test_a_deadline_that_has_passed_ends_a_sweep() -> None:
    problem = problem_of(tangle(), list(tangle()))
    with pytest.raises(OutOfTime):
        sweep(problem, 10**6, 10, backwards=False, deadline=time.monotonic() - 1)


def test_an_interruption_gives_the_best_so_far() -> None:
    def interrupted(peak: int, bound: int) -> None:
        raise KeyboardInterrupt

    graph = tangle()
    found = schedule(graph, progress=interrupted)
    assert max(needs(graph, found.order)) == found.peak_bytes
    assert found.lower_bound_bytes <= schedule(graph).peak_bytes


def test_progress_only_ever_closes_in() -> None:
    told: list[tuple[int, int]] = []
    found = schedule(tangle(), progress=lambda peak, bound: told.append((peak, bound)))
    assert told[-1] == (found.peak_bytes, found.lower_bound_bytes)
    for (peak, bound), (later_peak, later_bound) in pairwise(told):
        assert later_peak <= peak
        assert later_bound >= bound


def test_more_operators_than_two_words_of_a_mask_hold() -> None:
    found = schedule(branches(70))  # 142 operators
    # The last branch but one: 68 small results, its own two, and the source.
    assert (found.peak_bytes, found.optimal) == (68 + 64 + 1 + 8, True)


def test_a_diamond_in_a_diamond() -> None:
    graph = nx.DiGraph(["ab", "ac", "bd", "be", "df", "ef", "fg", "cg"])
    sizes = {"a": 4, "b": 9, "c": 2, "d": 7, "e": 3, "f": 1, "g": 5}
    nx.set_node_attributes(graph, sizes, "output_bytes")
    orders = list(nx.all_topological_sorts(graph))
    assert schedule(graph).peak_bytes == min(max(needs(graph, order)) for order in orders)


@pytest.mark.parametrize(
    ("graph", "peak"),
    [
        (nx.DiGraph(), 0),
        (nx.DiGraph([("a", "b"), ("c", "d")]), 17),  # the first's result waits for the second's
    ],
    ids=["empty", "disconnected"],
)
def test_graphs_of_no_and_of_two_pieces(graph: nx.DiGraph, peak: int) -> None:
    nx.set_node_attributes(graph, {"a": 8, "b": 1, "c": 8, "d": 8}, "output_bytes")
    found = schedule(graph)
    assert (found.peak_bytes, found.optimal) == (peak, True)


def test_a_long_chain_is_its_order() -> None:
    graph = nx.path_graph(3000, create_using=nx.DiGraph)
    nx.set_node_attributes(graph, {node: 1 + node % 7 for node in graph}, "output_bytes")
    found = schedule(graph)
    assert found.order == tuple(range(3000))
    assert (found.peak_bytes, found.optimal) == (13, True)


def test_nodes_listed_against_their_edges_are_sorted() -> None:
    graph = nx.DiGraph()
    graph.add_node("reader", output_bytes=1)
    graph.add_node("writer", output_bytes=2)
    graph.add_edge("writer", "reader")
    assert schedule(graph).order == ("writer", "reader")


def test_the_graph_is_left_as_it_was() -> None:
    graph = random_dag(3)
    before = nx.node_link_data(graph, edges="edges")
    schedule(graph)
    assert nx.node_link_data(graph, edges="edges") == before


def test_a_cycle_is_refused() -> None:
    graph = nx.DiGraph([("a", "b"), ("b", "a")])
    nx.set_node_attributes(graph, 1, "output_bytes")
    with pytest.raises(InvalidGraphError, match="cycle"):
        schedule(graph)


def test_the_order_depends_on_the_graph_alone() -> None:
    """Whatever the seed of Python's hashes is; and torch is not needed for it."""
    code = (
        "import sys, json; from fxopt.analysis.graph import load_graph\n"
        "from fxopt.analysis.schedule import schedule\n"
        f"found = schedule(load_graph({str(INSTANCES / 'swiftnet_vww.json')!r}))\n"
        "print(json.dumps([found.order, 'torch' in sys.modules]))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("0", "1")
    }
    assert len(outputs) == 1
    order, imported = json.loads(outputs.pop())
    assert len(order) == 86
    assert not imported
