"""Published figures beside ours, a table each: ``python tools/paper_tables.py memory``.

The others are ``mcunetv2``, ``efficientnetv2``, ``nfnet`` and ``signal``. A figure that must be met
to the digit and is not makes the exit status 1. Weights are seeded or random: no figure here
depends on them, but those of ``signal``. Needs torchvision and timm.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import click
import fused_tables
import nfnet_tables
import patch_tables
import signal_tables
import torch
from tabulate import tabulate
from torchvision import models

import fxopt
from fxopt import MemoryModel, MemoryPlan, Program, plan_memory

KIB = 1024
WIDTHS = ((1.0, 224), (0.35, 144), (0.35, 128))
LAYERWISE = (1_505_280, 311_040, 245_760)
INPLACE = (1_404_928, 290_304, 229_376)
"""MobileNetV2 int8 at these widths and sizes: bounds of kernels that overwrite nothing, and of
in-place depthwise convolutions. TensorFlow Lite Micro allocates the former exactly."""

BLOCKS = """
    539 588 1372 514.5 514.5 171.5 171.5 171.5 85.75 85.75 85.75 91.88 128.62 128.62 128.62
    53.59 53.59 61.25 76.56
"""
"""KiB of MobileNetV2's features.0 to features.18, int8: MCUNetV2 (Lin et al., 2021), figure 1."""

PEERS = (
    ("ExecuTorch, cortex_m", (1_509_744, 315_504, 250_224)),
    ("Vela 5.2, Performance", (1_509_827, 333_804, 264_172)),
    ("torch inductor's estimate", (1_505_280, None, 245_760)),
    ("TVM Relax, static plan", (2_160_128, 376_488, 297_472)),
)
"""Arenas that other tools reported for the same three nets, in bytes."""

LECTURE = (
    ("resnet50", None, 7.2),
    ("mobilenet_v2", None, 6.8),
    ("mobilenet_v2", 1, 1.7),
)
"""Peak MB of the lecture's table; it does not say by which convention."""

CONVENTIONS = {
    **{name: MemoryModel.preset(name) for name in ("tinyengine", "tflm", "pytorch")},
    "tflm, sums in place": MemoryModel.preset("tflm", inplace_elementwise=True),
}

LECTURE_COUNT = """\
The lecture does not state its convention. What gives all three of its figures by hand: an operator
needs its operands and its result, and a block's input stays live to the end of the block, whether
or not a shortcut reads it. ResNet-50: (64 + 256 + 256) maps of 56x56 in fp32, 7,225,344 B, which
is also what tflm needs if sums are in place. MobileNetV2: 96 maps of 112x112 and 96 of 56x56 in
features.2, beside its input of 16 maps of 112x112 that nothing reads any more: 1,705,984 B in int8,
6,823,936 B in fp32. No memory model here keeps a tensor that nothing reads, so ours are lower."""


@dataclass
class Checked:
    """Rows of figures that must be equal, and whether all were."""

    wrong: int = 0

    def row(self, name: str, ours: float, published: float) -> tuple[str, float, float, str]:
        equal = ours == published
        self.wrong += not equal
        return name, ours, published, "equal" if equal else "DIFFERS"


@click.group()
def main() -> None:
    """Published figures beside ours."""


@main.command()
def memory() -> None:
    """Peaks of MobileNetV2 and ResNet-50: MCUNet's, other tools' arenas, the lecture's table."""
    checked = Checked()
    nets = [mobilenet(width, size) for width, size in WIDTHS]
    _show("MobileNetV2 int8, bytes", _peaks(nets, checked))
    _show("MobileNetV2 1.0 at 224 int8, peak KiB of each block", _blocks(nets[0], checked))
    _bars(nets[0])
    _show("Arenas that other tools report, bytes (to be compared with tflm)", _arenas(nets))
    _show("The lecture's table, MB (10^6 bytes)", _lecture())
    click.echo(LECTURE_COUNT)
    sys.exit(checked.wrong > 0)


@main.command()
def mcunetv2() -> None:
    """Patch-based execution: MCUNetV2's figures, and what the pass finds for other networks."""
    checked = Checked()
    nets = [mobilenet(width, size) for width, size in WIDTHS[:2]]
    _show("MobileNetV2 1.0 at 224 tile by tile", patch_tables.grids(nets[0], checked.row))
    _show("Found by the pass", patch_tables.found(nets[1]))
    sys.exit(checked.wrong > 0)


