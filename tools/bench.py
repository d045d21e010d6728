"""Timings as ratios against a peer, both measured in the same process, one after the other.

``python tools/bench.py capture`` times :func:`fxopt.capture` (its verification apart) against
``torch.export.export`` on the same models and inputs, and prints the median of the ratios.
``orders`` sets the least peak beside that of the program's order and of networkx's topological
sort, ``growth`` shows what planning costs on chains of growing length and on a real network.
``fusing`` runs networks with no block fused, all, and those that ``select=measured`` chooses.
``patching`` runs ResNet-50's first stages whole and tile by tile, in processes of their own.
``execute`` runs plans in their arena beside the ordinary run; ``arenas FILE.csv ...`` packs buffers
in MiniMalloc's format beside greedy packing by size.

Large allocations can be slow on shared machines; give both sides the same setting with
``MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_TOP_PAD_=268435456``.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
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
from fxopt.analysis.buffers import load_buffers
from fxopt.analysis.dataflow import dataflow
from fxopt.analysis.graph import load_graph
from fxopt.analysis.liveness import timeline
from fxopt.analysis.memory_model import MemoryModel
from fxopt.analysis.plan import Lifetime
from fxopt.analysis.schedule import schedule
from fxopt.analysis.validate import validate_packing
from fxopt.execution.compare import compare_in_arena
from fxopt.passes import BnToScaledWS, FuseMBConv
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

NORMFREE = ("torchvision:resnet50", "torchvision:mobilenet_v2", "torchvision:efficientnet_b0")

EXECUTED = (
    *(f"torchvision:{name}" for name in (
        "resnet50", "densenet121", "inception_v3", "efficientnet_b0", "shufflenet_v2_x1_0",
        "mobilenet_v2",
    )),
    "timm:hrnet_w18_small",
    "UNet",
)  # fmt: skip
EXECUTED_PRESETS = ("tflm", "tinyengine_exact", "pytorch")

FUSED = ("timm:efficientnet_b4", "timm:tf_efficientnet_lite0", "torchvision:mobilenet_v2")
FUSIONS = {
    "1-3": {"stages": "1-3", "weights": "random"},
    "all": {"stages": "1-7", "weights": "random"},
    "measured": {"select": "measured", "weights": "random"},
}

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


WIDTHS = (3, 16, 32, 64)


class UNet(nn.Module):
    """An encoder and a decoder with skips: long lives across a deep middle."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(*pair, 3, padding=1) for pair in pairwise(WIDTHS))
        self.up = nn.ModuleList(nn.Conv2d(2 * b, a, 3, padding=1) for a, b in pairwise(WIDTHS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for down in self.down:
            x = torch.relu(down(x))
            skips.append(x)
            x = nn.functional.max_pool2d(x, 2)
        for up, skip in zip(reversed(self.up), reversed(skips), strict=True):
            x = nn.functional.interpolate(x, scale_factor=2.0)
            x = torch.cat([x, skip], 1)
            x = torch.relu(up(x))
        return x


@main.command()
@click.argument("specs", nargs=-1)
def execute(specs: tuple[str, ...]) -> None:
    """Plans run in their arena, in fp32: equal, by how much, and time over the ordinary run."""
    rows = []
    cases = [(spec, preset) for spec in specs or EXECUTED for preset in EXECUTED_PRESETS]
    for spec, preset in tqdm(cases, leave=False):
        size = 299 if "inception" in spec else 224
        model = UNet().eval() if spec == "UNet" else load_model(spec)
        program = fxopt.capture(model, torch.randn(1, 3, size, size), verify=False)
        plan = fxopt.plan_memory(program, preset=preset)
        compare_in_arena(program, plan)
        run = compare_in_arena(program, plan)
        rows.append((spec, preset, run.size_bytes, run.equal, run.error, run.bound, run.ratio))
    headers = ("model", "preset", "arena B", "equal", "error", "bound", "time ratio")
    formats = ("", "", "", "", ".1e", ".1e", ".2f")
    click.echo(tabulate(rows, headers, floatfmt=formats, intfmt=","))
    click.echo(f"median time ratio {statistics.median(row[-1] for row in rows):.2f}")


STAGES = """
import resource, sys, time
import torch, fxopt
from fxopt.zoo import load_model

torch.set_num_threads(int(sys.argv[1]))
grid, size = sys.argv[2], int(sys.argv[3])
net = load_model("torchvision:resnet50")
head = torch.nn.Sequential(*list(net.children())[:6]).eval()
passes = ["fold_conv_bn"]
if grid != "whole":
    passes.append(f"patch_execution{{until=5,grid={grid}}}")
torch.manual_seed(0)
small = torch.randn(1, 3, size, size)
model = fxopt.transform(head, passes, small, verify=False).eval()
with torch.inference_mode():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    result = model(small)
    spent = time.perf_counter() - started
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, spent, result.sum().item())
"""


@main.command()
@click.option("--size", default=2048, show_default=True, help="Rows and columns of the image.")
@click.option("--threads", default=1, show_default=True)
@click.argument("grids", nargs=-1)
def patching(size: int, threads: int, grids: tuple[str, ...]) -> None:
    """ResNet-50 up to layer2, fp32: memory that a fresh process takes for it, and time."""
    rows = []
    for grid in ("whole", *(grids or ("2x2", "4x4", "8x8"))):
        command = [sys.executable, "-c", STAGES, str(threads), grid, str(size)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        kilobytes, spent, total = map(float, done.stdout.split())
        rows.append((grid, kilobytes / 1024, spent, total))
    whole = rows[0]
    table = [(g, m, m / whole[1], s, s / whole[2], total) for g, m, s, total in rows]
    headers = ("grid", "MiB", "over whole", "s", "over whole", "sum of the result")
    click.echo(tabulate(table, headers, floatfmt=("", ".0f", ".2f", ".2f", ".2f", ".1f")))


@main.command()
@click.option("--rounds", default=15, show_default=True)
@click.argument("specs", nargs=-1)
def fusing(rounds: int, specs: tuple[str, ...]) -> None:
    """Seconds of an image with MBConv blocks fused, over those of the network as it is."""
    rows = []
    for spec in tqdm(specs or FUSED, leave=False, file=sys.stderr):
        program = fxopt.capture(load_model(spec), verify=False)
        forms = {"none": program.graph_module}
        for name, options in FUSIONS.items():
            result = fxopt.run_pass(FuseMBConv(**options), program, verify=False)
            forms[name] = result.after.graph_module
        chosen = len(result.rewritten)
        times = in_turns(forms, *(torch.randn(t.shape) for t in program.inputs().values()), rounds)
        best = min(times["none"], times["all"])
        ratios = [times[name] / times["none"] for name in FUSIONS]
        rows.append((spec, times["none"], *ratios, chosen, times["measured"] / best))
    against = [f"{name} /none" for name in FUSIONS]
    headers = ("model", "none s", *against, "blocks", "measured /best of none, all")
    click.echo(tabulate(rows, headers, floatfmt=".3f"))
    settings = " ".join(f"{name}={os.environ.get(name, '-')}" for name in _MALLOC)
    click.echo(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {settings}")


def in_turns(
    modules: Mapping[str, nn.Module], example: torch.Tensor, rounds: int
) -> dict[str, float]:
    """Median seconds of each module, called in turns after one call to warm up."""
    times: dict[str, list[float]] = {name: [] for name in modules}
    with torch.no_grad():
        for _ in range(rounds + 1):
            for name, module in modules.items():
                times[name].append(seconds(lambda module=module: module(example)))  # type: ignore
    return {name: statistics.median(each[1:]) for name, each in times.items()}


@main.command()
@click.option("--batch", default=8, show_default=True)
@click.option("--size", default=128, show_default=True, help="Rows and columns of the images.")
@click.option("--rounds", default=5, show_default=True)
@click.argument("specs", nargs=-1)
def normfree(batch: int, size: int, rounds: int, specs: tuple[str, ...]) -> None:
    """A training step without BatchNorm, over one of the network as it is: time and memory."""
    rows = []
    images = torch.randn(batch, 3, size, size)
    for spec in tqdm(specs or NORMFREE, leave=False, file=sys.stderr):
        model = load_model(spec)
        nets = {
            "norms": fxopt.transform(model, [], images[:1], verify=False),
            "means": fxopt.transform(model, "bn_to_scaled_ws", images[:1], verify=False),
            "no means": fxopt.transform(
                model, BnToScaledWS(keep_mean=False), images[:1], verify=False
            ),
        }
        times: dict[str, list[float]] = {name: [] for name in nets}
        for _ in range(rounds + 1):
            for name, net in nets.items():
                times[name].append(seconds(lambda net=net: training_step(net, images)))  # type: ignore
        spent = [statistics.median(each[1:]) for each in times.values()]
        saved = [saved_bytes(net, images) / 2**20 for net in nets.values()]
        rows.append((spec, *(figure for own, *others in (spent, saved)
                             for figure in (own, *(each / own for each in others)))))  # fmt: skip
    headers = ("model", "norms s", "means", "no means", "saved MiB", "means", "no means")
    click.echo(tabulate(rows, headers, floatfmt=("", ".3f", ".2f", ".2f", ".1f", ".2f", ".2f")))
    settings = " ".join(f"{name}={os.environ.get(name, '-')}" for name in _MALLOC)
    click.echo(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {settings}")


def training_step(net: nn.Module, images: torch.Tensor) -> None:
    """Forward and backward of a batch in training mode."""
    net.train().zero_grad()
    net(images).square().mean().backward()


def saved_bytes(net: nn.Module, images: torch.Tensor) -> int:
    """Bytes that PyTorch keeps for the backward pass of a batch, parameters not counted."""
    own = {tensor.untyped_storage().data_ptr() for tensor in net.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = net.train()(images).square().mean()
    loss.backward()
    return sum(kept.values())


@main.command()
@click.option("--time-limit", default=30.0, show_default=True)
@click.argument("files", nargs=-1, required=True)
def arenas(time_limit: float, files: tuple[str, ...]) -> None:
    """Sizes of packings over the capacity in the file's name, or over the largest live set."""
    rows = []
    for file in tqdm(files, leave=False):
        buffers = load_buffers(file)
        found, spent = timed(lambda buffers=buffers: plan_arena(buffers, 1, time_limit))
        validate_packing(buffers, found)
        number = Path(file).stem.rpartition(".")[2]
        over = int(number) if number.isdecimal() else found.lower_bound_bytes
        sizes = (greedy_by_size(buffers) / over, found.size_bytes / over)
        rows.append((Path(file).stem, len(buffers), over, *sizes, spent))
    headers = ("instance", "buffers", "capacity", "greedy", "found", "s")
    click.echo(tabulate(rows, headers, floatfmt=("", "", "", ".4f", ".4f", ".1f"), intfmt=","))
    greedy, found = (statistics.mean(row[column] for row in rows) for column in (3, 4))
    click.echo(f"mean: greedy by size {greedy:.4f}, found {found:.4f}")


def greedy_by_size(buffers: Sequence[Lifetime]) -> int:
    """Bytes of the peer's packing: the largest first, each at the lowest offset that is free."""
    placed: list[tuple[int, Lifetime]] = []
    for buffer in sorted(buffers, key=lambda each: -each.size_bytes):
        beside = sorted(
            (offset, offset + other.size_bytes)
            for offset, other in placed
            if other.start < buffer.end and buffer.start < other.end
        )
        at = 0
        for low, high in beside:
            if at + buffer.size_bytes <= low:
                break
            at = max(at, high)
        placed.append((at, buffer))
    return max((at + buffer.size_bytes for at, buffer in placed), default=0)


if __name__ == "__main__":
    main()
