"""Operators on tiles: what graphs of patched programs call.

They take the padding of each side of their own (``left, right, top, bottom``, as ``F.pad`` has it),
because a tile is padded only where it touches the border of the map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

Pads = tuple[int, int, int, int]
Pair = tuple[int, int]


def _padded(x: torch.Tensor, pads: Pads, value: float) -> torch.Tensor:
    """``x`` with a constant around it; a negative width cuts, what was put there too."""
    grows, cuts = max(pads) > 0, min(pads) < 0
    wider = F.pad(x, tuple(max(0, width) for width in pads), value=value) if grows else x
    if not cuts:
        return wider
    left, right, top, bottom = (max(0, -width) for width in pads)
    height, width = wider.shape[2:]
    return wider[:, :, top : height - bottom, left : width - right]


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    stride: Pair,
    pads: Pads,
    dilation: Pair,
    groups: int,
) -> torch.Tensor:
    """A convolution with zeros around ``x``, ``(N, C, H, W)``."""
    left, right, top, bottom = pads
    if left == right >= 0 and top == bottom >= 0:
        return F.conv2d(x, weight, bias, stride, (top, left), dilation, groups)
    return F.conv2d(_padded(x, pads, 0.0), weight, bias, stride, 0, dilation, groups)


def max_pool2d(
    x: torch.Tensor, *, kernel: Pair, stride: Pair, pads: Pads, dilation: Pair
) -> torch.Tensor:
    """The largest value in each window; what lies around ``x`` is no value."""
    least = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    return F.max_pool2d(_padded(x, pads, least), kernel, stride, 0, dilation)


def avg_pool2d(
    x: torch.Tensor,
    *,
    kernel: Pair,
    stride: Pair,
    pads: Pads,
    row_factors: Sequence[float] | None,
    col_factors: Sequence[float] | None,
) -> torch.Tensor:
    """The mean of each window with zeros around ``x``, times a factor of its row and its column.

    The factors are there where a window is not divided by the size of the kernel.
    """
    result = F.avg_pool2d(_padded(x, pads, 0.0), kernel, stride)
    if row_factors is not None:
        result = result * x.new_tensor(row_factors).view(-1, 1)
    if col_factors is not None:
        result = result * x.new_tensor(col_factors)
    return result


def pad2d(x: torch.Tensor, *, pads: Pads, value: float) -> torch.Tensor:
    """``x`` with a constant around it."""
    return _padded(x, pads, value)


def enlarge(x: torch.Tensor, *, scale: Pair, rows: Pair, cols: Pair) -> torch.Tensor:
    """``x`` enlarged to the nearest neighbour, then rows and columns ``[first, last)`` of it."""
    large = x.repeat_interleave(scale[0], 2).repeat_interleave(scale[1], 3)
    return large[:, :, rows[0] : rows[1], cols[0] : cols[1]]


def crop(x: torch.Tensor, rows: Pair, cols: Pair, axes: Pair = (-2, -1)) -> torch.Tensor:
    """Rows and columns ``[first, last)`` of ``x``, which lie along ``axes``: a view."""
    x = x.narrow(axes[0], rows[0], rows[1] - rows[0])
    return x.narrow(axes[1], cols[0], cols[1] - cols[0])


def channels(x: torch.Tensor, part: slice) -> torch.Tensor:
    """A part of axis 1: a view."""
    return x[:, part]


def regroup(x: torch.Tensor, channels: tuple[int, ...]) -> torch.Tensor:
    """``x``, ``(N, ..., H, W)``, with other axes of channels: a view."""
    return x.reshape(x.shape[0], *channels, *x.shape[-2:])


def regrouped(x: torch.Tensor, channels: tuple[int, ...]) -> torch.Tensor:
    """The same of channels that lie in another order: a copy."""
    return regroup(x, channels)


def first_tile(x: torch.Tensor, after: torch.Tensor, rows: Pair, cols: Pair) -> torch.Tensor:
    """A view of the input of a stage, for a tile that runs after another was written."""
    return crop(x, rows, cols)


def buffer(x: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory for the result of a stage of as many samples as ``x`` has."""
    return x.new_empty((x.shape[0], *shape), dtype=dtype)


def write_tile(result: torch.Tensor, tile: torch.Tensor, rows: Pair, cols: Pair) -> torch.Tensor:
    """``result`` with ``tile`` written into rows and columns ``[first, last)``, in place."""
    result[:, :, rows[0] : rows[1], cols[0] : cols[1]] = tile
    return result


def scale_shift(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``x·weight + bias`` along axis 1, in the dtype of ``x``."""
    shape = (-1, *(1,) * (x.dim() - 2))
    return (x * weight.reshape(shape) + bias.reshape(shape)).to(x.dtype)


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x`` in ``dtype``."""
    return x.to(dtype)


def same(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself, where the network has a layer that does nothing."""
    return x
