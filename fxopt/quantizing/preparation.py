"""What a program becomes before its tensors are quantised, its function kept.

Weights that the forward computes are computed, and norms are folded. What stays of one as a scale
and shift per channel is a depthwise convolution of one tap, exact in integers where each channel
has its scale. ``SiLU`` is ``x·sigmoid(x)``, two operators that integer kernels have. A patched
stage is written out, and made again afterwards.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxopt.constants import constant_value, constants
from fxopt.edit import Edit
from fxopt.graphs import member, with_sources
from fxopt.layers import ScaleShift, remade
from fxopt.passes.fold_conv_bn import FoldConvBn
from fxopt.passes.fold_scaled_ws import FoldScaledWS
from fxopt.patching.regions import marks, patch, unpatch
from fxopt.patching.stage import PatchedStage
from fxopt.program import Program
from fxopt.results import Declined
from fxopt.rewrite import Preserves, Site, site


def last_input(node: fx.Node) -> fx.Node:
    """What a reader of ``node`` may stand behind: of an input, the last one of all."""
    while node.op == "placeholder" and node.next.op == "placeholder":
        node = node.next
    return node


class Step(Protocol):
    """One way of preparing a program; the methods are those of a pass."""

    def sites(self, program: Program) -> Iterator[Site | Declined]: ...

    def rewrite(self, site: Site, edit: Edit) -> str | None: ...


class WriteOut:
    """Patched stages as the operators that they stand for; they are made again at the end."""

    def sites(self, program: Program) -> Iterator[Site]:
        for node in program.nodes:
            if isinstance(program.module(node), PatchedStage):
                yield site(node)

    def rewrite(self, site: Site, edit: Edit) -> str:
        unpatch(edit, site.node, marked=True)
        return "written out, to run in tiles again once it is quantised"


class _PatchAgain:
    """The stages that were written out."""

    def sites(self, program: Program) -> Iterator[Site]:
        nodes = {node.name: node for node in program.nodes}
        for path, plan in marks(program).items():
            inside = [nodes[record.name] for record in reversed(plan.written)]
            yield site(*inside, facts=(path, plan))

    def rewrite(self, site: Site, edit: Edit) -> str:
        path, plan = site.facts
        patch(edit, plan)
        edit.drop_member(path)
        return "runs in tiles again"


class _AsConvolution:
    """Scales and shifts of maps as depthwise convolutions."""

    def sites(self, program: Program) -> Iterator[Site]:
        for node in program.nodes:
            shift = program.module(node)
            if type(shift) is ScaleShift and len(program.types[node.name].shape) in _CONVOLUTIONS:
                yield site(node, facts=len(program.types[node.name].shape))

    def rewrite(self, site: Site, edit: Edit) -> str:
        shift: Any = edit.module(site.node)
        kind = _CONVOLUTIONS[site.facts]
        key = (kind, edit.node(site.node).target)
        edit.replace_module(site.node, lambda: _depthwise(shift, kind), key=key)
        return "now a depthwise convolution of one tap"


_CONVOLUTIONS: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
"""By the rank of the map."""


def _depthwise(shift: ScaleShift, kind: Any) -> nn.Module:
    channels = len(shift.weight)
    made: Any = kind(channels, channels, 1, groups=channels, device="meta")
    weight = shift.weight.detach().view(made.weight.shape)
    made.weight = nn.Parameter(weight, shift.weight.requires_grad)
    made.bias = shift.bias
    return made.train(shift.training)  # type: ignore[no-any-return]


class _FixWeights:
    """Layers whose weight the forward computes from parameters (weight standardisation, say)."""

    def sites(self, program: Program) -> Iterator[Site]:
        fixed = constants(program)
        for node in program.nodes:
            given = _layer_arguments(node)
            tensors = [given.get(name) for name in ("weight", "bias")] if given else []
            wanted = [each for each in tensors if isinstance(each, fx.Node)]
            if not wanted or not fixed.issuperset(wanted) or given["input"] in fixed:
                continue
            if len(program.types[given["weight"].name].shape) > 1:
                yield site(node)

    def rewrite(self, site: Site, edit: Edit) -> str:
        node = edit.node(site.node)
        given = _layer_arguments(node)
        weight, bias = (_as_parameter(edit, given.get(name)) for name in ("weight", "bias"))
        assert weight is not None
        settings = {name: given[name] for name in _SETTINGS if name in given}
        layer = _layer(_FUNCTIONS[node.target], weight, bias, settings)
        called = edit.call_module(layer, (given["input"],), after=node, name=node.name)
        edit.replace_uses(node, called)
        return "its weight is computed once and for all"


_FUNCTIONS: dict[Any, Any] = {
    F.conv1d: nn.Conv1d, F.conv2d: nn.Conv2d, F.conv3d: nn.Conv3d, F.linear: nn.Linear,
    F.conv_transpose1d: nn.ConvTranspose1d, F.conv_transpose2d: nn.ConvTranspose2d,
    F.conv_transpose3d: nn.ConvTranspose3d,
}  # fmt: skip
_SETTINGS = ("stride", "padding", "output_padding", "dilation", "groups")


def _layer_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a functional layer by name; empty for all else, or where one is computed."""
    if node.op != "call_function" or node.target not in _FUNCTIONS:
        return {}
    names = ["input", "weight", "bias"]
    if node.target is not F.linear:
        transposed = _FUNCTIONS[node.target].__name__.startswith("ConvTranspose")
        ordered = ("stride", "padding", "output_padding", "groups", "dilation")
        names += ordered if transposed else ("stride", "padding", "dilation", "groups")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    operands = [given.get(name) for name in ("input", "weight", "bias")]
    known = len([each for each in operands if isinstance(each, fx.Node)])
    return given if known == len(node.all_input_nodes) else {}


