"""What becomes of each norm of a program that is to have no BatchNorm any more."""

from __future__ import annotations

import enum
from collections import defaultdict
from collections.abc import Collection, Mapping

import torch.nn.functional as F
from torch import fx, nn

from fxopt import operators
from fxopt.channelwise import LINEAR_KINDS
from fxopt.flow import Flow
from fxopt.layers import standard_kind
from fxopt.normfree.conversion import fan_in, takes_norm
from fxopt.norms import batch_norms, why_not_behind
from fxopt.obstacles import SAMPLE_NORMS, named, no_fixed_map
from fxopt.program import Program
from fxopt.spans import ELEMENTWISE, is_activation

_SAMPLE_FUNCTIONS = (
    F.layer_norm, F.group_norm, F.instance_norm, F.rms_norm, F.local_response_norm,
)  # fmt: skip


_REMEDY = "fold_conv_bn{scale_shift=true} makes a scale and shift of it"


class Form(enum.Enum):
    """What a BatchNorm becomes.

    ``LAYER`` a part of the layer before it; ``INPUT`` a scale and shift of the model's input,
    which is not trained; ``PRE_ACTIVATION`` a scale and shift where an activation reads the norm
    and no layer stands before it, as in pre-activation order: there NFNet has its ``1/β``.
    """

    LAYER = "layer"
    INPUT = "input"
    PRE_ACTIVATION = "pre-activation"


def forms(
    program: Program, keep_mean: bool, kept: Mapping[fx.Node, str]
) -> dict[fx.Node, Form | str]:
    """What each norm of ``program``, in its order, becomes, or why it stays.

    Norms that are no BatchNorm are among them; they stay, and so do those of ``kept``.
    """
    norms = batch_norms(program)
    behind = {n: kept.get(n) or _why_no_layer(program, n, keep_mean) for n in norms}
    layers = {norm for norm, reason in behind.items() if not reason}
    shared = _shared(program, layers)
    found: dict[fx.Node, Form | str] = {}
    flow: Flow | None = None
    for node in program.nodes:
        if node not in behind:
            if is_of_samples(program, node):
                found[node] = by_sample(program, node)
        elif node in layers:
            found[node] = shared.get(node, Form.LAYER)
        elif node in kept or no_fixed_map(program, node) or _layer_before(program, node):
            found[node] = behind[node]
        elif reads_input(program, node):
            found[node] = Form.INPUT
        else:
            flow = flow or Flow(program)
            # a norm behind another one finds a layer there once that has gone
            waits = node.all_input_nodes[0] in layers
            activated = not waits and _is_activated(flow, node)
            reason = f"{behind[node]}, nor does an activation alone read it"
            found[node] = Form.PRE_ACTIVATION if activated else f"{reason}; {_REMEDY}"
    return found


def _why_no_layer(program: Program, norm: fx.Node, keep_mean: bool) -> str:
    """Why no layer takes in ``norm``, or nothing."""
    reason = no_fixed_map(program, norm) or why_not_behind(program, norm, _is_layer)
    if reason:
        return reason
    producer = norm.all_input_nodes[0]
    layer = program.module(producer)
    assert layer is not None
    if not takes_norm(layer):
        what = f"'{producer.target}' ({type(layer).__name__})"
        return f"a standardised weight is not defined for {what}: outputs see parts of a filter"
    if fan_in(layer) == 1 and not keep_mean:
        return (
            f"the filters of '{producer.target}' have one weight each, and standardised that is "
            "zero; keep_mean=true keeps it"
        )
    return ""


def _is_layer(layer: nn.Module) -> bool:
    return standard_kind(layer) in LINEAR_KINDS or takes_norm(layer)


def _layer_before(program: Program, norm: fx.Node) -> bool:
    """Whether ``norm`` alone reads what a layer gives, its function included."""
    producer = norm.all_input_nodes[0]
    kind = operators.describe(program, producer).kind if producer.op != "placeholder" else ""
    is_layer = kind in ("linear", "depthwise") or kind.startswith("conv")
    return is_layer and len(producer.users) == 1


def _shared(program: Program, norms: Collection[fx.Node]) -> dict[fx.Node, str]:
    """Why a layer that is called more than once cannot take in the norm after this call of it."""
    after = {norm.all_input_nodes[0]: norm for norm in norms}
    calls: dict[int, list[fx.Node]] = defaultdict(list)
    for node in program.nodes:
        module = program.module(node)
        if module is not None:
            calls[id(module)].append(node)
    found = {}
    for layer, norm in after.items():
        for call in calls[id(program.module(layer))]:
            other = after.get(call)
            if other is None or program.module(other) is not program.module(norm):
                follows = "no such norm" if other is None else named(other)
                found[norm] = (
                    f"its layer '{layer.target}' is shared: {follows} follows another call of it "
                    f"('{call.name}'), and one layer has one gain and one bias"
                )
    return found


def reads_input(program: Program, norm: fx.Node) -> bool:
    """Whether ``norm`` reads an input of the model, as a view of it or in another dtype."""
    node = norm.all_input_nodes[0]
    while node.op != "placeholder":
        known = node.op != "get_attr" and operators.describe(program, node).kind
        if known not in ("view", "permute", "cast"):
            return False
        node = node.all_input_nodes[0]
    return True


def _is_activated(flow: Flow, norm: fx.Node) -> bool:
    """Whether all that reads ``norm`` is one activation, however it is written."""
    end = flow.after(norm)
    if end is None:
        return False
    span = flow.between(norm, end)
    acts = any(flow.kind(node) in ELEMENTWISE for node in span)
    given = {norm, *span}
    closed = all(
        operand in given or operand.op == "get_attr"
        for node in span
        for operand in node.all_input_nodes
    )
    return acts and closed and is_activation(flow, span)


def is_of_samples(program: Program, node: fx.Node) -> bool:
    return node.target in _SAMPLE_FUNCTIONS or isinstance(program.module(node), SAMPLE_NORMS)


def by_sample(program: Program, node: fx.Node) -> str:
    kind = getattr(node.target, "__name__", type(program.module(node)).__name__)
    return f"it normalises each sample by its own values ({kind})"
