"""Imported once by the server that workers are forked from: a model then costs no imports.

Capture and its peer are both run once on a small net, so that neither pays for first uses in the
timings.
"""

from __future__ import annotations

import warnings

import timm
import torch
import torchvision
from torch import nn

import fxopt

warnings.simplefilter("ignore")
torch.set_num_threads(1)  # threads do not survive a fork
_net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
_example = torch.zeros(1, 3, 8, 8)
with torch.no_grad():
    fxopt.capture(_net.eval(), _example)
    torch.export.export(_net.eval(), (_example,)).module()
VERSIONS = {
    "torch": torch.__version__,
    "torchvision": torchvision.__version__,
    "timm": timm.__version__,
}
