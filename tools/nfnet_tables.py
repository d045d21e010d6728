"""The table of NFNet (Brock et al., ICML 2021) beside ours, and BatchNorm nets that lost theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import timm
import torch

import fxopt
from fxopt.passes import BnToScaledWS

Row = tuple[object, ...]


@dataclass(frozen=True)
class Published:
    """Billions of FLOPs (None where the table has none) and millions of parameters."""

    name: str
    flops: float | None
    parameters: float


@dataclass(frozen=True)
class Counted:
    """A model of timm at an image size, with the parameters and MACs that must come out."""

    model: str
    size: int
    parameters: int
    macs: int


TABLE: tuple[tuple[Published, Counted | None], ...] = (
    (Published("ResNet-50", 4.10, 26.0), Counted("resnet50", 224, 25_557_032, 4_089_184_256)),
    (Published("EffNet-B0", 0.39, 5.3), Counted("efficientnet_b0", 224, 5_288_548, 385_814_752)),
    (Published("SENet-50", 4.09, 28.0), Counted("seresnet50", 224, 28_088_024, 4_091_699_200)),
    (Published("NFNet-F0", 12.38, 71.5), Counted("dm_nfnet_f0", 256, 71_489_284, 12_384_198_656)),
    (Published("SENet-350", 52.90, 115.2), None),
    (Published("EffNet-B5", 9.90, 30.0),
     Counted("efficientnet_b5", 456, 30_389_784, 10_266_384_752)),
    (Published("LambdaNet-350", None, 105.8), None),
    (Published("BoTNet-77-T6", 23.30, 53.9), None),
    (Published("NFNet-F3", 114.76, 254.9),
     Counted("dm_nfnet_f3", 416, 254_924_200, 114_763_501_568)),
    (Published("LambdaNet-420", None, 124.8), None),
    (Published("EffNet-B6", 19.00, 43.0),
     Counted("efficientnet_b6", 528, 43_040_704, 19_067_593_536)),
    (Published("BoTNet-128-T7", 45.80, 75.1), None),
    (Published("NFNet-F4", 215.24, 316.1),
     Counted("dm_nfnet_f4", 512, 316_069_172, 215_241_187_328)),
)  # fmt: skip

CONVERTED = (
    ("resnet50", 25_557_032, 26_560, "nf_resnet50"),
    ("seresnet50", 28_088_024, 26_560, "nf_seresnet50"),
    ("efficientnet_b0", 5_288_548, 21_008, None),
)
"""Models of timm, their trainable parameters, filters under a norm, timm's own without norms."""

FRESH = (
    ("resnet50", 25_557_032, 16, "nf_resnet50"),
    ("seresnet50", 28_088_024, 16, "nf_seresnet50"),
)
"""Models of timm, trainable parameters, residual blocks, timm's own."""

BETAS = (1, 1.04, 1.08, 1.12, 1.04, 1.08, 1.12, 1.16, 1.04, 1.08, 1.12, 1.16, 1.2, 1.24, 1.04, 1.08)
"""β² of what each block of NF-ResNet-50 reads."""

REMARK = """\
The paper's FLOPs are multiply-accumulates; ours are those of convolutions, linear layers and matrix
products. Rows without a model are in no library here. The table's 26.0 M for ResNet-50 and 9.90 B
for EfficientNet-B5 are not what these models have (25.56 M; 10.27 B at 456)."""


def table(check: Callable[..., Row]) -> Iterator[Row]:
    """Parameters and MACs of the table's models, captured without weights."""
    yield ("model", "paper B", "paper M", "ours", "at", "parameters", "exact", "MACs", "exact")
    for published, counted in TABLE:
        figures = published.name, published.flops, published.parameters
        if counted is None:
            yield *figures, *("-",) * 6
            continue
        totals = fxopt.report(_captured(counted.model, counted.size)).totals
        _, parameters, _, exact = check(counted.model, totals.parameters, counted.parameters)
        _, macs, _, also = check(counted.model, totals.macs, counted.macs)
        yield (*figures, counted.model, counted.size, f"{parameters:,}", exact, f"{macs:,}", also)


def converted(check: Callable[..., Row]) -> Iterator[Row]:
    """What ``bn_to_scaled_ws`` makes of nets with BatchNorm: trainable parameters and MACs."""
    yield ("model", "norms", "left", "MACs", "after", "trainable", "with means", "", "without", "",
           "timm's own", "parameters", "MACs")  # fmt: skip
    for name, trainable, means, twin in CONVERTED:
        program = _captured(name, 224)
        kept, dropped = (
            fxopt.run_pass(BnToScaledWS(keep_mean=keep), program) for keep in (True, False)
        )
        counts = [each.evidence["trainable_parameters"] for each in (kept, dropped)]
        _, with_means, _, exact = check(name, counts[0]["after"], trainable + means)
        _, without, _, also = check(name, counts[1]["after"], trainable)
        macs = [fxopt.report(each).totals.macs for each in (program, kept.after)]
        own = fxopt.report(_captured(twin, 224)).totals if twin else None
        yield (name, kept.evidence["batch_norms_before"], kept.evidence["batch_norms_left"], *macs,
               counts[0]["before"], with_means, exact, without, also, twin or "-",
               f"{own.parameters:,}" if own else "-", f"{own.macs:,}" if own else "-")  # fmt: skip


def fresh(check: Callable[..., Row]) -> Iterator[Row]:
    """What ``init=fresh`` makes of them: parameters with and without skip gains, β² by block."""
    yield ("model", "norms", "left", "without gains", "", "with gains", "", "timm's own",
           "parameters", "beta² by block")  # fmt: skip
    for name, trainable, blocks, twin in FRESH:
        program = _captured(name, 224)
        with_gains, without = (
            fxopt.run_pass(BnToScaledWS(init="fresh", skip_init=gains), program)
            for gains in (True, False)
        )
        counts = [e.evidence["trainable_parameters"]["after"] for e in (without, with_gains)]
        _, plain, _, exact = check(name, counts[0], trainable)
        _, more, _, also = check(name, counts[1], trainable + blocks)
        notes = [site.note for site in without.rewritten if site.note.startswith("residual")]
        betas = tuple(float(note.split("variance ")[1].split(" to ")[0]) for note in notes)
        *_, equal = check(name, betas, BETAS)
        own = fxopt.report(_captured(twin, 224)).totals
        evidence = without.evidence
        yield (name, evidence["batch_norms_before"], evidence["batch_norms_left"], plain, exact,
               more, also, twin, f"{own.parameters:,}", equal)  # fmt: skip


def _captured(name: str, size: int) -> fxopt.Program:
    with torch.device("meta"):
        model, example = timm.create_model(name).eval(), torch.zeros(1, 3, size, size)
    return fxopt.capture(model, example)