@main.command()
@click.option("--timed/--untimed", default=True, help="Measure images a second, some minutes.")
def efficientnetv2(timed: bool) -> None:
    """Fused-MBConv: table 3 of EfficientNetV2, the sizes of its models, and peaks of memory."""
    checked = Checked()
    _show("EfficientNet-B4 with stages fused", fused_tables.table3(checked.row, timed))
    click.echo(f"{fused_tables.REMARK}\n")
    _show("Model sizes, captured on the meta device", fused_tables.sizes(checked.row))
    _show("Peak memory in int8, tinyengine, KiB", fused_tables.peaks())
    sys.exit(checked.wrong > 0)


@main.command()
def nfnet() -> None:
    """Scaled weight standardisation: the table of NFNet, and nets that lost their BatchNorms."""
    checked = Checked()
    _show("NFNet's table, captured on the meta device", nfnet_tables.table(checked.row))
    click.echo(f"{nfnet_tables.REMARK}\n")
    _show("BatchNorm nets after bn_to_scaled_ws", nfnet_tables.converted(checked.row))
    _show("The same, init=fresh", nfnet_tables.fresh(checked.row))
    sys.exit(checked.wrong > 0)


@main.command()
def signal() -> None:
    """Signal propagation in normaliser-free networks, some minutes."""
    _show("Variances of residual blocks", signal_tables.table())
    click.echo(signal_tables.REMARK)


def mobilenet(width: float, size: int) -> Program:
    """MobileNetV2 as torchvision has it, captured for one image of ``size`` x ``size``."""
    return captured("mobilenet_v2", size, width_mult=width)


def captured(name: str, size: int, **options: float) -> Program:
    torch.manual_seed(0)
    model = models.get_model(name, **options).eval()
    return fxopt.capture(model, torch.randn(1, 3, size, size))


def planned(program: Program, preset: str, element: int | None = 1) -> MemoryPlan:
    conventions = MemoryModel.preset(preset, bytes_per_element=element)
    return plan_memory(program, memory_model=conventions)


def _show(title: str, rows: Iterator[tuple[object, ...]]) -> None:
    head, *table = rows
    text = tabulate(table, head, floatfmt=".2f", intfmt=",", stralign="right")
    click.echo(f"{title}\n{text}\n")


def _peaks(nets: list[Program], checked: Checked) -> Iterator[tuple[object, ...]]:
    yield "net, preset", "ours", "published", "", "arena", "optimal"
    for preset, figures in (("tflm", LAYERWISE), ("tinyengine", INPLACE)):
        for (width, size), net, figure in zip(WIDTHS, nets, figures, strict=True):
            plan = planned(net, preset)
            name = f"{width}@{size}, {preset}"
            yield *checked.row(name, plan.peak_bytes, figure), plan.arena.size_bytes, plan.optimal
            wide = planned(net, preset, None)
            yield *checked.row(f"{name}, fp32", wide.peak_bytes, 4 * figure), "", wide.optimal


def _blocks(net: Program, checked: Checked) -> Iterator[tuple[object, ...]]:
    yield "block", "ours", "published", ""
    blocks = planned(net, "tinyengine").blocks(2)
    for index, text in enumerate(BLOCKS.split()):
        name = f"features.{index}"
        yield checked.row(name, round(blocks[name] / KIB, 2), float(text))


def _bars(net: Program) -> None:
    text = planned(net, "tinyengine").text()
    click.echo(text[text.index("block ") : text.index("hint:")])


def _arenas(nets: list[Program]) -> Iterator[tuple[object, ...]]:
    yield "tool", *(f"{width}@{size}" for width, size in WIDTHS)
    yield "fxopt, tinyengine", *_sizes(nets, "tinyengine")
    yield "fxopt, tflm", *_sizes(nets, "tflm")
    yield "TensorFlow Lite Micro", *(f"{size:,}" for size in LAYERWISE)
    for name, sizes in PEERS:
        yield name, *("-" if size is None else f"{size:,}" for size in sizes)


def _sizes(nets: list[Program], preset: str) -> Iterator[str]:
    for net in nets:
        yield f"{planned(net, preset).arena.size_bytes:,}"


def _lecture() -> Iterator[tuple[object, ...]]:
    yield "net", "lecture", *CONVENTIONS, "nearest", "weights"
    for name, element, figure in LECTURE:
        net = captured(name, 224)
        models = {k: replace(v, bytes_per_element=element) for k, v in CONVENTIONS.items()}
        plans = {key: plan_memory(net, memory_model=model) for key, model in models.items()}
        ours = {key: plan.peak_bytes / 1e6 for key, plan in plans.items()}
        nearest = min(ours, key=lambda key: abs(ours[key] - figure))
        title = f"{name}, {'fp32' if element is None else 'int8'}"
        yield title, figure, *ours.values(), nearest, plans["tflm"].weight_bytes / 1e6


if __name__ == "__main__":
    main()
