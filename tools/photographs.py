"""A folder of photographs as ImageNet networks take them: seeded crops, in two halves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image

CROPS, SIDE, SHORT = 10, 224, 256

Half = tuple[torch.Tensor, torch.Tensor]


def photographs(folder: Path) -> list[Path]:
    """The files in ``folder``, by name."""
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if len(files) < 4:
        raise click.UsageError(f"'{folder}' holds {len(files)} photographs; at least 4 are needed")
    return files


def halves(files: Sequence[Path], crops: int = CROPS) -> tuple[Half, Half]:
    """Calibration and judging data, two ways round; every other photograph."""
    even, odd = (torch.cat([_crops(file, crops) for file in files[start::2]]) for start in (0, 1))
    return (even, odd), (odd, even)


def _crops(file: Path, crops: int) -> torch.Tensor:
    """Seeded crops of a photograph whose shorter side is 256, in [-1, 1]."""
    return pixel_crops(file, crops, SHORT, SIDE) / 127.5 - 1


def pixel_crops(
    file: Path,
    crops: int,
    short: int,
    side: int,
    resampling: Image.Resampling = Image.Resampling.BICUBIC,
) -> torch.Tensor:
    """Seeded crops ``(crops, 3, side, side)`` of a photograph in [0, 255].

    Args:
        file: the photograph.
        crops: how many.
        short: its shorter side is made so many pixels first.
        side: of a crop, in pixels.
        resampling: how it is made smaller or larger.
    """
    image = Image.open(file).convert("RGB")
    scale = short / min(image.size)
    width, height = (round(each * scale) for each in image.size)
    pixels = np.array(image.resize((width, height), resampling))
    whole = torch.from_numpy(pixels).permute(2, 0, 1).float()
    generator = torch.Generator().manual_seed(0)
    return torch.stack(list(_cut(whole, generator, crops, side)))


def _cut(
    whole: torch.Tensor, generator: torch.Generator, crops: int, side: int
) -> Iterator[torch.Tensor]:
    for _ in range(crops):
        top, left = (
            int(torch.randint(0, each - side + 1, (), generator=generator))
            for each in whole.shape[1:]
        )
        yield whole[:, top : top + side, left : left + side]
