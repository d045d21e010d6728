"""Which models a sweep takes: names, patterns, and the smallest of every timm family."""

from __future__ import annotations

import fnmatch
import json
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torchvision
from tqdm import tqdm

ALL_TORCHVISION = ("", "segmentation", "video", "optical_flow", "quantization", "detection")
SIZES = Path(__file__).resolve().parents[2] / "build" / f"timm-{timm.__version__}-sizes.json"


@dataclass(frozen=True)
class Choice:
    """A MODEL spec and the family whose row of the table it counts in."""

    spec: str
    family: str


def choose(patterns: Iterable[str]) -> list[Choice]:
    """The models that ``patterns`` name, each once, in a fixed order.

    A pattern is ``families`` (the smallest of each timm family, and the smallest that is no
    ``test_`` model), ``family:GLOB`` (the same of the families so named) or a glob over specs:
    ``torchvision:resnet*``, ``timm:*``.
    """
    chosen: dict[str, Choice] = {}
    for pattern in patterns:
        kind, _, name = pattern.partition(":")
        if kind in ("families", "family"):
            found = list(_smallest(name or "*"))
        else:
            found = [c for c in _everything(kind) if fnmatch.fnmatch(c.spec, pattern)]
        if not found:
            raise SystemExit(f"no model matches '{pattern}'; write torchvision:GLOB, timm:GLOB, "
                             "families or family:GLOB")  # fmt: skip
        chosen |= {choice.spec: choice for choice in found}
    return list(chosen.values())


def _everything(package: str) -> Iterator[Choice]:
    if package == "torchvision":
        models = torchvision.models
        for group in ALL_TORCHVISION:
            module = getattr(models, group) if group else models
            for name in models.list_models(module=module):
                yield Choice(f"torchvision:{name}", f"torchvision {group or 'classification'}")
    elif package == "timm":
        for family in timm.list_modules():
            for name in timm.list_models(module=family):
                yield Choice(f"timm:{name}", f"timm {family}")


def _smallest(pattern: str) -> Iterator[Choice]:
    """By parameters; sizes are found once for a version of timm and kept under ``build/``."""
    sizes = json.loads(SIZES.read_text()) if SIZES.exists() else {}
    families = fnmatch.filter(timm.list_modules(), pattern)
    for family in tqdm([f for f in families if f not in sizes], desc="sizes", leave=False):
        sizes[family] = {name: _parameters(name) for name in timm.list_models(module=family)}
        SIZES.parent.mkdir(exist_ok=True)
        SIZES.write_text(json.dumps(sizes))
    for family in families:
        names = sorted(sizes[family], key=sizes[family].__getitem__)
        real = [name for name in names if not name.startswith("test_")]
        for name in dict.fromkeys(names[:1] + real[:1]):
            yield Choice(f"timm:{name}", f"timm {family}")


def _parameters(name: str) -> int:
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        return sum(p.numel() for p in timm.create_model(name).parameters())
