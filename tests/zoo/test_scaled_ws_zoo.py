"""bn_to_scaled_ws on networks as they come: no norm is left, and the proof holds.

Weights and statistics are seeded, some filters and channels are dead; inputs are small.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_fold_zoo import assert_proved, from_timm, from_torchvision, norms, seeded_net, trained
from torch import nn

import fxopt
from fxopt.capture import capture
from fxopt.layers import ScaleShift
from fxopt.passes import BnToScaledWS
from fxopt.results import PassResult
from fxopt.rewrite import run_pass
from fxopt.scaled_ws import ScaledWS

NETS = {
    "torchvision:resnet18": (20, 0),
    "torchvision:resnext50_32x4d": (53, 0),
    "torchvision:regnet_y_400mf": (53, 0),
    "torchvision:mobilenet_v2": (52, 0),
    "torchvision:mobilenet_v3_small": (34, 0),
    "torchvision:efficientnet_b0": (49, 0),
    "torchvision:densenet121": (121, 62),
    "timm:seresnet50": (53, 0),
    "timm:tf_efficientnet_lite0": (49, 0),
    "timm:resnetv2_50": (49, 17),
    "timm:ghostnet_100": (80, 0),
}
"""Norms, and how many of them become a scale and shift: those of pre-activation order."""


def make(name: str) -> nn.Module:
    library, _, short = name.partition(":")
    which: Callable[[str], Callable[[], nn.Module]]
    which = from_timm if library == "timm" else from_torchvision
    return with_dead_filters(trained(seeded_net(which(short))))


def with_dead_filters(model: nn.Module) -> nn.Module:
    """In every third convolution one filter is zero and one is constant; a norm's γ is zero."""
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        for conv in convs[::3]:
            conv.weight[0] = 0.0
            conv.weight[-1] = 0.01
        for norm in [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)][::5]:
            norm.weight[1] = 0.0
    return model


def convert(model: nn.Module) -> PassResult:
    return run_pass(BnToScaledWS(), capture(model, torch.zeros(1, 3, 64, 96)))


@pytest.mark.parametrize("name", NETS)
def test_no_norm_is_left(name: str) -> None:
    result = convert(make(name))
    count, alone = NETS[name]
    assert norms(result.before) == len(result.rewritten) == count
    assert norms(result.after) == 0
    assert result.declined == ()
    assert "untied" not in result.evidence
    assert_proved(result)
    called = [result.after.module(node) for node in result.after.nodes]
    assert sum(isinstance(module, ScaleShift) for module in called) == alone
    assert sum(isinstance(module, ScaledWS) for module in called) == count - alone


def test_resnet50_has_the_parameters_of_the_net_written_without_norms() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet50").eval()
    program = capture(model, torch.zeros(1, 3, 64, 96), verify=False)
    counts = [
        run_pass(BnToScaledWS(keep_mean=keep), program, verify=False).evidence[
            "trainable_parameters"
        ]
        for keep in (True, False)
    ]
    own = sum(p.numel() for p in timm.create_model("nf_resnet50").parameters())
    assert own == 25_557_032
    assert counts == [{"before": own, "after": own + 26_560}, {"before": own, "after": own}]


def test_exports_without_norms_and_without_weight_arithmetic(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    result = convert(make("torchvision:mobilenet_v2"))
    report = fxopt.export_onnx(result.after, tmp_path / "a.onnx")
    assert {deviation.batch for deviation in report.deviations} == {2, 3}
    operators = {node.op_type for node in onnx.load(tmp_path / "a.onnx").graph.node}
    known = {"Conv", "Clip", "Add", "ReduceMean", "GlobalAveragePool", "Flatten", "Reshape", "Gemm"}
    assert operators <= known
