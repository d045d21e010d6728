"""bn_to_scaled_ws{init=fresh} on models as they come, beside timm's own that have no norm."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from seeded import image
from torch import nn

import fxopt
from fxopt.captured import to_module
from fxopt.norms import batch_norms
from fxopt.passes import BnToScaledWS
from fxopt.results import PassResult
from fxopt.scaled_ws import ScaledWS

timm = pytest.importorskip("timm")
models = pytest.importorskip("torchvision").models


def fresh(model: nn.Module, size: tuple[int, int], **options: Any) -> PassResult:
    program = fxopt.capture(model.eval(), image(1, 3, *size), verify=False)
    return fxopt.run_pass(BnToScaledWS(init="fresh", **options), program)


@pytest.mark.parametrize("se", [False, True])
def test_resnet_is_the_published_net(se: bool) -> None:
    """timm's NF-ResNet with our weights, γ and (no) ε: the same function, so the same graph."""
    twin = timm.create_model("nf_seresnet26" if se else "nf_resnet26").double().eval()
    options = {"block_args": {"attn_layer": "se"}} if se else {}
    model = timm.create_model("resnet26", avg_down=True, **options)
    module = to_module(fresh(model, (96, 64), skip_init=False).after).double().eval()
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in twin.parameters())
    layers = [(n, m) for n, m in module.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for name, layer in layers:
        give(layer, twin.get_submodule(name_in_twin(name)))
    x = image(2, 3, 96, 64).double()
    expected = twin(x)
    error = (module(x) - expected).abs().max() / expected.abs().max()
    assert error < 1e-12


def name_in_twin(name: str) -> str:
    for ours, theirs in (
        (r"^conv1$", "stem.conv"), (r"^fc$", "head.fc"), (r"downsample\.1", "downsample.conv"),
        (r"\.se\.", ".attn_last."),
    ):  # fmt: skip
        name = re.sub(ours, theirs, name)
    return re.sub(r"^layer(\d)", lambda stage: f"stages.{int(stage[1]) - 1}", name)


def give(layer: Any, twin: Any) -> None:
    """``twin`` computes with what ``layer`` has; γ of theirs are estimates, off by 1e-4."""
    with torch.no_grad():
        twin.weight.copy_(layer.weight)
        twin.bias.copy_(layer.bias)
    if isinstance(layer, ScaledWS):
        fan_in = layer.weight[0].numel()
        twin.scale, twin.eps = layer.gamma * fan_in**-0.5, 1e-30
        twin.gain.data.copy_(layer.gain.view_as(twin.gain))


NETS = {
    "resnet18": (64, 96), "regnet_x_400mf": (64, 96), "regnet_y_400mf": (64, 96),
    "mobilenet_v2": (64, 96), "mobilenet_v3_small": (64, 96), "efficientnet_b0": (64, 96),
    "shufflenet_v2_x0_5": (64, 96), "mnasnet0_5": (64, 96), "densenet121": (64, 96),
    "timm:resnetv2_50": (64, 96), "timm:repvgg_a0": (64, 96), "timm:res2net50_26w_4s": (64, 64),
    "timm:skresnet18": (64, 64), "timm:hrnet_w18_small": (64, 64), "timm:dla34": (64, 64),
    "timm:darknet53": (64, 64), "timm:ghostnet_050": (64, 64), "timm:resnest14d": (64, 64),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_every_norm_goes_or_is_listed(name: str) -> None:
    torch.manual_seed(0)
    library, _, short = name.rpartition(":")
    model = timm.create_model(short) if library else models.get_model(name)
    result = fresh(model, NETS[name])
    left = {node.name for node in batch_norms(result.after)}
    assert left <= {declined.node for declined in result.declined}
    assert not [each for each in result.declined if "shares" in each.reason]
    assert len(left) < result.evidence["batch_norms_before"] * 0.6
    for row in result.evidence["block_variances"]:
        assert 0.01 < row["measured"] < 5


@pytest.mark.parametrize("name", ["resnet101", "regnet_y_800mf"])
def test_variance_does_not_grow_with_depth(name: str) -> None:
    """Past the ramp of a stage; with the norms deleted it explodes or vanishes.

    The last maps here are 3×3, and zeros around them take some of the variance.
    """
    torch.manual_seed(0)
    result = fresh(models.get_model(name), (96, 96))
    rows = result.evidence["block_variances"]
    assert len(rows) >= 14
    for row in rows:
        assert 0.5 < row["measured"] / row["expected"] < 1.35
    deleted = fxopt.signal_propagation(result.before, norms="deleted", batch=2).blocks
    variances = [row.variance for row in deleted]
    assert max(variances) > 10 * min(variances)
