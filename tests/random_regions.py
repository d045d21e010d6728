"""Random networks of spatially local operators: any kernel, stride, padding, dilation, wiring."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = "conv conv conv depthwise act max_pool avg_pool pad sum sum cat gate norm enlarge part shuffle last".split()


class RandomRegion(nn.Module):
    """A random directed graph of such operators, ending in one value and a head that pools it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = random.Random(seed)
        self.shape = (rng.choice([1, 2]), 3, rng.randint(5, 29), rng.randint(5, 29))
        self.steps: list[tuple[str, int, int, tuple[int, ...]]] = []
        self.layers = nn.ModuleDict()
        values = [torch.zeros(self.shape)]
        with torch.no_grad():
            for step in range(rng.randint(2, 12)):
                self._add_step(rng, str(step), values)
                values.append(self._value(step, values))
        self.steps.append(("join", len(values) - 1, 0, ()))

    def _add_step(self, rng: random.Random, name: str, values: Sequence[Tensor]) -> None:
        x = rng.choice(range(len(values))[-3:])
        like = [n for n, v in enumerate(values) if v.shape[2:] == values[x].shape[2:]]
        same = [n for n in like if values[n].shape == values[x].shape]
        channels, size = values[x].shape[1], min(values[x].shape[2:])
        kind = rng.choice(KINDS)
        widths: tuple[int, ...] = ()
        if kind in ("conv", "depthwise", "max_pool", "avg_pool"):
            self.layers[name] = self._window(rng, kind, channels, size)
        elif kind == "act":
            self.layers[name] = rng.choice([nn.ReLU(), nn.Hardswish(), nn.PReLU(channels)])
        elif kind == "last":
            self.layers[name] = nn.LayerNorm(channels)
        elif kind == "norm":
            self.layers[name] = nn.BatchNorm2d(channels)
        elif kind == "pad":
            widths = tuple(rng.randint(0, 3) for _ in range(4))
        elif kind == "enlarge":
            kind = "enlarge" if size <= 16 else "act"
            self.layers[name] = nn.ReLU6()
        other = rng.choice(like if kind == "cat" else same)
        self.steps.append((kind, x, other, widths))

    @staticmethod
    def _window(rng: random.Random, kind: str, channels: int, size: int) -> nn.Module:
        kernel = (rng.randint(1, min(5, size)), rng.randint(1, min(5, size)))
        stride = rng.choice([1, 1, 2, 3, (1, 2), (4, 1)])
        if "pool" in kind:
            padding = (rng.randint(0, kernel[0] // 2), rng.randint(0, kernel[1] // 2))
            ceil = rng.random() < 0.5
            if kind == "max_pool":
                return nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil)
            divisor = rng.choice([None, None, 3])
            include = rng.random() < 0.5
            return nn.AvgPool2d(kernel, stride, padding, ceil, include, divisor)
        dilation = rng.choice([1, 1, 2]) if size >= 9 else 1
        padding = rng.choice([0, 1, (kernel[0] // 2, kernel[1] // 2), (2, 4)])
        if stride == 1 and rng.random() < 0.2:
            padding = "same"
        outputs, groups = (
            (channels, channels) if kind == "depthwise" else (rng.choice([2, 3, 6]), 1)
        )
        return nn.Conv2d(channels, outputs, kernel, stride, padding, dilation, groups)

    def _value(self, step: int, values: Sequence[Tensor]) -> Tensor:
        kind, first, second, widths = self.steps[step]
        x, y = values[first], values[second]
        if kind == "sum":
            return x + y
        if kind == "cat":
            return torch.cat([x, y], 1)
        if kind == "gate":
            return x * torch.sigmoid(y)
        if kind == "pad":
            return F.pad(x, widths, value=0.5)
        if kind == "last":
            return self.layers[str(step)](x.permute(0, 2, 3, 1)).relu().permute(0, 3, 1, 2)
        if kind == "part":
            return x.chunk(2, 1)[0]
        if kind == "shuffle":
            groups = 2 if x.shape[1] % 2 == 0 else 1
            return x.view(x.shape[0], groups, -1, *x.shape[2:]).transpose(1, 2).reshape(x.shape)
        if kind == "enlarge":
            return F.interpolate(x, scale_factor=(2.0, 3.0))
        if kind == "join":
            return x.mean((2, 3))
        result: Tensor = self.layers[str(step)](x)
        return result

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for step in range(len(self.steps)):
            values.append(self._value(step, values))
        return values[-1]
