"""bn_to_scaled_ws: what each norm becomes, that values stay, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from folding import norms_left
from seeded import ConvBn, image, modules_called, seeded
from torch import nn

import fxopt
from fxopt import PipelineSpecError, PreconditionError
from fxopt.captured import to_module
from fxopt.layers import ScaleShift
from fxopt.normfree.conversion import scaled_ws
from fxopt.passes import BnToScaledWS
from fxopt.results import PassResult
from fxopt.scaled_ws import ScaledWS, ScaledWSConv2d


def convert(model: nn.Module, *inputs: torch.Tensor, **options: Any) -> PassResult:
    """The pass on the seeded model, proved; outputs are the model's, if means are kept."""
    inputs = inputs or (image(),)
    which = BnToScaledWS(**options)
    result = fxopt.run_pass(which, fxopt.capture(model, inputs))
    assert result.verification is not None
    if which.keep_mean:
        assert result.verification.bound == 1e-12
        module = to_module(result.after).eval()
        expected, found = model.eval()(*inputs), module(*inputs)
        scale = max(1.0, expected.abs().max().item())
        bound = 64 * torch.finfo(inputs[0].dtype).eps * scale
        torch.testing.assert_close(found, expected, rtol=0, atol=bound)
    return result


def reasons(result: PassResult) -> dict[str, str]:
    return {declined.node: declined.reason for declined in result.declined}


def notes(result: PassResult) -> dict[str, str]:
    return {site.node: site.note for site in result.rewritten}


def state(result: PassResult) -> dict[str, torch.Tensor]:
    return to_module(result.after).state_dict()


def stack(*layers: nn.Module) -> nn.Module:
    return seeded(nn.Sequential(*layers))


INPUT = "on the raw input: a fixed scale and shift"
PRE_ACTIVATION = "pre-activation: a scale and shift, trained as the norm's were"


# ---- the layer before the norm -----------------------------------------------------------------


def test_conv_and_norm_become_one_layer() -> None:
    model: Any = seeded(ConvBn(bias=False))
    result = convert(model)
    assert (norms_left(result), result.declined) == (0, ())
    assert list(state(result)) == ["conv.weight", "conv.bias", "conv.gain", "conv.mean"]
    (node,) = modules_called(result.after, ScaledWSConv2d)
    assert result.after.where(node) == "'conv'"
    assert result.evidence == {
        "batch_norms_before": 1,
        "batch_norms_left": 0,
        "trainable_parameters": {"before": 4 * 27 + 8, "after": 4 * 27 + 8 + 4},
        "training": "goes on without statistics of a batch where a norm has gone",
    }


def test_algebra_of_one_filter() -> None:
    """a = γ/√(σ² + ε) = 4/2; w = (1, 3), μ = 2, N·σ² = 2; b = 5, β = 7, mean 1; by hand."""
    norm = nn.BatchNorm1d(1, eps=1.0)
    linear = nn.Linear(2, 1)
    values = [(norm.weight, 4.0), (norm.bias, 7.0), (norm.running_mean, 1.0),
              (norm.running_var, 3.0), (linear.bias, 5.0)]  # fmt: skip
    for tensor, value in values:
        nn.init.constant_(tensor, value)  # type: ignore[arg-type]
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 3.0]]))
    made: Any = scaled_ws(linear, norm, keep_mean=True)
    assert made.weight is linear.weight
    assert made.gain.item() == pytest.approx(2 * 2**0.5)
    assert (made.bias.item(), made.mean.item(), made.gamma) == (2 * 5 + 7 - 2, 4.0, 1.0)
    torch.testing.assert_close(made.standardised_weight(), torch.tensor([[2.0, 6.0]]))


