"""Small random operator graphs, and what an order of one needs, counted step by step."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import networkx as nx

from fxopt.analysis.plan import NodeId


def random_dag(seed: int, most: int = 12) -> nx.DiGraph:
    """Up to ``most`` operators: views, in-place candidates, residents, scratch, empty tensors."""
    rng = random.Random(seed)
    graph = nx.DiGraph()
    density = rng.choice([0.15, 0.3, 0.5])
    for node in range(rng.randint(1, most)):
        operands = [other for other in range(node) if rng.random() < density]
        fields: dict[str, Any] = {
            "output_bytes": rng.choice([0, 1, 2, 4, 4, 8, 8, 16, rng.randint(1, 30)]),
            "scratch_bytes": rng.choice([0, 0, 0, rng.randint(0, 20)]),
        }
        if operands and rng.random() < 0.2:
            fields["alias_of"] = rng.choice(operands)
        else:
            if operands and rng.random() < 0.6:
                fields["inplace"] = rng.sample(operands, rng.randint(1, len(operands)))
            fields["resident"] = rng.random() < 0.15
        if rng.random() < 0.15:
            fields["output"] = rng.random() < 0.7
        graph.add_node(node, **fields)
        graph.add_edges_from((other, node) for other in operands)
    return graph


def few_orders(count: int, most_orders: int = 1000) -> Iterator[tuple[int, nx.DiGraph, list[Any]]]:
    """``count`` random graphs with all their orders, of which there are no more than that."""
    found = 0
    for seed in itertools.count():
        graph = random_dag(seed)
        orders = list(itertools.islice(nx.all_topological_sorts(graph), most_orders + 1))
        if len(orders) <= most_orders:
            yield seed, graph, orders
            found += 1
        if found == count:
            return


def needs(graph: nx.DiGraph, order: Sequence[NodeId]) -> list[int]:
    """Bytes of each step, by looking at every tensor at every step."""

    def storage(node: NodeId) -> NodeId:
        alias = graph.nodes[node].get("alias_of")
        return node if alias is None else storage(alias)

    step = {node: index for index, node in enumerate(order)}
    tensors = [node for node in graph if storage(node) == node]
    first, last, kept = {}, {}, {}
    for tensor in tensors:
        members = [node for node in graph if storage(node) == tensor]
        users = {user for node in members for user in (node, *graph.succ[node])}
        kept[tensor] = any(
            graph.nodes[node].get("output", graph.out_degree(node) == 0) for node in members
        )
        first[tensor] = 0 if graph.nodes[tensor].get("resident") else step[tensor]
        last[tensor] = len(order) - 1 if kept[tensor] else max(step[user] for user in users)
    total = []
    for index, node in enumerate(order):
        fields = graph.nodes[node]
        live = [tensor for tensor in tensors if first[tensor] <= index <= last[tensor]]
        here = sum(graph.nodes[tensor]["output_bytes"] for tensor in live)
        if storage(node) == node:
            here += fields.get("scratch_bytes", 0)
            candidates = () if fields.get("resident") else fields.get("inplace", ())
            over = [
                graph.nodes[root]["output_bytes"]
                for root in map(storage, candidates)
                if not kept[root] and last[root] == index
            ]
            here -= min(max(over, default=0), fields["output_bytes"])
        total.append(here)
    return total