def _as_parameter(edit: Edit, node: Any) -> nn.Parameter | None:
    """The value of ``node``, as trainable as what it is computed from; a parameter itself."""
    if not isinstance(node, fx.Node):
        return None
    before = edit.program.node(node.name)
    value = constant_value(edit.program, before)
    if isinstance(value, nn.Parameter):
        return value
    read = [each for each in with_sources([before]) if each.op == "get_attr"]
    trains = any(member(edit.tree, str(each.target)).requires_grad for each in read)
    return nn.Parameter(value.detach().clone(), trains)


def _layer(
    kind: Any, weight: nn.Parameter, bias: nn.Parameter | None, settings: dict[str, Any]
) -> nn.Module:
    groups = settings.get("groups", 1)
    if kind is nn.Linear:
        made = kind(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    else:
        outputs, inputs = weight.shape[0], weight.shape[1] * groups
        if kind.__name__.startswith("ConvTranspose"):
            inputs, outputs = weight.shape[0], weight.shape[1] * groups
        kernel = tuple(weight.shape[2:])
        made = kind(inputs, outputs, kernel, bias=bias is not None, device="meta", **settings)
    return remade(made, {"weight": weight, "bias": bias})


class _SplitSiLU:
    """``SiLU`` as the two operators that it is."""

    def sites(self, program: Program) -> Iterator[Site]:
        for node in program.nodes:
            if type(program.module(node)) is nn.SiLU or node.target is F.silu:
                yield site(node)

    def rewrite(self, site: Site, edit: Edit) -> str:
        node = edit.node(site.node)
        operand = node.all_input_nodes[0]
        after = last_input(operand)
        gate = edit.call_module(nn.Sigmoid().eval(), (operand,), after=after, name="sigmoid")
        product = edit.call_function(torch.mul, (operand, gate), after=node)
        edit.replace_uses(node, product)
        return "now x·sigmoid(x)"


FOLDS: tuple[Step, ...] = (FoldScaledWS(), FoldConvBn(scale_shift=True))
_PATCH_AGAIN, _FIX_WEIGHTS = _PatchAgain(), _FixWeights()
_FORMS: tuple[Step, ...] = (_AsConvolution(), _SplitSiLU())


def preparing(program: Program, skipped: Collection[fx.Node], folds: bool) -> Iterator[Site]:
    """What is to be done before, each site with the step that does it; with or without folding."""
    left = {node.name for node in skipped}
    for step in (WriteOut(), *((_FIX_WEIGHTS, *FOLDS) if folds else ()), *_FORMS):
        found = [each for each in step.sites(program) if isinstance(each, Site)]
        if step not in FOLDS:
            found = [each for each in found if each.node not in left]
        if found:
            yield from (prepared_by(step, each) for each in found)
            return


def finishing(program: Program) -> Iterator[Site]:
    """What is to be done after."""
    yield from (prepared_by(_PATCH_AGAIN, each) for each in _PATCH_AGAIN.sites(program))


def prepared_by(step: Step, found: Site) -> Site:
    """``found``, a site of ``step`` that keeps values, to be rewritten by it."""
    return replace(found, facts=Prepared(step, found), preserves=Preserves.VALUES)


class Prepared:
    """A site of a step, to be rewritten by it."""

    def __init__(self, step: Step, site: Site) -> None:
        self._step, self._site = step, site

    def rewrite(self, edit: Edit) -> str | None:
        return self._step.rewrite(self._site, edit)
