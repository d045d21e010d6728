"""Quantised by PT2E of torchao.

It is no dependency: ``pip install --no-deps --target FOLDER torchao==0.18.0`` and put FOLDER on
``PYTHONPATH``.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from quantizers import BATCH, Granularity, Quantized
from torch import nn

from fxopt.isolation import silenced


def pt2e(
    module: nn.Module, calibration: torch.Tensor, granularity: Granularity, observer: str
) -> Quantized:
    """PT2E of torchao with its X86InductorQuantizer; the observer is minmax or histogram.

    Its default is channel and histogram. What runs is torch's graph with quantisers in it.
    """
    with silenced():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer

        dynamic = ({0: torch.export.Dim("batch")},)
        exported = torch.export.export(module, (calibration[:2],), dynamic_shapes=dynamic)
        quantizer = X86InductorQuantizer().set_global(_config(granularity, observer))
        prepared = prepare_pt2e(exported.module(), quantizer)
        start = time.perf_counter()
        with torch.no_grad():
            for images in torch.split(calibration, BATCH):
                prepared(images)
        converted = convert_pt2e(prepared)
    return Quantized(converted, time.perf_counter() - start)


def _config(granularity: Granularity, observer: str) -> Any:
    """The quantizer's default with other observers where they are asked for."""
    from torchao.quantization import pt2e as ao
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    config = x86.get_default_x86_inductor_quantization_config()
    activation, weight = config.input_activation, config.weight
    eps = {"eps": 2**-12}  # the default's
    if observer == "minmax":
        seen = ao.MinMaxObserver.with_args(**eps)
        activation = replace(activation, observer_or_fake_quant_ctr=seen)
    if granularity == "tensor":
        seen = ao.MinMaxObserver.with_args(**eps)
        weight = replace(
            weight,
            qscheme=torch.per_tensor_symmetric,
            ch_axis=None,
            observer_or_fake_quant_ctr=seen,
        )
    return replace(config, input_activation=activation, output_activation=activation, weight=weight)
