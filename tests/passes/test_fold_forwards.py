"""fold_conv_bn, forwards: a norm goes into the layer after it where that is exact, else says why.

W' = W·a (over inputs)        b' = b + Σ W·c        a = γ/√(σ² + ε), c = β - μ·a
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from folding import fold, keys, norms_left, notes, reasons, stack
from hypothesis import given, settings
from hypothesis import strategies as st
from seeded import image, modules_called, seeded, text
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from fxopt.capture import capture
from fxopt.captured import to_module
from fxopt.passes import FoldConvBn
from fxopt.rewrite import run_pass

INPUT = "its input comes from the input 'input_1', not from a convolution or a linear layer; "


class BnConv(nn.Module):
    """norm → conv → act, the norm of the input."""

    def __init__(self, inputs: int = 3, outputs: int = 4, **options: Any) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, outputs, 3, **options)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.act(self.conv(self.norm(x)))
        return result


def test_graph_before_and_after() -> None:
    result = fold(seeded(BnConv()))
    assert text(result.before) == (
        "input x\nnorm = norm(x)\nconv = conv(norm)\nact = act(conv)\nreturn act"
    )
    assert text(result.after) == "input x\nconv = conv(x)\nact = act(conv)\nreturn act"
    assert [(s.node, s.where, s.note) for s in result.rewritten] == [
        ("norm", "'norm'", "folded forwards into 'conv'")
    ]
    assert result.declined == ()
    assert result.evidence == {
        "batch_norms_before": 1,
        "batch_norms_left": 0,
        "training": "folded norms have no batch statistics any more",
    }
    assert keys(result) == ["conv.weight", "conv.bias"]


def test_algebra_of_a_grouped_convolution() -> None:
    """By hand: a = γ/√(σ² + ε) = (2, 8), c = β - μ·a = (-1, -4)."""
    norm, conv = nn.BatchNorm1d(2, eps=1.0), nn.Conv1d(2, 2, 2, groups=2)
    values = [(norm.weight, (4.0, 16.0)), (norm.bias, (1.0, 4.0)), (norm.running_mean, (1.0, 1.0)),
              (norm.running_var, (3.0, 3.0)), (conv.bias, (0.5, 0.25)),
              (conv.weight, (((1.0, 2.0),), ((3.0, 4.0),)))]  # fmt: skip
    with torch.no_grad():
        for tensor, value in values:
            tensor.copy_(torch.tensor(value))  # type: ignore[union-attr]
    result = fold(nn.Sequential(norm, conv).eval(), image(2, 2, 5))
    made: Any = result.after.module(result.after.node("_1"))
    assert made.weight.flatten().tolist() == [2.0, 4.0, 24.0, 32.0]
    assert made.bias.tolist() == [0.5 - 3.0, 0.25 - 28.0]


# ---- where it is exact -------------------------------------------------------------------------

REFLECT: dict[str, Any] = {"padding": 2, "padding_mode": "reflect"}
EXACT = [
    (nn.Linear(5, 7), (5,)),
    (nn.Linear(5, 7, bias=False), (5,)),
    (nn.Conv1d(4, 6, 3, stride=2, groups=2, bias=False), (4, 11)),
    (nn.Conv2d(4, 6, 3), (4, 9, 13)),
    (nn.Conv2d(4, 6, 3, stride=(2, 1), dilation=(1, 2), groups=2, bias=False), (4, 9, 13)),
    (nn.Conv2d(4, 4, (3, 2), groups=4, padding="valid"), (4, 9, 13)),
    (nn.Conv2d(4, 6, 1, padding="same"), (4, 9, 13)),
    (nn.Conv2d(4, 6, 3, **REFLECT), (4, 9, 13)),
    (nn.Conv2d(4, 6, 3, stride=2, padding=(1, 0), padding_mode="replicate"), (4, 9, 13)),
    (nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular", groups=2), (4, 9, 13)),
    (nn.Conv3d(2, 4, (1, 3, 2), groups=2, stride=(1, 1, 2)), (2, 3, 5, 4)),
    (nn.ConvTranspose1d(4, 6, 3, padding=2, groups=2, bias=False), (4, 11)),
    (nn.ConvTranspose2d(4, 6, 1, groups=2), (4, 5, 7)),
    (nn.ConvTranspose2d(4, 6, (3, 2), padding=(5, 2), dilation=(2, 1), output_padding=(1, 0)),
     (4, 12, 7)),
    (nn.ConvTranspose3d(4, 2, (1, 2, 3), padding=(0, 1, 3), groups=2), (4, 3, 4, 6)),
]  # fmt: skip


def norm_for(layer: Any, shape: tuple[int, ...]) -> nn.Module:
    kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}[len(shape)]
    return kind(shape[0])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("layer", "shape"), EXACT, ids=[str(case[0]) for case in EXACT])
def test_folds_into_every_layer_where_it_is_exact(
    layer: nn.Module, shape: tuple[int, ...], batch: int
) -> None:
    result = fold(stack(norm_for(layer, shape), layer), image(batch, *shape))
    assert (norms_left(result), result.declined) == (0, ())
    assert notes(result) == [("_0", "folded forwards into '1'")]


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3, padding=1), nn.ConvTranspose2d(3, 4, 3, 2)])
def test_folds_over_zero_padding_where_the_shift_is_zero(layer: nn.Module) -> None:
    model: Any = stack(nn.BatchNorm2d(3, affine=False), layer)
    model[0].running_mean.zero_()
    assert norms_left(fold(model)) == 0


def test_folds_into_padding_that_the_user_took_away() -> None:
    """What the layer does now counts, not what it was made with."""
    model: Any = stack(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1))
    model[1].padding = (0, 0)
    assert norms_left(fold(model)) == 0
    model[1].padding = 1
    assert norms_left(fold(model)) == 1


def test_folds_into_a_functional_convolution_of_plain_weights() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)
            self.kernel = nn.Parameter(torch.empty(4, 3, 3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.conv2d(self.norm(x), self.kernel, stride=2)

    result = fold(seeded(Functional()))
    assert norms_left(result) == 0
    assert keys(result) == ["kernel", "conv2d.weight", "conv2d.bias"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_stores_in_the_models_dtype(dtype: torch.dtype) -> None:
    result = fold(seeded(BnConv()).to(dtype), image(dtype=dtype))
    conv: Any = result.after.module(result.after.node("conv"))
    assert conv.weight.dtype == conv.bias.dtype == dtype


def far_from_zero(mean: float) -> nn.Module:
    """Its input's mean is ``mean`` times its deviation; γ = 1 and β = 0."""
    model: Any = stack(nn.BatchNorm2d(3, affine=False), nn.Conv2d(3, 4, 3))
    model[0].running_mean.copy_(mean * model[0].running_var.sqrt())
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize("mean", [0.0, 2.0, -3.8])
def test_folds_statistics_not_far_from_zero(mean: float) -> None:
    model = far_from_zero(mean)
    x = image() + mean
    result = run_pass(FoldConvBn(), capture(model, x), example=[x])
    assert norms_left(result) == 0


