"""Int8 post-training quantisers behind one interface.

Each takes a module in eval mode with its BatchNorms, calibration images ``(N, 3, H, W)``, the
granularity of the weights and the observer of the activations, and gives a ``Quantized``.
Activations are uint8 and weights int8 throughout.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast

import torch
from onnx_files import exported, fresh_file, run_onnx
from torch import nn

from fxopt.capture import capture
from fxopt.export import export_onnx
from fxopt.passes import FakeQuantization, FoldConvBn
from fxopt.rewrite import run_pass

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
    """The pass of fxopt, its file run in onnxruntime."""
    return _ours(module, calibration, granularity, observer, bias_correction=True)


def ours_uncorrected(
    module: nn.Module, calibration: torch.Tensor, granularity: Granularity, observer: str
) -> Quantized:
    """The same with biases as they were."""
    return _ours(module, calibration, granularity, observer, bias_correction=False)


def _ours(
    module: nn.Module, calibration: torch.Tensor, granularity: Granularity, observer: str,
    bias_correction: bool,
) -> Quantized:  # fmt: skip
    program = capture(module, calibration[:1])
    folded = run_pass(FoldConvBn(), program).after
    start = time.perf_counter()
    which = FakeQuantization(
        calibration=calibration,
        granularity=cast(Any, granularity),
        observer=cast(Any, observer),
        bias_correction=bias_correction,
    )
    quantized = run_pass(which, folded, verify=False).after
    seconds = time.perf_counter() - start
    file = fresh_file("int8.onnx")
    export_onnx(quantized, file)
    return Quantized(run_onnx(file), seconds, file)


def fp32(
    module: nn.Module, calibration: torch.Tensor, granularity: Granularity, observer: str
) -> Quantized:
    """The module as it is, which the others are compared with; its file is for the size."""
    return Quantized(module, file=exported(module, calibration))
