"""fold_conv_bn on networks as they come: no norm is left, and the proof holds.

Weights and statistics are seeded, inputs small and not square; no file is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxopt.capture import capture
from fxopt.passes import FoldConvBn
from fxopt.program import Program
from fxopt.results import PassResult
from fxopt.rewrite import run_pass


def trained(model: nn.Module) -> nn.Module:
    """``model`` with weights and statistics as training leaves them: signals keep their size.

    The statistics are those of a seeded batch, off by a seeded tenth; γ and β are seeded.
    """
    generator = torch.Generator().manual_seed(3)

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator)

    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    x = torch.randn(4, 3, 64, 96, generator=generator)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(4)
        model.train()(x)
        for norm in norms:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.momentum = 0.1
            norm.running_var.mul_(1 + 0.1 * noise(norm.running_var).abs())
            norm.running_mean.add_(0.1 * norm.running_var.sqrt() * noise(norm.running_mean))
            norm.weight.copy_(1 + 0.2 * noise(norm.weight))
            norm.bias.copy_(0.2 * noise(norm.bias))
    return model.eval()


def from_torchvision(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        models = pytest.importorskip("torchvision.models")
        builder = getattr(models, name, None) or getattr(models.segmentation, name)
        options = {"weights_backbone": None} if "deeplab" in name else {}
        model: nn.Module = builder(weights=None, **options)
        return model

    return make


def from_timm(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model: nn.Module = pytest.importorskip("timm").create_model(name)
        return model

    return make


NETS = [
    *(
        pytest.param(from_torchvision(name), norms, id=f"torchvision:{name}")
        for name, norms in [
            ("resnet50", 53),
            ("mobilenet_v2", 52),
            ("mobilenet_v3_large", 46),
            ("efficientnet_b0", 49),
            ("efficientnet_v2_s", 110),
            ("regnet_y_400mf", 53),
            ("shufflenet_v2_x1_0", 56),
            ("deeplabv3_mobilenet_v3_large", 53),
        ]
    ),
    *(
        pytest.param(from_timm(name), norms, id=f"timm:{name}")
        for name, norms in [
            ("efficientnet_b0", 49),
            ("tf_efficientnet_lite0", 49),
            ("ghostnet_100", 80),
        ]
    ),
]


def fold(model: nn.Module, scale_shift: bool = False) -> PassResult:
    program = capture(trained(model), torch.zeros(1, 3, 64, 96))
    return run_pass(FoldConvBn(scale_shift=scale_shift), program)


def norms(program: Program) -> int:
    return sum(isinstance(program.module(node), _BatchNorm) for node in program.nodes)


def seeded_net(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return make()


def assert_proved(result: PassResult) -> None:
    verification = result.verification
    assert verification is not None
    # untrained, efficientnet_v2_s enlarges rounding 10,000 times
    assert verification.method in (
        "whole program", "site by site on recorded inputs: it enlarges rounding",
    )  # fmt: skip
    assert all(error.error is not None for error in verification.outputs)
    assert verification.max_error <= 1e-12
    assert 0 < verification.shipped_error <= verification.shipped_bound
    if verification.method == "whole program" and verification.original_error < 1e-5:
        assert verification.shipped_bound <= 256 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(("make", "count"), NETS)
def test_no_norm_is_left(make: Callable[[], nn.Module], count: int) -> None:
    result = fold(seeded_net(make))
    assert norms(result.before) == len(result.rewritten) == count
    assert norms(result.after) == 0
    assert result.declined == ()
    assert "untied" not in result.evidence
    assert_proved(result)


def test_densenet_keeps_the_norms_between_a_concatenation_and_an_activation() -> None:
    """58 second norms of the layers and the stem's fold backwards, and none forwards.

    The rest read a cat, a pool or an activation, and an activation reads them.
    """
    result = fold(seeded_net(from_torchvision("densenet121")))
    assert (len(result.rewritten), norms(result.after), len(result.declined)) == (59, 62, 62)
    assert {site.note for site in result.rewritten} == {""}
    for declined in result.declined:
        assert declined.reason.startswith("its input comes from ")
        assert declined.reason.endswith("(ReLU), which is no such layer")
    assert_proved(result)


def test_densenet_keeps_no_norm_with_scale_shift() -> None:
    result = fold(seeded_net(from_torchvision("densenet121")), scale_shift=True)
    assert (len(result.rewritten), norms(result.after), result.declined) == (121, 0, ())
    assert_proved(result)


@pytest.mark.parametrize(
    "make",
    [from_torchvision("convnext_tiny"), from_timm("nf_resnet50")],
    ids=["torchvision:convnext_tiny", "timm:nf_resnet50"],
)
def test_nets_without_norms_of_batches_stay_as_they_are(make: Callable[[], nn.Module]) -> None:
    result = run_pass(FoldConvBn(), capture(seeded_net(make).eval(), torch.zeros(1, 3, 64, 96)))
    assert result.after is result.before
    assert result.declined == ()
    assert result.verification is not None
    assert result.verification.max_error == 0.0
