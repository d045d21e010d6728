"""Variances of normaliser-free networks by block, measured and expected, over three seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import timm
import torch
from torchvision import models
from tqdm import tqdm

import fxopt
from fxopt import Program, SignalPropagation
from fxopt.passes import BnToScaledWS

Row = tuple[object, ...]

SEEDS = range(3)
BATCH = 4
SIZE = 224


@dataclass(frozen=True)
class Net:
    """A network, and how far from 1 measured over expected variance may be in its blocks."""

    library: str
    name: str
    within: float = 0.15

    def program(self) -> Program:
        torch.manual_seed(0)
        build = timm.create_model if self.library == "timm" else models.get_model
        return fxopt.capture(build(self.name).eval(), torch.zeros(1, 3, SIZE, SIZE), verify=False)


NETS = (
    Net("torchvision", "resnet18"), Net("torchvision", "resnet50"), Net("torchvision", "resnet101"),
    Net("timm", "resnetv2_50"), Net("timm", "seresnet50"), Net("torchvision", "regnet_x_400mf"),
    Net("torchvision", "regnet_y_400mf"), Net("timm", "regnety_008"),
    Net("torchvision", "mobilenet_v2", 0.35), Net("timm", "tf_efficientnet_lite0", 0.35),
    Net("torchvision", "efficientnet_b0", 0.35), Net("timm", "efficientnet_b0", 0.35),
)  # fmt: skip

REMARK = """\
Unit normal images, skip gains 1. Of each block the median over the seeds; the range is over blocks.
beta² is what the network is built on, expected has pools and borders beside. Deleted: the network
with its BatchNorms left out and its own initialisation, the least and largest block variance."""


def table(nets: tuple[Net, ...] = NETS) -> Iterator[Row]:
    """Ranges over residual blocks, and whether they are as near to 1 as they are to be."""
    yield ("net", "blocks", "variance", "over beta²", "over expected", "within", "",
           "norms deleted")  # fmt: skip
    for net in tqdm(nets, leave=False):
        program = net.program()
        found = [_propagated(program, seed) for seed in SEEDS]
        variances = _medians([[row.variance for row in each.blocks] for each in found])
        first = found[0].blocks
        beta = [v / (row.beta_squared or 0) for v, row in zip(variances, first, strict=True)]
        expected = _medians([[row.ratio or 0 for row in each.blocks] for each in found])
        holds = all(abs(ratio - 1) <= net.within for ratio in expected)
        deleted = fxopt.signal_propagation(program, norms="deleted", batch=BATCH).blocks
        yield (
            f"{net.name} ({net.library})", len(first),
            *map(_range, (variances, beta, expected)), net.within,
            "" if holds else "NOT", _range([row.variance for row in deleted]),
        )  # fmt: skip


def _propagated(program: Program, seed: int) -> SignalPropagation:
    result = fxopt.run_pass(BnToScaledWS(init="fresh", seed=seed), program, verify=False)
    return fxopt.signal_propagation(result.after, batch=BATCH)


def _medians(columns: list[list[float]]) -> list[float]:
    return [statistics.median(values) for values in zip(*columns, strict=True)]


def _range(values: list[float]) -> str:
    return f"{min(values):.3g} to {max(values):.3g}"
