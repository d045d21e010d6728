"""Submodules that run as they are: what values decide in them is never baked in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from capture.checks import assert_same, image, net
from capture.later import assert_same_later
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from fxopt.capture import capture
from fxopt.errors import CaptureError


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * 3


def _positive(self: Any, x: Tensor) -> Tensor:
    return x[x > 0]


def _count(self: Any, x: Tensor) -> Any:
    return x * 2, int((x > 5).sum())


def _flag(self: Any, x: Tensor) -> Any:
    return x * 2, x.mean().item() > 3


def _maybe(self: Any, x: Tensor) -> Tensor | None:
    return x * 2 if x.max() < 10 else None


def _widen(self: Any, x: Tensor) -> Tensor:
    return x.double() if x.max() > 10 else x


def _rows(self: Any, x: Tensor) -> Tensor:
    return x[:, :, : int(x.abs().max()) + 1]


def _clip(self: Any, x: Tensor) -> Tensor:
    if x.max() > 1:
        x.clamp_(max=1.0)
    return x


def _size(self: Any, x: Tensor) -> Any:
    return Doubling.apply(x), x.shape[2]


def _writing(self: Any, x: Tensor) -> Any:
    x.add_(1)
    return Doubling.apply(x)


def _checked(self: Any, x: Tensor) -> Tensor:
    if torch.isnan(x).any():
        raise ValueError("NaN")
    return x


def _flipped(self: Any, x: Tensor) -> Tensor:
    return torch.from_numpy(np.flip(x.detach().numpy(), 3).copy())


@pytest.mark.parametrize(
    ("leaf", "reader", "reason"),
    [
        (_positive, lambda x, y: x * 2 if len(y) > 10 else x, "decides by the size of what a submodule"),
        (_rows, lambda x, y: y.mean(2) if y.shape[2] > 2 else y.sum(2), "decides by the size"),
        (_flipped, lambda x, y: (y + 1) if (y + 1).shape[2] > 2 else y, "decides by the size"),
        (_count, lambda x, y: y[0] * (y[1] + 1), "gives a int, which other inputs may change"),
        (_count, lambda x, y: y, "gives a int, which other inputs may change"),
        (_flag, lambda x, y: y[0] if y[1] else x, "gives a bool, which other inputs may change"),
        (_size, lambda x, y: y[0] * y[1], "gives a int, which other inputs may change"),
        (_maybe, lambda x, y: x if y is None else y, "the values of its input decide the structure"),
        (_widen, lambda x, y: y * 2 if y.dtype == torch.float32 else y, "dtype of what it gives"),
        (_clip, lambda x, y: y * 2, "runs as it is and overwrites its input"),
        (_writing, lambda x, y: y * 2, "runs as it is and overwrites its input"),
        (_checked, lambda x, y: y.relu_() + x, "overwritten that may be the same as another"),
    ],
)  # fmt: skip
def test_refuses_what_values_decide_in_a_submodule(leaf: Any, reader: Any, reason: str) -> None:
    model = net(lambda self, x: reader(x, self.leaf(x)), leaf=net(leaf))
    with pytest.raises(CaptureError, match=reason + r".*:\d+"):
        capture(model, image())


def test_size_that_values_decide_is_computed_with() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        found = self.leaf(x)
        return found.sum() / found.shape[0] + found.numel()  # type: ignore[no-any-return]

    assert_same_later(net(forward, leaf=net(_positive)), image(), image().abs(), image(seed=9))


def test_result_in_a_structure_with_none() -> None:
    def leaf(self: Any, x: Tensor) -> Any:
        return {"a": x * 2 if x.sum() > 0 else x * 3, "b": [x + 1, None]}

    def forward(self: Any, x: Tensor) -> Tensor:
        found = self.leaf(x)
        return found["a"] + found["b"][0] if found["b"][1] is None else x  # type: ignore[no-any-return]

    assert_same(net(forward, leaf=net(leaf)), image())


def test_checked_value_is_overwritten_where_nobody_reads_the_other() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.relu(self.check(self.conv(x)))  # type: ignore[no-any-return]

    members = {"conv": nn.Conv2d(3, 4, 3), "check": net(_checked), "relu": nn.ReLU(True)}
    assert_same(net(forward, **members), image())


def test_stochastic_depth_overwritten_after_it() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.depth(self.conv(x))
        y += x
        return y  # type: ignore[no-any-return]

    members = {"conv": nn.Conv2d(3, 3, 1), "depth": StochasticDepth(0.5, "row")}
    assert_same(net(forward, **members), image())


def test_refuses_opaque_submodule_that_is_set_to_overwrite() -> None:
    class Activation(nn.Module):
        inplace = True

        def forward(self, x: Tensor) -> Any:
            return Doubling.apply(x)

    with pytest.raises(CaptureError, match="Activation runs as it is and has inplace=True"):
        capture(net(lambda self, x: self.act(x) + x, act=Activation()), image())
