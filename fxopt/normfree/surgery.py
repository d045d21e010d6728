"""The changes of :mod:`fxopt.normfree.fresh` carried out on an edit."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx, nn

from fxopt import channelwise
from fxopt.draws import normal
from fxopt.edit import Edit
from fxopt.layers import SkipInit, remade, standard_kind
from fxopt.normfree.fresh import (
    Change,
    Dropped,
    Fixed,
    Gated,
    Redrawn,
    Residual,
    Standardised,
    Swap,
)
from fxopt.scaled_ws import EPS, KINDS, ScaledWS


def carry_out(change: Change, edit: Edit, skip_init: bool, seed: int) -> None:
    """Make one change; ``skip_init`` gives branches a learned gain, ``seed`` is of new weights."""
    match change:
        case Swap():
            _swap(edit, change)
        case Residual():
            _scale_branch(edit, change, skip_init)
        case Gated(product, factor):
            scaled = edit.call_function(torch.mul, (edit.node(product), factor), after=product)
            edit.replace_uses(product, scaled)
        case Standardised():
            _standardise(edit, change, seed)
        case Redrawn(call):
            layer, path = edit.module(call), str(call.target)
            edit.replace_module(call, lambda: redrawn(layer, path, seed), key=("fresh", path))
        case Dropped(norm):
            edit.replace_uses(norm, edit.node(norm).all_input_nodes[0])
        case Fixed(norm):
            batch_norm = edit.module(norm)
            edit.replace_module(
                norm, lambda: fixed(batch_norm), key=("fixed", edit.node(norm).target)
            )


def fixed(norm: nn.Module) -> nn.Module:
    """The scale and shift of a norm in evaluation, not trained."""
    return channelwise.alone(norm).requires_grad_(False)


def _swap(edit: Edit, change: Swap) -> None:
    first, last = edit.node(change.carried[0]), edit.node(change.carried[-1])
    source, activated = edit.node(change.source), edit.node(change.activation[-1])
    stands_for = {source: last}
    end = last
    for node in map(edit.node, change.activation):
        end = stands_for[node] = edit.copied(node, stands_for, after=end)
    first.replace_input_with(activated, source)
    edit.replace_uses(last, end)
    for shortcut in change.shortcuts:
        edit.node(shortcut).replace_input_with(end, last)


def _scale_branch(edit: Edit, change: Residual, skip_init: bool) -> None:
    block = change.block
    if change.reads is not None:
        at = edit.node(change.reads)
        edit.node(change.start).replace_input_with(edit.node(block.entry), at)
        for node in map(edit.node, block.chain):
            if node < at:
                at.append(node)
            at = node
    branch = edit.node(block.branch)
    if skip_init:
        gain = SkipInit(change.scale).to(*_place(edit, block.branch))
        scaled = edit.call_module(gain, (branch,), after=branch, name="skip_init")
    else:
        scaled = edit.call_function(torch.mul, (branch, change.scale), after=branch)
    edit.node(block.total).replace_input_with(branch, scaled)


def _standardise(edit: Edit, change: Standardised, seed: int) -> None:
    call = edit.node(change.call)
    layer, path = edit.module(call), str(call.target)
    edit.replace_module(
        call, lambda: fresh_scaled_ws(layer, change.gamma, path, seed), key=("fresh", path)
    )
    if change.divisor != 1:
        operand = call.all_input_nodes[0]
        call.replace_input_with(operand, _times(edit, operand, 1 / change.divisor))
    for norm in change.norms:
        edit.replace_uses(norm, edit.node(norm).all_input_nodes[0])


def _times(edit: Edit, value: fx.Node, factor: float) -> fx.Node:
    """``factor`` times ``value``, once for all that are to read it."""
    for user in value.users:
        is_new = user.name not in edit.program.types
        if is_new and user.target is torch.mul and user.args == (value, factor):
            return user
    return edit.call_function(torch.mul, (value, factor), after=value)


def _place(edit: Edit, value: fx.Node) -> tuple[torch.device, torch.dtype]:
    """Where a parameter beside ``value`` is, and its dtype."""
    device = next((each.device for each in edit.tree.parameters()), torch.device("cpu"))
    return device, edit.program.types[value.name].dtype


def fresh_scaled_ws(layer: nn.Module, gamma: float, name: str, seed: int) -> ScaledWS:
    """An untrained layer with the settings of ``layer``: normal weights, gain 1, bias 0."""
    weight = _weight(layer, name, seed)
    zeros, ones = (nn.Parameter(weight.new_full((len(weight),), value)) for value in (0.0, 1.0))
    made = remade(
        layer, {"weight": weight, "bias": zeros, "gain": ones, "mean": None},
        kind=KINDS.get(standard_kind(layer), type(layer)),
    )  # fmt: skip
    assert isinstance(made, ScaledWS)
    made.gamma, made.eps = gamma, float(getattr(layer, "eps", EPS))  # type: ignore[arg-type]
    return made


def redrawn(layer: nn.Module, name: str, seed: int) -> nn.Module:
    """``layer``, plain, with normal weights and a bias of zero."""
    old: Any = layer
    own = dict(old._parameters)
    bias = None if old.bias is None else nn.Parameter(torch.zeros_like(old.bias))
    return remade(layer, {**own, "weight": _weight(layer, name, seed), "bias": bias})


def _weight(layer: Any, name: str, seed: int) -> nn.Parameter:
    """Normal, of variance one over the weights that an element of the result sees; trained."""
    weight: torch.Tensor = layer.weight
    seen = float(weight[0].numel())
    if isinstance(layer, channelwise.TRANSPOSED_KINDS):
        taps = math.prod(layer.kernel_size) / math.prod(layer.stride)
        seen = layer.in_channels / layer.groups * max(1.0, taps)
    return nn.Parameter(normal(weight, tuple(weight.shape), 1 / seen, name, seed))
