"""Replace BatchNorm by scaled weight standardisation (NFNet; Brock et al., ICLR and ICML 2021).

A trained network keeps its function: gain, bias and, by default, the mean of each filter are set
so that the standardised layer gives what layer and norm gave in evaluation
(:mod:`fxopt.normfree.conversion`). It trains on from there without statistics of a batch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from fxopt import channelwise
from fxopt.analysis.signal import propagated
from fxopt.calibration import Calibration
from fxopt.edit import Edit
from fxopt.errors import PreconditionError
from fxopt.normfree.bias import calibrated_shifts
from fxopt.normfree.conversion import fan_in, scaled_ws
from fxopt.normfree.errors import lost
from fxopt.normfree.planning import planned
from fxopt.normfree.sites import Form, forms
from fxopt.normfree.skipping import kept
from fxopt.normfree.surgery import carry_out, fixed
from fxopt.norms import batch_norms
from fxopt.paths import Paths
from fxopt.program import Program
from fxopt.proof.evidence import input_attempts, verification_shapes
from fxopt.results import Declined
from fxopt.rewrite import Preserves, Site, declined, site

ALPHA = 0.2
"""What NFNets multiply residual branches by."""

_NOTES = {
    Form.INPUT: "on the raw input: a fixed scale and shift",
    Form.PRE_ACTIVATION: "pre-activation: a scale and shift, trained as the norm's were",
}
_ONE_WEIGHT = "one weight a filter: its mean is all of it"
_SHARED = "its norm was shared with another layer: each has a gain and bias of its own now"


@dataclass(frozen=True)
class _Facts:
    """What a norm becomes, and what its layer's bias gets beside the norm's shift."""

    form: Form
    shift: torch.Tensor | None = None
    note: str = ""


@dataclass(frozen=True)
class BnToScaledWS:
    """Replace BatchNorms by scaled weight standardisation, the function kept.

    ``keep_mean`` gives each filter a learned mean, and the values stay; without it what the means
    contributed is lost, less where there is ``calibration`` data for the biases. ``skip`` names
    norms that stay, by path or by the path of what holds them.
    """

    name: ClassVar[str] = "bn_to_scaled_ws"
    init: Literal["preserve", "fresh"] = "preserve"
    keep_mean: bool | None = None
    skip: Paths | None = None
    calibration: Calibration | None = None
    alpha: float = ALPHA
    skip_init: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.init not in ("preserve", "fresh"):
            raise ValueError(f"init is preserve or fresh, not {self.init!r}")
        fresh = self.init == "fresh"
        if fresh and (self.keep_mean or self.calibration is not None):
            what = "keep_mean" if self.keep_mean else "calibration"
            raise ValueError(f"{what} goes with init=preserve: a fresh network has no function yet")
        if not fresh and (self.alpha, self.skip_init, self.seed) != (ALPHA, True, 0):
            raise ValueError("alpha, skip_init and seed go with init=fresh")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha is positive and finite, not {self.alpha}")
        if self.keep_mean is None:
            object.__setattr__(self, "keep_mean", not fresh)
        if self.skip is not None:
            object.__setattr__(self, "skip", Paths(self.skip))
        if self.calibration is not None:
            if self.keep_mean:
                raise ValueError("calibration goes with keep_mean=false: else nothing is lost")
            object.__setattr__(self, "calibration", Calibration(self.calibration))

    @property
    def preserves(self) -> Preserves:
        return Preserves.VALUES if self.keep_mean else Preserves.INTERFACE

    @property
    def once(self) -> bool:
        return self.init == "fresh"

    def sites(self, program: Program) -> Iterator[Site | Declined]:
        return self._fresh(program) if self.init == "fresh" else self._preserved(program)

    def _fresh(self, program: Program) -> Iterator[Site | Declined]:
        plan = planned(program, self.alpha, kept(program, self.skip, self.name))
        for change in plan.changes:
            yield site(*change.nodes, facts=change)
        for node, reason in plan.declined.items():
            yield declined(program, node, reason)

    def _preserved(self, program: Program) -> Iterator[Site | Declined]:
        found = forms(program, bool(self.keep_mean), kept(program, self.skip, self.name))
        shifts: Mapping[str, torch.Tensor] = {}
        layers = {n: n.all_input_nodes[0] for n, form in found.items() if form is Form.LAYER}
        if self.calibration is not None and layers:
            if program.is_on_meta:
                raise PreconditionError(
                    f"{self.name} cannot calibrate {program.name}, which is on the meta device; "
                    "leave calibration out there"
                )
            trial = self._trial(program, layers)
            shifts = calibrated_shifts(program, trial, layers, self.calibration)
        shared = _norms_of_several(program, layers)
        for norm, form in found.items():
            if form is Form.LAYER:
                layer = program.module(layers[norm])
                assert layer is not None
                notes = [_SHARED] if norm in shared else []
                notes += [_ONE_WEIGHT] if fan_in(layer) == 1 else []
                facts = _Facts(form, shifts.get(str(layers[norm].target)), "; ".join(notes))
                yield site(norm, layers[norm], facts=facts)
            elif isinstance(form, Form):
                yield site(norm, facts=_Facts(form, note=_NOTES[form]), preserves=Preserves.VALUES)
            else:
                yield declined(program, norm, form)

    def rewrite(self, site: Site, edit: Edit) -> str | None:
        if self.init == "fresh":
            carry_out(site.facts, edit, self.skip_init, self.seed)
            return str(site.facts.note)
        facts: _Facts = site.facts
        norm = edit.node(site.node)
        batch_norm = edit.module(norm)
        if facts.form is not Form.LAYER:
            make = fixed if facts.form is Form.INPUT else channelwise.alone
            edit.replace_module(norm, lambda: make(batch_norm), key=(facts.form, norm.target))
            return facts.note
        call = norm.all_input_nodes[0]
        layer = edit.module(call)
        edit.replace_module(
            call,
            lambda: scaled_ws(layer, batch_norm, bool(self.keep_mean), facts.shift),
            key=(norm.target, call.target),
        )
        edit.replace_uses(norm, call)
        return facts.note or None

    def evidence(self, before: Program, after: Program) -> Mapping[str, Any]:
        """BatchNorms and trainable parameters; what lost means cost; variances of fresh blocks."""
        had, left = len(batch_norms(before)), len(batch_norms(after))
        figures: dict[str, Any] = {
            "batch_norms_before": had,
            "batch_norms_left": left,
            "trainable_parameters": {"before": _trainable(before), "after": _trainable(after)},
        }
        if left < had:
            figures["training"] = "goes on without statistics of a batch where a norm has gone"
        if self.keep_mean or left == had or before.is_on_meta:
            return figures
        if self.init == "fresh":
            return figures | propagated(after)
        if self.calibration is None:
            figures["measured_on"] = "seeded inputs"
            inputs = next(input_attempts(before, verification_shapes(before), None))
            return figures | lost(before, after, [inputs])
        figures["measured_on"] = f"the calibration data, {self.calibration}"
        return figures | lost(before, after, self.calibration.batches(before))

    def _trial(self, program: Program, layers: Mapping[fx.Node, fx.Node]) -> Program:
        """``program`` with its layers converted and no bias calibrated."""
        edit = Edit(program)
        for norm, layer in layers.items():
            self.rewrite(site(norm, layer, facts=_Facts(Form.LAYER)), edit)
        return edit.commit()


def _norms_of_several(program: Program, layers: Mapping[fx.Node, fx.Node]) -> frozenset[fx.Node]:
    """The calls of norms that stand behind more than one layer."""
    behind: dict[str, set[str]] = defaultdict(set)
    for norm, layer in layers.items():
        behind[str(norm.target)].add(str(layer.target))
    return frozenset(norm for norm in layers if len(behind[str(norm.target)]) > 1)


def _trainable(program: Program) -> int:
    return sum(p.numel() for p in program.graph_module.parameters() if p.requires_grad)


__all__ = ["BnToScaledWS"]
