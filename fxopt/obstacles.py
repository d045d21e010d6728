"""Why a block whose structure is right cannot be rewritten."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import fx, nn

from fxopt.blocks import InvertedResidual
from fxopt.flow import Flow
from fxopt.graphs import member
from fxopt.layers import standard_kind
from fxopt.pads import pad_of
from fxopt.program import Program
from fxopt.scaled_ws import FOLD_FIRST, ScaledWS

SAMPLE_NORMS = (
    nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def named(node: fx.Node) -> str:
    """``node`` in messages."""
    if node.op == "output":
        return "an output"
    return f"'{node.target}'" if node.op == "call_module" else f"'{node.name}'"


def no_fixed_map(program: Program, norm: fx.Node) -> str:
    """Why ``norm`` is not a fixed map per channel in evaluation, or nothing."""
    batch_norm: Any = program.module(norm)
    if batch_norm is None:
        return "the forward computes its statistics or parameters, or it has none"
    kind = type(batch_norm).__name__
    if isinstance(batch_norm, SAMPLE_NORMS):
        return f"it normalises each sample by its own values ({kind})"
    if norm.name in program.opaque or standard_kind(batch_norm) not in BATCH_NORMS:
        return f"it was not traced, and may compute more than a BatchNorm ({kind})"
    if writes_tensors_of(program, batch_norm):
        return "the forward writes its statistics or parameters"
    if batch_norm.running_mean is None or batch_norm.running_var is None:
        return "it has no running statistics; train it with track_running_stats=True"
    if program.modes.fixed.get(str(norm.target), (False, True))[0]:
        return "it normalises by batch statistics in evaluation too"
    return ""


_WRITTEN: WeakKeyDictionary[Program, frozenset[int]] = WeakKeyDictionary()
"""Identities of the buffers that a program's forward writes, while it is looked at."""


def writes_tensors_of(program: Program, layer: nn.Module) -> bool:
    """Whether the forward writes a weight or a statistic of ``layer``, a borrowed one too."""
    if program not in _WRITTEN:
        targets = [node.args[0] for node in program.nodes if node.target == "copy_"]
        paths = [str(each.target) for each in targets if isinstance(each, fx.Node)]
        _WRITTEN[program] = frozenset(id(member(program.graph_module, path)) for path in paths)
    names = ("weight", "bias", "running_mean", "running_var")
    return any(id(getattr(layer, name, None)) in _WRITTEN[program] for name in names)


def obstacle(flow: Flow, block: InvertedResidual) -> str:
    """Why ``block``, whose structure is right, cannot be rewritten, or nothing."""
    conv: Any = flow.program.module(block.spatial.conv)
    reasons = (
        _quantised(flow, block),
        _standardised(flow, block),
        "" if conv.in_channels == conv.out_channels else
        f"its depth multiplier is {conv.out_channels // conv.in_channels}; it must be 1",
        "" if set(conv.dilation) == {1} else f"its dilation is {tuple(conv.dilation)}",
        _unfit_norm(flow.program, block),
        _unfit_pad(flow, block),
        _read_elsewhere(flow, block),
        _sized_by_channels(flow, block),
    )  # fmt: skip
    return next(filter(None, reasons), "")


def is_quantiser(program: Program, node: fx.Node) -> bool:
    """Whether ``node`` quantises, or pretends to."""
    module = program.module(node)
    names = [str(getattr(node.target, "__name__", node.target))]
    if module is not None:
        names = [f"{kind.__module__}.{kind.__name__}" for kind in type(module).__mro__]
    words = ("fake_quant", "fakequant", "quantize_per", "quantized", "nn.qat")
    return any(word in name.lower() for name in names for word in words)


def _quantised(flow: Flow, block: InvertedResidual) -> str:
    near = {each for node in block.nodes for each in (*node.all_input_nodes, *node.users)}
    for node in (*block.nodes, *sorted(near, key=str)):
        if node.op in ("call_module", "call_function") and is_quantiser(flow.program, node):
            return f"{named(node)} quantises it; fuse before quantising"
    return ""


def _standardised(flow: Flow, block: InvertedResidual) -> str:
    layers = (block.expand, block.spatial, block.project)
    for conv in (layer.conv for layer in layers if layer is not None):
        if isinstance(flow.program.module(conv), ScaledWS):
            return f"its {named(conv)} {FOLD_FIRST}"
    return ""


def _unfit_norm(program: Program, block: InvertedResidual) -> str:
    layers = (block.expand, block.spatial, block.project)
    for norm in (layer.norm for layer in layers if layer is not None):
        reason = "" if norm is None else no_fixed_map(program, norm)
        if norm is not None and reason:
            return f"its norm {named(norm)} is no fixed map per channel: {reason}"
    return ""


def _unfit_pad(flow: Flow, block: InvertedResidual) -> str:
    node = block.pad
    if node is None:
        return ""
    pad = pad_of(node, flow.program.module(node))
    if pad is None:
        return f"its pad {named(node)} is no constant, reflection, replication or circular one"
    if len(pad.widths) != 4:
        return f"its pad {named(node)} is not over rows and columns alone"
    if pad.mode == "constant" and not pad.is_of_zeros:
        where = "around the expanded map, where zeros are needed"
        return f"its pad {named(node)} puts {pad.value} {where}"
    return ""


def _read_elsewhere(flow: Flow, block: InvertedResidual) -> str:
    own = {*block.nodes}
    for node in block.nodes:
        other = next((each for each in flow.readers(node) if each not in own), None)
        if node is not block.end and other is not None:
            return f"its inner value {named(node)} is also read by {named(other)}"
    return ""


def _sized_by_channels(flow: Flow, block: InvertedResidual) -> str:
    """Sizes of inner maps stay what they are, but for the number of channels.

    What follows the depthwise convolution keeps that too: all of it, or of ratio 1 as far as the
    gate, whose own sizes go where it goes.
    """
    own = {*block.nodes}
    gate = {*block.gate.nodes} if block.gate is not None else set()
    before = {*block.inner, *(block.expand.nodes if block.expand else ())}
    for node in block.nodes:
        for reader in flow.shape_readers(node):
            axis = reader.args[1] if reader.target == "size" and len(reader.args) == 2 else None
            kept = axis in (0, 2, 3, -1, -2, -4) or reader in own
            if block.expand is not None:
                kept = kept or node not in before
            else:
                kept = kept or gate.issuperset(reader.users)
            if node is not block.end and not kept:
                return f"the forward reads the shape of its inner value {named(node)}"
    return ""