LAYERS: dict[str, tuple[list[nn.Module], tuple[int, ...]]] = {
    "groups": ([nn.Conv2d(6, 4, 3, groups=2), nn.BatchNorm2d(4)], (2, 6, 9, 7)),
    "depthwise": ([nn.Conv2d(6, 12, 3, groups=6, bias=False), nn.BatchNorm2d(12)], (2, 6, 9, 7)),
    "depthwise 1x1": ([nn.Conv2d(6, 6, 1, groups=6), nn.BatchNorm2d(6)], (2, 6, 9, 7)),
    "dilated": ([nn.Conv2d(6, 4, 3, dilation=2, padding="same"), nn.BatchNorm2d(4)], (2, 6, 9, 7)),
    "reflect": ([nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4)],
                (2, 6, 9, 7)),
    "no affine": ([nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4, affine=False)], (2, 6, 9, 7)),
    "synchronised": ([nn.Conv2d(6, 4, 3), nn.SyncBatchNorm(4)], (2, 6, 9, 7)),
    "one axis": ([nn.Conv1d(6, 4, 3), nn.BatchNorm1d(4)], (2, 6, 9)),
    "three axes": ([nn.Conv3d(6, 4, (1, 2, 3)), nn.BatchNorm3d(4)], (2, 6, 3, 4, 5)),
    "linear": ([nn.Linear(6, 4), nn.BatchNorm1d(4)], (3, 6)),
    "two norms": ([nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)], (2, 6, 9, 7)),
    "standardised": ([ScaledWSConv2d(6, 4, 3, gamma=1.7), nn.BatchNorm2d(4), nn.ReLU()],
                     (2, 6, 9, 7)),
    "standardised, mean": ([ScaledWSConv2d(6, 4, 3, keep_mean=True), nn.BatchNorm2d(4)],
                           (2, 6, 9, 7)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_that_takes_a_norm(name: str) -> None:
    layers, shape = LAYERS[name]
    result = convert(stack(*copy.deepcopy(layers)), image(*shape))
    assert (norms_left(result), result.declined) == (0, ())
    assert len(modules_called(result.after, ScaledWS)) == 1


@pytest.mark.parametrize("name", ["groups", "depthwise", "no affine", "linear"])
def test_every_layer_without_means_loses_what_they_gave(name: str) -> None:
    """What is lost is a·μ·boxsum(x): the layer with means gives it back."""
    layers, shape = LAYERS[name]
    model, x = stack(*copy.deepcopy(layers)).double(), image(*shape, dtype=torch.float64)
    kept, dropped = (to_module(convert(model, x, keep_mean=keep).after) for keep in (True, False))
    mean = next(p for n, p in kept.named_parameters() if n.endswith("mean"))
    with torch.no_grad():
        mean.zero_()
    torch.testing.assert_close(dropped(x), kept(x), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(dropped(x), model(x), rtol=0.01)


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_dead_filters_and_dead_channels(value: float) -> None:
    """Weights all alike (σ² is under the floor), a γ of zero, a variance of zero."""
    model: Any = seeded(ConvBn())
    with torch.no_grad():
        model.conv.weight[0] = value
        model.conv.weight[3] *= 1e-6
        model.norm.weight[1] = 0.0
        model.norm.running_var[2] = 0.0
        model.norm.weight[2] = -1.0
    result = convert(model)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state(result).values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_has_the_models_dtype(dtype: torch.dtype) -> None:
    result = convert(seeded(ConvBn()).to(dtype), image(dtype=dtype))
    assert {tensor.dtype for tensor in state(result).values()} == {dtype}


def test_weights_are_shared_with_the_original_and_the_model_stays() -> None:
    model: Any = seeded(ConvBn())
    before = copy.deepcopy(model.state_dict())
    program = fxopt.capture(model, image())
    after = fxopt.run_pass(BnToScaledWS(), program).after
    weights = [dict(p.graph_module.named_parameters())["conv.weight"] for p in (program, after)]
    assert weights[0] is weights[1]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_trains_as_the_norms_parameters_did() -> None:
    model: Any = seeded(ConvBn())
    model.norm.bias.requires_grad_(False)
    model.conv.weight.requires_grad_(False)
    trains = {
        name: p.requires_grad for name, p in to_module(convert(model).after).named_parameters()
    }
    assert trains == {
        "conv.weight": False,
        "conv.bias": False,
        "conv.gain": True,
        "conv.mean": False,
    }


def test_training_goes_on_without_a_batch() -> None:
    """In training the examples do not see each other, and a step follows the gradient down."""
    module = fxopt.transform(seeded(ConvBn()), ["bn_to_scaled_ws"], image()).train()
    x = image(4)
    x = image(4, 3, 9, 13)
    torch.testing.assert_close(module(x)[:1], module(x[:1]))
    torch.testing.assert_close(module(x), module.eval()(x))
    module.train()
    losses = []
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        loss = (module(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# ---- norms without a layer before them ---------------------------------------------------------


def test_a_norm_on_the_raw_input_becomes_fixed() -> None:
    result = convert(stack(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)))
    assert notes(result) == {"_0": INPUT}
    (node,) = modules_called(result.after, ScaleShift)
    made: Any = result.after.module(node)
    assert not any(parameter.requires_grad for parameter in made.parameters())


def test_a_norm_on_a_view_of_the_input_too() -> None:
    result = convert(stack(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 4)), image(3, 3, 2, 2))
    assert notes(result) == {"_1": INPUT}


class PreActivation(nn.Module):
    """Two residual blocks in pre-activation order, the second with a transition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm1, self.norm2, self.norm3 = (nn.BatchNorm2d(6) for _ in range(3))
        self.conv1, self.conv2 = (nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(2))
        self.conv3, self.shortcut = nn.Conv2d(6, 8, 3, 2, 1), nn.Conv2d(6, 8, 1, 2)
        self.last = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.conv2(self.norm2(self.conv1(self.norm1(x).relu())).relu())
        act = F.silu(self.norm3(x))
        x = self.conv3(act) + self.shortcut(act)
        last = self.last(x)
        result: torch.Tensor = self.head((last * torch.sigmoid(last)).mean((2, 3)))
        return result


def test_pre_activation_order() -> None:
    """conv1 → norm2 is one layer; where the stream is read there is a scale and shift."""
    result = convert(seeded(PreActivation()))
    assert (norms_left(result), result.declined) == (0, ())
    assert notes(result) == {
        "norm1": PRE_ACTIVATION, "norm2": "", "norm3": PRE_ACTIVATION, "last": PRE_ACTIVATION,
    }  # fmt: skip
    module = to_module(result.after)
    assert module.norm1.weight.requires_grad
    assert module.norm1.bias.requires_grad


def test_pre_activation_is_proved_where_means_are_dropped() -> None:
    result = convert(seeded(PreActivation()), keep_mean=False)
    assert norms_left(result) == 0
    assert result.evidence["exact_sites"]["proved"] == 3
    assert result.evidence["exact_sites"]["max_error"] <= 1e-12
    assert [row["layer"] for row in result.evidence["layer_errors"]] == ["conv1"]


@pytest.mark.parametrize("keep_mean", [True, False])
def test_layers_and_norms_called_by_keyword(keep_mean: bool) -> None:
    class Keyword(PreActivation):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm1(input=self.stem(input=x))
            result: torch.Tensor = self.norm2(input=self.conv1(input=x) + x).relu()
            return result

    result = convert(seeded(Keyword()), keep_mean=keep_mean)
    assert (norms_left(result), result.declined) == (0, ())


# ---- what stays, and why -----------------------------------------------------------------------


def declined(*layers: nn.Module, x: torch.Tensor | None = None, **options: Any) -> str:
    """The one reason for which a norm of these layers stays."""
    model = layers[0] if len(layers) == 1 else stack(*layers)
    result = convert(model, *(() if x is None else (x,)), **options)
    (reason,) = {*reasons(result).values()}
    assert result.rewritten == ()
    assert result.after is result.before
    return reason


def test_declines_a_norm_without_running_statistics() -> None:
    reason = declined(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    assert reason == "it has no running statistics; train it with track_running_stats=True"


@pytest.mark.parametrize(
    ("layers", "source"),
    [
        ([nn.AvgPool2d(2), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)], "'0' (AvgPool2d)"),
        ([nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Dropout()], "'1' (ReLU)"),
    ],
)
def test_declines_a_norm_behind_no_layer(layers: list[nn.Module], source: str) -> None:
    assert declined(*layers) == (
        f"its input comes from {source}, not from a convolution or a linear layer, nor does an "
        "activation alone read it; fold_conv_bn{scale_shift=true} makes a scale and shift of it"
    )


def test_declines_a_residual_after_the_norm() -> None:
    class Identity(nn.Module):
        """RepVGG's norm of the block's input, which is added to the branches."""

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.relu()
            return (x + self.norm(x)).relu()

    assert "nor does an activation alone read it" in declined(seeded(Identity()))
    passes = ["bn_to_scaled_ws", "fold_conv_bn{scale_shift=true}"]
    module = fxopt.transform(seeded(Identity()), passes, image())
    assert not any(isinstance(each, nn.BatchNorm2d) for each in module.modules())


class Shared(nn.Module):
    """One convolution, called twice."""

    def __init__(self, norms: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(norms))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norms[0](self.conv(x)).relu()
        x = self.conv(x)
        return self.norms[-1](x).relu() if len(self.norms) else x


def test_declines_a_shared_convolution_under_different_norms() -> None:
    result = convert(seeded(Shared(2)))
    assert reasons(result) == {
        f"norms_{one}": f"its layer 'conv' is shared: 'norms.{other}' follows another call of it "
        f"('{call}'), and one layer has one gain and one bias"
        for one, other, call in ((0, 1, "conv_1"), (1, 0, "conv"))
    }
    assert result.rewritten == ()


def test_declines_a_shared_convolution_that_one_norm_follows() -> None:
    class Half(Shared):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.conv(self.norms[0](self.conv(x)).relu())
            return result

    (reason,) = reasons(convert(seeded(Half(1)))).values()
    assert reason == (
        "its layer 'conv' is shared: no such norm follows another call of it ('conv_1'), and one "
        "layer has one gain and one bias"
    )


def test_a_shared_convolution_under_its_own_norm_is_one_layer() -> None:
    result = convert(seeded(Shared(1)))
    assert (norms_left(result), result.declined) == (0, ())
    first, second = modules_called(result.after, ScaledWSConv2d)
    assert result.after.module(first) is result.after.module(second)
    assert list(state(result)) == ["conv.weight", "conv.bias", "conv.gain", "conv.mean"]


def test_a_norm_that_two_layers_shared_is_said_to_be_two_now() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.norm(self.b(self.norm(self.a(x)).relu()))
            return result

    result = convert(seeded(Norm()))
    shared = "its norm was shared with another layer: each has a gain and bias of its own now"
    assert notes(result) == {"norm": shared, "norm_1": shared}


class Written(nn.Module):
    """A filter and a norm's statistics that the forward writes."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.register_buffer("kernel", torch.randn(3, 3, 3, 3))
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(F.conv2d(x, self.kernel)).relu()  # type: ignore[arg-type]
        (self.kernel if self.what == "kernel" else self.norm.running_mean).mul_(0.5)  # type: ignore[operator, union-attr]
        return result


@pytest.mark.parametrize("what", ["kernel", "statistics"])
def test_declines_what_the_forward_writes(what: str) -> None:
    reason = declined(seeded(Written(what)))
    assert reason.startswith("the forward writes")


def test_a_filter_that_is_a_buffer_stays_one() -> None:
    class Fixed(Written):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.norm(F.conv2d(x, self.kernel)).relu()  # type: ignore[arg-type]
            return result

    result = convert(seeded(Fixed("")))
    module = to_module(result.after)
    assert norms_left(result) == 0
    assert {p.shape for p in module.parameters()} == {(3,)}


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = ConvBn(3, 3, padding=1), ConvBn(3, 3, padding=1)
            self.b.conv.weight = self.a.conv.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.b(self.a(x))
            return result

    result = convert(seeded(Tied()))
    assert norms_left(result) == 0
    module: Any = to_module(result.after)
    assert module.a.conv.weight is module.b.conv.weight
    assert module.a.conv.gain is not module.b.conv.gain


def test_declines_a_second_reader_of_the_convolution() -> None:
    class Read(ConvBn):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            return torch.cat([self.norm(x), x], 1)

    reason = declined(seeded(Read()))
    assert reason.startswith("the result of 'conv' is also read by 'cat'")


def test_declines_a_transposed_convolution() -> None:
    assert declined(nn.ConvTranspose2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU()) == (
        "a standardised weight is not defined for '0' (ConvTranspose2d): outputs see parts of a "
        "filter"
    )


def test_declines_a_computed_weight() -> None:
    class Computed(ConvBn):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.norm(F.conv2d(x, self.conv.weight.tanh())).relu()
            return result

    assert declined(seeded(Computed())).startswith("the forward computes the weight or bias of")


def test_declines_filters_of_one_weight_without_their_mean() -> None:
    reason = declined(nn.Conv2d(3, 3, 1, groups=3), nn.BatchNorm2d(3), nn.ReLU(), keep_mean=False)
    assert "have one weight each" in reason
    assert "keep_mean=true" in reason


def test_other_norms_are_left_alone_and_listed() -> None:
    class Others(ConvBn):
        def __init__(self) -> None:
            super().__init__()
            self.group, self.instance = nn.GroupNorm(2, 4), nn.InstanceNorm2d(4)
            self.layer = nn.LayerNorm(11)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.layer(self.instance(self.group(super().forward(x))))
            return F.layer_norm(x, (7, 11))

    result = convert(seeded(Others()))
    assert list(notes(result)) == ["norm"]
    assert reasons(result) == {
        name: f"it normalises each sample by its own values ({kind})"
        for name, kind in (("group", "GroupNorm"), ("instance", "InstanceNorm2d"),
                           ("layer", "LayerNorm"), ("layer_norm", "layer_norm"))
    }  # fmt: skip


class Blocks(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(ConvBn(3, 4), ConvBn(4, 4), ConvBn(4, 4))


@pytest.mark.parametrize("skip", ["1.norm", "1", "1.norm,1", ["1.norm"]])
def test_skips_norms_by_path(skip: Any) -> None:
    result = convert(seeded(Blocks()), image(2, 3, 13, 15), skip=skip)
    assert norms_left(result) == 1
    text = skip if isinstance(skip, str) else ",".join(skip)
    assert [d.where for d in result.declined] == ["'1.norm'"]
    assert result.declined[0].reason == f"it is of skip={text}"


def test_skips_norms_behind_no_layer() -> None:
    """They would become a scale and shift."""
    result = convert(seeded(PreActivation()), skip="norm1,last")
    assert reasons(result) == dict.fromkeys(("norm1", "last"), "it is of skip=norm1,last")
    assert sorted(notes(result)) == ["norm2", "norm3"]
    assert norms_left(convert(stack(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), skip="0")) == 1


def test_skips_a_norm_by_any_of_its_names() -> None:
    class Alias(ConvBn):
        def __init__(self) -> None:
            super().__init__()
            self.other = self.norm

    for skip in ("norm", "other"):
        assert norms_left(convert(seeded(Alias()), skip=skip)) == 1


def test_refuses_to_skip_what_is_not_there() -> None:
    with pytest.raises(PreconditionError, match=r"no BatchNorm is at '3'; there are '0.norm', '1"):
        convert(seeded(Blocks()), image(2, 3, 13, 15), skip="1,3")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bn_to_scaled_ws{init=zero}", "takes preserve\\|fresh, not 'zero'"),
        ("bn_to_scaled_ws{calibration=nowhere.pt,keep_mean=false}", "no calibration file"),
        ("bn_to_scaled_ws{keep=false}", "did you mean 'keep_mean'"),
    ],
)
def test_refuses_wrong_options(spec: str, message: str) -> None:
    with pytest.raises((PipelineSpecError, PreconditionError), match=message):
        fxopt.transform(seeded(ConvBn()), spec, image())


def test_refuses_calibration_where_nothing_is_lost() -> None:
    with pytest.raises(ValueError, match="calibration goes with keep_mean=false"):
        BnToScaledWS(calibration=image())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="init is preserve or fresh, not 'x'"):
        BnToScaledWS(init="x")  # type: ignore[arg-type]


