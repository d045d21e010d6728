"""One training of a small net: what determines it, and what came of it.

SGD with Nesterov momentum, the learning rate on a half cosine down to 0, without augmentation,
weight decay or warm-up. Weights and the order of the images come from the seed alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from fashion import SIDE, fashion
from fitting import Course, accuracy, fit
from small_nets import drop_norms, seeded_net
from torch import nn
from torch.optim import SGD, Optimizer

import fxopt
from fxopt.layers import SkipInit
from fxopt.optim import with_adaptive_gradient_clip
from fxopt.passes import BnToScaledWS

MOMENTUM = 0.9

Method = Literal["bn", "nf", "published", "none"]
"""``published`` is ``nf`` with the hyper-parameters of the papers and not with chosen ones."""


@dataclass(frozen=True)
class Cell:
    """What is compared: a net, trained in one way for so many steps of so many images."""

    net: str
    batch: int
    method: Method
    steps: int


@dataclass(frozen=True)
class Run(Cell):
    """A training of a cell: judged on the held-out images in a search, else on the test images.

    ``clip`` is λ of the adaptive gradient clipping, None where nothing is clipped; ``skip_gain`` is
    what the gains of the residual branches start from, None where there are none.
    """

    role: Literal["search", "final"]
    lr: float
    clip: float | None
    skip_gain: float | None
    seed: int

    @property
    def cell(self) -> Cell:
        return Cell(self.net, self.batch, self.method, self.steps)


@dataclass(frozen=True)
class Outcome:
    """What came of a run: fewer steps than it was to have if its loss was not finite any more."""

    accuracy: float
    steps_done: int
    seconds: float
    parameters: int

    @property
    def ms_per_step(self) -> float:
        return 1e3 * self.seconds / max(1, self.steps_done)


def carry_out(run: Run, folder: Path) -> Outcome:
    """Train on the images in ``folder`` and judge."""
    data = fashion(folder)
    model = _model(run).to(memory_format=torch.channels_last)
    start = time.perf_counter()
    course = Course(run.steps, run.batch, run.seed)
    done = fit(model, data.training, _optimizer(model, run), course)
    spent = time.perf_counter() - start
    judged = data.held_out if run.role == "search" else data.test
    parameters = sum(each.numel() for each in model.parameters())
    return Outcome(accuracy(model, judged), done, spent, parameters)


def _model(run: Run) -> nn.Module:
    net = seeded_net(run.net, run.seed)
    if run.method == "bn":
        return net
    if run.method == "none":
        drop_norms(net)
        return net
    fresh = BnToScaledWS(init="fresh", seed=run.seed)
    model = fxopt.transform(net, [fresh], torch.zeros(2, 1, SIDE, SIDE), verify=False)
    assert run.skip_gain is not None
    for module in model.modules():
        if isinstance(module, SkipInit):
            nn.init.constant_(module.gain, run.skip_gain)
    return model


def _optimizer(model: nn.Module, run: Run) -> Optimizer:
    optimizer = SGD(model.parameters(), run.lr, MOMENTUM, nesterov=True, foreach=True)
    if run.clip is not None:
        with_adaptive_gradient_clip(optimizer, model, clip=run.clip)
    return optimizer
