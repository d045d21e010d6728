"""Biases that make up for the rounding of weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxopt.quantizing.bias import bias_shift
from fxopt.quantizing.layers import quantized, with_bias


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 5),
        nn.Conv2d(6, 4, 3),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.Conv1d(6, 9, 2, groups=3),
    ],
    ids=["linear", "conv2d", "depthwise", "grouped"],
)
def test_keeps_the_mean_of_constant_inputs(layer: nn.Module) -> None:
    """On an input that is its mean everywhere nothing is lost but the rounding of the bias."""
    torch.manual_seed(0)
    mean = torch.rand(6)
    rank = layer.weight.dim()
    x = mean.view(1, 6, *(1,) * (rank - 2)).expand(2, 6, *(4,) * (rank - 2))
    rough = quantized(layer, 1e-4, bits=3)
    made = with_bias(rough, bias_shift(rough, mean))
    expected, before, after = layer(x), rough(x), made(x)
    assert (after - expected).abs().max() < 1e-4
    assert (before - expected).abs().max() > 1e-2
    assert made.bias_shift is not None
    torch.testing.assert_close(made.bias - made.bias_shift, layer.bias)
    assert layer.bias is not made.bias
