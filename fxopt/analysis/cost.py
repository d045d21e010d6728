"""Parameters, multiply-accumulates and bytes, per operator and in total."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from fxopt import operators
from fxopt.analysis.storage import layouts
from fxopt.program import Program, tensor_types


@dataclass(frozen=True)
class OperatorCost:
    """Cost of one operator at the example's batch size.

    Attributes:
        node: its name in the graph.
        kind: its kind, as in :mod:`fxopt.operators`.
        parameters: elements of the parameters that it reads.
        macs: multiply-accumulates.
        weight_bytes: bytes of those parameters and of its persistent buffers.
        activation_bytes: bytes of the tensors that it writes; 0 for a view, for arithmetic on
            sizes, and for dropout, which does nothing in inference.
    """

    node: str
    kind: str
    parameters: int
    macs: int
    weight_bytes: int
    activation_bytes: int


@dataclass(frozen=True)
class Cost:
    """Cost of every operator, and totals in which a shared tensor counts once.

    ``activation_bytes`` is the sum of what all operators write, not what is alive at one time.
    ``at_least`` says that the MACs and the activations inside opaque leaves are not in the totals.
    """

    operators: tuple[OperatorCost, ...]
    parameters: int
    macs: int
    weight_bytes: int
    activation_bytes: int
    at_least: bool

    @property
    def macs_by_kind(self) -> Mapping[str, int]:
        """MACs of each kind that has any, largest first."""
        macs: dict[str, int] = {}
        for row in self.operators:
            if row.macs:
                macs[row.kind] = macs.get(row.kind, 0) + row.macs
        return dict(sorted(macs.items(), key=lambda item: -item[1]))


@dataclass(frozen=True)
class Weights:
    """Tensors that a program keeps, by identity: a tensor with two names is one tensor."""

    tensors: Mapping[int, torch.Tensor] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Elements of the parameters among them."""
        return sum(t.numel() for t in self.tensors.values() if isinstance(t, nn.Parameter))

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.itemsize for t in self.tensors.values())


def weights_of(program: Program) -> Mapping[str, Weights]:
    """The parameters and persistent buffers that each node reads, by node name."""
    graph_module = program.graph_module
    kept = {
        id(tensor)
        for tensor in graph_module.state_dict(keep_vars=True).values()
        if isinstance(tensor, torch.Tensor)
    }
    weights = {}
    for node in program.nodes:
        tensors = program.tensors_read(node)
        weights[node.name] = Weights({id(t): t for t in tensors if id(t) in kept})
    return weights


def cost(program: Program) -> Cost:
    """What ``program`` costs for its example inputs, in time linear in the size of its graph."""
    weights = weights_of(program)
    used: dict[int, torch.Tensor] = {}
    descriptions = {
        node: operators.describe(program, node)
        for node in program.nodes
        if node.op not in ("placeholder", "output")
    }
    layout = layouts(program, descriptions)
    rows = []
    for node, description in descriptions.items():
        own = weights[node.name]
        used.update(own.tensors)
        types = tensor_types(program.types[node.name]) if layout[node].writes else ()
        rows.append(
            OperatorCost(
                node.name,
                description.kind,
                own.parameters,
                description.macs,
                own.bytes,
                sum(t.bytes for t in types),
            )
        )
    total = Weights(used)
    return Cost(
        tuple(rows),
        total.parameters,
        sum(row.macs for row in rows),
        total.bytes,
        sum(row.activation_bytes for row in rows),
        bool(program.opaque),
    )
