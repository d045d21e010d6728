"""Fold a BatchNorm into the convolution or linear layer before it, or into the one after it.

In evaluation a BatchNorm is ``y = a·x + c`` per channel. The layer whose result it alone reads
takes it in (backwards); if there is none, so does the layer that alone reads the norm, where that
is exact (forwards). The algebra is in :mod:`fxopt.channelwise`.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx, nn

from fxopt import channelwise
from fxopt.edit import Edit
from fxopt.layers import standard_kind
from fxopt.norms import batch_norms, why_not_before, why_not_behind
from fxopt.obstacles import no_fixed_map
from fxopt.program import Program
from fxopt.results import Declined
from fxopt.rewrite import Preserves, Site, declined, site


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
        found = [(norm, *_judged(program, norm)) for norm in batch_norms(program)]
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
        had, left = len(batch_norms(before)), len(batch_norms(after))
        gone = {"training": "folded norms have no batch statistics any more"} if left < had else {}
        return {"batch_norms_before": had, "batch_norms_left": left, **gone}


def _judged(program: Program, norm: fx.Node) -> tuple[Direction | None, str]:
    """Where ``norm`` can go, and why it cannot be folded."""
    reason = no_fixed_map(program, norm)
    if reason:
        return None, reason
    before = why_not_behind(program, norm, _takes_maps)
    if not before:
        return Direction.BACKWARDS, ""
    after = why_not_before(program, norm, _takes_maps) or _inexact(program, norm)
    if not after:
        return Direction.FORWARDS, ""
    return Direction.ALONE, f"{before}; {after}"


def _takes_maps(module: nn.Module) -> bool:
    return standard_kind(module) in channelwise.LINEAR_KINDS


def _inexact(program: Program, norm: fx.Node) -> str:
    """Why the layer after ``norm`` cannot take it in exactly, or nothing."""
    (reader,) = norm.users
    layer, batch_norm = program.module(reader), program.module(norm)
    assert layer is not None
    assert batch_norm is not None
    obstacle = channelwise.why_not_before(layer, channelwise.map_of(batch_norm))
    return f"'{reader.target}' {obstacle}" if obstacle else ""


__all__ = ["Direction", "FoldConvBn"]