def test_declines_statistics_that_would_cost_precision() -> None:
    """√(1 + 30²) = 30.0; folded, float32 is off by 5 times what the original is."""
    assert reasons(fold(far_from_zero(30.0))) == [
        (
            "'0'",
            INPUT + "'1' would sum terms 30 times as large as now, and lose that much precision",
        )
    ]


# ---- order, sharing ----------------------------------------------------------------------------


def test_backwards_is_preferred() -> None:
    result = fold(stack(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3)))
    assert notes(result) == [("_1", "")]


def test_goes_forwards_where_the_layer_before_has_another_reader() -> None:
    class Skip(BnConv):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x)
            return self.conv(self.norm(y)) + y.mean()

    result = fold(seeded(Skip()))
    assert notes(result) == [("norm", "folded forwards into 'conv'")]


def test_norms_in_a_row_fold_from_the_last_to_the_first() -> None:
    result = fold(stack(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)))
    assert (norms_left(result), result.declined) == (0, ())
    assert [name for name, _ in notes(result)] == ["_1", "_0"]


def test_norms_on_both_sides_fold_into_one_convolution() -> None:
    result = fold(stack(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    assert (norms_left(result), result.declined) == (0, ())
    assert len(modules_called(result.after, nn.Conv2d)) == 1


def test_norms_between_two_convolutions_fold_into_both() -> None:
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3))
    result = fold(stack(*layers))
    assert (norms_left(result), result.declined) == (0, ())
    assert len(result.rewritten) == 2


