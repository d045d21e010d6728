"""What each operator of a program does to a tile, as a step of a stage; or why it cannot."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxopt import operators, tiles
from fxopt.analysis.padding import known_sizes
from fxopt.analysis.placement import placement
from fxopt.analysis.receptive_field import Local, Window
from fxopt.graphs import Operand
from fxopt.kernels import InPlace
from fxopt.layers import ScaleShift, standard_kind
from fxopt.program import Program, TensorType
from fxopt.stage import Step


class NotLocal(Exception):
    """An operator that cannot run on a tile, with the reason."""


ATTRIBUTE = "="
"""Before the path of a parameter or buffer, as the name of an operand of a stage."""


class Context:
    """What steps need to know of a program beside their nodes.

    Attributes:
        weights: the nodes that are computed from parameters and buffers alone.
    """

    def __init__(self, program: Program) -> None:
        module = program.graph_module
        named = (*module.named_parameters(), *module.named_buffers())
        self._names = {id(tensor): name for name, tensor in reversed(named)}
        self._sizes = known_sizes(program)
        self._values = placement(program, clip_padding=False).values
        self.weights: set[fx.Node] = set()
        for node in program.nodes:
            computed = node.op not in ("placeholder", "output", "get_attr")
            if node.op == "get_attr" or (
                computed and self.weights.issuperset(node.all_input_nodes)
            ):
                self.weights.add(node)

    def number(self, argument: Any) -> Any:
        """What arithmetic on sizes gives for the example's; anything else as it is."""
        if not isinstance(argument, fx.Node):
            return argument
        return self._sizes.get(argument.name, argument)

    def is_view(self, node: fx.Node) -> bool:
        """Whether ``node`` writes no tensor of its own."""
        return self._values[node].view_of is not None

    def operand(self, tensor: torch.Tensor) -> Operand:
        """A module's parameter or buffer as an operand of a stage."""
        return Operand(ATTRIBUTE + self._names[id(tensor)])


def step_of(program: Program, node: fx.Node, context: Context) -> Step:
    """What ``node`` does to a tile.

    Raises:
        NotLocal: it needs more than a neighbourhood of each position, or how much is not known.
    """
    module = program.module(node)
    if node.name in program.opaque:
        raise NotLocal("is opaque")
    known = _FUNCTIONS if module is None else _MODULES
    make = known.get(node.target if module is None else standard_kind(module), _pointwise)
    step: Step = make(program, node, module, context)
    if len(step.type.shape) < 4:
        raise NotLocal("gives no map")
    return replace(step, origin=program.origins.get(node.name, step.origin))


def _operand(node: fx.Node, position: int = 0) -> Operand:
    operand = node.args[position]
    assert isinstance(operand, fx.Node)
    return Operand(operand.name)


def _given(node: fx.Node, *names: str) -> dict[str, Any]:
    """The arguments by name; those of a method have other names only by keyword."""
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _step(
    program: Program, node: fx.Node, function: Any, args: Any, kwargs: Any = None, **fields: Any
) -> Step:
    fields.setdefault("local", Local())
    fields.setdefault("type", program.types[node.name])
    return Step(node.name, function, tuple(args), dict(kwargs or {}), **fields)


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def _windows(kernel: Any, stride: Any, dilation: Any, before: Any) -> Local:
    fields = zip(*map(_pair, (kernel, stride, dilation, before)), strict=True)
    rows, cols = (Window(*each) for each in fields)
    return Local(rows, cols)


def _convolution(program: Program, node: fx.Node, conv: Any, context: Context) -> Step:
    if conv.padding_mode != "zeros":
        raise NotLocal(f"pads with padding_mode='{conv.padding_mode}'")
    weight = context.operand(conv.weight)
    bias = None if conv.bias is None else context.operand(conv.bias)
    settings = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return _convolved(program, node, weight, bias, conv.kernel_size, *settings)


def _conv2d(program: Program, node: fx.Node, _: Any, context: Context) -> Step:
    given: dict[str, Any] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    given |= _given(node, "input", "weight", *given)
    kernel = program.types[given["weight"].name].shape[2:]
    weight = Operand(given["weight"].name)
    bias = None if given["bias"] is None else Operand(given["bias"].name)
    settings = (given[name] for name in ("stride", "padding", "dilation", "groups"))
    return _convolved(program, node, weight, bias, kernel, *settings)


