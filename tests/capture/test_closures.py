"""Functions that close over the model: the captured module is about its own parameters."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from capture.checks import assert_same, captured, image, net, seeded
from torch import Tensor, nn

from fxopt.capture import capture
from fxopt.errors import CaptureError


class Closed(nn.Module):
    """Holds functions over itself in the ways that people do."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.scale = nn.Parameter(torch.full((1,), 2.0))
        made: Any = {
            "lambda": lambda x: self.conv(x) * self.scale,
            "partial": functools.partial(lambda module, x: module(x) * 2, self.conv),
            "method": self.double,
            "default": lambda x, module=self.conv: module(x),
            "inner lambda": (lambda inner: lambda x: inner(x) + 1)(lambda x: self.norm(x)),
            "of its mode": lambda x: x * 2 if self.training else self.conv(x),
        }[how]
        self.functions = {"all": [made]}

    def double(self, x: Tensor) -> Tensor:
        return self.norm(x) * 2  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.functions["all"][0](x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["lambda", "partial", "method", "default", "inner lambda"])
def test_function_over_the_model(how: str) -> None:
    assert_same(seeded(Closed(how)), image())


def test_function_that_asks_for_the_mode() -> None:
    assert assert_same(seeded(Closed("of its mode")), image(), eval_only=True).modes.eval_only


def test_forward_replaced_by_a_function_over_the_old_one() -> None:
    model = net(lambda self, x: self.conv(x), conv=nn.Conv2d(3, 4, 3))
    old = model.forward
    model.forward = lambda x: old(x) * 2
    assert_same(model, image())


def test_hook_that_counts_in_the_models_buffer_leaves_the_model_alone() -> None:
    model = net(lambda self, x: self.conv(x) * self.calls, conv=nn.Conv2d(3, 4, 3),
                calls=torch.ones(()))  # fmt: skip

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        model.calls.add_(1)

    model.conv.register_forward_hook(count)
    module = captured(model, image())
    assert model.calls == 1
    module(image())
    assert module.calls == 2


def test_refuses_a_parameter_of_somebody_else() -> None:
    stranger = nn.Parameter(torch.ones(7))
    with pytest.raises(CaptureError, match=r"a parameter of shape \(7,\) that is none of its own"):
        capture(net(lambda self, x: x * stranger), image())
