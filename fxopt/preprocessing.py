"""A picture as a model takes it: resized, cut, scaled, normalised, as timm and torchvision do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fxopt.errors import PreconditionError

if TYPE_CHECKING:
    from PIL import Image

INTERPOLATIONS = ("bicubic", "bilinear", "lanczos", "nearest")
"""Pillow's names of them."""

_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class Preprocessing:
    """From a picture to a tensor ``(channels, *crop)``.

    The picture is made RGB, or grey for one channel; its shorter side becomes ``resize`` pixels
    and the longer one keeps the proportions, or also becomes ``resize`` (``squash``). The centre of
    ``crop`` (height, width) is cut out, [0, 255] becomes [0, 1], and ``mean`` is taken off before
    ``std`` divides; one value is for every channel. The orientation that a camera wrote into the
    file is not looked at. All of this is bit for bit torchvision's and timm's.

    Raises:
        PreconditionError: a value is of no use, or the crop is larger than the resized picture.

    >>> from PIL import Image
    >>> half = Preprocessing(resize=8, crop=(6, 4), mean=(0.5,), std=(0.5,))
    >>> half(Image.new("L", (20, 10), 255)).shape
    torch.Size([3, 6, 4])
    """

    resize: int
    crop: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    channels: int = 3
    squash: bool = False

    def __post_init__(self) -> None:
        if self.channels not in _MODES:
            raise PreconditionError(
                f"the model takes {self.channels} channels, and pictures have 1 or 3; give its "
                "inputs as an .npz"
            )
        if self.interpolation not in INTERPOLATIONS:
            raise PreconditionError(
                f"unknown interpolation '{self.interpolation}'; there are "
                f"{', '.join(INTERPOLATIONS)}"
            )
        self._check_sizes()
        self._check_values()

    def _check_sizes(self) -> None:
        crop = f"{self.crop[0]}x{self.crop[1]}"
        if min(self.crop) < 1:
            raise PreconditionError(f"the crop is {crop} pixels; the least is 1x1")
        if self.resize < max(self.crop):
            raise PreconditionError(
                f"a crop of {crop} is larger than a picture whose shorter side is {self.resize}; "
                f"resize to {max(self.crop)} or more, or crop less"
            )

    def _check_values(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise PreconditionError(
                    f"the {name} has {len(values)} values and a picture {self.channels} channels; "
                    "give one value, or one for each"
                )
            if not all(map(math.isfinite, values)):
                raise PreconditionError(f"the {name} is not finite: {_listed(values)}")
        if min(self.std) <= 0:
            raise PreconditionError(f"the std is {_listed(self.std)}; it must be above 0")

    def __call__(self, picture: Image.Image) -> torch.Tensor:
        """``picture`` as a float32 tensor ``(channels, *crop)``.

        Raises:
            PreconditionError: it has more than 8 bits a channel.
        """
        import numpy as np
        from PIL import Image

        if picture.mode.startswith(("I", "F")):
            raise PreconditionError(
                f"its mode is {picture.mode}, which Pillow would clip to 8 bits"
            )
        image = picture.convert(_MODES[self.channels])
        filtering = Image.Resampling[self.interpolation.upper()]
        image = image.resize(self._resized(*image.size), filtering)
        height, width = self.crop
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        cut = np.array(image.crop((left, top, left + width, top + height)))
        pixels = torch.from_numpy(cut).view(height, width, self.channels).permute(2, 0, 1)
        scaled = pixels.contiguous().to(torch.float32).div(255)
        return scaled.sub(_by_channel(self.mean)).div(_by_channel(self.std))

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        if self.squash:
            return self.resize, self.resize
        longer = int(self.resize * max(width, height) / min(width, height))
        return (self.resize, longer) if width <= height else (longer, self.resize)


def _listed(values: Sequence[float]) -> str:
    return ", ".join(map(str, values))


def _by_channel(values: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
