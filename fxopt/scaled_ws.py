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

import math
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
    once under :func:`torch.nn.utils.parametrize.cached`. :meth:`fold` is for inference, and for
    whatever reads the ``weight`` of a plain layer (``fuse_conv_bn_eval``, mkldnn): that is not the
    weight that this layer multiplies by.

    Args:
        *args: what the plain layer takes.
        gamma: γ, 1 for a layer that reads the raw input or a linear stream.
        eps: the floor of ``N·σ²``.
        keep_mean: whether the filters have a learned mean.
        device, dtype, **kwargs: what the plain layer takes.

    Raises:
        ValueError: ``gamma`` is not finite, or ``eps`` not positive.

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
        device: Any = None, dtype: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        if not (math.isfinite(gamma) and 0 < eps < math.inf):
            raise ValueError(f"gamma is finite and eps positive, not {gamma} and {eps}")
        super().__init__(*args, device=device, dtype=dtype, **kwargs)
        self.gamma, self.eps = gamma, eps
        outputs = len(self.weight)
        self.gain = nn.Parameter(self.weight.new_ones(outputs))
        mean = nn.Parameter(self.weight.new_zeros(outputs)) if keep_mean else None
        self.register_parameter("mean", mean)

    def _filter_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

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
        cache: dict[Any, Any] = parametrize._cache  # type: ignore[assignment]
        key = (id(self), "standardised_weight")
        made_for = (
            self.weight, self.gain, self.mean,
            torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
        )  # fmt: skip
        known = cache.get(key)
        if known is None or any(a is not b for a, b in zip(known[0], made_for, strict=True)):
            known = cache[key] = made_for, self._standardised()
        return known[1]  # type: ignore[no-any-return]

    def _standardised(self) -> torch.Tensor:
        # what is asked of shapes is asked of the layer: torch.fx may trace this with proxies
        dtype = next(self.parameters()).dtype
        wide = torch.promote_types(dtype, torch.float32)  # float16 is too narrow for sums
        filters = self._filter_shape()
        axes = tuple(range(1, len(filters) + 1))
        per_filter = (-1, *(1,) * len(filters))
        weight = self.weight.to(wide)
        centred = weight - weight.mean(axes, keepdim=True)
        # N·σ² is the squared norm of w - μ
        norm = torch.linalg.vector_norm(centred, dim=axes, keepdim=True)
        scale = self.gamma * self.gain.to(wide).view(per_filter) / norm.clamp_min(self.eps**0.5)
        standardised: torch.Tensor = centred * scale
        if self.mean is not None:
            standardised = standardised + self.mean.to(wide).view(per_filter)
        return standardised.to(dtype)

    def fold(self) -> nn.Module:
        """The plain layer that computes the same now, with tensors of its own."""
        with torch.no_grad():
            weight = self._standardised()
            bias = None if self.bias is None else self.bias.detach().clone()
        folded = remade(self, {"weight": weight, "bias": bias}, kind=self.plain)
        del folded.gamma, folded.eps
        return folded.train(self.training)

    def extra_repr(self) -> str:
        mean = "" if self.mean is None else ", keep_mean=True"
        return f"{super().extra_repr()}, gamma={self.gamma:.6g}, eps={self.eps:g}{mean}"


class _ScaledWSConv(ScaledWS):
    in_channels: int
    groups: int
    kernel_size: tuple[int, ...]

    def _filter_shape(self) -> tuple[int, ...]:
        return self.in_channels // self.groups, *self.kernel_size

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        layer: Any = self
        result: torch.Tensor = layer._conv_forward(input, self.standardised_weight(), self.bias)
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

    def _filter_shape(self) -> tuple[int, ...]:
        return (self.in_features,)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, self.standardised_weight(), self.bias)


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
