"""Timings as ratios against a peer, both measured in the same process, one after the other.

``python tools/bench.py capture`` times :func:`fxopt.capture` (its verification apart) against
``torch.export.export`` on the same models and inputs, and prints the median of the ratios.
``orders`` sets the least peak beside that of the program's order and of networkx's topological
sort, ``growth`` shows what planning costs on chains of growing length and on a real network.

Large allocations can be slow on shared machines; give both sides the same setting with
``MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_TOP_PAD_=268435456``.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import click
import networkx as nx
import torch
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

import fxopt
from fxopt.analysis.arena import plan_arena
from fxopt.analysis.dataflow import dataflow
from fxopt.analysis.graph import load_graph
from fxopt.analysis.liveness import timeline
from fxopt.analysis.memory_model import MemoryModel
from fxopt.analysis.schedule import schedule
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


ORDERED = (*MODELS, "timm:hrnet_w18", "timm:nasnetalarge", "timm:pnasnet5large", "timm:dla102")
INSTANCES = Path(__file__).parent.parent / "tests" / "data" / "ordering"
CHAINS = (100, 300, 1000, 3000)

Result = TypeVar("Result")


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


@main.command()
@click.option("--preset", default="tinyengine", show_default=True)
@click.argument("specs", nargs=-1)
def orders(preset: str, specs: tuple[str, ...]) -> None:
    """Peaks in int8 by order, the arena beside its bound, and the seconds of the search."""
    rows = []
    for name, graph in tqdm(_graphs(preset, specs), leave=False, file=sys.stderr):
        sort = timeline(graph, list(nx.topological_sort(graph))).peak_bytes
        found, spent = timed(lambda graph=graph: schedule(graph))
        arena = plan_arena(timeline(graph, found.order).lifetimes)
        program = timeline(graph, list(graph)).peak_bytes
        packed = arena.size_bytes / arena.lower_bound_bytes
        best = (found.peak_bytes, found.optimal, found.lower_bound_bytes)
        rows.append((name, len(graph), program, sort, *best, packed, spent))
    headers = ("graph", "ops", "program", "nx sort", "found", "proven", "bound", "arena", "s")
    click.echo(tabulate(rows, headers, floatfmt=".3f", intfmt=","))
    times = [row[-1] for row in rows]
    click.echo(f"search: median {statistics.median(times):.2f} s, most {max(times):.2f} s")


def _graphs(preset: str, specs: tuple[str, ...]) -> Iterator[tuple[str, nx.DiGraph]]:
    conventions = MemoryModel.preset(preset, bytes_per_element=1)
    for spec in specs or ORDERED:
        model = load_model(spec)
        size = 331 if "nasnet" in spec else 224
        program = fxopt.capture(model, torch.randn(1, 3, size, size), verify=False)
        yield spec, dataflow(program, conventions)
    for path in () if specs else sorted(INSTANCES.glob("*.json")):
        yield path.stem, load_graph(path)


def timed(action: Callable[[], Result]) -> tuple[Result, float]:
    """What ``action`` gives, and how many seconds it takes."""
    started = time.perf_counter()
    result = action()
    return result, time.perf_counter() - started


@main.command()
@click.option("--model", default="torchvision:mobilenet_v2", show_default=True)
def growth(model: str) -> None:
    """Seconds of planning chains of growing length; of capture and planning for a network."""
    rows = []
    for length in CHAINS:
        graph = nx.path_graph(length, create_using=nx.DiGraph)
        nx.set_node_attributes(graph, {node: 64 + node % 7 * 16 for node in graph}, "output_bytes")
        found, ordering = timed(lambda graph=graph: schedule(graph))
        lifetimes = timeline(graph, found.order).lifetimes
        _, packing = timed(lambda lifetimes=lifetimes: plan_arena(lifetimes))
        rows.append((length, ordering, packing))
    click.echo(tabulate(rows, ("chain", "schedule s", "pack s"), floatfmt=".3f"))
    network, example = load_model(model), torch.randn(1, 3, 224, 224)
    program, capturing = timed(lambda: fxopt.capture(network, example, verify=False))
    _, planning = timed(lambda: fxopt.plan_memory(program))
    size = f"{model}: {len(program.nodes)} nodes"
    click.echo(f"{size}: capture {capturing:.2f} s, schedule and pack {planning:.2f} s")


if __name__ == "__main__":
    main()
