"""What kernels can make of a call: write it in place, run it inside another, do without it."""

from __future__ import annotations

import enum
from math import prod

from fxopt.macs import TypedCall
from fxopt.program import TensorType


class InPlace(enum.Enum):
    """Which operands a kernel may write the result over.

    ``ELEMENTWISE`` any one of the result's shape: an element of the result needs no other element
    of it; ``FIRST`` the first one, of which it is a changed copy; ``PLANES`` the first one, of
    which each plane gives one plane of the result.
    """

    NONE = "none"
    ELEMENTWISE = "elementwise"
    FIRST = "first"
    PLANES = "planes"


class Fusion(enum.Enum):
    """What part of a fused kernel an operator can be.

    ``HOST`` one in whose loop others run; ``EPILOGUE`` one that runs in the loop that produces its
    first operand; ``SUM`` of two tensors: it runs in the loop that produces either; ``RESULT`` how
    any kernel writes its result.
    """

    NONE = "none"
    HOST = "host"
    EPILOGUE = "epilogue"
    SUM = "sum"
    RESULT = "result"


class Window(enum.Enum):
    """What slides over the operand: a sum (convolution, average pool), a maximum, or nothing."""

    NONE = "none"
    SUM = "sum"
    MAX = "maximum"


class Integer(enum.Enum):
    """What an operator is to kernels that count in whole numbers.

    ``NONE`` it has no integer form; ``WEIGHTED`` it multiplies by a weight of its own and adds a
    bias; ``RESCALED`` its result has a scale of its own; ``SAME`` it moves or picks values, and
    result and operands are on one scale.
    """

    NONE = "none"
    WEIGHTED = "weighted"
    RESCALED = "rescaled"
    SAME = "same"


def groups(call: TypedCall) -> int:
    """Of a convolution, by its shapes: a function may be given a number that it computes."""
    weight = call.shape_of(1, "weight")
    channels: int = call.operand(0, "input").shape[1 - len(weight)]
    return channels // weight[1]


def convolution_window(call: TypedCall) -> Window:
    """A convolution that mirrors or repeats its operand at the border needs to see the border."""
    mode = "zeros" if call.module is None else call.module.padding_mode
    return Window.SUM if mode == "zeros" else Window.NONE


def planes(call: TypedCall) -> InPlace:
    """One filter for each channel, and one channel for each filter."""
    filters, depth, *_ = call.shape_of(1, "weight")
    one_to_one = depth == 1 and filters == groups(call) != 1
    return InPlace.PLANES if one_to_one else InPlace.NONE


def plane(call: TypedCall) -> int:
    """Elements of one channel of one sample of the result, where it is written in place."""
    axes = len(call.shape_of(1, "weight")) - 2
    return prod(call.result.shape[-axes:]) if planes(call) is InPlace.PLANES else 0


def _knows_statistics(call: TypedCall) -> bool:
    """Whether a BatchNorm is given mean and variance; otherwise it reads all before it writes."""
    if call.module is not None:
        return call.module.running_mean is not None
    return call.operand(1, "running_mean") is not None and not call.operand(5, "training")


def norm_inplace(call: TypedCall) -> InPlace:
    return InPlace.ELEMENTWISE if _knows_statistics(call) else InPlace.NONE


def norm_fusion(call: TypedCall) -> Fusion:
    return Fusion.EPILOGUE if _knows_statistics(call) else Fusion.NONE


def sum_fusion(call: TypedCall) -> Fusion:
    """Of two tensors, neither of them scaled."""
    terms = (call.operand(0, "input"), call.operand(1, "other"))
    plain = all(isinstance(term, TensorType) for term in terms) and "alpha" not in call.kwargs
    return Fusion.SUM if plain else Fusion.NONE


def padding(call: TypedCall) -> float | None:
    """The constant around the operand, if no side is cut; a width that is no number may cut."""
    if call.module is None:
        mode, value = call.operand(2, "mode") or "constant", call.operand(3, "value")
        widths = call.operand(1, "pad")
    else:
        mode, value, widths = "constant", call.module.value, call.module.padding
    grows = isinstance(widths, (tuple, list)) and all(
        isinstance(width, int) and width >= 0 for width in widths
    )
    return float(value or 0) if mode == "constant" and grows else None


def tile_padding(call: TypedCall) -> float | None:
    """The constant around a tile, if no side is cut."""
    return float(call.kwargs["value"]) if min(call.kwargs["pads"]) >= 0 else None
