"""Random small nets of the operators whose memory is planned in special ways."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn


class RandomNet(nn.Module):
    """Convolutions, sums, gates, concatenations, activations and views, wired at random."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.layers = nn.ModuleDict()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        rng = random.Random(self.seed)
        values = [x]
        for step in range(rng.randint(4, 14)):
            values.append(self._next(rng, step, values))
        return (values[-1], rng.choice(values[1:]))

    def _next(self, rng: random.Random, step: int, values: list[Tensor]) -> Tensor:
        x = rng.choice(values[-3:])
        same = [y for y in values if y.shape == x.shape]
        kind = rng.choice(["conv", "dw", "dw", "act", "sum", "sum", "gate", "cat", "norm", "view"])
        channels = x.shape[1]
        if kind == "conv":
            conv = nn.Conv2d(channels, rng.choice([2, 4, channels]), rng.choice([1, 3]), padding=1)
            return self._layer(step, conv)(x)
        if kind == "dw":
            options = {"stride": rng.choice([1, 1, 2]), "padding": rng.choice([0, 1, 2])}
            return self._layer(step, nn.Conv2d(channels, channels, 3, groups=channels, **options))(
                x
            )
        if kind == "act":
            return rng.choice([torch.relu, torch.tanh, nn.functional.hardswish])(x)
        if kind == "sum":
            return x + rng.choice(same)
        if kind == "gate":
            return x * torch.sigmoid(rng.choice(same).mean((2, 3), keepdim=True))
        if kind == "cat":
            return torch.cat([x, rng.choice(same)[:, : max(1, channels // 2)]], 1)
        if kind == "norm":
            return self._layer(step, nn.BatchNorm2d(channels))(x)
        return x.transpose(2, 3)

    def _layer(self, step: int, layer: nn.Module) -> nn.Module:
        if str(step) not in self.layers:
            self.layers[str(step)] = layer
        return self.layers[str(step)]


def random_net(seed: int) -> RandomNet:
    """A net for ``(2, 3, 11, 14)``, with its layers."""
    net = RandomNet(seed)
    with torch.no_grad():
        net(torch.zeros(2, 3, 11, 14))
    return net
