"""The preprocessing that a model is evaluated with, and what the user says otherwise."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import fmean
from typing import Any

from torch import nn

from fxopt.errors import PreconditionError
from fxopt.preprocessing import Preprocessing


@dataclass(frozen=True)
class _Usual:
    """How the pictures were that a model is evaluated on; ``share`` is the crop's of the side.

    Without arguments, ImageNet's.
    """

    crop: tuple[int, int] = (224, 224)
    share: float | Fraction = Fraction(224, 256)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"
    channels: int = 3
    squash: bool = False

    def resize(self, crop: tuple[int, int]) -> int:
        """The shorter side for ``crop``, by timm's rule."""
        return math.floor(max(crop) / self.share)


def preprocessing_for(
    model: nn.Module,
    spec: str,
    *,
    input_shape: tuple[int, int, int] | None = None,
    resize: int | None = None,
    crop: int | tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str | None = None,
) -> Preprocessing:
    """The preprocessing that ``model`` is evaluated with, but for what is given.

    It is that of the model's ``pretrained_cfg`` (timm's models have one), of the default weights of
    ``torchvision:NAME``, or else ImageNet's. Nothing is downloaded.

    Args:
        model: whose inputs are wanted.
        spec: the text that it was loaded by.
        input_shape: ``(C, H, W)`` that it takes, where that is not as usual. A side to resize to
            follows in the usual proportion; for one channel, usual means become their mean.
        resize: the shorter side in pixels. Where it follows from nothing given and a given crop is
            larger than usual, it grows with the crop.
        crop: height and width, or both in one.
        mean: one value, or one for each channel.
        std: likewise.
        interpolation: one of ``INTERPOLATIONS``.

    Raises:
        PreconditionError: what comes together is no :class:`Preprocessing`, or timm pads the
            pictures of this model.

    >>> preprocessing_for(nn.Identity(), "net.py:Net", crop=320).resize
    365
    """
    usual = _of_timm(model) or _of_torchvision(spec) or _Usual()
    channels, *sides = input_shape or (usual.channels, *usual.crop)
    size = (sides[0], sides[1])
    cut = size if crop is None else (crop, crop) if isinstance(crop, int) else crop
    if resize is None:
        fitting = usual.resize(size)
        resize = fitting if fitting >= max(cut) else usual.resize(cut)
    return Preprocessing(
        resize=resize,
        crop=cut,
        mean=_for_channels(usual.mean, channels) if mean is None else tuple(mean),
        std=_for_channels(usual.std, channels) if std is None else tuple(std),
        interpolation=interpolation or usual.interpolation,
        channels=channels,
        squash=usual.squash,
    )


def _for_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return (fmean(values),) if channels == 1 else values


def _of_timm(model: nn.Module) -> _Usual | None:
    config = getattr(model, "pretrained_cfg", None)
    if not config:
        return None

    def value(key: str, default: Any) -> Any:
        found = config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)
        return found or default

    mode = value("crop_mode", "center")
    if mode not in ("center", "squash"):
        raise PreconditionError(
            f"timm's crop mode for the pictures of this model is '{mode}', and only center and "
            "squash are known here; give its inputs as an .npz"
        )
    channels, height, width = value("input_size", (3, 224, 224))
    return _Usual(
        crop=(height, width),
        share=value("crop_pct", 0.875),
        mean=tuple(value("mean", _Usual.mean)),
        std=tuple(value("std", _Usual.std)),
        interpolation=value("interpolation", "bicubic"),
        channels=channels,
        squash=mode == "squash",
    )


def _of_torchvision(spec: str) -> _Usual | None:
    family, _, name = spec.partition(":")
    if family != "torchvision":
        return None
    try:
        weights = importlib.import_module("torchvision.models").get_model_weights(name)
    except ValueError:  # a builder that knows of no weights
        return None
    if not len(weights):
        return None
    preset = weights.DEFAULT.transforms()
    resize = getattr(preset, "resize_size", None) or (256,)
    # A segmentation network is given the picture uncut, a detector scales and normalises inside.
    crop = getattr(preset, "crop_size", None) or resize
    height, width = crop[0], crop[-1]
    interpolation = getattr(preset, "interpolation", None)
    return _Usual(
        crop=(height, width),
        share=Fraction(max(height, width), resize[0]),
        mean=tuple(getattr(preset, "mean", (0.0,))),
        std=tuple(getattr(preset, "std", (1.0,))),
        interpolation=interpolation.value if interpolation else _Usual.interpolation,
    )
