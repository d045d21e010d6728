"""Networks as they come, in int8: nothing left in float that has integer kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fxopt
from fxopt.passes import FakeQuantization
from fxopt.zoo import load_model

FLOATS = {
    "torchvision:mobilenet_v2": set(),
    "torchvision:shufflenet_v2_x0_5": set(),
    "timm:tf_efficientnet_lite0": set(),
    "timm:mobilenetv3_small_050": {"HardSigmoid", "Mul"},
}


@pytest.mark.parametrize("name", FLOATS)
def test_runs_in_integers(name: str, tmp_path: Path) -> None:
    images = torch.randn(4, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    model: Any = load_model(name)
    which = FakeQuantization(calibration=images, fold="auto")
    int8 = fxopt.transform(model, [which], images)
    (record,) = fxopt.history(int8)
    assert record.declined == ()
    written = fxopt.export_onnx(int8, tmp_path / "int8.onnx")
    assert written.integers is not None
    agreement, optimised = written.integers.agreement, written.integers.optimised
    assert agreement is not None
    assert optimised is not None
    assert agreement.worst <= 1
    assert agreement.differing <= agreement.elements * 1e-4
    assert {each.kind for each in optimised.in_float} <= FLOATS[name]
    parameters = sum(p.numel() for p in model.parameters())
    assert written.bytes < 1.6 * parameters