# ---- means dropped: what it costs --------------------------------------------------------------


def test_reports_the_error_of_every_layer_and_of_the_output() -> None:
    model = seeded(Blocks()).double()
    result = convert(model, image(2, 3, 13, 15, dtype=torch.float64), keep_mean=False)
    rows = result.evidence["layer_errors"]
    assert [row["layer"] for row in rows] == ["0.conv", "1.conv", "2.conv"]
    assert rows[0]["alone"] == rows[0]["in place"] > 0
    assert all(row["in place"] > row["alone"] > 0 for row in rows[1:])
    assert result.evidence["output_errors"]["output"] > 0
    assert result.evidence["measured_on"] == "seeded inputs"
    assert result.record.preserves == "interface"


def test_calibrated_biases_restore_the_means_of_every_channel() -> None:
    """Layer after layer, on what the converted layers before give; batches of unequal sizes."""
    model = seeded(Blocks()).double()
    batches = [image(n, 3, 13, 15, seed=n, dtype=torch.float64) + 0.5 for n in (4, 1, 3)]
    options = {"keep_mean": False, "calibration": batches}
    calibrated = convert(model, batches[0], **options)
    plain = convert(model, batches[0], keep_mean=False)
    before, after = calibrated.before.graph_module, calibrated.after.graph_module

    def means(module: nn.Module, path: str) -> torch.Tensor:
        found = []
        handle = module.get_submodule(path).register_forward_hook(
            lambda _, __, result: found.append(result.movedim(1, 0).flatten(1))
        )
        for batch in batches:
            module(batch)
        handle.remove()
        return torch.cat(found, 1).mean(1)

    for block in "012":
        wanted, found = means(before, f"{block}.norm"), means(after, f"{block}.conv")
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    errors = [r.evidence["output_errors"]["output"] for r in (calibrated, plain)]
    assert errors[0] < errors[1]
    assert calibrated.evidence["measured_on"] == "the calibration data, a list"


