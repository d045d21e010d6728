"""A scale and shift per channel, and the layers that take one in.

A BatchNorm in evaluation is the map ``y = a·x + c`` along axis 1 with

    a = γ/√(σ² + ε)        c = β - μ·a

for the running mean ``μ`` and variance ``σ²``. A convolution or linear layer ``W*z + b`` takes in
the map that follows it (Jacob et al., CVPR 2018, section 3.2, equation 14, without quantisation),

    a·(W*z + b) + c  =  W'*z + b'        W' = a·W (over outputs)        b' = a·b + c

and one that comes before it (ours; the same algebra over inputs),

    W*(a·z + c) + b  =  W'*z + b'        W' = W·a (over inputs)         b' = b + Σ W·c

where the sum is over inputs and taps. The second needs every output position to see every tap
once, because ``Σ W·c`` is a constant only there, and it sums ``W·a·z`` where the layer summed
``W·y``: if ``z`` is far from zero, rounding grows. :func:`why_not_before` says where it fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from fxopt.layers import ScaleShift, remade

TRANSPOSED_KINDS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LINEAR_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED_KINDS, nn.Linear)
"""The layers that take a map in."""

_LARGEST_GROWTH = 4.0
"""Measured on float32 layers: up to 4 costs 9 ε over twice the original's own error, 6 costs 17.

The proof allows 16 (:mod:`fxopt.proof.verify`).
"""


@dataclass(frozen=True, eq=False)
class ChannelMap:
    """``y = scale·x + shift`` along axis 1, and what ``x`` was in training: ``(C,)``, float64."""

    scale: torch.Tensor
    shift: torch.Tensor
    mean: torch.Tensor
    variance: torch.Tensor


def map_of(norm: nn.Module) -> ChannelMap:
    """What ``norm``, a BatchNorm with running statistics, computes in evaluation."""
    statistics: Any = norm
    mean, variance = statistics.running_mean.double(), statistics.running_var.double()
    scale = (variance + statistics.eps).rsqrt()
    if statistics.weight is not None:
        scale = scale * statistics.weight.detach().double()
    shift = -mean * scale
    if statistics.bias is not None:
        shift = shift + statistics.bias.detach().double()
    return ChannelMap(scale, shift, mean, variance)


def with_map_after(layer: nn.Module, after: ChannelMap) -> nn.Module:
    """A new layer that computes ``after(layer(z))``; float64 inside, the layer's dtype outside."""
    tensors: Any = layer
    weight = tensors.weight.detach().double()
    bias = after.shift
    if tensors.bias is not None:
        bias = bias + after.scale * tensors.bias.detach().double()
    return _with_tensors(layer, weight * _over_outputs(layer, after.scale), bias)


def with_map_before(layer: nn.Module, before: ChannelMap) -> nn.Module:
    """A new layer that computes ``layer(before(z))`` where :func:`why_not_before` is silent."""
    tensors: Any = layer
    weight = tensors.weight.detach().double()
    bias = _summed_per_output(layer, weight * _over_inputs(layer, before.shift))
    if tensors.bias is not None:
        bias = bias + tensors.bias.detach().double()
    return _with_tensors(layer, weight * _over_inputs(layer, before.scale), bias)


def with_scale_before(layer: nn.Module, scale: torch.Tensor) -> nn.Module:
    """A new layer that computes ``layer(scale·z)``, its bias as it is."""
    tensors: Any = layer
    weight = tensors.weight.detach().double() * _over_inputs(layer, scale)
    return remade(layer, {"weight": weight.to(tensors.weight.dtype), "bias": tensors.bias})


def alone(norm: nn.Module) -> ScaleShift:
    """The map of ``norm`` as a layer of its own, in its dtype, as trainable as γ and β are."""
    found, statistics = map_of(norm), cast(Any, norm)
    dtype = statistics.running_mean.dtype
    made = ScaleShift(found.scale.to(dtype), found.shift.to(dtype))
    for mine, theirs in ((made.weight, statistics.weight), (made.bias, statistics.bias)):
        mine.requires_grad_(theirs is not None and theirs.requires_grad)
    return made


