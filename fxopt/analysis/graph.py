"""Dataflow graphs: a ``networkx.DiGraph`` of operators and the bytes that they write.

One node is one operator, an edge says that its target reads what its source writes. Attributes of
a node, with what they are if they are left out (or None):

``output_bytes``
    what it writes; it has no default, unless the node is a view.
``scratch_bytes`` (0)
    what it needs beside its operands and its result while it runs.
``inplace`` (none)
    predecessors whose storage the result may take over, from the same offset.
``alias_of`` (None)
    the predecessor that it is a view of: it writes nothing, its sizes count for nothing, and it
    keeps that one alive.
``output`` (true where nothing reads the node)
    the result is live to the end.
``resident`` (false)
    the result is live from the first step, as a model's inputs are.
``item_bytes`` (1)
    size of one element of the result, of which its offset is a multiple.

Other attributes are left alone. The file format is networkx's node-link JSON.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import networkx as nx

from fxopt.analysis.plan import NodeId
from fxopt.errors import InvalidGraphError
from fxopt.files import scratch_beside

FIELDS = (
    "output_bytes",
    "scratch_bytes",
    "inplace",
    "alias_of",
    "output",
    "resident",
    "item_bytes",
)


def normalised(graph: nx.DiGraph) -> nx.DiGraph:
    """A copy of ``graph`` in which every node has every attribute, checked.

    Raises:
        InvalidGraphError: naming the node and what is wrong with it.
    """
    if not graph.is_directed():
        raise InvalidGraphError(
            "the graph is undirected; an operator graph is a networkx.DiGraph whose edges go from "
            "the operator that writes a tensor to those that read it"
        )
    result = nx.DiGraph(**graph.graph)
    for node, given in graph.nodes(data=True):
        result.add_node(node, **{**given, **_filled(graph, node, given)})
    result.add_edges_from(graph.edges())
    _check_acyclic(result)
    return result


def _filled(graph: nx.DiGraph, node: NodeId, given: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of ``node`` that this module speaks of, all of them."""
    present = {key: value for key, value in given.items() if value is not None}
    alias = present.get("alias_of")
    if alias is None and "output_bytes" not in present:
        raise _wrong(node, "has no output_bytes; give the size of the tensor that it writes")
    inplace = present.get("inplace", ())
    if not isinstance(inplace, (list, tuple)):
        raise _wrong(node, f"has inplace {inplace!r}, which is no list of nodes")
    for other in (*inplace, *([] if alias is None else [alias])):
        if not isinstance(other, Hashable) or other == node or not graph.has_edge(other, node):
            field = "alias_of" if other is alias else "inplace"
            raise _wrong(node, f"names {other!r} in {field}, which is no predecessor of it")
    resident = _flag(node, "resident", present.get("resident", False))
    if resident and alias is not None:
        raise _wrong(node, "is resident and a view; only the tensor that it views can be resident")
    return {
        "output_bytes": _size(node, "output_bytes", present.get("output_bytes", 0)),
        "scratch_bytes": _size(node, "scratch_bytes", present.get("scratch_bytes", 0)),
        "inplace": tuple(inplace),
        "alias_of": alias,
        "output": _flag(node, "output", present.get("output", graph.out_degree(node) == 0)),
        "resident": resident,
        "item_bytes": _size(node, "item_bytes", present.get("item_bytes", 1), least=1),
    }


def _size(node: NodeId, field: str, value: Any, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong(node, f"has {field} {value!r}, which is no whole number of bytes")
    if value < least:
        raise _wrong(node, f"has {field} {value}; the least is {least}")
    return value


def _flag(node: NodeId, field: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong(node, f"has {field} {value!r}; it is true or false")
    return value


def _check_acyclic(graph: nx.DiGraph) -> None:
    if nx.is_directed_acyclic_graph(graph):
        return
    nodes = [repr(source) for source, _ in nx.find_cycle(graph)]
    raise InvalidGraphError(
        f"the graph has a cycle, so no order of it exists: {' -> '.join([*nodes, nodes[0]])}"
    )


def _wrong(node: NodeId, what: str) -> InvalidGraphError:
    return InvalidGraphError(f"node {node!r} {what}")


def graph_from_json(document: Any) -> nx.DiGraph:
    """The graph of a node-link document, checked and with every attribute.

    Edges are under ``edges``, or ``links`` as older networkx wrote them. Where the document does
    not say, the graph is directed and no multigraph; parallel edges are one.

    Raises:
        InvalidGraphError: naming what is malformed.
    """
    if not isinstance(document, Mapping):
        raise InvalidGraphError("a graph is a JSON object with the keys 'nodes' and 'edges'")
    if document.get("directed", True) is not True:
        raise InvalidGraphError('the graph is not directed; write "directed": true')
    nodes, edges = document.get("nodes"), document.get("edges", document.get("links"))
    if not isinstance(nodes, list) or not isinstance(edges, list):
        raise InvalidGraphError("a graph has a list of 'nodes' and a list of 'edges'")
    graph = nx.DiGraph()
    for position, node in enumerate(nodes):
        if not isinstance(node, Mapping) or not _is_id(node.get("id")):
            raise InvalidGraphError(f"node number {position} of the list has no 'id'")
        if node["id"] in graph:
            raise _wrong(node["id"], "is in the list twice")
        graph.add_node(node["id"], **{str(k): v for k, v in node.items() if k != "id"})
    for position, edge in enumerate(edges):
        ends = [edge.get(end) for end in ("source", "target")] if isinstance(edge, Mapping) else []
        if len(ends) != 2 or not all(map(_is_id, ends)):
            raise InvalidGraphError(f"edge number {position} has no 'source' and 'target'")
        for end in ends:
            if end not in graph:
                raise InvalidGraphError(
                    f"the edge {ends[0]!r} -> {ends[1]!r} names {end!r}, which is no node"
                )
        graph.add_edge(*ends)
    return normalised(graph)


def _is_id(value: Any) -> bool:
    return isinstance(value, (str, int)) and not isinstance(value, bool)


def graph_to_json(graph: nx.DiGraph) -> dict[str, Any]:
    """``graph`` as a node-link document, with every attribute.

    Raises:
        InvalidGraphError: the graph is malformed.
    """
    document: dict[str, Any] = nx.node_link_data(normalised(graph), edges="edges")
    return document


def load_graph(path: str | Path) -> nx.DiGraph:
    """The graph of a node-link JSON file, checked and with every attribute.

    Raises:
        InvalidGraphError: the file cannot be read, is no JSON, or holds no valid graph.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidGraphError(f"cannot read '{path}': {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidGraphError(f"'{path}' is no JSON: {error}") from error
    try:
        return graph_from_json(document)
    except InvalidGraphError as error:
        raise InvalidGraphError(f"'{path}': {error}") from error


def save_graph(graph: nx.DiGraph, path: str | Path) -> None:
    """Write ``graph`` to a node-link JSON file, which appears whole or not at all.

    Raises:
        InvalidGraphError: the graph is malformed.
        ExportError: the file cannot be written.
    """
    target = Path(path)
    text = json.dumps(graph_to_json(graph), indent=1)
    with scratch_beside(target) as scratch:
        written = scratch / target.name
        written.write_text(text + "\n", encoding="utf-8")
        written.replace(target)
