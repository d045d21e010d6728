"""What the tests of fold_conv_bn have in common: fold under proof, and read what came of it."""

from __future__ import annotations

from typing import Any

import torch
from seeded import image, modules_called, seeded
from torch import nn

from fxopt.capture import capture
from fxopt.captured import to_module
from fxopt.passes import FoldConvBn
from fxopt.results import PassResult
from fxopt.rewrite import run_pass

KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def fold(model: nn.Module, *inputs: torch.Tensor, scale_shift: bool = False) -> PassResult:
    """Fold the seeded model, proved; its outputs are those of the model."""
    inputs = inputs or (image(),)
    result = run_pass(FoldConvBn(scale_shift=scale_shift), capture(model, inputs))
    assert result.verification is not None
    assert result.verification.max_error <= 1e-12
    module = to_module(result.after).eval()
    expected, found = model.eval()(*inputs), module(*inputs)
    epsilon = torch.finfo(inputs[0].dtype).eps
    # a few roundings of values about as large as the largest
    torch.testing.assert_close(
        found, expected, rtol=0, atol=64 * epsilon * max(1.0, leaf(expected).abs().max().item())
    )
    return result


def leaf(outputs: Any) -> torch.Tensor:
    return outputs[0] if isinstance(outputs, tuple) else outputs  # type: ignore[no-any-return]


def reasons(result: PassResult) -> list[tuple[str, str]]:
    return [(declined.where, declined.reason) for declined in result.declined]


def notes(result: PassResult) -> list[tuple[str, str]]:
    return [(site.node, site.note) for site in result.rewritten]


def norms_left(result: PassResult) -> int:
    return sum(len(modules_called(result.after, kind)) for kind in KINDS)


def keys(result: PassResult) -> list[str]:
    return list(to_module(result.after).state_dict())


def stack(*layers: nn.Module) -> nn.Module:
    return seeded(nn.Sequential(*layers))
