"""Inverted residual blocks of families as they come: found where the families' own classes say."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch

import fxopt
from fxopt.blocks import FUSED_MBCONV, MBCONV, InvertedResidual, NearMiss
from fxopt.patterns import inverted_residuals
from fxopt.zoo import load_model

CLASSES = {
    "MBConv": MBCONV, "InvertedResidual": MBCONV, "_InvertedResidual": MBCONV,
    "DepthwiseSeparableConv": MBCONV, "CondConvResidual": MBCONV,
    "FusedMBConv": FUSED_MBCONV, "EdgeResidual": FUSED_MBCONV,
}  # fmt: skip
"""What torchvision and timm call their blocks."""

WHOLE = """
    torchvision:efficientnet_b0 torchvision:efficientnet_b4 torchvision:efficientnet_v2_s
    torchvision:mobilenet_v2 torchvision:mobilenet_v3_large torchvision:mobilenet_v3_small
    timm:efficientnet_b0 timm:tf_efficientnet_b0
    timm:tf_efficientnet_lite0 timm:efficientnet_x_b3 timm:efficientnet_b1_pruned
    timm:mobilenetv2_100 timm:mobilenetv3_large_100 timm:tf_mobilenetv3_small_minimal_100
    timm:mnasnet_small timm:semnasnet_100 timm:spnasnet_100 timm:fbnetc_100 timm:fbnetv3_b
    timm:tinynet_a timm:hardcorenas_a timm:efficientnet_es timm:mobilenet_edgetpu_100
    timm:test_efficientnet
""".split()
"""Nets all of whose blocks are to be found."""


def blocks_of(spec: str) -> tuple[torch.nn.Module, tuple[InvertedResidual | NearMiss, ...]]:
    pytest.importorskip(spec.partition(":")[0])
    with torch.device("meta"):
        model, example = load_model(spec).eval(), torch.zeros(1, 3, 224, 192)
    return model, inverted_residuals(fxopt.capture(model, example))


@pytest.mark.parametrize("spec", WHOLE)
def test_every_block_is_found_where_its_class_is(spec: str) -> None:
    model, found = blocks_of(spec)
    kinds = {name: CLASSES.get(type(module).__name__) for name, module in model.named_modules()}
    expected = Counter((name, kind) for name, kind in kinds.items() if kind)
    blocks = [each for each in found if isinstance(each, InvertedResidual)]
    assert len(blocks) == len(found), [each for each in found if isinstance(each, NearMiss)]
    homes = {name for name, _ in expected}
    assert expected == Counter((_home(block.path, homes), block.kind) for block in blocks)
    assert not any(block.obstacle for block in blocks)


def _home(path: str, homes: set[str]) -> str:
    """The module of ``homes`` that holds ``path``, or is it."""
    atoms = path.split(".")
    inside = (".".join(atoms[:depth]) for depth in range(len(atoms), 0, -1))
    return next((name for name in inside if name in homes), path)


STAGES = {
    "torchvision:efficientnet_b0": [1, 2, 2, 3, 3, 4, 1], "timm:efficientnet_b4": [2, 4, 4, 6, 6, 8, 2],
    "torchvision:mobilenet_v2": [1, 2, 3, 4, 3, 3, 1], "timm:mobilenetv3_large_100": [1, 2, 3, 4, 2, 3],
    "torchvision:efficientnet_v2_s": [2, 4, 4, 6, 9, 15], "torchvision:mnasnet1_0": [1, 3, 3, 3, 2, 4, 1],
    # all but the blocks that a pool halves, which are declined
    "timm:mobilenetv4_conv_aa_large": [1, 9, 6], "timm:mobilenetv4_hybrid_medium": [1, 2, 5, 6],
}  # fmt: skip


@pytest.mark.parametrize("spec", STAGES)
def test_stages_are_those_of_the_papers(spec: str) -> None:
    _, found = blocks_of(spec)
    stages = Counter(each.stage for each in found if isinstance(each, InvertedResidual))
    assert stages == dict(enumerate(STAGES[spec], start=1))


NOT_ALL = {
    "timm:mobilenetv4_conv_small": (11, ["activation follows it"]),
    "timm:mobilenetv4_hybrid_medium": (13, ["activation follows it", "is a linear branch beside others"]),
    "timm:mobilenetv4_conv_aa_large": (16, ["activation follows it", "(pool), not to"]),
    "timm:mixnet_s": (1, ["(concat), not to a linear pointwise", "(slice), not to"]),
    "timm:ghostnet_100": (0, ["(concat), not to a linear", "is a linear branch beside others"]),
    "timm:convnext_atto": (0, ["(permute), not to a linear"]), "torchvision:convnext_tiny": (0, ["(permute), not to"]),
    "timm:efficientnet_cc_b0_4e": (8, ["its weight is computed by the forward"]),
    "timm:legacy_xception": (0, ["activation follows it", "is a linear branch beside others"]),
    "timm:mobilenetv1_100": (0, ["activation follows it"]), "timm:lcnet_050": (0, ["activation follows it"]),
    "torchvision:shufflenet_v2_x0_5": (0, ["activation follows it"]),
    "timm:rexnet_100": (16, []), "timm:tresnet_m": (0, ["a fixed filter that is not trained"]),
}  # fmt: skip


@pytest.mark.parametrize("spec", NOT_ALL)
def test_what_is_no_block_says_why(spec: str) -> None:
    count, reasons = NOT_ALL[spec]
    _, found = blocks_of(spec)
    plain = [each for each in found if isinstance(each, InvertedResidual) and each.kind == MBCONV]
    assert len(plain) == count
    said = {each.reason for each in found if isinstance(each, NearMiss)}
    assert all(any(reason in each for each in said) for reason in reasons)
    assert all(any(reason in each for reason in reasons) for each in said)


def test_group_norms_are_an_obstacle() -> None:
    _, found = blocks_of("timm:efficientnet_b3_gn")
    assert len(found) == 26
    for block in found:
        assert isinstance(block, InvertedResidual)
        assert re.search(r"its norm '\S+' is no fixed map per channel", block.obstacle)
