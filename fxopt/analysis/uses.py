"""Which operators of a program read which values, as far as memory is concerned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxopt import operators
from fxopt.analysis.storage import Layout, layouts
from fxopt.operators import Description
from fxopt.program import Origin, Program


@dataclass(frozen=True)
class Uses:
    """A program's nodes by what they read, overwrite and return. The ``output`` node is left out.

    Attributes:
        program: whose nodes these are.
        descriptions: of every node but the inputs, from the operator table.
        layout: where every node's result lies.
        operands: nodes whose values each node reads, each as often as it is given.
        readers: the tensor operators that read each node's value.
        returned: nodes whose values the program returns.
        overwriting: nodes whose value the user's code wrote over that of their first operand.
    """

    program: Program
    descriptions: Mapping[fx.Node, Description]
    layout: Mapping[fx.Node, Layout]
    operands: Mapping[fx.Node, tuple[fx.Node, ...]]
    readers: Mapping[fx.Node, tuple[fx.Node, ...]]
    returned: frozenset[fx.Node]
    overwriting: frozenset[fx.Node]


def uses(program: Program, sizes: Mapping[str, Any]) -> Uses:
    """What the nodes of ``program`` read; ``sizes`` are those of :func:`operators.describe`."""
    *nodes, output = program.nodes
    descriptions = {
        node: operators.describe(program, node, sizes) for node in nodes if node.op != "placeholder"
    }
    operands = {
        node: operators.reads(node, descriptions[node]) if node in descriptions else ()
        for node in nodes
    }
    readers: dict[fx.Node, dict[fx.Node, None]] = {node: {} for node in nodes}
    for node, description in descriptions.items():
        if description.kind != "shape":
            for operand in operands[node]:
                readers[operand][node] = None
    # Not the node that ``overwrote`` names, which a pass may have replaced: it is the operand.
    origins = {node: program.origins.get(node.name, Origin()) for node in nodes}
    return Uses(
        program,
        descriptions,
        layouts(program, descriptions),
        operands,
        {node: tuple(reading) for node, reading in readers.items()},
        frozenset(output.all_input_nodes),
        frozenset(node for node, origin in origins.items() if origin.overwrote is not None),
    )
