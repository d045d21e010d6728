"""What each operator of a program does to a tile, as a step of a stage; or why it cannot."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxopt import operators, tiles
from fxopt.analysis.receptive_field import Local, Window
from fxopt.graphs import Operand
from fxopt.kernels import InPlace
from fxopt.layers import ScaleShift, standard_kind
from fxopt.program import Program, TensorType
from fxopt.stage import Step


class NotLocal(Exception):
    """An operator that cannot run on a tile, with the reason."""


Weigh = Callable[[torch.Tensor], Operand]
"""Gives a parameter or buffer of a module as an operand of the stage."""


def step_of(program: Program, node: fx.Node, weigh: Weigh) -> Step:
    """What ``node`` does to a tile.

    Raises:
        NotLocal: it needs more than a neighbourhood of each position, or how much is not known.
    """
    type = program.types[node.name]
    if not isinstance(type, TensorType) or len(type.shape) != 4:
        raise NotLocal("gives no map of four axes")
    module = program.module(node)
    if node.name in program.opaque:
        raise NotLocal("is opaque")
    known = _FUNCTIONS if module is None else _MODULES
    make = known.get(node.target if module is None else standard_kind(module), _pointwise)
    step: Step = make(program, node, module, weigh)
    return replace(step, origin=program.origins.get(node.name, step.origin))


def _operand(node: fx.Node, position: int = 0) -> Operand:
    operand = node.args[position]
    assert isinstance(operand, fx.Node)
    return Operand(operand.name)


def _step(
    program: Program, node: fx.Node, function: Any, args: Any, kwargs: Any = None, **fields: Any
) -> Step:
    fields.setdefault("local", Local())
    type = program.types[node.name]
    return Step(node.name, function, tuple(args), dict(kwargs or {}), type=type, **fields)


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def _windows(kernel: Any, stride: Any, dilation: Any, before: Any) -> Local:
    fields = zip(*map(_pair, (kernel, stride, dilation, before)), strict=True)
    rows, cols = (Window(*each) for each in fields)
    return Local(rows, cols)


def _convolution(program: Program, node: fx.Node, conv: Any, weigh: Weigh) -> Step:
    if conv.padding_mode != "zeros":
        raise NotLocal(f"pads with padding_mode='{conv.padding_mode}'")
    if conv.padding == "same":
        before = tuple(
            (k - 1) * d // 2 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)
        )
    else:
        before = (0, 0) if conv.padding == "valid" else _pair(conv.padding)
    local = _windows(conv.kernel_size, conv.stride, conv.dilation, before)
    bias = None if conv.bias is None else weigh(conv.bias)
    kwargs = {"stride": _pair(conv.stride), "dilation": _pair(conv.dilation), "groups": conv.groups}
    args = (_operand(node), weigh(conv.weight), bias)
    return _step(program, node, tiles.conv2d, args, kwargs, local=local, pads=True)


def _max_pool(program: Program, node: fx.Node, pool: Any, weigh: Weigh) -> Step:
    if pool.return_indices:
        raise NotLocal("returns indices, which count in the whole map")
    stride = _pair(pool.stride or pool.kernel_size)
    local = _windows(pool.kernel_size, stride, pool.dilation, pool.padding)
    kwargs = {"kernel": _pair(pool.kernel_size), "stride": stride, "dilation": _pair(pool.dilation)}
    return _step(program, node, tiles.max_pool2d, (_operand(node),), kwargs, local=local, pads=True)


def _avg_pool(program: Program, node: fx.Node, pool: Any, weigh: Weigh) -> Step:
    kernel, padding = _pair(pool.kernel_size), _pair(pool.padding)
    stride = _pair(pool.stride or pool.kernel_size)
    sizes = program.types[_operand(node).name].shape[2:]
    results = program.types[node.name].shape[2:]
    factors = [
        _factors(*each, pool.count_include_pad)
        for each in zip(sizes, results, kernel, stride, padding, strict=True)
    ]
    if pool.divisor_override:
        factor = kernel[0] * kernel[1] / pool.divisor_override
        factors = [(factor,) * results[0], (1.0,) * results[1]]
    local = _windows(kernel, stride, 1, padding)
    kwargs = {"kernel": kernel, "stride": stride}
    fields = {"local": local, "pads": True, "factors": tuple(factors)}
    return _step(program, node, tiles.avg_pool2d, (_operand(node),), kwargs, **fields)


def _factors(
    size: int, results: int, kernel: int, stride: int, padding: int, include_pad: bool
) -> tuple[float, ...]:
    """The kernel's positions over those that count, along one axis."""
    low, high = (-padding, size + padding) if include_pad else (0, size)
    starts = (position * stride - padding for position in range(results))
    return tuple(kernel / (min(s + kernel, high) - max(s, low)) for s in starts)


def _batch_norm(program: Program, node: fx.Node, norm: Any, weigh: Weigh) -> Step:
    if norm.running_mean is None:
        raise NotLocal("normalises by the statistics of the whole map")
    tensors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    weights = [None if tensor is None else weigh(tensor) for tensor in tensors]
    return _step(program, node, F.batch_norm, (_operand(node), *weights, False, 0.0, norm.eps))


def _scale_shift(program: Program, node: fx.Node, layer: Any, weigh: Weigh) -> Step:
    args = (_operand(node), weigh(layer.weight), weigh(layer.bias))
    return _step(program, node, tiles.scale_shift, args)


