"""Six-line models, quantised, and their graphs as text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from seeded import image, seeded, text
from torch import nn

import fxopt
from fxopt.fake_quantize import FakeQuantize
from fxopt.passes import FakeQuantization
from fxopt.quantizing.fidelity import quantisers
from fxopt.results import PassResult


class Net(nn.Module):
    """``forward`` is a function of the module and its inputs."""

    def __init__(self, forward: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        self.function = forward
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


def net(forward: Callable[..., Any], **members: Any) -> Any:
    """A seeded net in evaluation mode."""
    return seeded(Net(forward, **members))


def conv(inputs: int = 3, outputs: int = 4, kernel: int = 3, **options: Any) -> nn.Conv2d:
    """A convolution that keeps the size of a map."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def quantise(model: nn.Module, *inputs: torch.Tensor, **options: Any) -> PassResult:
    """The pass on ``model``, calibrated on ``inputs``, by default one image ``(2, 3, 8, 8)``.

    Biases are corrected, in all units.
    """
    inputs = inputs or (image(2, 3, 8, 8),)
    options = {"calibration": [inputs], "fold": "auto", "bias_correction": True, **options}
    return fxopt.run_pass(FakeQuantization(**options), fxopt.capture(model, inputs))


def grids(result: PassResult) -> dict[str, FakeQuantize]:
    """The quantisers by the name of what they read."""
    return {node.all_input_nodes[0].name: grid for node, grid in quantisers(result.after).items()}


def graph(result: PassResult) -> list[str]:
    """The graph with a star behind what is quantised, two behind what lies on its grid already.

    Quantisers themselves are left out, and inputs without one.
    """
    stars = {
        each.name: "**" if grid.settled else "*" for each, grid in quantisers(result.after).items()
    }
    read = {each.name: each.all_input_nodes[0].name for each in quantisers(result.after)}
    names = {name: read[name] + star for name, star in stars.items()}
    lines = []
    for line in text(result.after).splitlines():
        name = line.partition(" = ")[0]
        if name in stars or line.startswith("input "):
            continue
        for long in sorted(names, key=len, reverse=True):
            line = line.replace(long, names[long])
        lines.append(line)
    return lines


def reasons(result: PassResult) -> dict[str, str]:
    return {each.node: each.reason for each in result.declined}
