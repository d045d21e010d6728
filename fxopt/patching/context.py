"""What steps are made with: reasons against, the program around them, arguments of a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.analysis.padding import known_sizes
from fxopt.analysis.placement import placement
from fxopt.analysis.receptive_field import Local
from fxopt.graphs import Operand
from fxopt.patching.stage import MAP, Step
from fxopt.program import Program, tensor_types

ATTRIBUTE = "="
"""Before the path of a parameter or buffer, as the name of an operand of a stage."""

QUANTIZED = "~"
"""Before the path of a quantised layer's weight or bias: what the layer makes of it."""


class NotLocal(Exception):
    """An operator that cannot run on a tile, with the reason."""


class Context:
    """What steps need to know of a program beside their nodes.

    Attributes:
        weights: the nodes that are computed from parameters and buffers alone.
        axes: by node name, those of rows and columns where they are not the last two.
    """

    def __init__(self, program: Program) -> None:
        module = program.graph_module
        named = (*module.named_parameters(), *module.named_buffers())
        self._names = {id(tensor): name for name, tensor in reversed(named)}
        self._types = program.types
        self._sizes = known_sizes(program)
        self._values = placement(program, clip_padding=False).values
        self.axes: dict[str, tuple[int, int]] = {}
        self.weights: set[fx.Node] = set()
        for node in program.nodes:
            computed = node.op not in ("placeholder", "output", "get_attr")
            if node.op == "get_attr" or (
                computed and self.weights.issuperset(node.all_input_nodes)
            ):
                self.weights.add(node)

    def axes_of(self, node: fx.Node) -> tuple[int, int]:
        """The axes of rows and columns in what ``node`` reads.

        Raises:
            NotLocal: its operands have them in different places.
        """
        found = {
            self.axes.get(each.name, MAP)
            for each in node.all_input_nodes
            if each not in self.weights and any(True for _ in tensor_types(self._types[each.name]))
        }
        if len(found) > 1:
            raise NotLocal("reads maps whose rows and columns lie along different axes")
        return found.pop() if found else MAP

    def number(self, argument: Any) -> Any:
        """What arithmetic on sizes gives for the example's; anything else as it is."""
        if not isinstance(argument, fx.Node):
            return argument
        return self._sizes.get(argument.name, argument)

    def is_view(self, node: fx.Node) -> bool:
        """Whether ``node`` writes no tensor of its own."""
        return self._values[node].view_of is not None

    def operand(self, tensor: torch.Tensor) -> Operand:
        """A module's parameter or buffer as an operand of a stage."""
        return Operand(ATTRIBUTE + self._names[id(tensor)])


def operand_of(node: fx.Node) -> Operand:
    """The value that an operator of one map reads."""
    first = (*node.args, *node.kwargs.values())[0]
    assert isinstance(first, fx.Node)
    return Operand(first.name)


def arguments(node: fx.Node, *names: str) -> dict[str, Any]:
    """The arguments by name; those of a method have other names only by keyword."""
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def step(
    program: Program, node: fx.Node, function: Any, args: Any, kwargs: Any = None, **fields: Any
) -> Step:
    """The step that ``node`` becomes; of its own type, at each position by itself unless told."""
    fields.setdefault("local", Local())
    fields.setdefault("type", program.types[node.name])
    return Step(node.name, function, tuple(args), dict(kwargs or {}), **fields)


def operand(node: fx.Node) -> Any:
    """``node`` as an argument of a step."""
    return Operand(node.name)