def _prelu(program: Program, node: fx.Node, layer: Any, weigh: Weigh) -> Step:
    return _step(program, node, F.prelu, (_operand(node), weigh(layer.weight)))


def _constant_pad(program: Program, node: fx.Node, layer: Any, weigh: Weigh) -> Step:
    return _padded(program, node, layer.padding, layer.value)


def _pad(program: Program, node: fx.Node, _: Any, weigh: Weigh) -> Step:
    given = dict(zip(("pad", "mode", "value"), node.args[1:], strict=False)) | node.kwargs
    if given.get("mode", "constant") != "constant":
        raise NotLocal(f"pads with mode='{given['mode']}'")
    return _padded(program, node, given["pad"], given.get("value") or 0.0)


def _padded(program: Program, node: fx.Node, widths: Any, value: Any) -> Step:
    if not all(isinstance(width, int) for width in widths) or any(widths[4:]):
        raise NotLocal("pads by widths that are not fixed, or other axes than rows and columns")
    left, top = widths[0], widths[2] if len(widths) > 2 else 0
    local = Local(Window(before=top), Window(before=left))
    args, kwargs = (_operand(node),), {"value": float(value)}
    return _step(program, node, tiles.pad2d, args, kwargs, local=local, pads=True)


def _upsample(program: Program, node: fx.Node, layer: Any, weigh: Weigh) -> Step:
    return _enlarged(program, node, layer.mode)


def _interpolate(program: Program, node: fx.Node, _: Any, weigh: Weigh) -> Step:
    given = dict(zip(("size", "scale_factor", "mode"), node.args[1:], strict=False)) | node.kwargs
    return _enlarged(program, node, str(given.get("mode", "nearest")))


def _enlarged(program: Program, node: fx.Node, mode: str) -> Step:
    before = program.types[_operand(node).name].shape[2:]
    after = program.types[node.name].shape[2:]
    if not mode.startswith("nearest"):
        raise NotLocal(f"interpolates with mode='{mode}'")
    if any(b % a for a, b in zip(before, after, strict=True)):
        raise NotLocal(f"enlarges {before} to {after}, which is no whole number of times")
    scale = tuple(b // a for a, b in zip(before, after, strict=True))
    local = Local(Window(scale=scale[0]), Window(scale=scale[1]))
    args, kwargs = (_operand(node),), {"scale": scale}
    return _step(program, node, tiles.enlarge, args, kwargs, local=local, places=True)


def _cat(program: Program, node: fx.Node, _: Any, weigh: Weigh) -> Step:
    given = dict(zip(("tensors", "dim"), node.args, strict=False)) | node.kwargs
    if given.get("dim", 0) not in (1, -3):
        raise NotLocal("joins along another axis than the channels")
    given_tensors: Any = given["tensors"]
    operands = [Operand(n.name) for n in given_tensors]
    return _step(program, node, torch.cat, (operands, 1))


def _identity(program: Program, node: fx.Node, layer: Any, weigh: Weigh) -> Step:
    if getattr(layer, "p", 0):
        raise NotLocal("drops out at random in training")
    return _step(program, node, tiles.same, (_operand(node),))


def _pointwise(program: Program, node: fx.Node, module: nn.Module | None, weigh: Weigh) -> Step:
    """Element by element: the same call on a part of the operands."""
    if operators.describe(program, node).inplace is not InPlace.ELEMENTWISE:
        what = type(module).__name__ if module else getattr(node.target, "__name__", node.target)
        raise NotLocal(f"'{what}' is not known to work on a neighbourhood of each position")
    if isinstance(module, nn.RReLU):
        raise NotLocal("draws random numbers in training")
    if module is not None and next(iter(module.state_dict()), None):
        raise NotLocal(f"'{type(module).__name__}' has tensors of its own")
    result = program.types[node.name].shape
    for operand in node.all_input_nodes:
        kind = program.types[operand.name]
        if isinstance(kind, TensorType) and len(kind.shape) >= 2:
            maps, own = kind.shape[-2:], result[-2:]
            if maps not in (own, (1, 1)):
                raise NotLocal(f"stretches '{operand.name}' over the map")
    call: Any = (node.args, node.kwargs)
    args, kwargs = fx.node.map_arg(call, _named)
    function: Any = copy.deepcopy(module) if module is not None else node.target
    if node.op == "call_method":
        function = getattr(torch.Tensor, str(node.target))
    return _step(program, node, function, args, kwargs)


def _named(node: fx.Node) -> Any:
    return Operand(node.name)


_MODULES: Mapping[Any, Any] = {
    nn.Conv2d: _convolution,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _avg_pool,
    nn.BatchNorm2d: _batch_norm,
    nn.PReLU: _prelu,
    ScaleShift: _scale_shift,
    nn.ConstantPad2d: _constant_pad,
    nn.ZeroPad2d: _constant_pad,
    nn.Upsample: _upsample,
    nn.UpsamplingNearest2d: _upsample,
    nn.Identity: _identity,
    nn.Dropout: _identity,
    nn.Dropout2d: _identity,
}
_FUNCTIONS: Mapping[Any, Any] = {F.pad: _pad, F.interpolate: _interpolate, torch.cat: _cat}
