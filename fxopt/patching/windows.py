"""Steps of operators that read a neighbourhood: convolutions, pools, pads, enlargements."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from fxopt.analysis.receptive_field import Local, Window
from fxopt.graphs import Operand
from fxopt.patching import tiles
from fxopt.patching.context import QUANTIZED, Context, NotLocal, arguments, operand_of, step
from fxopt.patching.stage import Step
from fxopt.program import Program
from fxopt.quantized_layers import QuantizedLayer


def convolution(program: Program, node: fx.Node, conv: Any, context: Context) -> Step:
    if conv.padding_mode != "zeros":
        raise NotLocal(f"pads with padding_mode='{conv.padding_mode}'")
    weight, bias = (_tensor(node, conv, name, context) for name in ("weight", "bias"))
    assert weight is not None
    settings = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return _convolved(program, node, weight, bias, conv.kernel_size, *settings)


def _tensor(node: fx.Node, conv: Any, name: str, context: Context) -> Operand | None:
    """The weight or bias of ``conv``, quantised where it does that."""
    tensor = getattr(conv, name)
    if tensor is None:
        return None
    if isinstance(conv, QuantizedLayer):
        if conv.update_rounding is not None:
            raise NotLocal(
                "casts its weight after each step (real_int8), which a stage does not; run "
                "fake_quantize{qas=true} first, which keeps its values"
            )
        return Operand(f"{QUANTIZED}{node.target}.{name}")
    return context.operand(tensor)


def conv2d(program: Program, node: fx.Node, _: Any, context: Context) -> Step:
    given: dict[str, Any] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    given |= arguments(node, "input", "weight", *given)
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
    args = (operand_of(node), weight, bias)
    return step(program, node, tiles.conv2d, args, kwargs, local=local, pads=True)


def max_pool(program: Program, node: fx.Node, pool: Any, context: Context) -> Step:
    if pool.return_indices:
        raise NotLocal("returns indices, which count in the whole map")
    stride = _pair(pool.stride or pool.kernel_size)
    local = _windows(pool.kernel_size, stride, pool.dilation, pool.padding)
    kwargs = {"kernel": _pair(pool.kernel_size), "stride": stride, "dilation": _pair(pool.dilation)}
    args = (operand_of(node),)
    return step(program, node, tiles.max_pool2d, args, kwargs, local=local, pads=True)


def max_pool2d(program: Program, node: fx.Node, _: Any, context: Context) -> Step:
    names = "kernel_size stride padding dilation ceil_mode return_indices"
    return max_pool(program, node, _as_layer(node, nn.MaxPool2d, names), context)


def avg_pool(program: Program, node: fx.Node, pool: Any, context: Context) -> Step:
    kernel, padding = _pair(pool.kernel_size), _pair(pool.padding)
    stride = _pair(pool.stride or pool.kernel_size)
    sizes = program.types[operand_of(node).name].shape[2:]
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
    return step(program, node, tiles.avg_pool2d, (operand_of(node),), kwargs, **fields)


def avg_pool2d(program: Program, node: fx.Node, _: Any, context: Context) -> Step:
    names = "kernel_size stride padding ceil_mode count_include_pad divisor_override"
    return avg_pool(program, node, _as_layer(node, nn.AvgPool2d, names), context)


def _as_layer(node: fx.Node, kind: type[nn.Module], names: str) -> nn.Module:
    """The layer that does what a call of a function does."""
    given = arguments(node, "input", *names.split())
    return kind(**{name: value for name, value in given.items() if name != "input"})


def _factors(
    size: int, results: int, kernel: int, stride: int, padding: int, include_pad: bool
) -> tuple[float, ...]:
    """The kernel's positions over those that count, along one axis."""
    low, high = (-padding, size + padding) if include_pad else (0, size)
    starts = (position * stride - padding for position in range(results))
    return tuple(kernel / (min(s + kernel, high) - max(s, low)) for s in starts)


def constant_pad(program: Program, node: fx.Node, layer: Any, context: Context) -> Step:
    return _padded(program, node, layer.padding, layer.value)


def pad(program: Program, node: fx.Node, _: Any, context: Context) -> Step:
    given = arguments(node, "x", "pad", "mode", "value")
    if given.get("mode", "constant") != "constant":
        raise NotLocal(f"pads with mode='{given['mode']}'")
    widths = tuple(map(context.number, given["pad"]))
    return _padded(program, node, widths, given.get("value") or 0.0)


def _padded(program: Program, node: fx.Node, widths: Any, value: Any) -> Step:
    if not all(isinstance(width, int) for width in widths) or any(widths[4:]):
        raise NotLocal("pads by widths that are not fixed, or other axes than rows and columns")
    left, top = widths[0], widths[2] if len(widths) > 2 else 0
    local = Local(Window(before=top), Window(before=left))
    args, kwargs = (operand_of(node),), {"value": float(value)}
    return step(program, node, tiles.pad2d, args, kwargs, local=local, pads=True)


def upsample(program: Program, node: fx.Node, layer: Any, context: Context) -> Step:
    return _enlarged(program, node, layer.mode)


def interpolate(program: Program, node: fx.Node, _: Any, context: Context) -> Step:
    given = arguments(node, "x", "size", "scale_factor", "mode")
    return _enlarged(program, node, str(given.get("mode", "nearest")))


def _enlarged(program: Program, node: fx.Node, mode: str) -> Step:
    before = program.types[operand_of(node).name].shape[2:]
    after = program.types[node.name].shape[2:]
    if not mode.startswith("nearest"):
        raise NotLocal(f"interpolates with mode='{mode}'")
    if any(b % a for a, b in zip(before, after, strict=True)):
        raise NotLocal(f"enlarges {before} to {after}, which is no whole number of times")
    scale = tuple(b // a for a, b in zip(before, after, strict=True))
    local = Local(Window(scale=scale[0]), Window(scale=scale[1]))
    args, kwargs = (operand_of(node),), {"scale": scale}
    return step(program, node, tiles.enlarge, args, kwargs, local=local, places=True)


def _windows(kernel: Any, stride: Any, dilation: Any, before: Any) -> Local:
    fields = zip(*map(_pair, (kernel, stride, dilation, before)), strict=True)
    rows, cols = (Window(*each) for each in fields)
    return Local(rows, cols)


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[-1]))