def why_not_before(layer: nn.Module, before: ChannelMap) -> str:
    """Why ``layer`` cannot take in the map before it (what it does), or nothing.

    It can if the shift is zero, and else if each output position sees each tap exactly once,
    whatever the size of the input. A convolution that pads with its input's own values commutes
    with the map. A transposed one writes at ``o = i·stride + k·dilation - padding``: with a stride
    neighbours see different taps, and without one only the first and last ``dilation·(kernel - 1)``
    positions lack some, with ``output_padding`` more at the end, which the padding must cut off.
    """
    obstacle = ""
    if isinstance(layer, TRANSPOSED_KINDS):
        obstacle = _uneven_taps(layer)
    elif not isinstance(layer, nn.Linear):
        obstacle = _zero_padding(layer)
    return obstacle if obstacle and bool(before.shift.any()) else _growth(layer, before)


def _growth(layer: Any, before: ChannelMap) -> str:
    """Whether the terms that ``layer`` sums would grow so much that rounding shows."""
    mean_after = before.scale * before.mean + before.shift
    now = before.scale**2 * before.variance + mean_after**2
    then = before.scale**2 * (before.variance + before.mean**2)
    squared = layer.weight.detach().double() ** 2
    then, now = (_summed_per_output(layer, squared * _over_inputs(layer, t)) for t in (then, now))
    growth = float((then / now).nan_to_num(1.0).max().sqrt())
    if growth <= _LARGEST_GROWTH:
        return ""
    return f"would sum terms {growth:.0f} times as large as now, and lose that much precision"


def _zero_padding(layer: Any) -> str:
    if layer.padding_mode != "zeros" or layer.padding == "valid":
        return ""
    if layer.padding == "same":
        zeros = any(dilation * (kernel - 1) for dilation, kernel in _by_axis(layer, "dilation"))
    else:
        zeros = any(padding for padding, _ in _by_axis(layer, "padding"))
    by = f"('{layer.padding}')" if isinstance(layer.padding, str) else f"by {layer.padding}"
    reason = f"pads its input with zeros {by}, and a zero after the norm is not a zero before it"
    return reason if zeros else ""


def _uneven_taps(layer: Any) -> str:
    axes = _by_axis(layer, "stride", "padding", "dilation", "output_padding")
    for stride, padding, dilation, extra, kernel in axes:
        if stride > 1 or padding < dilation * (kernel - 1) + extra:
            return "does not spread all its taps to all outputs, so the norm's shift differs there"
    return ""


def _by_axis(layer: Any, *settings: str) -> Iterator[tuple[int, ...]]:
    """These settings (users may have set plain numbers) and the kernel's size, for each axis."""
    kernel = layer.weight.shape[2:]
    values = (getattr(layer, name) for name in settings)
    each = [v if isinstance(v, tuple) else (v,) * len(kernel) for v in values]
    yield from zip(*each, kernel, strict=True)


# ---- weights: (out, in / groups, *taps), transposed (in, out / groups, *taps) ------------------


def _over_outputs(layer: nn.Module, values: torch.Tensor) -> torch.Tensor:
    spread = _over_columns if isinstance(layer, TRANSPOSED_KINDS) else _over_rows
    return spread(layer, values)


def _over_inputs(layer: nn.Module, values: torch.Tensor) -> torch.Tensor:
    spread = _over_rows if isinstance(layer, TRANSPOSED_KINDS) else _over_columns
    return spread(layer, values)


def _over_rows(layer: Any, values: torch.Tensor) -> torch.Tensor:
    """A value for each row of the weight, in a shape that multiplies it."""
    return values.reshape(-1, *(1,) * (layer.weight.dim() - 1))


def _over_columns(layer: Any, values: torch.Tensor) -> torch.Tensor:
    """The values of a group's channels for each row of that group."""
    rows, columns, *taps = layer.weight.shape
    groups = getattr(layer, "groups", 1)
    by_row = values.reshape(groups, 1, columns).expand(groups, rows // groups, columns)
    return by_row.reshape(rows, columns, *(1 for _ in taps))


def _summed_per_output(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """The sum over inputs and taps."""
    if not isinstance(layer, TRANSPOSED_KINDS):
        return weight.flatten(1).sum(1)
    by_group = weight.reshape(layer.groups, -1, weight.shape[1], weight[0, 0].numel())
    return by_group.sum((1, 3)).flatten()


def _with_tensors(layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor) -> nn.Module:
    old: Any = layer
    dtype = old.weight.dtype
    return remade(layer, {"weight": weight.to(dtype), "bias": bias.to(dtype)})
