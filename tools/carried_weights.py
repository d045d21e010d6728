"""How well fused blocks of a trained EfficientNet-Lite0 do what the blocks did, on photographs.

``python tools/carried_weights.py FOLDER`` takes a folder of photographs. Half of them calibrate,
the other half judge, and then the other way round; a photograph gives ten crops. Each block alone
and stages fused together: the error of each block, and how often the likeliest class stays.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from tabulate import tabulate
from tqdm import tqdm

import fxopt
from fxopt.blocks import InvertedResidual
from fxopt.calibration import Calibration
from fxopt.demo import trained_model
from fxopt.fusing.reconstruction import reconstruction
from fxopt.passes import FuseMBConv
from fxopt.patterns import inverted_residuals

CROPS, SIDE, SHORT = 10, 224, 256
WEIGHTS = ("fit", "linearize", "compose")
STAGES = ("1", "1-2", "1-3")
ALONE = 5
"""Blocks that are fused one at a time: those of the first three stages."""

Half = tuple[torch.Tensor, torch.Tensor]


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(folder: Path) -> None:
    """Errors and agreement of carried weights on the photographs in FOLDER."""
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if len(files) < 4:
        raise click.UsageError(f"'{folder}' holds {len(files)} photographs; at least 4 are needed")
    halves = _halves(files)
    program = fxopt.capture(trained_model(), torch.zeros(1, 3, SIDE, SIDE), verify=False)
    found = [b for b in inverted_residuals(program) if isinstance(b, InvertedResidual)]
    names = [block.path for block in found[:ALONE]]
    jobs = [("blocks", name) for name in names] + [("stages", stages) for stages in STAGES]
    rows = []
    for weights in WEIGHTS:
        for option, value in tqdm(jobs, leave=False, desc=weights):
            rows.append((weights, value, *_judged(program, found, weights, option, value, halves)))
    headers = ("weights", "fused", "own data", "other data", "output error", "top-1 agreement")
    click.echo(f"{len(files)} photographs, {CROPS} crops each; judged on those not calibrated on")
    click.echo(tabulate(rows, headers, floatfmt=".2f", disable_numparse=[1]))


def _halves(files: Sequence[Path]) -> tuple[Half, Half]:
    """Calibration and judging data, two ways round; every other photograph."""
    even, odd = (torch.cat([_crops(file) for file in files[start::2]]) for start in (0, 1))
    return (even, odd), (odd, even)


def _crops(file: Path) -> torch.Tensor:
    """Seeded crops of a photograph whose shorter side is 256, in [-1, 1]."""
    image = Image.open(file).convert("RGB")
    scale = SHORT / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    pixels = np.array(image.resize((width, height), Image.Resampling.BICUBIC))
    whole = torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1
    generator = torch.Generator().manual_seed(0)
    return torch.stack(list(_cut(whole, generator)))


def _cut(whole: torch.Tensor, generator: torch.Generator) -> Iterator[torch.Tensor]:
    for _ in range(CROPS):
        top, left = (
            int(torch.randint(0, side - SIDE + 1, (), generator=generator))
            for side in whole.shape[1:]
        )
        yield whole[:, top : top + SIDE, left : left + SIDE]


def _judged(
    program: fxopt.Program, blocks: Sequence[InvertedResidual], weights: str, option: str,
    value: str, halves: Sequence[Half],
) -> tuple[str, str, float, float]:  # fmt: skip
    """Block errors on both data, as text, the output's error and the agreement, over the halves."""
    own, others, outputs, agreement = [], [], [], []
    for calibration, judging in halves:
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