def _convolved(
    program: Program, node: fx.Node, weight: Operand, bias: Operand | None,
    kernel: Any, stride: Any, padding: Any, dilation: Any, groups: int,
) -> Step:  # fmt: skip
    if padding == "same":
        spans = zip(_pair(kernel), _pair(dilation), strict=True)
        padding = tuple((size - 1) * apart // 2 for size, apart in spans)
    before = (0, 0) if padding == "valid" else padding
    local = _windows(kernel, stride, dilation, before)
    kwargs = {"stride": _pair(stride), "dilation": _pair(dilation), "groups": groups}
    args = (_operand(node), weight, bias)
    return _step(program, node, tiles.conv2d, args, kwargs, local=local, pads=True)


def _max_pool(program: Program, node: fx.Node, pool: Any, context: Context) -> Step:
    if pool.return_indices:
        raise NotLocal("returns indices, which count in the whole map")
    stride = _pair(pool.stride or pool.kernel_size)
    local = _windows(pool.kernel_size, stride, pool.dilation, pool.padding)
    kwargs = {"kernel": _pair(pool.kernel_size), "stride": stride, "dilation": _pair(pool.dilation)}
    return _step(program, node, tiles.max_pool2d, (_operand(node),), kwargs, local=local, pads=True)


def _max_pool2d(program: Program, node: fx.Node, _: Any, context: Context) -> Step:
    names = "kernel_size stride padding dilation ceil_mode return_indices"
    return _max_pool(program, node, _as_layer(node, nn.MaxPool2d, names), context)


def _avg_pool2d(program: Program, node: fx.Node, _: Any, context: Context) -> Step:
    names = "kernel_size stride padding ceil_mode count_include_pad divisor_override"
    return _avg_pool(program, node, _as_layer(node, nn.AvgPool2d, names), context)


def _as_layer(node: fx.Node, kind: type[nn.Module], names: str) -> nn.Module:
    """The layer that does what a call of a function does."""
    given = _given(node, "input", *names.split())
    return kind(**{name: value for name, value in given.items() if name != "input"})


def _avg_pool(program: Program, node: fx.Node, pool: Any, context: Context) -> Step:
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


def _batch_norm(program: Program, node: fx.Node, norm: Any, context: Context) -> Step:
    tensors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    operands = [None if tensor is None else context.operand(tensor) for tensor in tensors]
    if program.modes.training and _follows_mode(program, node):
        raise NotLocal(f"is in training mode, {_STATISTICS}")
    return _normalised(program, node, operands, norm.eps, _follows_mode(program, node))


def _functional_batch_norm(program: Program, node: fx.Node, _: Any, context: Context) -> Step:
    names = ("running_mean", "running_var", "weight", "bias")
    given = _given(node, "input", *names, "training", "momentum", "eps")
    operands = [Operand(given[n].name) if given.get(n) is not None else None for n in names]
    if given.get("training", False) is not False:
        raise NotLocal(f"may be in training mode, {_STATISTICS}")
    return _normalised(program, node, operands, given.get("eps", 1e-5), False)


def _normalised(
    program: Program, node: fx.Node, operands: Sequence[Operand | None], eps: float, trains: bool
) -> Step:
    if operands[0] is None:
        raise NotLocal("normalises by the statistics of the whole map")
    args = (_operand(node), *operands, False, 0.0, eps)
    untrained = f"holds BatchNorms, {_STATISTICS}" if trains else ""
    return _step(program, node, F.batch_norm, args, untrained=untrained)


def _follows_mode(program: Program, node: fx.Node) -> bool:
    """Whether a layer does another thing in training."""
    return program.modes.fixed.get(str(node.target), (False, True))[1]


_STATISTICS = "whose statistics over a tile are not the batch's: fold first (fold_conv_bn)"


def _scale_shift(program: Program, node: fx.Node, layer: Any, context: Context) -> Step:
    args = (_operand(node), context.operand(layer.weight), context.operand(layer.bias))
    return _step(program, node, tiles.scale_shift, args)


def _prelu(program: Program, node: fx.Node, layer: Any, context: Context) -> Step:
    return _step(program, node, F.prelu, (_operand(node), context.operand(layer.weight)))


def _constant_pad(program: Program, node: fx.Node, layer: Any, context: Context) -> Step:
    return _padded(program, node, layer.padding, layer.value)


def _pad(program: Program, node: fx.Node, _: Any, context: Context) -> Step:
    given = _given(node, "x", "pad", "mode", "value")
    if given.get("mode", "constant") != "constant":
        raise NotLocal(f"pads with mode='{given['mode']}'")
    widths = tuple(map(context.number, given["pad"]))
    return _padded(program, node, widths, given.get("value") or 0.0)


def _padded(program: Program, node: fx.Node, widths: Any, value: Any) -> Step:
    if not all(isinstance(width, int) for width in widths) or any(widths[4:]):
        raise NotLocal("pads by widths that are not fixed, or other axes than rows and columns")
    left, top = widths[0], widths[2] if len(widths) > 2 else 0
    local = Local(Window(before=top), Window(before=left))
    args, kwargs = (_operand(node),), {"value": float(value)}
    return _step(program, node, tiles.pad2d, args, kwargs, local=local, pads=True)


def _upsample(program: Program, node: fx.Node, layer: Any, context: Context) -> Step:
    return _enlarged(program, node, layer.mode)


def _interpolate(program: Program, node: fx.Node, _: Any, context: Context) -> Step:
    given = _given(node, "x", "size", "scale_factor", "mode")
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


def _cat(program: Program, node: fx.Node, _: Any, context: Context) -> Step:
    given = _given(node, "tensors", "dim")
    if given.get("dim", 0) % len(program.types[node.name].shape) != 1:
        raise NotLocal("joins along another axis than the channels")
    operands = [Operand(each.name) for each in given["tensors"]]
    return _step(program, node, torch.cat, (operands, 1))


def _split(program: Program, node: fx.Node, _: Any, context: Context) -> Step:
    """It is its operand; each of its items is a part of that."""
    whole = program.types[_operand(node).name]
    given = _given(node, "x", "parts", "dim")
    if given.get("dim", 0) % len(whole.shape) != 1:
        raise NotLocal("splits another axis than the channels")
    return _step(program, node, tiles.same, (_operand(node),), type=whole)


def _item(program: Program, node: fx.Node, _: Any, context: Context) -> Step:
    operand: Any
    index: Any
    operand, index = node.args
    whole = program.types[operand.name]
    if isinstance(whole, tuple) and isinstance(index, int):
        stops = list(accumulate(part.shape[1] for part in whole))
        index = (slice(None), slice(stops[index] - whole[index].shape[1], stops[index]))
    parts = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(part, slice) for part in parts) or any(
        part != slice(None) for axis, part in enumerate(parts) if axis != 1
    ):
        raise NotLocal("takes a part of other axes than the channels")
    part = parts[1] if len(parts) > 1 else slice(None)
    bounds = [context.number(bound) for bound in (part.start, part.stop, part.step)]
    if any(isinstance(bound, fx.Node) for bound in bounds):
        raise NotLocal("takes channels that are computed")
    part = slice(*bounds)
    return _step(program, node, tiles.channels, (Operand(operand.name), part))


