"""Which constant pads need no kernel of their own: whoever reads them supplies the border."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fxopt.analysis.uses import Uses
from fxopt.graphs import call_node, mapped
from fxopt.kernels import Window
from fxopt.program import Program, TensorType, tensor_types

_SUPPLIED = {0.0: (Window.SUM, Window.MAX), -math.inf: (Window.MAX,)}
"""The windows whose kernels can supply a constant: a sum takes no notice of zeros at the border and
a maximum none of -inf; a maximum over zeros is told so."""


def clipped_pads(used: Uses) -> Iterator[fx.Node]:
    """The constant pads whose value only convolutions and pools read, as their first operand."""
    for node, description in used.descriptions.items():
        constant = description.padding
        if constant in _SUPPLIED and _only_read_through(used, node, _SUPPLIED[constant]):
            yield node


def _only_read_through(used: Uses, pad: fx.Node, windows: tuple[Window, ...]) -> bool:
    pending = [pad]
    while pending:
        value = pending.pop()
        if value in used.returned or not used.readers[value]:
            return False
        for reader in used.readers[value]:
            if _gives_as_it_is(used, reader, value):
                pending.append(reader)
                continue
            window = used.descriptions[reader].window
            if window not in windows or value in used.operands[reader][1:]:
                return False
    return True


def _gives_as_it_is(used: Uses, node: fx.Node, operand: fx.Node) -> bool:
    layout, types = used.layout[node], used.program.types
    same = layout.view_of is operand and not layout.rearranged
    return same and bool(types[node.name] == types[operand.name])


def known_sizes(program: Program) -> dict[str, Any]:
    """What arithmetic on sizes gives for the example's shapes, by node name.

    Left out is what follows from the values of tensors.
    """
    found: dict[str, Any] = {}

    def given(argument: Any) -> Any:
        if not isinstance(argument, fx.Node):
            return mapped(given, argument)
        type = program.types[argument.name]
        if isinstance(type, TensorType):
            return torch.empty(type.shape, dtype=type.dtype, device="meta")
        return found[argument.name]

    for node in program.nodes:
        called = node.op in ("call_function", "call_method")
        if not called or any(True for _ in tensor_types(program.types[node.name])):
            continue
        try:
            args, kwargs = given(node.args), given(node.kwargs)
            found[node.name] = call_node(node, args, kwargs, program.graph_module.get_submodule)
        except (KeyError, RuntimeError, TypeError, ValueError):  # it needs what is not known
            continue
    return found
