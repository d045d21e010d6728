"""The file format of operator graphs: defaults, round trips, and a refusal for every fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import networkx as nx
import pytest

from fxopt.analysis.graph import (
    FIELDS,
    graph_from_json,
    graph_to_json,
    load_graph,
    normalised,
    save_graph,
)
from fxopt.errors import ExportError, InvalidGraphError


def document(*nodes: Any, edges: Any = (), **more: Any) -> dict[str, Any]:
    pairs = [{"source": edge[0], "target": edge[1]} for edge in edges]
    return {"nodes": list(nodes), "edges": pairs, **more}


A, B = {"id": "a", "output_bytes": 8}, {"id": "b", "output_bytes": 4}


def test_absent_fields_have_their_defaults() -> None:
    graph = graph_from_json(document(A, B, edges=["ab"]))
    assert type(graph) is nx.DiGraph
    expected = {
        "output_bytes": 8,
        "scratch_bytes": 0,
        "inplace": (),
        "alias_of": None,
        "output": False,
        "resident": False,
        "item_bytes": 1,
    }
    assert graph.nodes["a"] == expected
    assert graph.nodes["b"] == {**expected, "output_bytes": 4, "output": True}
    assert tuple(expected) == FIELDS


def test_null_is_absent_and_a_view_needs_no_size() -> None:
    view = {"id": "b", "alias_of": "a", "output_bytes": None, "scratch_bytes": None}
    fields = graph_from_json(document(A, view, edges=["ab"])).nodes["b"]
    assert (fields["output_bytes"], fields["alias_of"]) == (0, "a")


def test_numbers_are_ids_links_are_edges_and_parallel_edges_one() -> None:
    nodes = [{"id": 0, "output_bytes": 1}, {"id": 1, "output_bytes": 1, "inplace": [0]}]
    twice = [{"source": 0, "target": 1}, {"source": 0, "target": 1}]
    graph = graph_from_json({"nodes": nodes, "links": twice, "multigraph": True})
    assert list(graph.edges) == [(0, 1)]


def test_unknown_attributes_survive() -> None:
    graph = graph_from_json(document({**A, "kind": "conv"}))
    assert graph_to_json(graph)["nodes"][0]["kind"] == "conv"


def test_a_file_gives_the_graph_back(tmp_path: Path) -> None:
    graph = graph_from_json(document(A, {**B, "inplace": ["a"], "item_bytes": 4}, edges=["ab"]))
    save_graph(graph, tmp_path / "graph.json")
    again = load_graph(tmp_path / "graph.json")
    assert dict(again.nodes) == dict(graph.nodes)
    assert list(again.edges) == list(graph.edges)
    assert [path.name for path in tmp_path.iterdir()] == ["graph.json"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "a graph is a JSON object with the keys 'nodes' and 'edges'"),
        ({"nodes": []}, "a graph has a list of 'nodes' and a list of 'edges'"),
        (document(A, directed=False), 'the graph is not directed; write "directed": true'),
        (document({"output_bytes": 1}), "node number 0 of the list has no 'id'"),
        (document({"id": True, "output_bytes": 1}), "node number 0 of the list has no 'id'"),
        (document(A, A), "node 'a' is in the list twice"),
        ({"nodes": [A], "edges": [{"source": "a"}]}, "edge number 0 has no 'source' and 'target'"),
        (document(A, edges=["ax"]), "the edge 'a' -> 'x' names 'x', which is no node"),
        (document(A, B, edges=["ab", "ba"]), "cycle, so no order of it exists: 'a' -> 'b' -> 'a'"),
        (document({"id": "a"}), "node 'a' has no output_bytes"),
        (document({**A, "output_bytes": -1}), "node 'a' has output_bytes -1; the least is 0"),
        (document({**A, "output_bytes": 1.5}), "node 'a' has output_bytes 1.5, which is no whole"),
        (
            document({**A, "output_bytes": True}),
            "node 'a' has output_bytes True, which is no whole",
        ),
        (
            document({**A, "scratch_bytes": "4"}),
            "node 'a' has scratch_bytes '4', which is no whole",
        ),
        (document({**A, "item_bytes": 0}), "node 'a' has item_bytes 0; the least is 1"),
        (document({**A, "output": 1}), "node 'a' has output 1; it is true or false"),
        (document({**A, "inplace": "b"}), "node 'a' has inplace 'b', which is no list of nodes"),
        (document(A, {**B, "inplace": ["a"]}), "node 'b' names 'a' in inplace, which is no pred"),
        (document(A, {**B, "inplace": [["a"]]}), "node 'b' names ['a'] in inplace"),
        (document(A, {**B, "alias_of": "c"}), "node 'b' names 'c' in alias_of, which is no pred"),
        (document({**A, "inplace": ["a"]}), "node 'a' names 'a' in inplace"),
        (
            document(A, {"id": "b", "alias_of": "a", "resident": True}, edges=["ab"]),
            "node 'b' is resident and a view",
        ),
    ],
)
def test_malformed_graphs_are_refused_by_name(given: Any, message: str) -> None:
    with pytest.raises(InvalidGraphError) as refusal:
        graph_from_json(given)
    assert message in str(refusal.value)


def test_an_undirected_graph_is_refused() -> None:
    with pytest.raises(InvalidGraphError, match="undirected"):
        normalised(nx.Graph([("a", "b")]))


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "\x00", json.dumps(document({"id": "a"}))])
def test_a_bad_file_is_refused_by_its_path(content: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(InvalidGraphError, match="bad.json"):
        load_graph(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidGraphError, match="cannot read '.*none.json': No such file"):
        load_graph(tmp_path / "none.json")


def test_a_graph_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError):
        save_graph(graph_from_json(document(A)), tmp_path / "no" / "graph.json")
