"""Layers with scaled weight standardisation, which need no normalisation of activations.

Per output channel, over the ``N`` weights (the fan-in) of its filter, with their biased mean ``μ``
and variance ``σ²``,

    ŵ = γ · gain · (w - μ) / √max(N·σ², ε)

(Brock et al., "Characterizing signal propagation to close the performance gap in unnormalized
ResNets", ICLR 2021, section 4.1; "High-performance large-scale image recognition without
normalization", ICML 2021, section 2, equation 1; the floor ε as in their published code). ``γ`` is
a constant for the activation whose output the layer reads, ``gain`` and the bias are learned.
Optionally so is the filter's mean, which is added to ``ŵ``: a trained layer keeps its function by
it (:mod:`fxopt.normfree.conversion`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from fxopt.layers import remade

EPS = 1e-4
"""The floor of the variance times the fan-in, as published."""


class ScaledWS(nn.Module):
    """What layers with scaled weight standardisation have in common; it goes before the plain one.

    The weight is standardised in each call, in evaluation too (a copy kept there would go stale
    when somebody writes to ``weight``). A module that is called often in one pass standardises
    once under :func:`torch.nn.utils.parametrize.cached`. :meth:`fold` is for inference.

    Args:
        *args: what the plain layer takes.
        gamma: γ, 1 for a layer that reads the raw input or a linear stream.
        eps: the floor of ``N·σ²``.
        keep_mean: whether the filters have a learned mean.
        **kwargs: what the plain layer takes.

    Attributes:
        weight: as in the plain layer, ``(C_out, C_in / groups, *kernel)`` or ``(out, in)``.
        gain: ``(C_out,)``, 1 to begin with.
        bias: ``(C_out,)``, 0 to begin with.
        mean: ``(C_out,)``, 0 to begin with; None without ``keep_mean``.
    """

    plain: ClassVar[type[nn.Module]]
    """The layer that computes the same with a weight that is given."""

    weight: torch.Tensor
    bias: Any
    gain: nn.Parameter
    mean: nn.Parameter | None

    def __init__(
        self, *args: Any, gamma: float = 1.0, eps: float = EPS, keep_mean: bool = False,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **kwargs)
        self.gamma, self.eps = gamma, eps
        outputs = len(self.weight)
        self.gain = nn.Parameter(self.weight.new_ones(outputs))
        mean = nn.Parameter(self.weight.new_zeros(outputs)) if keep_mean else None
        self.register_parameter("mean", mean)

    def reset_parameters(self) -> None:
        """Draw the weight as the plain layer does; gain 1, bias and mean 0."""
        super().reset_parameters()  # type: ignore[misc]
        for name, value in (("gain", 1.0), ("bias", 0.0), ("mean", 0.0)):
            tensor = self._parameters.get(name)
            if tensor is not None:
                nn.init.constant_(tensor, value)

    def standardised_weight(self) -> torch.Tensor:
        """``ŵ`` (and the mean), in the shape of ``weight``."""
        # the two names are how torch's own parametrizations know that they are inside `cached()`
        if not parametrize._cache_enabled:
            return self._standardised()
        key = (id(self), "weight")
        if key not in parametrize._cache:
            parametrize._cache[key] = self._standardised()
        found: torch.Tensor = parametrize._cache[key]  # type: ignore[assignment]
        return found

    def _standardised(self) -> torch.Tensor:
        weight = self.weight
        per_filter = (-1, *(1,) * (weight.dim() - 1))
        variance, mean = torch.var_mean(weight, tuple(range(1, weight.dim())), correction=0)
        norm = (weight[0].numel() * variance).clamp_min(self.eps).sqrt()
        scale = self.gamma * self.gain / norm
        shift = -mean * scale if self.mean is None else self.mean - mean * scale
        return torch.addcmul(shift.view(per_filter), weight, scale.view(per_filter))

    def fold(self) -> nn.Module:
        """The plain layer that computes the same now, with tensors of its own."""
        with torch.no_grad():
            weight = self.standardised_weight().clone()
            bias = None if self.bias is None else self.bias.detach().clone()
        folded = remade(self, {"weight": weight, "bias": bias}, kind=self.plain)
        del folded.gamma, folded.eps
        return folded.train(self.training)

    def extra_repr(self) -> str:
        mean = "" if self.mean is None else ", keep_mean=True"
        return f"{super().extra_repr()}, gamma={self.gamma:.6g}, eps={self.eps:g}{mean}"


class _ScaledWSConv(ScaledWS):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer: Any = self
        result: torch.Tensor = layer._conv_forward(x, self.standardised_weight(), self.bias)
        return result


class ScaledWSConv1d(_ScaledWSConv, nn.Conv1d):
    """``nn.Conv1d`` with scaled weight standardisation: ``(N, C, L)``."""

    plain = nn.Conv1d


class ScaledWSConv2d(_ScaledWSConv, nn.Conv2d):
    """``nn.Conv2d`` with scaled weight standardisation: ``(N, C, H, W)``.

    >>> conv = ScaledWSConv2d(3, 8, 3, padding=1, gamma=1.7128585504)
    >>> filters = conv.standardised_weight().flatten(1)
    >>> bool(filters.sum(1).abs().max() < 1e-6)
    True
    >>> round(torch.linalg.vector_norm(filters[0]).item(), 4)
    1.7129
    >>> type(conv.fold()).__name__
    'Conv2d'
    """

    plain = nn.Conv2d


class ScaledWSConv3d(_ScaledWSConv, nn.Conv3d):
    """``nn.Conv3d`` with scaled weight standardisation: ``(N, C, D, H, W)``."""

    plain = nn.Conv3d


class ScaledWSLinear(ScaledWS, nn.Linear):
    """``nn.Linear`` with scaled weight standardisation: ``(N, *, in)``."""

    plain = nn.Linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.standardised_weight(), self.bias)


FOLD_FIRST = "standardises its weight in each call: fold first (fold_scaled_ws)"
"""What is said of such a layer where a plain one is needed."""

KINDS: Mapping[type[nn.Module], type[ScaledWS]] = {
    kind.plain: kind
    for kind in (ScaledWSConv1d, ScaledWSConv2d, ScaledWSConv3d, ScaledWSLinear)
}  # fmt: skip
"""The layer with scaled weight standardisation, by the plain one."""


def folded(layer: nn.Module) -> nn.Module:
    """``layer``, or the plain layer that computes the same if it standardises its weight."""
    return layer.fold() if isinstance(layer, ScaledWS) else layer
