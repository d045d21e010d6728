"""One fine-tuning of the base net: what determines it, and what came of it.

The head is new and in float; the rest trains in float, or with int8 weights and activations, all
from the same folded weights. Without augmentation or weight decay; the learning rate rises for a
tenth of the steps, since there are no norms any more, and falls to 0 on a half cosine. Head, order
of the images and stochastic rounding come from the seed alone.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast

import click
import torch
from fashion import Fashion, Labelled, fashion, standardised
from fitting import Course, accuracy, fit
from onnx_files import run_onnx
from qas_base import NEW_CLASSES, Base, of_classes, with_new_head
from torch import nn
from torch.optim import SGD, Adam, Optimizer

import fxopt
from fxopt.calibration import Calibration
from fxopt.passes import FakeQuantization, FoldConvBn
from fxopt.paths import Paths

MOMENTUM: Final = 0.9
WARMUP: Final = 10
"""The learning rate rises for this part of the steps."""
CALIBRATED: Final = 512
"""Images of the new classes from which the ranges of activations come."""

OptimizerName = Literal["momentum", "sgd", "adam", "lars"]
Granularity = Literal["channel", "tensor", ""]
"""Of the scales of the weights; fp32 has none."""
Method = Literal["fp32", "int8", "qas", "real_nearest", "real_stochastic"]
"""``int8`` and ``qas`` round float masters in each call, ``real_…`` have no masters."""
OPTIONS: Final[dict[Method, dict[str, Any]]] = {
    "int8": {"qas": False},
    "qas": {"qas": True},
    "real_nearest": {"qas": True, "real_int8": True, "update_rounding": "nearest"},
    "real_stochastic": {"qas": True, "real_int8": True, "update_rounding": "stochastic"},
}
"""Of the pass that quantises."""


@dataclass(frozen=True)
class Cell:
    """What is compared: a way to fine-tune a base net, in so many steps of so many images."""

    optimizer: OptimizerName
    granularity: Granularity
    method: Method
    steps: int
    batch: int
    base_steps: int

    @property
    def is_real(self) -> bool:
        """Whether there are no masters: int8 weights that are rounded in each step."""
        return self.method.startswith("real")


@dataclass(frozen=True)
class Run(Cell):
    """A training of a cell: judged on the held-out images in a search, else on the test images."""

    role: Literal["search", "final"]
    lr: float
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What came of a run: accuracy 0 and fewer steps if its loss was not finite any more.

    ``onnx_accuracy`` is that of the int8 file in onnxruntime; None where none was written.
    """

    accuracy: float
    steps_done: int
    seconds: float
    onnx_accuracy: float | None

    @property
    def ms_per_step(self) -> float:
        return 1e3 * self.seconds / max(1, self.steps_done)


def carry_out(run: Run, base: Base) -> Outcome:
    """Fine-tune on the images of the new classes and judge."""
    data = new_classes(base.folder)
    model = model_of(run, base.load(), data.training)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(run.seed)
        start = time.perf_counter()
        optimizer = optimizer_of(run.optimizer, model, run.lr)
        course = Course(run.steps, run.batch, run.seed, warmup=run.steps // WARMUP)
        done = fit(model, data.training, optimizer, course)
        spent = time.perf_counter() - start
    if done < run.steps or not _is_finite(model):
        return Outcome(0.0, done, spent, None)
    if run.role == "search":
        return Outcome(accuracy(model, data.held_out), done, spent, None)
    file_accuracy = None if run.method == "fp32" else onnx_accuracy(model, data.test)
    return Outcome(accuracy(model, data.test), done, spent, file_accuracy)


def _is_finite(model: nn.Module) -> bool:
    """After the last step, whose loss nobody sees."""
    return all(bool(each.isfinite().all()) for each in model.parameters())


def new_classes(folder: Path) -> Fashion:
    """The images of the classes that the base net does not know."""
    whole = fashion(folder)
    parts = (whole.training, whole.held_out, whole.test)
    return Fashion(*(of_classes(part, NEW_CLASSES) for part in parts))


def model_of(run: Run, base: nn.Sequential, training: Labelled) -> nn.Module:
    """What the run trains: the base net with a head of the run's seed."""
    net = with_new_head(base, run.seed).eval()
    images = standardised(training.images[:CALIBRATED])
    if run.method == "fp32":
        return fxopt.transform(net, [FoldConvBn()], images[:2], verify=False)
    quantization = FakeQuantization(
        calibration=Calibration(images),
        fold="auto",
        observer="minmax",
        granularity=cast(Any, run.granularity),
        bias_correction=False,
        skip=Paths(str(len(net) - 1)),
        **OPTIONS[run.method],
    )
    return fxopt.transform(net, [quantization], images[:2], verify=False)


def optimizer_of(name: OptimizerName, model: nn.Module, lr: float) -> Optimizer:
    """Fresh, for all parameters."""
    tensors = list(model.parameters())
    if name == "adam":
        return Adam(tensors, lr, foreach=True)
    if name == "lars":
        # without weight decay it is plain SGD unless told otherwise
        lars: Optimizer = require_lars()(tensors, lr, MOMENTUM, always_adapt=True)
        return lars
    return SGD(tensors, lr, MOMENTUM if name == "momentum" else 0.0, foreach=True)


def require_lars() -> Any:
    """The class; an error that says how to get it where it is missing."""
    try:
        from timm.optim.lars import Lars
    except ImportError as missing:
        raise click.UsageError("lars needs timm: pip install timm") from missing
    return Lars


def onnx_accuracy(model: nn.Module, data: Labelled) -> float:
    """That of the int8 file which the model is written to."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "int8.onnx"
        fxopt.export_onnx(model, file)
        return accuracy(_FromFile(file), data)


class _FromFile(nn.Module):
    def __init__(self, file: Path) -> None:
        super().__init__()
        self.run = run_onnx(file)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.run(images)
