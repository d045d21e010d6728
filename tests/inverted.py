"""Hand-written inverted residual blocks, in the ways that people write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def unchanged(x: Tensor) -> Tensor:
    return x


class Block(nn.Module):
    """An MBConv with everything optional; ``act`` is called, so it may be a function.

    ``inner`` is the activation of the expansion, if that is another one, and ``before`` a pad.
    """

    def __init__(
        self, inputs: int = 6, outputs: int = 6, ratio: int = 3, kernel: Any = 3, stride: int = 1,
        act: Any = F.relu6, se: bool = False, norm: bool = True, inner: Any = None,
        before: Any = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        hidden = inputs * ratio
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = options.pop("padding", tuple(side // 2 for side in sides))
        bias = not norm
        self.act, self.inner, self.before = act, inner or act, before or unchanged
        self.expand = nn.Conv2d(inputs, hidden, 1, bias=bias) if ratio > 1 else None
        self.norm1 = nn.BatchNorm2d(hidden) if norm and ratio > 1 else nn.Identity()
        self.depthwise = nn.Conv2d(
            hidden, hidden, kernel, stride, padding, groups=hidden, bias=bias, **options
        )
        self.norm2 = nn.BatchNorm2d(hidden) if norm else nn.Identity()
        self.reduce = nn.Linear(hidden, 2) if se else None
        self.restore = nn.Linear(2, hidden) if se else None
        self.project = nn.Conv2d(hidden, outputs, 1, bias=bias)
        self.norm3 = nn.BatchNorm2d(outputs) if norm else nn.Identity()

    def gate(self, x: Tensor) -> Tensor:
        if self.reduce is None or self.restore is None:
            return x
        squeezed = self.restore(F.relu(self.reduce(x.mean((2, 3)))))
        return x * torch.sigmoid(squeezed).view(x.size(0), -1, 1, 1)

    def inside(self, x: Tensor) -> Tensor:
        if self.expand is not None:
            x = self.inner(self.norm1(self.expand(x)))
        return self.gate(self.act(self.norm2(self.depthwise(self.before(x)))))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm3(self.project(self.inside(x)))
        return y + x if y.shape == x.shape else y


class Net(nn.Module):
    """A stem, blocks, and a classifier, so that outputs tell classes."""

    def __init__(self, blocks: Sequence[nn.Module], width: int = 6, last: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(last, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def saturate(model: nn.Module, by: float = 50.0) -> nn.Module:
    """Make every BatchNorm's β so large that a ReLU after it does nothing."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias += by
    return model


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)
