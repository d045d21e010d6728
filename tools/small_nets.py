"""Two small nets for gray 28×28 images, with BatchNorms or with nothing in their place.

Their widths are such that a training step takes a thread some 70 ms at batch 128.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import nn


class PreActBlock(nn.Module):
    """norm → relu → conv, twice, beside a shortcut (He et al., ECCV 2016, figure 4e).

    Where the shape changes, the shortcut is a 1×1 convolution of the activated input.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.act = nn.ReLU()
        self.shortcut: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        active = self.act(self.norm1(x))
        branch: torch.Tensor = self.conv2(self.act(self.norm2(self.conv1(active))))
        return branch + (x if self.shortcut is None else self.shortcut(active))


class PreAct(nn.Sequential):
    """A pre-activation ResNet of 14 layers: a stem at half the size, two stages of three blocks."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False),
            *(PreActBlock(16, 16, 1) for _ in range(3)),
            PreActBlock(16, 24, 2),
            *(PreActBlock(24, 24, 1) for _ in range(2)),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(24, classes),
        )


class InvertedResidual(nn.Module):
    """1×1 to thrice the width, depthwise 3×3, 1×1 back (Sandler et al., CVPR 2018, figure 3b)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        width = 3 * inputs
        self.branch = nn.Sequential(
            *_conv_norm_act(inputs, width, 1),
            *_conv_norm_act(width, width, 3, stride, groups=width),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.branch(x)
        return x + result if self.residual else result


class Mobile(nn.Sequential):
    """A MobileNetV2 of 21 layers: a stem at half the size, two stages of three blocks, a head."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__(
            *_conv_norm_act(1, 16, 3, 2),
            InvertedResidual(16, 24, 2),
            *(InvertedResidual(24, 24, 1) for _ in range(2)),
            InvertedResidual(24, 32, 2),
            *(InvertedResidual(32, 32, 1) for _ in range(2)),
            *_conv_norm_act(32, 96, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(96, classes),
        )


NETS: Final[dict[str, type[nn.Module]]] = {"preact": PreAct, "mobile": Mobile}


def seeded_net(name: str, seed: int) -> nn.Module:
    """The net with BatchNorms, its convolutions drawn as He et al. (ICCV 2015) draw them."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        net = NETS[name]()
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return net


def drop_norms(net: nn.Module) -> None:
    """Make identities of the norms, and give the convolutions, which all have one, a bias."""
    for parent in list(net.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, nn.Identity())
            elif isinstance(child, nn.Conv2d):
                child.bias = nn.Parameter(torch.zeros(child.out_channels))


def _conv_norm_act(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(
        inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False
    )
    return conv, nn.BatchNorm2d(outputs), nn.ReLU6()
