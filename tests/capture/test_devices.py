"""Devices: asked of a tensor they stay that tensor's, written out they are literals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from capture.checks import assert_same, captured, code, image, net
from torch import nn

from fxopt.capture import capture
from fxopt.errors import GuardError


@pytest.mark.parametrize(
    "body",
    [
        "x.to(torch.device('cpu'))", "x.to(torch.device('cuda' if torch.cuda.is_available() else 'cpu'))",
        "x + torch.zeros(7, device=torch.device('cpu'))", "x + torch.arange(x.shape[3], device=torch.device(x.device))",
        "x * 2 if x.device == torch.device('cpu') else x", "x * 2 if x.device.type == torch.device('cpu', 0).type else x",
        "x + torch.arange(7, device=x.device)", "x.to(self.conv.weight.device)", "x.cpu() * 2",
    ],
)  # fmt: skip
def test_device(body: str) -> None:
    assert_same(net(code(f"lambda self, x: {body}"), conv=nn.Conv2d(3, 4, 3)), image())


@pytest.mark.parametrize(
    "body",
    [
        "x + torch.arange(x.shape[3], device=x.device)", "self.conv(x) + torch.zeros(5).to(x.device)",
        "torch.eye(7, device=self.conv.weight.device)[:1] + x", "x.new_zeros(7) + torch.zeros_like(x)",
    ],
)  # fmt: skip
def test_moved_after_capture_it_follows(body: str) -> None:
    model = net(code(f"lambda self, x: {body}"), conv=nn.Conv2d(3, 4, 3))
    module = captured(model, image()).to("meta")
    assert module(image().to("meta")).is_meta


@pytest.mark.parametrize(
    "question", ["x.device.type == 'cpu'", "x.is_cpu", "x.get_device() == -1", "str(x.device) == 'cpu'"]
)  # fmt: skip
def test_decision_by_a_device_is_guarded(question: str) -> None:
    def model() -> Any:
        return net(code(f"lambda self, x: x * 2 if {question} else x"))

    assert_same(model(), image())
    with pytest.raises(GuardError, match="'x' is on meta and was captured on cpu"):
        captured(model(), image())(image().to("meta"))


def test_norms_of_one_value_per_channel_on_the_meta_device() -> None:
    """Training refuses a batch of one there, after the norm has counted it."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4))
        program = capture(model.eval(), torch.empty(1, 3, 6, 5))
    assert [node.op for node in program.nodes] == ["placeholder", *["call_module"] * 3, "output"]
