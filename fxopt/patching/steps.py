"""What each operator of a program does to a tile, in one table."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxopt.fake_quantize import FakeQuantize
from fxopt.layers import ScaleShift, standard_kind
from fxopt.patching import channels, elementwise, windows
from fxopt.patching.context import Context, NotLocal
from fxopt.patching.stage import MAP, Step
from fxopt.program import Program
from fxopt.quantized_layers import QuantizedConv2d
from fxopt.scaled_ws import FOLD_FIRST, ScaledWS

_MODULES: Mapping[Any, Any] = {
    **dict.fromkeys((nn.Conv2d, QuantizedConv2d), windows.convolution),
    nn.MaxPool2d: windows.max_pool,
    nn.AvgPool2d: windows.avg_pool,
    nn.BatchNorm2d: elementwise.batch_norm,
    nn.LayerNorm: elementwise.layer_norm,
    nn.Linear: elementwise.linear,
    nn.PReLU: elementwise.prelu,
    ScaleShift: elementwise.scale_shift,
    FakeQuantize: elementwise.quantizer,
    nn.ConstantPad2d: windows.constant_pad,
    nn.ZeroPad2d: windows.constant_pad,
    nn.Upsample: windows.upsample,
    nn.UpsamplingNearest2d: windows.upsample,
    nn.ChannelShuffle: channels.channelwise,
}
_FUNCTIONS: Mapping[Any, Any] = {  # and methods, by name
    F.pad: windows.pad,
    F.interpolate: windows.interpolate,
    F.conv2d: windows.conv2d,
    F.batch_norm: elementwise.functional_batch_norm,
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), windows.max_pool2d),
    F.avg_pool2d: windows.avg_pool2d,
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), channels.cat),
    operator.getitem: channels.item,
    **dict.fromkeys((torch.chunk, torch.split, "chunk", "split"), channels.split),
    **dict.fromkeys((torch.reshape, "view", "reshape"), channels.view),
    **dict.fromkeys((torch.transpose, "transpose"), channels.transpose),
    **dict.fromkeys((torch.permute, "permute"), channels.permute),
    **dict.fromkeys((torch.channel_shuffle, torch.clone, "clone"), channels.channelwise),
    "contiguous": channels.contiguous,
}


_ANY_AXES = (
    channels.permute, channels.transpose, channels.contiguous, channels.channelwise,
    elementwise.pointwise, elementwise.linear, elementwise.layer_norm, elementwise.quantizer,
)  # fmt: skip
"""What does not mind where rows and columns lie."""


def step_of(program: Program, node: fx.Node, context: Context) -> Step:
    """What ``node`` does to a tile.

    Raises:
        NotLocal: it needs more than a neighbourhood of each position, or how much is not known.
    """
    module = program.module(node)
    if node.name in program.opaque:
        raise NotLocal("is opaque")
    if isinstance(module, ScaledWS):
        raise NotLocal(FOLD_FIRST)
    known = _FUNCTIONS if module is None else _MODULES
    what = node.target if module is None else standard_kind(module)
    make = known.get(what, elementwise.pointwise)
    axes = context.axes_of(node)
    if axes != MAP and make not in _ANY_AXES:
        raise NotLocal("reads a map whose rows and columns are not the last axes")
    step: Step = make(program, node, module, context)
    if len(step.type.shape) < 4:
        raise NotLocal("gives no map")
    if make not in (channels.permute, channels.transpose):
        step = replace(step, axes=axes)
    context.axes[node.name] = step.axes
    return replace(step, origin=program.origins.get(node.name, step.origin))
