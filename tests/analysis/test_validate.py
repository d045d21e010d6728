"""The judge of plans: peaks by hand, one broken plan per verdict, and painting as its own judge."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.analysis.plan import ArenaPlan, Lifetime, NodeId, Schedule, Scratch
from fxopt.analysis.validate import validate_packing, validate_plan, validate_schedule
from fxopt.errors import InvalidGraphError, InvalidPlanError


def size(count: int, **more: Any) -> dict[str, Any]:
    return {"output_bytes": count, **more}


def view(of: str, **more: Any) -> dict[str, Any]:
    return {"alias_of": of, **more}


def graph_of(edges: str, /, **nodes: int | Mapping[str, Any]) -> nx.DiGraph:
    """``"ab bc"``, and of every node its bytes or its attributes."""
    graph = nx.DiGraph()
    for name, what in nodes.items():
        graph.add_node(name, **(what if isinstance(what, Mapping) else size(what)))
    graph.add_edges_from(tuple(edge) for edge in edges.split())
    return graph


def scheduled(order: str, peak: int, bound: int = 0, optimal: bool = False) -> Schedule:
    return Schedule(tuple(order), peak, bound, optimal)


def arena_of(size: int, bound: int = 0, optimal: bool = False, /, **offsets: int) -> ArenaPlan:
    return ArenaPlan(offsets, size, bound, optimal)


def refused(match: str) -> Any:
    """The whole message, as it stands."""
    return pytest.raises(InvalidPlanError, match=f"^{re.escape(match)}$")


CHAIN = graph_of("ab bc", a=4, b=8, c=2)

PEAKS = {
    # name: graph, order, bytes of each step
    "empty": (graph_of(""), "", []),
    "chain": (CHAIN, "abc", [4, 12, 10]),
    "diamond": (graph_of("ab ac bd cd", a=3, b=5, c=7, d=1), "abcd", [3, 8, 15, 13]),
    "disconnected": (graph_of("ab cd", a=4, b=1, c=6, d=2), "abcd", [4, 5, 7, 9]),
    "disconnected, interleaved": (graph_of("ab cd", a=4, b=1, c=6, d=2), "acbd", [4, 10, 11, 9]),
    "scratch": (graph_of("ab bc", a=4, b=size(1, scratch_bytes=9), c=2), "abc", [4, 14, 3]),
    "dead tensor": (graph_of("", a=size(9, output=False), b=1), "ab", [9, 1]),
    "output read inside": (graph_of("ab bc", a=4, b=size(8, output=True), c=2), "abc", [4, 12, 10]),
    "output read inside lives on": (
        graph_of("ab bc cd", a=4, b=size(8, output=True), c=2, d=1),
        "abcd",
        [4, 12, 10, 11],
    ),
    "resident": (graph_of("ac bc", a=4, b=size(8, resident=True), c=2), "abc", [12, 12, 14]),
    "resident with scratch": (
        graph_of("ab", a=size(4, resident=True, scratch_bytes=3), b=1),
        "ab",
        [7, 5],
    ),
    "resident and dead": (
        graph_of("", a=1, b=size(8, resident=True, output=False), c=2),
        "abc",
        [9, 9, 3],
    ),
    "zero sizes": (graph_of("ab bc", a=0, b=0, c=0), "abc", [0, 0, 0]),
    # In place.
    "in place": (graph_of("ab bc", a=4, b=size(4, inplace=["a"]), c=2), "abc", [4, 4, 6]),
    "in place, larger": (graph_of("ab", a=4, b=size(10, inplace=["a"])), "ab", [4, 10]),
    "in place, smaller": (graph_of("ab bc", a=9, b=size(4, inplace=["a"]), c=1), "abc", [9, 9, 5]),
    "in place with scratch": (
        graph_of("ab", a=4, b=size(4, inplace=["a"], scratch_bytes=5)),
        "ab",
        [4, 9],
    ),
    "in place, read later": (
        graph_of("ab ac", a=4, b=size(4, inplace=["a"]), c=1),
        "abc",
        [4, 8, 9],
    ),
    "in place, read before": (
        graph_of("ab ac", a=4, b=size(4, inplace=["a"]), c=1),
        "acb",
        [4, 5, 5],
    ),
    "in place of an output": (
        graph_of("ab", a=size(4, output=True), b=size(4, inplace=["a"])),
        "ab",
        [4, 8],
    ),
    "in place of a resident": (
        graph_of("ab", a=size(4, resident=True), b=size(4, inplace=["a"])),
        "ab",
        [4, 4],
    ),
    "a resident takes nothing over": (
        graph_of("ab", a=4, b=size(4, inplace=["a"], resident=True)),
        "ab",
        [8, 8],
    ),
    "the largest is taken over": (
        graph_of("ac bc", a=3, b=7, c=size(5, inplace=["a", "b"])),
        "abc",
        [3, 10, 10],
    ),
    "the largest that qualifies": (
        graph_of("ac bc bd", a=3, b=7, c=size(5, inplace=["a", "b"]), d=1),
        "abcd",
        [3, 10, 12, 13],
    ),
    "one of two is taken over": (
        graph_of("ac bc", a=4, b=4, c=size(8, inplace=["a", "b"])),
        "abc",
        [4, 8, 12],
    ),
    "sum of a tensor and itself": (
        # b reads a twice, c reads b twice: one edge each
        graph_of("ab bc", a=4, b=size(4, inplace=["a", "a"]), c=size(4, inplace=["b", "b"])),
        "abc",
        [4, 4, 4],
    ),
    "over nothing": (graph_of("ab", a=0, b=size(4, inplace=["a"])), "ab", [0, 4]),
    "nothing over something": (graph_of("ab", a=4, b=size(0, inplace=["a"])), "ab", [4, 4]),
    # Views.
    "view keeps alive": (graph_of("ab bd ac", a=8, b=view("a"), c=1, d=2), "abcd", [8, 8, 9, 11]),
    "view ends before": (
        graph_of("ab bc ad", a=8, b=view("a"), c=size(1, output=False), d=2),
        "abcd",
        [8, 8, 9, 10],
    ),
    "view costs nothing": (
        graph_of("ab bc", a=8, b=view("a", output_bytes=99, scratch_bytes=99), c=1),
        "abc",
        [8, 8, 9],
    ),
    "view of a view": (
        graph_of("ab bc ad ce", a=8, b=view("a"), c=view("b"), d=1, e=2),
        "abcde",
        [8, 8, 8, 9, 11],
    ),
    "unread view is an output": (graph_of("ab ac", a=8, b=view("a"), c=1), "acb", [8, 9, 9]),
    "dead view still reads": (
        graph_of("ab cd", a=8, b=view("a", output=False), c=1, d=1),
        "acbd",
        [8, 9, 9, 2],
    ),
    "view of a resident": (
        graph_of("bc cd", a=1, b=size(8, resident=True), c=view("b"), d=2),
        "abcd",
        [9, 9, 9, 11],
    ),
    "in place of a view": (
        graph_of("ab bc", a=8, b=view("a"), c=size(8, inplace=["b"])),
        "abc",
        [8, 8, 8],
    ),
    "in place, a view read later": (
        graph_of("ab ac bd", a=8, b=view("a"), c=size(8, inplace=["a"]), d=1),
        "abcd",
        [8, 8, 16, 17],
    ),
    "in place, a view written later": (
        graph_of("ab ac", a=8, b=view("a", output=False), c=size(8, inplace=["a"])),
        "acb",
        [8, 16, 16],
    ),
    "in place, a view is an output": (
        graph_of("ab bc", a=8, b=view("a", output=True), c=size(8, inplace=["b"])),
        "abc",
        [8, 8, 16],
    ),
    "operator of two outputs": (
        # split into two halves: the second may take the storage over, as the last to read it
        graph_of(
            "as sx sy xp yq pr qr",
            **{"a": 8, "s": 8, "x": view("s"), "y": view("s")},
            **{"p": size(4, inplace=["x"]), "q": size(4, inplace=["y"]), "r": 1},
        ),
        "asxypqr",
        [8, 16, 8, 8, 12, 12, 9],
    ),
}


@pytest.mark.parametrize("name", PEAKS)
def test_peak_by_hand(name: str) -> None:
    graph, order, needs = PEAKS[name]
    peak = max(needs, default=0)
    validate_schedule(graph, scheduled(order, peak, bound=peak, optimal=True))
    at = f", at step {needs.index(peak)} ({order[needs.index(peak)]!r})" if needs else ""
    for stated in (peak - 1, peak + 1):
        with refused(f"the peak is {peak} bytes{at}, not {stated}"):
            validate_schedule(graph, scheduled(order, stated))


def check_each_step(graph: nx.DiGraph, order: Sequence[Any], needs: Sequence[int]) -> None:
    """Enough scratch at one step makes it the peak, so that every step is seen, not just the top one."""
    for node, need in zip(order, needs, strict=True):
        if graph.nodes[node].get("alias_of") is None:
            lifted = graph.copy()
            lifted.nodes[node]["scratch_bytes"] = 1000 + lifted.nodes[node].get("scratch_bytes", 0)
            validate_schedule(lifted, Schedule(tuple(order), need + 1000, 0, False))


@pytest.mark.parametrize("name", PEAKS)
def test_bytes_of_each_step_by_hand(name: str) -> None:
    check_each_step(*PEAKS[name])


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (scheduled("ab", 12), "the order lacks 'c'"),
        (scheduled("", 0), "the order lacks 'a'"),
        (scheduled("abcd", 12), "step 3 runs 'd', which is no node of the graph"),
        (scheduled("abcb", 12), "'b' runs twice, at the steps 1 and 3"),
        (
            scheduled("acb", 12),
            "the order breaks a dependency: 'c' runs at step 1, but 'b', which it reads, at step 2",
        ),
        (scheduled("abc", 11), "the peak is 12 bytes, at step 1 ('b'), not 11"),
        (scheduled("abc", 12, 13), "the lower bound of 13 bytes is above the peak, 12"),
        (scheduled("abc", 12, 13, True), "the lower bound of 13 bytes is above the peak, 12"),
        (
            scheduled("abc", 12, 11, True),
            "the peak of 12 bytes is claimed to be optimal, but is above the lower bound of 11 bytes",
        ),
    ],
)
def test_schedule_refused(schedule: Schedule, message: str) -> None:
    with refused(message):
        validate_schedule(CHAIN, schedule)


def test_schedule_accepted() -> None:
    validate_schedule(CHAIN, scheduled("abc", 12))
    validate_schedule(CHAIN, scheduled("abc", 12, 12))  # may leave it unsaid that it is optimal
    validate_schedule(CHAIN, scheduled("abc", 12, 12, True))


def test_nodes_of_any_kind() -> None:
    """What is false in a condition, has no order, or is a tuple, is a node like any other."""
    graph = nx.DiGraph([(0, ""), ("", (1, 2)), ((1, 2), 3.5)])
    for node in graph:
        graph.add_node(node, output_bytes=4, alias_of=0 if node == "" else None)
    order = (0, "", (1, 2), 3.5)
    validate_schedule(graph, Schedule(order, 8, 8, True))
    validate_plan(graph, order, ArenaPlan({0: 0, (1, 2): 4, 3.5: 0}, 8, 8, True))
    with refused("'' is at offset 4, but 0, which it views, at 0"):
        validate_plan(graph, order, ArenaPlan({0: 0, "": 4, (1, 2): 4, 3.5: 0}, 8, 8, True))
    view_of_empty = nx.relabel_nodes(graph, {0: "", "": 0})
    for node, viewed in (("", None), (0, "")):
        view_of_empty.nodes[node]["alias_of"] = viewed
    plan = ArenaPlan({"": 0, 0: 4, (1, 2): 4, 3.5: 0}, 8, 8, True)
    with refused("0 is at offset 4, but '', which it views, at 0"):
        validate_plan(view_of_empty, ("", 0, (1, 2), 3.5), plan)


def test_malformed_graph() -> None:
    with pytest.raises(InvalidGraphError, match="'b' has no output_bytes"):
        validate_schedule(graph_of("ab", a=1), scheduled("ab", 1))
    with pytest.raises(InvalidGraphError, match="has a cycle"):
        validate_plan(graph_of("ab ba", a=1, b=1), "ab", arena_of(2, a=0, b=1))


def test_leaves_the_graph_as_it_was() -> None:
    graph = graph_of("ab", a=1, b=size(1, inplace=["a"]))
    before = {node: dict(attributes) for node, attributes in graph.nodes.items()}
    validate_schedule(graph, scheduled("ab", 1))
    validate_plan(graph, "ab", arena_of(1, a=0, b=0))
    assert dict(graph.nodes.items()) == before


# Packings: a lives at 0 and 1, b at 1 and 2, c at 2 and 3.
A, B, C = Lifetime("a", 8, 0, 2), Lifetime("b", 8, 1, 3), Lifetime("c", 8, 2, 4)
B_OVER_A = replace(B, takes_over="a")


@pytest.mark.parametrize(
    ("lifetimes", "arena", "alignment"),
    [
        pytest.param([], arena_of(0), 1, id="nothing"),
        pytest.param([A, B, C], arena_of(16, 16, True, a=0, b=8, c=0), 8, id="reuse"),
        pytest.param([C, B, A], arena_of(16, a=8, b=0, c=8), 8, id="in any order"),
        pytest.param([A, C], arena_of(12, a=0, c=4), 1, id="partly on a dead one"),
        pytest.param([A, B_OVER_A], arena_of(8, a=0, b=0), 1, id="taken over"),
        pytest.param([B_OVER_A, A], arena_of(8, a=0, b=0), 1, id="taken over, listed first"),
        pytest.param(
            [A, replace(B, size_bytes=20, takes_over="a")], arena_of(20, a=0, b=0), 1, id="outgrown"
        ),
        pytest.param(
            [A, B_OVER_A, replace(C, takes_over="b")],
            arena_of(12, a=4, b=4, c=4),
            1,
            id="taken over twice in turn",
        ),
        pytest.param(
            [A, replace(B, size_bytes=0)], arena_of(8, a=0, b=4), 1, id="no bytes within some"
        ),
        pytest.param(
            [replace(A, size_bytes=0), replace(B, size_bytes=0)],
            arena_of(0, a=0, b=0),
            1,
            id="no bytes at all",
        ),
        pytest.param([replace(A, item_bytes=4)], arena_of(20, a=12), 6, id="aligned to both"),
        pytest.param([A], arena_of(99, 7, a=0), 1, id="more than enough"),
        pytest.param([A], arena_of(8, 8, a=0), 1, id="optimal, unsaid"),
        pytest.param(
            [Lifetime("a", 8, 3, 4), Lifetime("b", 8, 3, 5, takes_over="a")],
            arena_of(8, a=0, b=0),
            1,
            id="taken over at its only step",
        ),
        pytest.param(
            [Lifetime("b", 8, 3, 5, takes_over="a"), Lifetime("a", 8, 3, 4)],
            arena_of(8, a=0, b=0),
            1,
            id="taken over at its only step, listed first",
        ),
    ],
)
def test_packing_accepted(lifetimes: list[Lifetime], arena: ArenaPlan, alignment: int) -> None:
    validate_packing(lifetimes, arena, alignment)


A_OVERLAPS_B = "'a' (bytes [0, 8), steps [0, 2)) overlaps 'b' (bytes [{0}, {1}), steps [1, 3))"

REFUSED_PACKINGS = {
    # Lifetimes.
    "two lifetimes": ([A, A], arena_of(8, a=0), "'a' has two lifetimes"),
    "two lifetimes, apart": (
        [A, replace(A, start=5, end=6)],
        arena_of(8, a=0),
        "'a' has two lifetimes",
    ),
    "ends where it starts": (
        [replace(A, start=2)],
        arena_of(8, a=0),
        "'a' is live at no step: [2, 2)",
    ),
    "ends before": ([replace(A, start=3)], arena_of(8, a=0), "'a' is live at no step: [3, 2)"),
    "negative size": (
        [replace(A, size_bytes=-1)],
        arena_of(8, a=0),
        "'a' has -1 bytes, in elements of 1; the least are 0 and 1",
    ),
    "no element": (
        [replace(A, item_bytes=0)],
        arena_of(8, a=0),
        "'a' has 8 bytes, in elements of 0; the least are 0 and 1",
    ),
    "takes over a stranger": (
        [B_OVER_A],
        arena_of(8, b=0),
        "'b' takes over 'a', which has no lifetime",
    ),
    "takes over too early": (
        [replace(A, end=3), B_OVER_A],
        arena_of(8, a=0, b=0),
        "'b' takes over 'a' at step 1, but that one's last step is 2",
    ),
    "takes over too late": (
        [A, replace(C, takes_over="a")],
        arena_of(8, a=0, c=0),
        "'c' takes over 'a' at step 2, but that one's last step is 1",
    ),
    "two take over one": (
        [A, B_OVER_A, replace(C, start=1, takes_over="a")],
        arena_of(16, a=0, b=0, c=0),
        "'c' takes over 'a', and so does 'b'",
    ),
    "takes over itself": (
        [Lifetime("a", 8, 3, 4, takes_over="a")],
        arena_of(8, a=0),
        "in a circle, tensors take over one another: ['a']",
    ),
    # Places.
    "no offset": ([A, B], arena_of(16, a=0), "'b' has no offset"),
    "stranger": ([A], arena_of(16, a=0, z=8), "there is an offset for 'z', which is no tensor"),
    "negative": ([A], arena_of(16, a=-8), "'a' has the negative offset -8"),
    "misaligned for its elements": (
        [replace(A, item_bytes=4)],
        arena_of(16, a=2),
        "'a' is misaligned: offset 2 is no multiple of 4",
    ),
    "out of the arena": (
        [A],
        arena_of(15, a=8),
        "'a' (bytes [8, 16), steps [0, 2)) ends beyond the arena of 15 bytes",
    ),
    "no bytes, out of the arena": (
        [replace(A, size_bytes=0)],
        arena_of(15, a=16),
        "'a' (bytes [16, 16), steps [0, 2)) ends beyond the arena of 15 bytes",
    ),
    "takes over elsewhere": (
        [A, B_OVER_A],
        arena_of(16, a=0, b=8),
        "'b' is at offset 8, but takes over 'a', at offset 0",
    ),
    # Overlaps.
    "same place": ([A, B], arena_of(8, a=0, b=0), A_OVERLAPS_B.format(0, 8)),
    "one byte": ([A, B], arena_of(15, a=0, b=7), A_OVERLAPS_B.format(7, 15)),
    "within": ([A, replace(B, size_bytes=1)], arena_of(8, a=0, b=3), A_OVERLAPS_B.format(3, 4)),
    "in any order": ([B, A], arena_of(15, a=0, b=7), A_OVERLAPS_B.format(7, 15)),
    "one step": (
        [A, replace(C, start=1)],
        arena_of(8, a=0, c=0),
        "'a' (bytes [0, 8), steps [0, 2)) overlaps 'c' (bytes [0, 8), steps [1, 4))",
    ),
    "identical lifetimes": (
        [A, replace(A, id="b")],
        arena_of(8, a=0, b=0),
        "'a' (bytes [0, 8), steps [0, 2)) overlaps 'b' (bytes [0, 8), steps [0, 2))",
    ),
    "identical lifetimes and ids of no order": (
        [replace(A, id=1), replace(A, id="1")],
        ArenaPlan({1: 0, "1": 4}, 12, 0, False),
        "1 (bytes [0, 8), steps [0, 2)) overlaps '1' (bytes [4, 12), steps [0, 2))",
    ),
    "a long lived one, far back": (
        [replace(A, end=9), *(Lifetime(i, 1, i, i + 1) for i in range(8)), Lifetime("c", 8, 8, 9)],
        ArenaPlan({"a": 0, "c": 7} | dict.fromkeys(range(8), 8), 16, 0, False),
        "'a' (bytes [0, 8), steps [0, 9)) overlaps 'c' (bytes [7, 15), steps [8, 9))",
    ),
    "what took over on a third": (
        [A, replace(B, size_bytes=12, takes_over="a"), replace(A, id="c")],
        arena_of(16, a=0, b=0, c=8),
        "'c' (bytes [8, 16), steps [0, 2)) overlaps 'b' (bytes [0, 12), steps [1, 3))",
    ),
    # Claims.
    "bound above the size": (
        [A],
        arena_of(8, 9, a=0),
        "the lower bound of 9 bytes is above the arena, 8",
    ),
    "optimal above the bound": (
        [A],
        arena_of(9, 8, True, a=0),
        "the arena of 9 bytes is claimed to be optimal, but is above the lower bound of 8 bytes",
    ),
}


@pytest.mark.parametrize("name", REFUSED_PACKINGS)
def test_packing_refused(name: str) -> None:
    lifetimes, arena, message = REFUSED_PACKINGS[name]
    with refused(message):
        validate_packing(lifetimes, arena)


def test_packing_refused_for_its_alignment() -> None:
    with refused("'a' is misaligned: offset 8 is no multiple of 16"):
        validate_packing([A], arena_of(16, a=8), alignment=16)
    with refused("'a' is misaligned: offset 8 is no multiple of 12"):  # of 4, and of 6
        validate_packing([replace(A, item_bytes=6)], arena_of(16, a=8), alignment=4)
    with refused("the alignment is 0; the least is 1"):
        validate_packing([A], arena_of(16, a=8), alignment=0)


def test_circle_of_takers() -> None:
    circle = [Lifetime(i, 8, 3, 4, takes_over=(i + 1) % 3) for i in range(3)]
    with pytest.raises(InvalidPlanError, match="in a circle, tensors take over one another: "):
        validate_packing(circle, ArenaPlan(dict.fromkeys(range(3), 0), 8, 0, False))


# Plans of graphs. b may be written over a; c reads both b and the view v of a.
OVER = graph_of("ab bc", a=8, b=size(8, inplace=["a"]), c=4)
VIEWED = graph_of("ab av vw wc bc", a=8, b=4, v=view("a"), w=view("v"), c=2)
TWO = graph_of("ac bc", a=4, b=4, c=size(8, inplace=["a", "b"]))


@pytest.mark.parametrize(
    ("graph", "order", "arena"),
    [
        pytest.param(graph_of(""), "", arena_of(0, 0, True), id="empty"),
        pytest.param(CHAIN, "abc", arena_of(12, 12, True, a=0, b=4, c=0), id="chain"),
        pytest.param(OVER, "abc", arena_of(12, 12, True, a=0, b=0, c=8), id="in place"),
        pytest.param(OVER, "abc", arena_of(16, a=0, b=8, c=0), id="in place, not used"),
        pytest.param(VIEWED, "abvwc", arena_of(14, a=0, b=8, c=12), id="views unlisted"),
        pytest.param(
            VIEWED, "abvwc", arena_of(14, a=0, v=0, w=0, b=8, c=12), id="views with their storage"
        ),
        pytest.param(VIEWED, "abvwc", arena_of(14, a=0, w=0, b=8, c=12), id="view of one unlisted"),
        pytest.param(TWO, "abc", arena_of(16, a=0, b=12, c=0), id="over the first of two"),
        pytest.param(TWO, "abc", arena_of(16, a=12, b=0, c=0), id="over the second of two"),
        pytest.param(TWO, "abc", arena_of(16, a=0, b=4, c=8), id="over none of two"),
        pytest.param(
            graph_of("ac bc", a=3, b=7, c=size(3, inplace=["a", "b"])),
            "abc",
            arena_of(10, a=0, b=3, c=0),
            id="over one that is not the largest",
        ),
        pytest.param(
            graph_of("ab bc", a=8, b=view("a"), c=size(8, inplace=["b"])),
            "abc",
            arena_of(8, 8, True, a=0, b=0, c=0),
            id="in place of what a view views",
        ),
        pytest.param(
            graph_of("ab", a=8, b=size(0, inplace=["a"])),
            "ab",
            arena_of(8, a=0, b=4),
            id="no bytes need no offset in particular",
        ),
        pytest.param(
            graph_of("", a=1, b=size(8, resident=True)), "ab", arena_of(9, a=8, b=0), id="resident"
        ),
    ],
)
def test_plan_accepted(graph: nx.DiGraph, order: str, arena: ArenaPlan) -> None:
    validate_plan(graph, order, arena)


REFUSED_PLANS = {
    "order": (CHAIN, "acb", arena_of(12, a=0, b=4, c=0), "the order breaks a dependency: "),
    "incomplete order": (CHAIN, "ab", arena_of(12, a=0, b=4, c=0), "the order lacks 'c'"),
    "no offset": (OVER, "abc", arena_of(12, b=0, c=8), "'a' has no offset"),
    "no offset of the taker": (OVER, "abc", arena_of(12, a=0, c=8), "'b' has no offset"),
    "only its view has an offset": (
        VIEWED,
        "abvwc",
        arena_of(14, v=0, b=8, c=12),
        "'a' has no offset",
    ),
    "stranger": (
        CHAIN,
        "abc",
        arena_of(12, a=0, b=4, c=0, z=0),
        "there is an offset for 'z', which is no tensor",
    ),
    "view elsewhere": (
        VIEWED,
        "abvwc",
        arena_of(14, a=0, v=8, b=8, c=12),
        "'v' is at offset 8, but 'a', which it views, at 0",
    ),
    "view of a view elsewhere": (
        VIEWED,
        "abvwc",
        arena_of(14, a=0, w=4, b=8, c=12),
        "'w' is at offset 4, but 'v', which it views, at 0",
    ),
    "size of the arena": (
        CHAIN,
        "abc",
        arena_of(11, a=0, b=4, c=0),
        "'b' (bytes [4, 12), steps [1, 3)) ends beyond the arena of 11 bytes",
    ),
    "elements": (
        graph_of("", a=1, b=size(8, item_bytes=8)),
        "ab",
        arena_of(12, a=0, b=4),
        "'b' is misaligned: offset 4 is no multiple of 8",
    ),
    "overlap": (
        CHAIN,
        "abc",
        arena_of(12, a=0, b=4, c=4),
        "'b' (bytes [4, 12), steps [1, 3)) overlaps 'c' (bytes [4, 6), steps [2, 3))",
    ),
    "over what a view still needs": (
        VIEWED,
        "abvwc",
        arena_of(12, a=0, b=8, c=0),
        "'a' (bytes [0, 8), steps [0, 5)) overlaps 'c' (bytes [0, 2), steps [4, 5))",
    ),
    "over a resident before it is read": (
        graph_of("bc", a=size(1, output=False), b=size(8, resident=True), c=1),
        "abc",
        arena_of(9, a=0, b=0, c=8),
        "'a' (bytes [0, 1), steps [0, 1)) overlaps 'b' (bytes [0, 8), steps [0, 3))",
    ),
    "over an output": (
        graph_of("ab bc", a=size(4, output=True), b=4, c=4),
        "abc",
        arena_of(8, a=0, b=4, c=0),
        "'a' (bytes [0, 4), steps [0, 3)) overlaps 'c' (bytes [0, 4), steps [2, 3))",
    ),
    "in place, elsewhere": (
        OVER,
        "abc",
        arena_of(16, a=0, b=4, c=12),
        "'b' is at offset 4, but takes over 'a', at offset 0",
    ),
    "in place, not offered": (
        graph_of("ab", a=4, b=4),
        "ab",
        arena_of(4, a=0, b=0),
        "'a' (bytes [0, 4), steps [0, 2)) overlaps 'b' (bytes [0, 4), steps [1, 2))",
    ),
    "in place, read later": (
        graph_of("ab ac bd cd", a=4, b=size(4, inplace=["a"]), c=4, d=1),
        "abcd",
        arena_of(9, a=0, b=0, c=4, d=8),
        "'a' (bytes [0, 4), steps [0, 3)) overlaps 'b' (bytes [0, 4), steps [1, 4))",
    ),
    "in place of an output, at the last step": (
        graph_of("ab", a=size(4, output=True), b=size(4, inplace=["a"])),
        "ab",
        arena_of(4, a=0, b=0),
        "'a' (bytes [0, 4), steps [0, 2)) overlaps 'b' (bytes [0, 4), steps [1, 2))",
    ),
    "in place by a resident": (
        graph_of("ab", a=4, b=size(4, inplace=["a"], resident=True)),
        "ab",
        arena_of(4, a=0, b=0),
        "'a' (bytes [0, 4), steps [0, 2)) overlaps 'b' (bytes [0, 4), steps [0, 2))",
    ),
    "over two at once": (
        TWO,
        "abc",
        arena_of(8, a=0, b=4, c=0),
        "'b' (bytes [4, 8), steps [1, 3)) overlaps 'c' (bytes [0, 8), steps [2, 3))",
    ),
    "outgrows onto a third": (
        graph_of("ab cd bd", a=4, b=size(8, inplace=["a"]), c=4, d=1),
        "acbd",
        arena_of(9, a=0, b=0, c=4, d=8),
        "'c' (bytes [4, 8), steps [1, 4)) overlaps 'b' (bytes [0, 8), steps [2, 4))",
    ),
    "claim": (
        CHAIN,
        "abc",
        arena_of(12, 13, a=0, b=4, c=0),
        "the lower bound of 13 bytes is above",
    ),
}


@pytest.mark.parametrize("name", REFUSED_PLANS)
def test_plan_refused(name: str) -> None:
    graph, order, arena, message = REFUSED_PLANS[name]
    with pytest.raises(InvalidPlanError, match=f"^{re.escape(message)}"):
        validate_plan(graph, order, arena)


def test_scratch_has_a_place() -> None:
    graph = graph_of("ab", a=8, b=size(4, scratch_bytes=4))
    place = {"a": 0, "b": 8, Scratch("b"): 12}
    validate_plan(graph, "ab", ArenaPlan(place, 16, 16, True))
    with refused("Scratch(node='b') has no offset"):
        validate_plan(graph, "ab", ArenaPlan({"a": 0, "b": 8}, 16, 16, True))
    with pytest.raises(InvalidPlanError, match="'a' .* overlaps Scratch"):
        validate_plan(graph, "ab", ArenaPlan({**place, Scratch("b"): 4}, 16, 16, True))


def test_plan_refused_for_its_alignment() -> None:
    validate_plan(CHAIN, "abc", arena_of(24, a=0, b=16, c=0), alignment=16)
    with refused("'b' is misaligned: offset 4 is no multiple of 16"):
        validate_plan(CHAIN, "abc", arena_of(12, a=0, b=4, c=0), alignment=16)


# The semantics again, word for word and as slow as they read, for small graphs.


@st.composite
def graphs(draw: st.DrawFn) -> nx.DiGraph:
    """Small graphs, whose nodes are their steps in one order of them."""
    count = draw(st.sampled_from([5, 6, 4, 3, 2, 1, 0]))
    graph = nx.DiGraph()
    for node in range(count):
        before = range(node)
        read = draw(
            st.sampled_from([*([each] for each in before), list(before[-2:]), list(before), []])
        )
        graph.add_node(
            node,
            output_bytes=draw(st.integers(0, 4)),
            scratch_bytes=draw(st.integers(0, 2)),
            output=draw(st.sampled_from([None, None, False, True])),
            inplace=draw(st.sampled_from([read, read[:1], []])),
            alias_of=draw(st.sampled_from([None, None, None, *read[:1]])),
        )
        if graph.nodes[node]["alias_of"] is None:
            graph.nodes[node]["resident"] = draw(st.sampled_from([False, False, True]))
        graph.add_edges_from((other, node) for other in read)
    return graph


class Semantics:
    """Questions about a graph whose nodes are their steps."""

    def __init__(self, graph: nx.DiGraph) -> None:
        self.graph, self.steps = graph, range(len(graph))

    def storage(self, node: int) -> int:
        viewed = self.graph.nodes[node]["alias_of"]
        return node if viewed is None else self.storage(viewed)

    def storages(self) -> list[int]:
        return [node for node in self.steps if self.storage(node) == node]

    def members(self, storage: int) -> list[int]:
        return [node for node in self.steps if self.storage(node) == storage]

    def size(self, node: int) -> int:
        return int(self.graph.nodes[node]["output_bytes"])

    def is_output(self, storage: int) -> bool:
        def stated(node: int) -> bool:
            output = self.graph.nodes[node]["output"]
            return not self.graph.out_degree(node) if output is None else bool(output)

        return any(map(stated, self.members(storage)))

    def needed_after(self, storage: int, step: int) -> bool:
        members = self.members(storage)
        readers = [reader for member in members for reader in self.graph.successors(member)]
        return self.is_output(storage) or any(node > step for node in (*members, *readers))

    def is_live(self, storage: int, step: int) -> bool:
        written = storage <= step or bool(self.graph.nodes[storage]["resident"])
        return written and (step <= storage or self.needed_after(storage, step - 1))

    def takeable(self, node: int) -> set[int]:
        if self.storage(node) != node or self.graph.nodes[node]["resident"]:
            return set()
        over = {self.storage(other) for other in self.graph.nodes[node]["inplace"]}
        return {storage for storage in over if not self.needed_after(storage, node)}

    def need(self, step: int) -> int:
        live = [node for node in self.storages() if node != step and self.is_live(node, step)]
        need = sum(map(self.size, live))
        if self.storage(step) != step:
            return need
        taken = max(map(self.size, self.takeable(step)), default=0)
        return need + max(0, self.size(step) - taken) + self.graph.nodes[step]["scratch_bytes"]

    def scratch(self, node: int) -> int:
        return int(self.graph.nodes[node]["scratch_bytes"]) if self.storage(node) == node else 0

    def is_valid(self, offsets: Mapping[NodeId, int]) -> bool:
        """Paint the arena at every step: nothing is painted over but what is taken over."""
        for step in self.steps:
            place = offsets.get(Scratch(step), 0)
            painted = dict.fromkeys(range(place, place + self.scratch(step)), -1)
            for node in self.storages():
                if not self.is_live(node, step):
                    continue
                for byte in range(offsets[node], offsets[node] + self.size(node)):
                    below = painted.setdefault(byte, node)
                    takes = node == step and below in self.takeable(node)
                    if below != node and not (takes and offsets[node] == offsets[below]):
                        return False
        return True


@settings(max_examples=150, deadline=None)
@given(graphs())
def test_bytes_of_each_step_are_those_of_the_semantics(graph: nx.DiGraph) -> None:
    semantics = Semantics(graph)
    peak = max(map(semantics.need, semantics.steps), default=0)
    validate_schedule(graph, Schedule(tuple(graph), peak, peak, True))
    check_each_step(graph, tuple(graph), list(map(semantics.need, semantics.steps)))
    with pytest.raises(InvalidPlanError, match=f"the peak is {peak} bytes.*, not {peak + 1}$"):
        validate_schedule(graph, Schedule(tuple(graph), peak + 1, peak, False))


@settings(max_examples=300, deadline=None)
@given(graphs(), st.data())
def test_verdict_is_that_of_painting(graph: nx.DiGraph, data: st.DataObject) -> None:
    semantics = Semantics(graph)
    offsets: dict[NodeId, int] = {}
    for node in semantics.storages():
        if semantics.scratch(node):
            offsets[Scratch(node)] = data.draw(st.sampled_from([14, 12, 2, 0]))
        over = [offsets[storage] for storage in semantics.takeable(node)]
        offsets[node] = data.draw(st.sampled_from([0, 4, 8, 12, 2, *over * 5]))
    plan = ArenaPlan(offsets, 16, 0, False)
    if semantics.is_valid(offsets):
        validate_plan(graph, tuple(graph), plan)
    else:
        with pytest.raises(InvalidPlanError, match="overlaps|takes over"):
            validate_plan(graph, tuple(graph), plan)


def test_long_chain_in_moments() -> None:
    """Three thousand operators, two of them live at a time, in place, views and all."""
    count = 3000
    graph = nx.path_graph(count, nx.DiGraph)
    for node in graph:
        graph.add_node(node, output_bytes=8)
        if node % 5 == 1:
            graph.add_node(node, alias_of=node - 1)
        elif node % 5 == 3:
            graph.add_node(node, inplace=[node - 1])
    validate_schedule(graph, Schedule(tuple(graph), 16, 16, True))
    offsets, place = {}, 0
    for node, attributes in graph.nodes.items():
        if "alias_of" not in attributes:
            place = place if "inplace" in attributes else 8 - place
            offsets[node] = place
    validate_plan(graph, tuple(graph), ArenaPlan(offsets, 16, 16, True))
