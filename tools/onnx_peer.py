"""Quantised by ``quantize_static`` of onnxruntime."""

from __future__ import annotations

import time
from typing import Any, Final

import torch
from onnx_files import exported, run_onnx
from onnxruntime import quantization as ort
from onnxruntime.quantization.shape_inference import quant_pre_process
from quantizers import BATCH, Granularity, Quantized
from torch import nn

from fxopt.isolation import silenced

STRIDE: Final = BATCH
"""Images that calibrate at a time. Until then onnxruntime's histograms keep every tensor of every
image, of Lite2 0.1 GB each. Minmax does not depend on it; a histogram does, whose first stride
decides on the width of the bins. CalibMaxIntermediateOutputs is no remedy: it drops the ranges of
what it clears (onnxruntime 1.32)."""


def onnx_static(
    module: nn.Module, calibration: torch.Tensor, granularity: Granularity, observer: str,
    stride: int = STRIDE,
) -> Quantized:  # fmt: skip
    """``quantize_static`` of onnxruntime, QDQ; the observer is minmax, entropy or percentile."""
    method = {name.lower(): each for name, each in ort.CalibrationMethod.__members__.items()}
    file = exported(module, calibration)
    prepared, quantized = file.with_stem("prepared"), file.with_stem("quantized")
    with silenced():
        quant_pre_process(file, prepared)
        start = time.perf_counter()
        ort.quantize_static(
            prepared,
            quantized,
            _Reader(calibration),
            quant_format=ort.QuantFormat.QDQ,
            per_channel=granularity == "channel",
            activation_type=ort.QuantType.QUInt8,
            weight_type=ort.QuantType.QInt8,
            calibrate_method=method[observer],
            extra_options={"CalibStridedMinMax": stride},
        )
        seconds = time.perf_counter() - start
    return Quantized(run_onnx(quantized), seconds, quantized)


class _Reader:
    """Feeds the images of the stride that onnxruntime asks for, as one batch."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images
        self.left: list[torch.Tensor] = []

    def __len__(self) -> int:
        return len(self.images)

    def set_range(self, start_index: int, end_index: int) -> None:
        self.left = [self.images[start_index:end_index]]

    def get_next(self) -> dict[str, Any] | None:
        return {"input": self.left.pop().numpy()} if self.left else None
