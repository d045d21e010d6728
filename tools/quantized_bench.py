"""Seconds that calibration takes and milliseconds that a picture takes, beside the peers'.

    python tools/quantized_bench.py WEIGHTS

MobileNetV2 with its weights (tools/trained.py), 64 normal pictures of 224×224. Calibration is one
pass over the pictures: the observers here, onnxruntime's calibrator, those of torchao. Latency is
onnxruntime's at batch 1, the files in turns, the median. Set on both sides
MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_TOP_PAD_=268435456.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import click
import torch
from onnx_files import exported, fresh_file, run_onnx
from onnx_peer import onnx_static
from pt2e_peer import pt2e
from tabulate import tabulate
from torch import nn
from trained import trained

from fxopt.capture import capture
from fxopt.export import export_onnx
from fxopt.onnx_whole import ActivationType
from fxopt.passes import FakeQuantization, FoldConvBn
from fxopt.program import Program
from fxopt.quantizing.calibrate import calibrated
from fxopt.quantizing.observers import ObserverName
from fxopt.quantizing.placement import placed
from fxopt.rewrite import run_pass

PICTURES = 64
STRIDE = 8
"""Pictures that calibrate at a time."""
ROUNDS = 30


@click.command(help=__doc__)
@click.argument("weights", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(weights: Path) -> None:
    torch.set_num_threads(1)
    module = trained("mobilenet_v2", weights).module
    pictures = torch.randn(PICTURES, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    folded = run_pass(FoldConvBn(), capture(module, pictures[:1]), verify=False).after
    _calibration(module, folded, pictures)
    _latency(module, folded, pictures)


def _calibration(module: nn.Module, folded: Program, pictures: torch.Tensor) -> None:
    def own(observer: ObserverName) -> float:
        start = time.perf_counter()
        batches = ([batch] for batch in pictures.split(STRIDE))
        calibrated(folded, placed(folded, {}), batches, observer, 8, means=True)
        return time.perf_counter() - start

    seconds: dict[str, float] = {
        "fxopt minmax": own("minmax"),
        "fxopt percentile": own("percentile"),
        "fxopt mse": own("mse"),
    }
    for name, observer in (("minmax", "minmax"), ("percentile", "percentile")):
        found = onnx_static(module, pictures, "channel", observer, STRIDE)
        seconds[f"onnxruntime {name}"] = found.seconds
    for name, observer in (("minmax", "minmax"), ("histogram", "histogram")):
        seconds[f"torchao {name}"] = pt2e(module, pictures, "channel", observer).seconds
    click.echo(tabulate(seconds.items(), ("calibration", "seconds"), floatfmt=".1f"))


def _latency(module: nn.Module, folded: Program, pictures: torch.Tensor) -> None:
    which = FakeQuantization(calibration=pictures[:STRIDE])
    quantized = run_pass(which, folded, verify=False).after

    def written(kind: ActivationType) -> Path:
        file = fresh_file(f"{kind}.onnx")
        export_onnx(quantized, file, activation_type=kind, verify=False)
        return file

    peer = onnx_static(module, pictures[:STRIDE], "channel", "minmax", STRIDE).file
    assert peer is not None
    files = {
        "fp32": exported(module, pictures),
        "onnxruntime quantize_static": peer,
        "fxopt uint8": written("uint8"),
        "fxopt int8": written("int8"),
    }
    medians = _in_turns({name: run_onnx(file) for name, file in files.items()}, pictures[:1])
    rows = [(name, each, medians["fp32"] / each) for name, each in medians.items()]
    click.echo(tabulate(rows, ("latency", "ms", "times as fast as fp32"), floatfmt=".2f"))


def _in_turns(
    runs: Mapping[str, Callable[[torch.Tensor], torch.Tensor]], picture: torch.Tensor
) -> dict[str, float]:
    """Milliseconds of each, the median of rounds in which all take their turn."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            run(picture)
            found[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(each) for name, each in found.items()}


if __name__ == "__main__":
    main()
