"""A layer and the BatchNorm after it as one layer with scaled weight standardisation.

In evaluation the norm is ``a·z + c`` per channel (:mod:`fxopt.channelwise`). For the layer
``z = w*x + b`` with the filter's biased mean ``μ`` and variance ``σ²`` over its ``N`` weights,

    gain = a·√max(N·σ², ε)        bias = a·b + c        mean = a·μ

and γ = 1 give ``gain·ŵ + mean = a·(w - μ) + a·μ = a·w``, whatever the floor ε is (ours; dead
filters, whose weights are all alike, included). Without the learned mean ``a·μ·boxsum(x)`` is
lost, where boxsum adds up all that a filter sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxopt.channelwise import map_of
from fxopt.layers import remade, standard_kind
from fxopt.scaled_ws import EPS, KINDS, ScaledWS


def takes_norm(layer: nn.Module) -> bool:
    """Whether :func:`scaled_ws` is defined for ``layer``."""
    return standard_kind(layer) in KINDS or type(layer) in KINDS.values()


def fan_in(layer: nn.Module) -> int:
    """Weights of one filter."""
    weight: Any = layer.weight
    return int(weight[0].numel())


def scaled_ws(
    layer: nn.Module, norm: nn.Module, keep_mean: bool, shift: torch.Tensor | None = None
) -> ScaledWS:
    """A layer that computes ``norm(layer(x))`` in evaluation, but for the mean if it is not kept.

    Its weight is the parameter of ``layer``; gain and bias are as trainable as γ and β of ``norm``
    were.

    Args:
        layer: a convolution or linear layer, with scaled weight standardisation or without.
        norm: a BatchNorm with running statistics.
        keep_mean: whether the filters' means become parameters.
        shift: what the bias gets beside, ``(C_out,)``.
    """
    given: Any = layer
    affine: Any = norm
    after, known = map_of(norm), _before(layer)
    weight, trains = given.weight, given.weight.requires_grad
    bias = after.scale * known.bias + after.shift

    def parameter(values: torch.Tensor, trains: bool) -> nn.Parameter:
        return nn.Parameter(values.to(weight.dtype), trains)

    mean = None
    if known.mean is not None and (keep_mean or isinstance(layer, ScaledWS)):
        mean = parameter(after.scale * known.mean, trains)
    own = {"weight": weight}
    is_trained = isinstance(weight, nn.Parameter)
    made = remade(
        layer,
        {
            **(own if is_trained else {}),
            "bias": parameter(bias if shift is None else bias + shift,
                              _trains(affine.bias, _trains(given.bias, trains))),
            "gain": parameter(after.scale * known.gain, _trains(affine.weight, trains)),
            "mean": mean,
        },
        {} if is_trained else own,
        kind=KINDS.get(standard_kind(layer), type(layer)),
    )  # fmt: skip
    assert isinstance(made, ScaledWS)
    made.gamma, made.eps = known.gamma, known.eps
    return made


def _trains(tensor: torch.Tensor | None, otherwise: bool) -> bool:
    return otherwise if tensor is None else tensor.requires_grad


@dataclass(frozen=True)
class _Standardised:
    """What makes a layer of its standardised weight: ``(C_out,)``, float64."""

    gain: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor | None
    gamma: float
    eps: float


def _before(layer: nn.Module) -> _Standardised:
    """``layer`` as it is, written with its standardised weight."""
    weight: Any = layer.weight
    given: Any = layer
    wide = weight.detach().double()
    bias = wide.new_zeros(len(wide)) if given.bias is None else given.bias.detach().double()
    if isinstance(layer, ScaledWS):
        mean = None if layer.mean is None else layer.mean.detach().double()
        return _Standardised(layer.gain.detach().double(), bias, mean, layer.gamma, layer.eps)
    variance, mean = torch.var_mean(wide, tuple(range(1, wide.dim())), correction=0)
    gain = (fan_in(layer) * variance).clamp_min(EPS).sqrt()
    return _Standardised(gain, bias, mean, 1.0, EPS)