class Shared(nn.Module):
    """Convolutions and norms that are called more than once."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)
        self.other = nn.Conv2d(3, 3, 3, bias=False)
        self.a = nn.BatchNorm2d(3)
        self.b = nn.BatchNorm2d(3)


def test_convolution_called_twice_after_two_norms_is_untied() -> None:
    class TwoNorms(Shared):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.a(x)) + self.conv(self.b(x.relu()))

    result = fold(seeded(TwoNorms()))
    assert norms_left(result) == 0
    first, second = modules_called(result.after, nn.Conv2d)
    assert result.after.module(first) is not result.after.module(second)
    assert result.evidence["untied"] == [
        {"name": "conv.weight", "bytes_added": 3 * 3 * 9 * 4},
        {"name": "conv.bias", "bytes_added": 3 * 4},
    ]


def test_same_pair_called_twice_stays_shared() -> None:
    class OnePair(Shared):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.a(x)) + self.conv(self.a(x.relu()))

    result = fold(seeded(OnePair()))
    assert norms_left(result) == 0
    first, second = modules_called(result.after, nn.Conv2d)
    assert result.after.module(first) is result.after.module(second)
    assert "untied" not in result.evidence


def test_norm_called_twice_before_two_convolutions_folds_into_both() -> None:
    class OneNorm(Shared):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.a(x)) + self.other(self.a(x.relu()))

    result = fold(seeded(OneNorm()))
    assert norms_left(result) == 0
    assert "a.weight" not in keys(result)


def test_norm_called_twice_folds_in_both_directions() -> None:
    class Between(Shared):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(self.conv(x)).relu() + self.conv(self.a(x.relu())).relu()

    model: Any = seeded(Between())
    result = fold(model)
    assert norms_left(result) == 0
    assert sorted(note for _, note in notes(result)) == ["", "folded forwards into 'conv'"]
    first, second = modules_called(result.after, nn.Conv2d)
    assert result.after.module(first) is not result.after.module(second)


def test_convolution_called_again_without_a_norm_keeps_its_weights_there() -> None:
    class Bare(Shared):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.a(x)) + 2 * self.conv(x)

    model: Any = seeded(Bare())
    result = fold(model)
    assert norms_left(result) == 0
    kept: Any = result.after.module(result.after.node("conv_1"))
    assert torch.equal(kept.weight, model.conv.weight)


def test_frozen_layers_stay_frozen_and_others_train() -> None:
    for trains in (False, True):
        module = to_module(fold(seeded(BnConv()).requires_grad_(trains)).after)
        assert {p.requires_grad for p in module.parameters()} == {trains}


# ---- declined ----------------------------------------------------------------------------------

ZERO = "and a zero after the norm is not a zero before it"
TAPS = "'1' does not spread all its taps to all outputs, so the norm's shift differs there"


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(3, 4, 3, padding=1), f"'1' pads its input with zeros by (1, 1), {ZERO}"),
        (nn.Conv2d(3, 4, 3, padding=(0, 2)), f"'1' pads its input with zeros by (0, 2), {ZERO}"),
        (nn.Conv2d(3, 4, 3, padding="same"), f"'1' pads its input with zeros ('same'), {ZERO}"),
        (nn.ConvTranspose2d(3, 4, 2, stride=2), TAPS),
        (nn.ConvTranspose2d(3, 4, 1, stride=2), TAPS),
        (nn.ConvTranspose2d(3, 4, 3, padding=1), TAPS),
        (nn.ConvTranspose2d(3, 4, 3, padding=4, dilation=2, output_padding=1), TAPS),
    ],
    ids=str,
)
def test_declines_where_the_shift_is_no_constant(layer: nn.Module, reason: str) -> None:
    result = fold(stack(nn.BatchNorm2d(3), layer))
    assert reasons(result) == [("'0'", INPUT + reason)]
    assert text(result.after) == text(result.before)


def test_declines_a_norm_with_two_readers() -> None:
    class Forked(Shared):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            return self.conv(y) + self.other(y)

    ((_, reason),) = reasons(fold(seeded(Forked())))
    assert reason.endswith("; its result is read by 'conv' and 'other'")


def test_declines_a_norm_that_nothing_reads() -> None:
    class Unread(Shared):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.a(x)
            result: torch.Tensor = self.conv(x)
            return result

    ((_, reason),) = reasons(fold(seeded(Unread())))
    assert reason.endswith("; nothing reads its result")


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (nn.ReLU(), "its result goes to '1' (ReLU), which is no such layer"),
        (nn.ZeroPad2d(1), "its result goes to 'pad' (pad), which is no such layer"),
    ],
    ids=str,
)
def test_declines_a_reader_that_is_no_such_layer(between: nn.Module, reason: str) -> None:
    ((_, found),) = reasons(fold(stack(nn.BatchNorm2d(3), between, nn.Conv2d(3, 4, 3))))
    assert found == INPUT + reason


def test_declines_a_convolution_whose_weight_is_computed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = stack(nn.BatchNorm2d(3), weight_norm(nn.Conv2d(3, 4, 3)))
    assert reasons(fold(model)) == [
        ("'0'", INPUT + "the forward computes the weight or bias of 'conv2d' after it")
    ]


def test_declines_a_norm_of_weights_that_a_convolution_reads() -> None:
    class Dynamic(Shared):
        def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return F.conv2d(x, self.a(w))

    ((_, reason),) = reasons(fold(seeded(Dynamic()), image(), image(4, 3, 2, 2)))
    assert reason.endswith("; the forward computes the weight or bias of 'conv2d' after it")


def test_declines_an_untraced_reader() -> None:
    class Own(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(super().forward(x).detach().numpy() * 2)

    large = nn.Conv2d(4, 64, 3)  # what is not traced must be a small part of the whole
    assert reasons(fold(stack(nn.BatchNorm2d(3), Own(3, 4, 1), large))) == [
        ("'0'", INPUT + "its result goes to '1', which could not be traced")
    ]


@pytest.mark.parametrize(
    ("layers", "shape", "rank"),
    [
        ((nn.BatchNorm1d(4), nn.Linear(4, 5)), (2, 4, 4), 3),
        ((nn.BatchNorm1d(7), nn.Conv1d(3, 5, 3)), (3, 7), 2),
    ],
    ids=["linear", "unbatched"],
)
def test_declines_another_axis(
    layers: tuple[nn.Module, ...], shape: tuple[int, ...], rank: int
) -> None:
    assert reasons(fold(stack(*layers), image(*shape))) == [
        ("'0'", INPUT + f"it normalises axis 1 of {rank} and '1' has its channels on another")
    ]


# ---- every geometry, against the definition ----------------------------------------------------

BATCH_NORMS: Any = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVS: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: Any = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Module, int]:
    """A convolution or a transposed one with any settings, and its number of axes."""
    axes = draw(st.integers(1, 3))
    transposed = draw(st.booleans())

    def each(least: int, largest: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(least, largest)) for _ in range(axes))

    kernel, dilation = each(1, 3), each(1, 2)
    stride = each(1, 2) if draw(st.booleans()) else (1,) * axes
    full = tuple(d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
    padding = draw(st.sampled_from([(0,) * axes, full, each(0, 2), each(0, 3)]))
    groups = draw(st.sampled_from([1, 2, 4]))
    options: dict[str, Any] = {
        "stride": stride, "padding": padding, "dilation": dilation, "groups": groups,
        "bias": draw(st.booleans()),
    }  # fmt: skip
    if transposed:
        limits = [max(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
        options["output_padding"] = tuple(draw(st.integers(0, limit)) for limit in limits)
        return TRANSPOSED[axes](4, 8, kernel, **options), axes
    options["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    if stride == (1,) * axes and draw(st.booleans()):
        options["padding"] = draw(st.sampled_from(["same", "valid"]))
    return CONVS[axes](4, 8, kernel, **options), axes


def shifts_by_a_constant(layer: Any, shape: tuple[int, ...]) -> bool:
    """Whether the layer turns a constant per channel into one, at this size and a larger one."""
    constant = image(1, 4, *(1,) * len(shape), seed=5, dtype=torch.float64)
    for sizes in (shape, tuple(size + 1 for size in shape)):
        result = layer(constant.expand(1, 4, *sizes)).flatten(2)
        if (result - result[..., :1]).abs().max() > 1e-12 * result.abs().max():
            return False
    return True


@settings(max_examples=60, deadline=None)
@given(layers(), st.booleans(), st.integers(0, 2**16))
def test_every_geometry_folds_exactly_or_is_declined(
    drawn: tuple[nn.Module, int], backwards: bool, seed: int
) -> None:
    """Backwards always; forwards just where a constant stays one, found out by trying."""
    layer, axes = drawn
    norm = BATCH_NORMS[axes](8 if backwards else 4)
    model = seeded(nn.Sequential(*((layer, norm) if backwards else (norm, layer))), seed).double()
    norm.running_mean *= 0.5  # within four deviations, else precision would be a reason
    shape = (9, 7, 8)[:axes]
    x = image(2, 4, *shape, seed=seed + 1, dtype=torch.float64)
    result = run_pass(FoldConvBn(), capture(model, x))
    exact = backwards or shifts_by_a_constant(layer, shape)
    assert (norms_left(result) == 0) == exact
    assert len(result.declined) == (not exact)
    expected, found = model(x), to_module(result.after).eval()(x)
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()
