"""The k×k convolution that stands in place of a block's convolutions, in closed form.

A norm in evaluation is ``a·x + c`` per channel. Of ratio e ≠ 1 the depthwise convolution ``D``
reads ``act(z)`` of ``z = a·(P*x) + c``, where ``P`` is the expansion. If the activation is the
linear map ``s·z + t``, then

    D * (s·z + t)  =  K*x + b        K[o,i,h,w] = D[o,h,w]·s[o]·a[o]·P[o,i]
                                     b[o] = Σ D[o]·(s[o]·c[o] + t[o])

but at the border: ``D`` pads ``s·z + t`` with zeros, the fused convolution pads ``x``, so there the
constant is ``D`` convolved with a padded map of ones. Of ratio 1 the projection ``P`` reads
``act(z)`` of ``z = a·(D*x) + c``:

    P * (s·z + t)  =  K*x + b        K[o,i,h,w] = P[o,i]·s[i]·a[i]·D[i,h,w]
                                     b[o] = Σ P[o,i]·(s[i]·c[i] + t[i])

with no border to mind. *Composition* takes s = 1 and t = 0. *Statistical linearisation* (Booton,
1954) takes the best linear map for ``z ~ N(μ, σ²)``, which a BatchNorm says of its own output:
``s = Cov(act(z), z)/σ²``, ``t = E[act(z)] - s·μ``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxopt.channelwise import map_of

_REACH, _POINTS = 8.0, 2049
"""Standard deviations and points of the integrals over the normal density.

The density beyond is 1e-14; between the points a kink (ReLU's) is off by 1e-6 of σ.
"""


@dataclass(frozen=True, eq=False)
class Fused:
    """A full convolution ``(C_out, C_in, k, k)`` with a bias ``(C_out,)``, in float64.

    ``border`` ``(C_out, k, k)`` is a kernel on a map of ones that is padded as the input is; it
    takes the place of the bias.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    border: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Affine:
    """``y = scale·x + shift`` for each channel, in float64."""

    scale: torch.Tensor
    shift: torch.Tensor


@dataclass(frozen=True, eq=False)
class Stretch:
    """What a BatchNorm gives: channels that are normal with this mean and standard deviation."""

    mean: torch.Tensor
    deviation: torch.Tensor

    def grid(self) -> torch.Tensor:
        """Values ``(points, C, 1, 1)`` that cover the density."""
        points = torch.linspace(-_REACH, _REACH, _POINTS, dtype=torch.float64)
        grid = self.mean + self.deviation * points.to(self.mean.device)[:, None]
        return grid[:, :, None, None]

    def expected(self, values: torch.Tensor) -> torch.Tensor:
        """The mean ``(C,)`` of what was computed from :meth:`grid`."""
        points = torch.linspace(-_REACH, _REACH, _POINTS, dtype=torch.float64)
        density = torch.exp(-(points**2) / 2)
        weights = (density / density.sum()).to(values.device)
        return (values.flatten(1) * weights[:, None]).sum(0)


def stretch(norm: nn.Module) -> Stretch:
    """Mean β and deviation ``|γ|·√(var/(var + ε))`` of what ``norm`` gives on what it has seen."""
    found = map_of(norm)
    mean = found.scale * found.mean + found.shift
    return Stretch(mean, found.scale.abs() * found.variance.sqrt())


def linearised(activation: Callable[[torch.Tensor], torch.Tensor], inputs: Stretch) -> Affine:
    """The best linear map for ``activation`` on such inputs; of a constant channel a shift."""
    grid = inputs.grid()
    values = activation(grid)
    mean = inputs.expected(values)
    centred = grid - inputs.mean[:, None, None]
    variance = inputs.deviation**2
    covariance = inputs.expected(values * centred)
    scale = torch.where(variance > 0, covariance / variance, 0.0)
    return Affine(scale, mean - scale * inputs.mean)


def identity(channels: int, like: torch.Tensor) -> Affine:
    ones = torch.ones(channels, dtype=torch.float64, device=like.device)
    return Affine(ones, torch.zeros_like(ones))


def normed(conv: Any, norm: nn.Module | None) -> Affine:
    """The map from the sums of ``conv``, without its bias, to what its norm gives."""
    weight = conv.weight.detach()
    found = identity(weight.shape[0], weight)
    scale, shift = found.scale, found.shift
    if conv.bias is not None:
        shift = conv.bias.detach().double()
    if norm is None:
        return Affine(scale, shift)
    after = map_of(norm)
    return Affine(after.scale, after.scale * shift + after.shift)


def cropped(depthwise: Any, kernel: tuple[int, int]) -> torch.Tensor:
    """The middle ``kernel`` of the depthwise weight, ``(C, k, k)`` in float64."""
    weight: torch.Tensor = depthwise.weight.detach().double()[:, 0]
    top, left = ((have - want) // 2 for have, want in zip(weight.shape[1:], kernel, strict=True))
    return weight[:, top : top + kernel[0], left : left + kernel[1]]


def expanded(
    expand: Any, expansion: Affine, activation: Affine, depthwise: torch.Tensor, bias: torch.Tensor
) -> Fused:
    """Ratio e ≠ 1: to the sums of the depthwise convolution, its ``bias`` included.

    The border is given where the constant is not the same everywhere because of padding.
    """
    pointwise = expand.weight.detach().double().flatten(1)
    scale = activation.scale * expansion.scale
    weight = depthwise[:, None] * (scale[:, None] * pointwise)[:, :, None, None]
    constant = activation.scale * expansion.shift + activation.shift
    border = depthwise * constant[:, None, None]
    return Fused(weight, bias + border.sum((1, 2)), border)


def single(
    project: Any, depthwise: torch.Tensor, separable: Affine, activation: Affine
) -> Fused:  # fmt: skip
    """Ratio 1: to the sums of the projection, its bias included."""
    pointwise = project.weight.detach().double().flatten(1)
    scale = activation.scale * separable.scale
    weight = (pointwise * scale)[:, :, None, None] * depthwise[None]
    bias = pointwise @ (activation.scale * separable.shift + activation.shift)
    if project.bias is not None:
        bias = bias + project.bias.detach().double()
    return Fused(weight, bias)
