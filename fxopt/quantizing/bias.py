"""Biases that make up for what the rounding of weights does to a layer's mean.

    b' = b + Σ (W - Ŵ)·E[x]

over inputs and taps, with the mean ``E[x]`` of each input channel on the calibration data (bias
correction: Nagel et al., "Data-free quantization through weight equalization and bias correction",
ICCV 2019, section 4.2, there with the mean from a BatchNorm). Zeros around a map count as its mean.
"""

from __future__ import annotations

import torch

from fxopt.quantized_layers import QuantizedLayer


def bias_shift(layer: QuantizedLayer, input_mean: torch.Tensor) -> torch.Tensor:
    """What to add to the bias of ``layer``, ``(C_out,)``, float64.

    Args:
        layer: a convolution or linear layer, not a transposed one.
        input_mean: E[x], ``(C_in,)``.
    """
    with torch.no_grad():
        lost = layer.float_weight().double() - layer.quantized_weight().double()
    by_input = lost.flatten(2).sum(2) if lost.dim() > 2 else lost
    outputs, inputs = by_input.shape
    groups = len(input_mean) // inputs
    mean = input_mean.view(groups, 1, inputs).expand(groups, outputs // groups, inputs)
    return (by_input * mean.reshape(outputs, inputs)).sum(1)
