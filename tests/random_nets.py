"""Random small nets of the operators whose memory is planned in special ways."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn

SHAPE = (2, 3, 11, 14)
KINDS = "conv depthwise depthwise act act sum sum gate cat norm turn".split()


class RandomNet(nn.Module):
    """Convolutions, sums, gates, concatenations, activations and views, wired at random.

    A step has a kind, the values that it reads, and a layer where it needs one.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = random.Random(seed)
        self.steps: list[tuple[str, int, int]] = []
        self.layers = nn.ModuleDict()
        values = [torch.zeros(SHAPE)]
        with torch.no_grad():
            for step in range(rng.randint(4, 14)):
                self._add_step(rng, str(step), values)
                values.append(self._value(step, values))
        self.also = rng.randrange(1, len(values))

    def _add_step(self, rng: random.Random, name: str, values: Sequence[Tensor]) -> None:
        x = rng.choice(range(len(values))[-3:])
        like = [place for place, value in enumerate(values) if value.shape == values[x].shape]
        channels = values[x].shape[1]
        kind = rng.choice(KINDS)
        if kind == "conv":
            outputs, kernel = rng.choice([2, 4, channels]), rng.choice([1, 3])
            self.layers[name] = nn.Conv2d(channels, outputs, kernel, padding=kernel // 2)
        elif kind == "depthwise":
            stride, padding = rng.choice([1, 1, 2]), rng.choice([1, 1, 2])
            self.layers[name] = nn.Conv2d(
                channels, channels, 3, stride=stride, padding=padding, groups=channels
            )
        elif kind == "act":
            self.layers[name] = rng.choice([nn.ReLU(), nn.Hardswish(), nn.ReLU6(inplace=True)])
        elif kind == "norm":
            self.layers[name] = nn.BatchNorm2d(channels)
        self.steps.append((kind, x, rng.choice(like)))

    def _value(self, step: int, values: Sequence[Tensor]) -> Tensor:
        kind, first, second = self.steps[step]
        x, y = values[first], values[second]
        if kind == "sum":
            return x + y
        if kind == "gate":
            return x * torch.sigmoid(y.mean((2, 3), keepdim=True))
        if kind == "cat":
            return torch.cat([x, y[:, :1]], 1)
        if kind == "turn":
            return x.transpose(2, 3)
        result: Tensor = self.layers[str(step)](x.clone() if kind == "act" else x)
        return result

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values = [x]
        for step in range(len(self.steps)):
            values.append(self._value(step, values))
        return values[-1], values[self.also]
