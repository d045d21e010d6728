"""How well fused blocks of a trained EfficientNet-Lite0 do what the blocks did, on photographs.

``python tools/carried_weights.py FOLDER`` takes a folder of photographs. Half of them calibrate,
the other half judge, and then the other way round; a photograph gives ten crops. Each block alone
and stages fused together: the error of each block, and how often the likeliest class stays.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from photographs import CROPS, SIDE, Half, halves, photographs
from tabulate import tabulate
from tqdm import tqdm

import fxopt
from fxopt.blocks import InvertedResidual
from fxopt.calibration import Calibration
from fxopt.demo import trained_model
from fxopt.fusing.reconstruction import reconstruction
from fxopt.passes import FuseMBConv
from fxopt.patterns import inverted_residuals

WEIGHTS = ("fit", "linearize", "compose")
STAGES = ("1", "1-2", "1-3")
ALONE = 5
"""Blocks that are fused one at a time: those of the first three stages."""


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(folder: Path) -> None:
    """Errors and agreement of carried weights on the photographs in FOLDER."""
    files = photographs(folder)
    both = halves(files)
    program = fxopt.capture(trained_model(), torch.zeros(1, 3, SIDE, SIDE), verify=False)
    found = [b for b in inverted_residuals(program) if isinstance(b, InvertedResidual)]
    names = [block.path for block in found[:ALONE]]
    jobs = [("blocks", name) for name in names] + [("stages", stages) for stages in STAGES]
    rows = []
    for weights in WEIGHTS:
        for option, value in tqdm(jobs, leave=False, desc=weights):
            rows.append((weights, value, *_judged(program, found, weights, option, value, both)))
    headers = ("weights", "fused", "own data", "other data", "output error", "top-1 agreement")
    click.echo(f"{len(files)} photographs, {CROPS} crops each; judged on those not calibrated on")
    click.echo(tabulate(rows, headers, floatfmt=".2f", disable_numparse=[1]))


def _judged(
    program: fxopt.Program, blocks: Sequence[InvertedResidual], weights: str, option: str,
    value: str, both: Sequence[Half],
) -> tuple[str, str, float, float]:  # fmt: skip
    """Block errors on both data, as text, the output's error and the agreement, over the halves."""
    own, others, outputs, agreement = [], [], [], []
    for calibration, judging in both:
        which = FuseMBConv(weights=weights, calibration=calibration, **{option: value})  # type: ignore
        result = fxopt.run_pass(which, program, verify=False)
        own.append(list(result.evidence["block_errors"].values()))
        paths = result.evidence["block_errors"]
        fused = [block for block in blocks if block.path in paths]
        judged = reconstruction(program, result.after, fused, Calibration(judging))
        others.append(list(judged["block_errors"].values()))
        outputs.append(judged["output_errors"]["output"])
        agreement.append(judged["top1_agreement"]["output"])
    return _texts(own), _texts(others), statistics.mean(outputs), statistics.mean(agreement)


def _texts(errors: Sequence[Sequence[float]]) -> str:
    return " ".join(f"{statistics.mean(each):.2f}" for each in zip(*errors, strict=True))


if __name__ == "__main__":
    main()
