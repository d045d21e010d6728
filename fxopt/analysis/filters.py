"""What the filters of a layer see of a map."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxopt.channelwise import TRANSPOSED_KINDS

_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups")
"""Arguments of the functions, in order."""
_TRANSPOSED_FUNCTIONS = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def is_fixed_filter(layer: Any) -> bool:
    """Whether a layer's weight is a buffer: it smooths, say, and is not trained."""
    weight = getattr(layer, "weight", None)
    return weight is not None and not isinstance(weight, nn.Parameter)


def filters_seen(layer: Any, node: fx.Node, weight: torch.Tensor) -> float:
    """Filters that an element of a layer's result sees all of, on the average over positions."""
    if not (isinstance(layer, TRANSPOSED_KINDS) or node.target in _TRANSPOSED_FUNCTIONS):
        return len(weight)
    rank = weight.dim() - 2
    given: Any = dict(zip(_TRANSPOSED, node.args, strict=False)) | node.kwargs
    if layer is not None:
        given = {"stride": layer.stride, "groups": layer.groups}
    stride = given.get("stride", 1)
    strides = (stride,) * rank if isinstance(stride, int) else stride
    return float(weight.shape[1] * given.get("groups", 1) * math.prod(strides))


@dataclass(frozen=True)
class Border:
    """What zeros around a map take from a filter's ``N`` taps, on the average over its places.

    Attributes:
        seen: the share of taps that see the map.
        squared: the square of that share.
        common: of two places, the share of taps that see the map at both.
    """

    seen: float = 1.0
    squared: float = 1.0
    common: float = 1.0

    def uneven(self, count: int, standardised: bool) -> float:
        """The variance over places of the sum of the weights that see the map, of norm 1.

        Of weights that are drawn apart from one another, or of ``count`` that add up to zero.
        """
        if not standardised:
            return self.seen - self.common
        apart = self.seen - self.squared - (self.common - self.seen**2)
        return apart * count / max(1, count - 1)


def border_of(layer: Any, shape: tuple[int, ...], zeros: tuple[Any, ...]) -> Border:
    """The border of a convolution's operand; none for what is no such layer.

    Args:
        layer: the convolution.
        shape: of the operand, without ``zeros``.
        zeros: what an operator before it puts around the operand, as ``F.pad`` takes it.
    """
    own = getattr(layer, "_reversed_padding_repeated_twice", None)
    if own is None or getattr(layer, "transposed", True) or layer.padding_mode != "zeros":
        return Border()
    more = [width if isinstance(width, int) else 0 for width in zeros[: len(own)]]
    padding = [a + b for a, b in zip(own, (*more, *(0,) * (len(own) - len(more))), strict=True)]
    seen = squared = common = 1.0
    for axis, size in enumerate(shape[2:]):
        place = 2 * (len(shape) - 3 - axis)
        before, after = padding[place : place + 2]
        reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
        starts = torch.arange(-before, size + after - reach, layer.stride[axis])
        taps = starts[:, None] + layer.dilation[axis] * torch.arange(layer.kernel_size[axis])
        inside = ((taps >= 0) & (taps < size)).double()
        seen *= inside.mean().item()
        squared *= inside.mean(1).square().mean().item()
        common *= inside.mean(0).square().mean().item()
    return Border(seen, squared, common)
