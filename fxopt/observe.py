"""Values of single nodes on batches of a model's inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
        self._nodes, self._wanted, self._tree = nodes, frozenset(nodes), tree
        needed = with_sources(nodes)
        graph = list(nodes[0].graph.nodes) if nodes else []
        self._inputs = [node for node in graph if node.op == "placeholder"]
        self._steps = [node for node in graph if node in needed and node.op != "placeholder"]
        self._last_use = {each: step for step in self._steps for each in step.all_input_nodes}

    def __call__(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The wanted values for these inputs, in the order in which they were asked for."""
        every = self.in_lockstep([inputs])
        found = {node: values[0] for node, values in every if node in self._wanted}
        return tuple(found[node] for node in self._nodes)

    def in_lockstep(
        self, batches: Sequence[Sequence[torch.Tensor]]
    ) -> Iterator[tuple[fx.Node, list[Any]]]:
        """Each node that is needed, wanted or not, with its values on all ``batches``.

        The values may be written to before the next one is asked for; they are kept as long as
        something reads them.
        """
        values: dict[fx.Node, list[Any]] = {}
        for place, node in enumerate(self._inputs):
            values[node] = [batch[place] for batch in batches]
            yield node, values[node]
        for step in self._steps:
            with torch.no_grad():
                values[step] = [self._run(step, values, index) for index in range(len(batches))]
            yield step, values[step]
            for operand in {*step.all_input_nodes, step}:
                if self._last_use.get(operand, step) is step:
                    del values[operand]

    def _run(self, node: fx.Node, values: Mapping[fx.Node, list[Any]], index: int) -> Any:
        if node.op == "get_attr":
            return member(self._tree, str(node.target))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda each: values[each][index])
        return call_node(node, args, kwargs, self._tree.get_submodule)
