"""What the filters' means are worth in a trained EfficientNet-Lite0, on photographs.

``python tools/dropped_means.py FOLDER`` takes a folder of photographs. Half of them calibrate, the
other half judge, and then the other way round.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from photographs import SIDE, Half, halves, photographs
from tabulate import tabulate
from tqdm import tqdm

import fxopt
from fxopt import operators
from fxopt.demo import trained_model
from fxopt.fidelity import fidelity
from fxopt.norms import batch_norms
from fxopt.passes import BnToScaledWS

BATCH = 32


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--crops", default=4, show_default=True, help="Of each photograph.")
def main(folder: Path, crops: int) -> None:
    """Errors and agreement without means on the photographs in FOLDER."""
    files = photographs(folder)
    both = halves(files, crops)
    program = fxopt.capture(trained_model(), torch.zeros(1, 3, SIDE, SIDE), verify=False)
    depthwise = _norms_after(program, "depthwise")
    variants: dict[str, tuple[Mapping[str, Any], bool]] = {
        "means kept": ({"keep_mean": True}, False),
        "dropped": ({"keep_mean": False}, False),
        "dropped, calibrated": ({"keep_mean": False}, True),
        "dropped but after depthwise": ({"keep_mean": False, "skip": depthwise}, False),
        "the same, calibrated": ({"keep_mean": False, "skip": depthwise}, True),
    }
    judged = ((name, _judged(program, *variants[name], both)) for name in variants)
    rows = [(name, *figures) for name, figures in tqdm(judged, total=len(variants), leave=False)]
    click.echo(f"{len(files)} photographs, {crops} crops each; judged on those not calibrated on")
    click.echo(tabulate(rows, ("", "output error", "top-1 agreement"), floatfmt=".2g"))


def _norms_after(program: fxopt.Program, kind: str) -> list[str]:
    """The paths of norms that read what an operator of this kind gives."""
    norms = [n for n in batch_norms(program) if n.all_input_nodes[0].op == "call_module"]
    return [
        str(norm.target)
        for norm in norms
        if operators.describe(program, norm.all_input_nodes[0]).kind == kind
    ]


def _judged(
    program: fxopt.Program, options: Mapping[str, Any], calibrated: bool, both: Sequence[Half]
) -> tuple[float, float]:
    """The output's error and the agreement, over the halves."""
    outputs, agreement = [], []
    for calibration, judging in both:
        data = {"calibration": calibration} if calibrated else {}
        result = fxopt.run_pass(BnToScaledWS(**options, **data), program, verify=False)
        batches = ([batch] for batch in judging.split(BATCH))
        _, found = fidelity(program, result.after, [], batches)
        outputs.append(found["output_errors"]["output"])
        agreement.append(found["top1_agreement"]["output"])
    return statistics.mean(outputs), statistics.mean(agreement)


if __name__ == "__main__":
    main()