def _view(program: Program, node: fx.Node, _: Any, context: Context) -> Step:
    before, after = program.types[_operand(node).name].shape, program.types[node.name].shape
    kept = (before[0], *before[-2:]) == (after[0], *after[-2:])
    if not kept or min(len(before), len(after)) < 4:
        raise NotLocal(f"views {before} as {after}, not channels alone")
    function = tiles.regroup if context.is_view(node) else tiles.regrouped
    return _step(program, node, function, (_operand(node), tuple(after[1:-2])))


def _contiguous(program: Program, node: fx.Node, _: Any, context: Context) -> Step:
    function = tiles.same if context.is_view(node) else torch.clone
    return _step(program, node, function, (_operand(node),))


def _transpose(program: Program, node: fx.Node, _: Any, context: Context) -> Step:
    rank = len(program.types[node.name].shape)
    given = _given(node, "x", "dim0", "dim1")
    axes = [given["dim0"] % rank, given["dim1"] % rank]
    return _permuted(program, node, torch.transpose, axes, axes)


def _permute(program: Program, node: fx.Node, _: Any, context: Context) -> Step:
    given: Any = _given(node, "x", "dims")["dims"]
    dims: Any = given if isinstance(given, (tuple, list)) else node.args[1:]
    axes = [axis % len(dims) for axis in dims]
    moved = [axis for place, axis in enumerate(axes) if place != axis]
    return _permuted(program, node, torch.permute, [axes], moved)


