"""Values of single nodes on batches of a model's inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxopt.graphs import call_node, member, with_sources


class Observer:
    """Runs a graph as far as some of its nodes need it, and gives their values.

    Args:
        nodes: whose values are wanted.
        tree: the graph's modules and tensors, in evaluation mode.
    """

    def __init__(self, nodes: Sequence[fx.Node], tree: nn.Module) -> None:
        self._wanted, self._tree = tuple(nodes), tree
        needed = with_sources(nodes)
        graph = list(nodes[0].graph.nodes) if nodes else []
        self._inputs = [node for node in graph if node.op == "placeholder"]
        self._steps = [node for node in graph if node in needed and node.op != "placeholder"]
        self._last_use = {each: step for step in self._steps for each in step.all_input_nodes}

    def __call__(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The wanted values for these inputs, in the order in which they were asked for."""
        values: dict[fx.Node, Any] = dict(zip(self._inputs, inputs, strict=bool(self._steps)))
        with torch.no_grad():
            for step in self._steps:
                values[step] = self._run(step, values)
                for operand in step.all_input_nodes:
                    if self._last_use[operand] is step and operand not in self._wanted:
                        del values[operand]
        return tuple(values[node] for node in self._wanted)

    def _run(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            return member(self._tree, str(node.target))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        return call_node(node, args, kwargs, self._tree.get_submodule)
