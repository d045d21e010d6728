"""Rows of the tables of int8 networks: how each is judged, and the file that keeps them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from crops import Labelled
from quantizers import BATCH, Granularity, Logits
from torch import nn


@dataclass(frozen=True)
class Setting:
    """What a row is of."""

    network: str
    method: str
    granularity: Granularity
    observer: str


@dataclass(frozen=True)
class Measured:
    """What a row says.

    ``sqnr`` is in dB, None where nothing differs; agreement, top-1 and top-5 are shares of the
    crops, ``seconds`` what calibration took.
    """

    sqnr: float | None
    agreement: float
    top1: float
    top5: float
    seconds: float
    size_bytes: int | None


Rows = dict[Setting, Measured]


def judged(
    reference: nn.Module, logits: Logits, test: Labelled, seconds: float, size_bytes: int | None
) -> Measured:
    """A network that ``logits`` runs, against the one that it was quantised from and the labels."""
    expected, found = _all(reference, test.images), _all(logits, test.images)
    agreement = _known(found, expected.argmax(1), 1)
    top1, top5 = (_known(found, test.labels, places) for places in (1, 5))
    return Measured(sqnr(expected, found), agreement, top1, top5, seconds, size_bytes)


@torch.no_grad()
def _all(logits: Logits, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([logits(batch) for batch in torch.split(images, BATCH)])


def sqnr(expected: torch.Tensor, found: torch.Tensor) -> float | None:
    """Signal to quantisation noise in dB, over all logits; None if none differs."""
    expected, found = expected.double(), found.double()
    noise = float((expected - found).square().sum())
    return 10 * math.log10(float(expected.square().sum()) / noise) if noise else None


def _known(logits: torch.Tensor, classes: torch.Tensor, places: int) -> float:
    """The share of images whose class is among so many likeliest."""
    likeliest = logits.topk(places, dim=1).indices
    return float((likeliest == classes[:, None]).any(1).double().mean())


def read(file: Path) -> Rows:
    """The rows in the file, none if there is no file."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    records = [json.loads(line) for line in lines]
    return {Setting(**record["setting"]): Measured(**record["measured"]) for record in records}


def append(file: Path, setting: Setting, measured: Measured) -> None:
    """Write a row at the end of the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    record = {"setting": asdict(setting), "measured": asdict(measured)}
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(record) + "\n")
