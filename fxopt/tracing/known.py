"""Values that are known while a model is traced: those computed from constants alone.

``torch.linspace(0, 0.3, 12).tolist()`` is the same for every input. The graph is pure, so what a
node holds can be computed from the graph itself when Python asks: constants and the sizes that a
guard then fixes are its leaves; inputs, parameters, buffers and random numbers are not known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from fxopt.graphs import call_node

Size = Callable[[fx.Node], int]
"""The value of a ``size`` node, which from then on is fixed by a guard."""


class Unknown(Exception):
    """A value depends on more than constants; the text says on what."""


class KnownValues:
    """Computes nodes of a graph that is being written."""

    def __init__(
        self,
        constants: Mapping[str, torch.Tensor],
        modules: Mapping[str, nn.Module],
        size: Size,
    ) -> None:
        self._constants = constants
        self._modules = modules
        self._size = size
        self._values: dict[fx.Node, Any] = {}

    def of(self, node: fx.Node) -> Any:
        """What ``node`` computes for every input.

        Raises:
            Unknown: it is not the same for every input.
        """
        if node not in self._values:
            state = torch.get_rng_state()
            values = self._computed(self._missing(node))
            if not torch.equal(state, torch.get_rng_state()):
                torch.default_generator.set_state(state)
                raise Unknown("random numbers")
            self._values.update(values)
        return self._values[node]

    def _missing(self, node: fx.Node) -> list[fx.Node]:
        """``node`` and the nodes that it needs and that are not computed yet, in order."""
        found, pending = {node}, [node]
        while pending:
            current = pending.pop()
            self._check(current)
            if not (_is_size(current) or _is_device(current)):
                new = set(current.all_input_nodes) - found - self._values.keys()
                found |= new
                pending += new
        return sorted(found)

    def _check(self, node: fx.Node) -> None:
        name = str(getattr(node.target, "__name__", node.target))
        if node.op == "placeholder":
            raise Unknown(f"the input '{node.target}'")
        if node.op == "get_attr" and node.target not in self._constants:
            raise Unknown(f"'{node.target}'")
        if node.op == "call_module" and node.target not in self._modules:
            raise Unknown(f"'{node.target}'")
        if name.removeprefix("new_").startswith("empty"):
            raise Unknown("memory that nobody has written")

    def _computed(self, nodes: list[fx.Node]) -> dict[fx.Node, Any]:
        values = dict(self._values)
        with torch.no_grad():
            for node in nodes:
                values[node] = self._run(node, values)
        return values

    def _run(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            return self._constants[str(node.target)]
        if _is_size(node):
            return self._size(node)
        if _is_device(node):
            return torch.device("cpu")  # where values are computed does not change them
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        return call_node(node, args, kwargs, self._modules.__getitem__)


def _is_size(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target == "size"


def _is_device(node: fx.Node) -> bool:
    return node.target is getattr
