"""Residual blocks by structure: what is one, and what only looks like it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from seeded import image, seeded
from torch import Tensor, nn

import fxopt
from fxopt.flow import Flow
from fxopt.residuals import ResidualBlock, residual_blocks


class Net(nn.Module):
    """Convolutions of six channels by letter, one of stride 2, and a forward that is given."""

    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        for name in "abcde":
            self.add_module(name, nn.Conv2d(6, 6, 3, padding=1))
        self.stride = nn.Conv2d(6, 6, 3, 2, 1)
        self.point = nn.Conv2d(6, 6, 1, 2)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.1)
        self.written = forward

    def forward(self, x: Tensor) -> Any:
        return self.written(self, x)


def found(forward: Callable[[Any, Tensor], Any]) -> list[ResidualBlock]:
    program = fxopt.capture(seeded(Net(forward)), image(2, 6, 8, 12))
    return list(residual_blocks(Flow(program)))


def branch(net: Any, x: Tensor) -> Tensor:
    return net.b(F.relu(net.a(x)))  # type: ignore[no-any-return]


BLOCKS: dict[str, tuple[Any, list[str], str | None]] = {
    "identity": (lambda net, x: x + branch(net, x), [], None),
    "other way round": (lambda net, x: branch(net, x) + x, [], None),
    "in place": (lambda net, x: branch(net, x).add_(x), [], None),
    "dropped": (lambda net, x: x + net.drop(branch(net, x)), [], None),
    "norm on the shortcut": (lambda net, x: net.norm(x) + branch(net, x), ["norm"], None),
    "one layer": (lambda net, x: x + net.a(x), [], None),
    "pool": (lambda net, x: F.max_pool2d(x, 2) + net.stride(F.relu(net.a(x))), ["max_pool2d"], None),
    "layer": (lambda net, x: net.point(x) + net.stride(F.relu(net.a(x))), ["point"], "point"),
    "pool and layer": (
        lambda net, x: net.b(F.avg_pool2d(x, 2)) + net.stride(F.relu(net.a(x))), ["avg_pool2d", "b"], "b",
    ),
    "multiple": (lambda net, x: 0.5 * x + branch(net, x), ["mul"], None),
    "three ways": (lambda net, x: net.c(x) + branch(net, x) + x, [], None),
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_finds(name: str) -> None:
    forward, chain, layer = BLOCKS[name]
    (block,) = found(lambda net, x: net.e(F.relu(forward(net, net.d(x)))))
    assert [node.name for node in block.chain] == chain
    assert (None if block.layer is None else block.layer.name) == layer
    assert (block.entry.name, block.path) == ("d", "")


def test_nested() -> None:
    def inner(net: Any, x: Tensor) -> Tensor:
        return x + branch(net, x)

    blocks = found(lambda net, x: x + net.d(F.relu(inner(net, net.c(x)))))
    assert [block.entry.name for block in blocks] == ["c", "x"]


NONE: dict[str, Any] = {
    "two alike": lambda net, x: net.a(x) + net.b(x),
    "as many layers": lambda net, x: net.a(x) + F.relu(net.b(x)),
    "two branches": lambda net, x: branch(net, x) + net.d(F.relu(net.c(x))),
    "no layer": lambda net, x: x + torch.sigmoid(x),
    "a part of the channels": lambda net, x: x[:, :3] + net.a(x)[:, :3],
    "enlarged": lambda net, x: x + F.interpolate(net.stride(F.relu(net.a(x))), scale_factor=2),
    "gated": lambda net, x: x + x * torch.sigmoid(branch(net, x)),
    "difference": lambda net, x: x - branch(net, x),
    "a multiple of the branch": lambda net, x: torch.add(x, branch(net, x), alpha=2),
    "broadcast": lambda net, x: x + branch(net, x).mean((2, 3), keepdim=True),
    "a number": lambda net, x: branch(net, x) + 1,
}


@pytest.mark.parametrize("name", NONE)
def test_does_not_find(name: str) -> None:
    assert found(NONE[name]) == []