def _permuted(program: Program, node: fx.Node, function: Any, args: Any, moved: Any) -> Step:
    rank = len(program.types[node.name].shape)
    if {0, rank - 2, rank - 1} & set(moved):
        raise NotLocal("moves other axes than those of the channels")
    return _step(program, node, function, (_operand(node), *args))


def _channelwise(program: Program, node: fx.Node, module: Any, context: Context) -> Step:
    """Each position for itself: the same call on a part of the operand."""
    call: Any = (node.args, node.kwargs)
    args, kwargs = fx.node.map_arg(call, _named)
    function: Any = node.target if module is None else copy.deepcopy(module)
    if node.op == "call_method":
        name = str(node.target)
        function = getattr(torch, name, None) or getattr(torch.Tensor, name)
    return _step(program, node, function, args, kwargs)


def _dropout(program: Program, node: fx.Node, layer: Any, context: Context) -> Step:
    """In evaluation it is its operand."""
    probability = getattr(layer, "p", getattr(layer, "drop_prob", 0.0))
    acts = bool(probability) and _follows_mode(program, node)
    if program.modes.fixed.get(str(node.target), (False,))[0] or (acts and program.modes.training):
        raise NotLocal("drops out at random")
    untrained = "drops out at random in training, over a tile otherwise" if acts else ""
    return _step(program, node, tiles.same, (_operand(node),), untrained=untrained)


def _cast(program: Program, node: fx.Node) -> Step:
    type = program.types[node.name]
    given = (*node.args[1:], *node.kwargs.values())
    if not isinstance(type, TensorType) or not all(isinstance(g, torch.dtype) for g in given):
        raise NotLocal("may give a tensor on another device")
    return _step(program, node, tiles.cast, (_operand(node),), {"dtype": type.dtype})


def _pointwise(program: Program, node: fx.Node, module: nn.Module | None, context: Context) -> Step:
    """Element by element: the same call on a part of the operands."""
    known = operators.describe(program, node)
    if known.kind == "dropout" and module is not None:
        return _dropout(program, node, module, context)
    if known.kind == "cast":
        return _cast(program, node)
    if known.inplace is not InPlace.ELEMENTWISE:
        what = type(module).__name__ if module else getattr(node.target, "__name__", node.target)
        raise NotLocal(f"'{what}' is not known to work on a neighbourhood of each position")
    if isinstance(module, nn.RReLU):
        raise NotLocal("draws random numbers in training")
    if module is not None and next(iter(module.state_dict()), None):
        raise NotLocal(f"'{type(module).__name__}' has tensors of its own")
    own = program.types[node.name].shape[-2:]
    for operand in node.all_input_nodes:
        kind = program.types[operand.name]
        shape = kind.shape[-2:] if isinstance(kind, TensorType) else ()
        if any(size != 1 for size in shape) and (operand in context.weights or shape != own):
            raise NotLocal(f"reads '{operand.name}' at every position of the map")
    return _channelwise(program, node, module, context)


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
    nn.ChannelShuffle: _channelwise,
}
_FUNCTIONS: Mapping[Any, Any] = {  # and methods, by name
    F.pad: _pad,
    F.interpolate: _interpolate,
    F.conv2d: _conv2d,
    F.batch_norm: _functional_batch_norm,
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), _max_pool2d),
    F.avg_pool2d: _avg_pool2d,
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _cat),
    operator.getitem: _item,
    **dict.fromkeys((torch.chunk, torch.split, "chunk", "split"), _split),
    **dict.fromkeys((torch.reshape, "view", "reshape"), _view),
    **dict.fromkeys((torch.transpose, "transpose"), _transpose),
    **dict.fromkeys((torch.permute, "permute"), _permute),
    **dict.fromkeys((torch.channel_shuffle, torch.clone, "clone"), _channelwise),
    "contiguous": _contiguous,
}
