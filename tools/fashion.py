"""Fashion-MNIST (Xiao et al., 2017) from its IDX files: training, held-out and test images.

70,000 gray images of clothing, 28×28, in ten classes; 10,000 of them are the test set.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import click
import torch

FOLDER = Path("/usr/share/datasets/fashion-mnist")
PACKAGE = "dataset-fashion-mnist"
SIDE, CLASSES = 28, 10
HELD_OUT = 12
"""The last twelfth of the training images is held out: 5,000 of 60,000."""
MEAN, DEVIATION = 255 * 0.2860, 255 * 0.3530
"""Of the pixels of the 60,000 training images."""

_FILES = {
    part: (f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz")
    for part in ("train", "t10k")
}
_HEADERS = (16, 8)
"""Bytes in front of the pixels and of the labels: a magic number, and the sizes of the axes."""


@dataclass(frozen=True, eq=False)
class Labelled:
    """Images ``(N, 1, 28, 28)`` of bytes, and their classes ``(N,)``."""

    images: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True, eq=False)
class Fashion:
    """The images to train on, those to choose hyper-parameters on, and those to judge on."""

    training: Labelled
    held_out: Labelled
    test: Labelled


def check(folder: Path) -> None:
    """Refuse a folder that lacks one of the four files."""
    for name in (name for names in _FILES.values() for name in names):
        if not (folder / name).is_file():
            raise click.UsageError(
                f"'{folder}' has no {name}; Debian's package {PACKAGE} installs Fashion-MNIST "
                f"in {FOLDER}, for another folder give --data"
            )


@lru_cache(maxsize=1)
def fashion(folder: Path) -> Fashion:
    """The images in ``folder``, read once a process."""
    images, labels = _read(folder, "train")
    kept = len(labels) - len(labels) // HELD_OUT
    return Fashion(
        training=Labelled(images[:kept], labels[:kept]),
        held_out=Labelled(images[kept:], labels[kept:]),
        test=Labelled(*_read(folder, "t10k")),
    )


def standardised(images: torch.Tensor) -> torch.Tensor:
    """Pixels of mean 0 and deviation 1 over the training images, in float32."""
    return (images.float() - MEAN) / DEVIATION


def _read(folder: Path, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    pixels, labels = (
        torch.frombuffer(bytearray(gzip.decompress(file.read_bytes())), dtype=torch.uint8)[header:]
        for file, header in zip((folder / name for name in _FILES[part]), _HEADERS, strict=True)
    )
    return pixels.view(-1, 1, SIDE, SIDE), labels.long()
