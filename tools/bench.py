"""Timings as ratios against a peer, both measured in the same process, one after the other.

``python tools/bench.py capture`` times :func:`fxopt.capture` (its verification apart) against
``torch.export.export`` on the same models and inputs, and prints the median of the ratios.

Large allocations can be slow on shared machines; give both sides the same setting with
``MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_TOP_PAD_=268435456``.
"""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections.abc import Callable

import click
import torch
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

import fxopt
from fxopt.zoo import load_model

MODELS = (
    "torchvision:resnet50",
    "torchvision:mobilenet_v2",
    "torchvision:mobilenet_v3_large",
    "torchvision:efficientnet_b0",
    "torchvision:efficientnet_v2_s",
    "torchvision:regnet_y_400mf",
    "torchvision:densenet121",
    "torchvision:shufflenet_v2_x1_0",
    "torchvision:convnext_tiny",
    "torchvision:deeplabv3_mobilenet_v3_large",
    "timm:efficientnet_b0",
    "timm:tf_efficientnet_lite0",
    "timm:nf_resnet50",
    "timm:ghostnet_100",
)
_MALLOC = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


@click.group()
def main() -> None:
    """Timings as ratios against a peer measured in the same run."""


def seconds(action: Callable[[], object]) -> float:
    """How long ``action`` takes, in seconds."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def capture_times(model: nn.Module, example: torch.Tensor) -> tuple[float, float, float]:
    """Seconds of capture, of capture with verification, and of ``torch.export.export``."""
    alone = seconds(lambda: fxopt.capture(model, example, verify=False))
    verified = seconds(lambda: fxopt.capture(model, example))
    peer = seconds(lambda: torch.export.export(model, (example,)))
    return alone, verified, peer


@main.command()
@click.option("--runs", default=3, show_default=True, help="Runs of each model; the median counts.")
@click.argument("specs", nargs=-1)
def capture(runs: int, specs: tuple[str, ...]) -> None:
    """Capture time against torch.export.export, by model and as the median ratio."""
    warnings.simplefilter("ignore")
    rows = []
    for spec in tqdm(specs or MODELS, leave=False):
        model = load_model(spec)
        example = torch.randn(1, 3, 224, 224)
        capture_times(model, example)
        times = [capture_times(model, example) for _ in range(runs)]
        alone, verified, peer = (statistics.median(column) for column in zip(*times, strict=True))
        rows.append((spec, alone, verified - alone, peer, alone / peer))
    headers = ("model", "capture s", "verification s", "torch.export s", "ratio")
    click.echo(tabulate(rows, headers, floatfmt=".2f"))
    settings = " ".join(f"{name}={os.environ.get(name, '-')}" for name in _MALLOC)
    ratio = statistics.median(row[-1] for row in rows)
    click.echo(f"median ratio {ratio:.2f}, slowest capture {max(r[1] for r in rows):.2f} s")
    click.echo(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {settings}")


if __name__ == "__main__":
    main()
