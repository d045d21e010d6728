"""Int8 post-training quantisers behind one interface.

Each takes a module in eval mode with its BatchNorms, calibration images ``(N, 3, H, W)``, the
granularity of the weights and the observer of the activations, and gives a ``Quantized``.
Activations are uint8 and weights int8 throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch
from onnx_files import exported
from torch import nn

BATCH: Final = 10
"""Images at a time; it divides the number of those that calibrate."""

Granularity = Literal["tensor", "channel", "none"]
"""Of the scales of the weights, none in fp32; activations have one a tensor."""

Logits = Callable[[torch.Tensor], torch.Tensor]
"""From images to logits."""


@dataclass(frozen=True)
class Quantized:
    """An int8 network that runs, the seconds that calibrating it took, its ONNX file if any."""

    logits: Logits
    seconds: float = 0.0
    file: Path | None = None


Quantizer = Callable[[nn.Module, torch.Tensor, Granularity, str], Quantized]


def ours(
    module: nn.Module, calibration: torch.Tensor, granularity: Granularity, observer: str
) -> Quantized:
    """The pass of fxopt."""
    raise NotImplementedError


def fp32(
    module: nn.Module, calibration: torch.Tensor, granularity: Granularity, observer: str
) -> Quantized:
    """The module as it is, which the others are compared with; its file is for the size."""
    return Quantized(module, file=exported(module, calibration))