def test_calibrates_a_shared_layer_by_its_first_call() -> None:
    model = seeded(Shared(1))
    result = convert(model, keep_mean=False, calibration=image(4, 3, 9, 13))
    assert norms_left(result) == 0
    assert [row["layer"] for row in result.evidence["layer_errors"]] == ["conv", "conv"]


def test_two_norms_without_means() -> None:
    model = stack(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU())
    for options in ({}, {"calibration": image(6, 3, 9, 13)}):
        result = convert(model, keep_mean=False, **options)
        assert norms_left(result) == 0
        assert [row["layer"] for row in result.evidence["layer_errors"]] == ["0"]


def test_figures_where_no_value_can_be_compared() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.fft.fft2(self.norm(x))

    program = fxopt.capture(seeded(Complex()), image())
    result = fxopt.run_pass(BnToScaledWS(keep_mean=False), program)
    assert result.evidence["output_errors"] == {}
    assert result.record.preserves == "values"


def test_the_output_of_one_sample_has_an_error() -> None:
    model = stack(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(308, 2))
    result = convert(model, keep_mean=False, calibration=image(1, 3, 9, 13))
    assert 0 < result.evidence["output_errors"]["output"] < 10


class Acting(nn.Module):
    """A dropout and a norm that act in evaluation, between two layers; a buffer that is written."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = ConvBn(3, 4), ConvBn(4, 4)
        self.norm = nn.BatchNorm2d(4)
        self.register_buffer("calls", torch.zeros(()))

    def train(self, mode: bool = True) -> Acting:
        super().train(mode)
        self.norm.train()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = F.dropout(self.norm(self.first(x)), 0.3)
        result: torch.Tensor = self.second(x)
        return result


def test_figures_are_of_the_network_as_it_runs_and_leave_no_trace() -> None:
    model = seeded(Acting()).eval()
    data = [image(8, 3, 9, 13, seed=n) for n in range(4)]
    program = fxopt.capture(model, data[0])
    which = BnToScaledWS(keep_mean=False, calibration=data)
    result = fxopt.run_pass(which, program)
    for each in (result.before, result.after):
        assert float(each.graph_module.calls) == 0
    plain, calibrated = (
        r.evidence["layer_errors"][1]["in place"]
        for r in (fxopt.run_pass(BnToScaledWS(keep_mean=False), program), result)
    )
    assert 0 < calibrated < plain


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = ConvBn(bias=False).eval()
    program = fxopt.capture(model, torch.zeros(1, 3, 9, 13, device="meta"))
    for keep in (True, False):
        result = fxopt.run_pass(BnToScaledWS(keep_mean=keep), program)
        assert norms_left(result) == 0
        assert result.evidence["trainable_parameters"]["after"] == 4 * 27 + 8 + 4 * keep
    with pytest.raises(PreconditionError, match="on the meta device; leave calibration out"):
        fxopt.run_pass(BnToScaledWS(keep_mean=False, calibration=image()), program)  # type: ignore[arg-type]


# ---- after the pass ----------------------------------------------------------------------------


def test_folds_into_plain_layers() -> None:
    passes = ["bn_to_scaled_ws", "fold_scaled_ws"]
    module = fxopt.transform(seeded(Shared(1)), passes, image())
    assert [type(m) for m in module.modules() if list(m.parameters(recurse=False))] == [nn.Conv2d]
    assert list(module.state_dict()) == ["conv.weight", "conv.bias"]
    torch.testing.assert_close(module(image()), seeded(Shared(1))(image()), rtol=1e-5, atol=1e-5)


def test_files_have_plain_convolutions(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    model = seeded(Blocks())
    module = fxopt.transform(model, "bn_to_scaled_ws", image(2, 3, 13, 15))
    report = fxopt.export_onnx(module, tmp_path / "a.onnx")
    assert report.deviations
    graph = onnx.load(tmp_path / "a.onnx").graph
    assert [node.op_type for node in graph.node] == ["Conv", "Relu"] * 3
    fxopt.export_pt2(module, tmp_path / "a.pt2")
    loaded: Any = torch.export.load(tmp_path / "a.pt2")
    names = [str(n.target) for n in loaded.graph.nodes if n.op == "call_function"]
    assert names == ["aten.conv2d.default", "aten.relu.default"] * 3
    assert any(isinstance(each, ScaledWS) for each in module.modules())


@pytest.mark.parametrize("spec", ["patch_execution{until=5}", "fuse_mbconv{weights=compose}"])
def test_passes_that_need_plain_layers_say_what_to_do(spec: str) -> None:
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
              nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU(),
              nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1))  # fmt: skip
    model = stack(*layers)
    with pytest.raises(PreconditionError, match="fold first \\(fold_scaled_ws\\)"):
        fxopt.transform(model, f"bn_to_scaled_ws,{spec}", image(1, 3, 17, 13))
    fxopt.transform(model, f"bn_to_scaled_ws,fold_scaled_ws,{spec}", image(1, 3, 17, 13))


def test_blocks_are_still_found() -> None:
    """Reports count blocks by structure."""
    from inverted import Block, Net

    program = fxopt.capture(seeded(Net([Block(), Block(act=nn.ReLU())])), image())
    after = fxopt.run_pass(BnToScaledWS(), program).after
    before, found = ([b.kind for b in fxopt.report(p).blocks] for p in (program, after))
    assert before == found
    assert len(found) == 2


def test_a_converted_model_is_captured_again() -> None:
    module = fxopt.transform(seeded(ConvBn()), "bn_to_scaled_ws", image())
    again = fxopt.transform(module, "bn_to_scaled_ws", image(1, 3, 12, 10))
    assert fxopt.history(again)[-1].rewritten == ()
    assert any(isinstance(each, ScaledWSConv2d) for each in again.modules())
