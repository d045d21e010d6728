"""Fold a BatchNorm into the convolution or linear layer before it, or into the one after it.

In evaluation a BatchNorm is ``y = a·x + c`` per channel. The layer whose result it alone reads
takes it in (backwards); if there is none, so does the layer that alone reads the norm, where that
is exact (forwards). The algebra is in :mod:`fxopt.channelwise`.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch.nn.functional as F
from torch import fx, nn

from fxopt import channelwise
from fxopt.edit import Edit
from fxopt.layers import standard_kind
from fxopt.obstacles import no_fixed_map
from fxopt.program import Program
from fxopt.results import Declined
from fxopt.rewrite import Preserves, Site, declined, site

_COMPUTED = (F.conv1d, F.conv2d, F.conv3d, F.linear)
"""A layer that is a function in a captured graph has a tensor that the forward computes."""
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
"""Functions that capture makes no layers of."""


class Direction(enum.Enum):
    """Where a norm goes: the layer before it, the layer after it, or a layer of its own."""

    BACKWARDS = "backwards"
    FORWARDS = "forwards"
    ALONE = "alone"


@dataclass(frozen=True)
class FoldConvBn:
    """Fold BatchNorms into the convolutions and linear layers beside them (for inference).

    With ``scale_shift``, a norm that no layer takes in becomes a multiplication and an addition per
    channel (:class:`fxopt.layers.ScaleShift`).
    """

    name: ClassVar[str] = "fold_conv_bn"
    preserves: ClassVar[Preserves] = Preserves.VALUES
    scale_shift: bool = False

    def sites(self, program: Program) -> Iterator[Site | Declined]:
        found = [(norm, *_judged(program, norm)) for norm in _norms(program)]
        # a norm that is next to another one may find a layer there once that has gone
        settled = all(direction in (None, Direction.ALONE) for _, direction, _ in found)
        for norm, direction, reason in found:
            if direction is Direction.BACKWARDS:
                yield site(norm, norm.all_input_nodes[0], facts=direction)
            elif direction is Direction.FORWARDS:
                yield site(norm, *norm.users, facts=direction)
            elif direction is Direction.ALONE and self.scale_shift and settled:
                yield site(norm, facts=direction)
            else:
                yield declined(program, norm, reason)

    def rewrite(self, site: Site, edit: Edit) -> str | None:
        norm = edit.node(site.node)
        batch_norm = edit.module(norm)
        if site.facts is Direction.ALONE:
            edit.replace_module(norm, lambda: channelwise.alone(batch_norm), key=norm.target)
            return "now a scale and shift"
        backwards = site.facts is Direction.BACKWARDS
        source = norm.all_input_nodes[0]
        node = source if backwards else next(iter(norm.users))
        layer, name = edit.module(node), str(node.target)
        fold = channelwise.with_map_after if backwards else channelwise.with_map_before
        key = (site.facts, norm.target, name)
        edit.replace_module(node, lambda: fold(layer, channelwise.map_of(batch_norm)), key=key)
        edit.replace_uses(norm, source)
        return None if backwards else f"folded forwards into '{name}'"

    def evidence(self, before: Program, after: Program) -> Mapping[str, Any]:
        had, left = len(_norms(before)), len(_norms(after))
        gone = {"training": "folded norms have no batch statistics any more"} if left < had else {}
        return {"batch_norms_before": had, "batch_norms_left": left, **gone}


def _norms(program: Program) -> list[fx.Node]:
    """The BatchNorms of activations; one over weights alone (standardisation) is none."""
    from_input: set[fx.Node] = set()
    for node in program.nodes:
        if node.op == "placeholder" or not from_input.isdisjoint(node.all_input_nodes):
            from_input.add(node)
    return [
        node
        for node in program.nodes
        if isinstance(program.module(node), nn.modules.batchnorm._BatchNorm)
        or (node.target is F.batch_norm and node.args[0] in from_input)
    ]


def _judged(program: Program, norm: fx.Node) -> tuple[Direction | None, str]:
    """Where ``norm`` can go, and why it cannot be folded."""
    reason = no_fixed_map(program, norm)
    if reason:
        return None, reason
    before = _not_backwards(program, norm)
    if not before:
        return Direction.BACKWARDS, ""
    after = _not_forwards(program, norm)
    if not after:
        return Direction.FORWARDS, ""
    return Direction.ALONE, f"{before}; {after}"


def _not_backwards(program: Program, norm: fx.Node) -> str:
    """Why the layer before ``norm`` cannot take it in, or nothing."""
    producer = norm.all_input_nodes[0]
    if producer.name in program.opaque:
        return f"its input comes from '{producer.target}', which could not be traced"
    if _called(producer):
        return f"{_called(producer)} before it"
    if not _takes_maps(program, producer):
        source = _described(program, producer)
        return f"its input comes from {source}, not from a convolution or a linear layer"
    if len(producer.users) > 1:
        other = next(user for user in producer.users if user is not norm)
        return f"the result of '{producer.target}' is also read by '{other.name}'"
    return _other_axis(program, producer, producer)


def _not_forwards(program: Program, norm: fx.Node) -> str:
    """Why the layer after ``norm`` cannot take it in, or nothing."""
    if len(norm.users) != 1:
        names = " and ".join(f"'{user.name}'" for user in list(norm.users)[:2])
        return f"its result is read by {names}" if names else "nothing reads its result"
    (reader,) = norm.users
    if reader.name in program.opaque:
        return f"its result goes to '{reader.target}', which could not be traced"
    if reader.op == "output":
        return "its result is an output"
    if _called(reader):
        return f"{_called(reader)} after it"
    if not _takes_maps(program, reader):
        return f"its result goes to {_described(program, reader)}, which is no such layer"
    axis = _other_axis(program, norm, reader)
    if axis:
        return axis
    layer, batch_norm = program.module(reader), program.module(norm)
    assert layer is not None
    assert batch_norm is not None
    obstacle = channelwise.why_not_before(layer, channelwise.map_of(batch_norm))
    return f"'{reader.target}' {obstacle}" if obstacle else ""


def _takes_maps(program: Program, node: fx.Node) -> bool:
    module = program.module(node)
    return module is not None and standard_kind(module) in channelwise.LINEAR_KINDS


def _called(node: fx.Node) -> str:
    """What the forward does if ``node`` is a layer's function, or nothing."""
    if node.target in _COMPUTED:
        return f"the forward computes the weight or bias of '{node.name}'"
    if node.target in _TRANSPOSED:
        return f"the forward calls the function '{node.name}'"
    return ""


def _other_axis(program: Program, value: fx.Node, layer: fx.Node) -> str:
    """Why the norm's axis 1 of ``value`` does not hold the channels of ``layer``, or nothing."""
    rank = len(program.types[value.name].shape)
    if rank == cast(Any, program.module(layer)).weight.dim():
        return ""
    return f"it normalises axis 1 of {rank} and '{layer.target}' has its channels on another"


def _described(program: Program, node: fx.Node) -> str:
    if node.op == "placeholder":
        return f"the input '{node.name}'"
    module = program.module(node)
    if module is not None:
        return f"'{node.target}' ({type(module).__name__})"
    return f"'{node.name}' ({getattr(node.target, '__name__', node.target)})"


__all__ = ["Direction", "FoldConvBn"]
