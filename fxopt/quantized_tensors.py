"""The weights and biases of quantised layers, as tensors.

Per output channel

    Ŵ = s_W·round(W/s_W)        b̂ = s_x·s_W·round(b/(s_x·s_W))

with whole numbers from -127 to 127, and in int32, and ``s_x`` the scale of the layer's input: what
an integer kernel multiplies and adds (Jacob et al., CVPR 2018, section 2.4). In quantised units
``W̄ = W/s_W`` and ``b̄ = b/(s_x·s_W)`` are what is kept (:mod:`fxopt.integer_training`).
"""

from __future__ import annotations

import torch

from fxopt.fake_quantize import fake_quantize, integers
from fxopt.integer_training import cast, scaled

INT32 = (-(2**31), 2**31 - 128)
"""As far as float32 numbers fit into int32."""


def quantized_weight(
    weight: torch.Tensor, scale: torch.Tensor, axis: int, most: int, qas: bool | None = None
) -> torch.Tensor:
    """``Ŵ``, with a scale for the whole weight or one for each output channel along ``axis``.

    Args:
        weight: W, or with ``qas`` true or false W̄.
        scale: s_W.
        axis: of the output channels.
        most: the greatest whole number; the least is its negative.
        qas: whether gradients in quantised units are scaled back; None in float units.
    """
    return _quantized(weight, spread(scale, weight, axis), (-most, most), qas)


def quantized_bias(
    bias: torch.Tensor, weight_scale: torch.Tensor, input_scale: torch.Tensor,
    qas: bool | None = None,
) -> torch.Tensor:  # fmt: skip
    """``b̂``, ``(C_out,)``, of b, or with ``qas`` true or false of b̄."""
    return _quantized(bias, products(bias, weight_scale, input_scale), INT32, qas)


def _quantized(
    values: torch.Tensor, scale: torch.Tensor, ends: tuple[int, int], qas: bool | None
) -> torch.Tensor:
    if qas is None:
        return fake_quantize(values, scale, 0, *ends)
    return scaled(values, scale, *ends, qas)


@torch.no_grad()
def whole_numbers(
    values: torch.Tensor, scale: torch.Tensor, ends: tuple[int, int], qas: bool | None
) -> torch.Tensor:
    """What an integer kernel has in the place of ``values``, in their dtype."""
    return integers(values, scale, 0, *ends) if qas is None else cast(values, *ends, "nearest")


def spread(scale: torch.Tensor, weight: torch.Tensor, axis: int) -> torch.Tensor:
    """``scale`` in a shape that broadcasts to the weight's."""
    if scale.dim() == 0:
        return scale
    return scale.view([-1 if each == axis else 1 for each in range(weight.dim())])


def products(
    bias: torch.Tensor, weight_scale: torch.Tensor, input_scale: torch.Tensor
) -> torch.Tensor:
    """s_x·s_W of each output channel; of a transposed layer each group has the same."""
    each = input_scale * weight_scale
    return each.repeat(len(bias) // each.numel())
