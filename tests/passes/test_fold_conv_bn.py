"""fold_conv_bn: what folds backwards, what is declined and why, what the result still is.

Forwards and scale_shift have files of their own.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from folding import fold, keys, norms_left, reasons, stack
from hypothesis import given, settings
from hypothesis import strategies as st
from seeded import ConvBn, image, modules_called, seeded, text
from torch import nn
from torch.nn.utils import weight_norm as hooked_weight_norm
from torch.nn.utils.parametrizations import weight_norm

from fxopt.capture import capture
from fxopt.captured import to_module
from fxopt.passes import FoldConvBn
from fxopt.rewrite import run_pass


def test_graph_before_and_after() -> None:
    result = fold(seeded(ConvBn()))
    assert text(result.before) == (
        "input x\nconv = conv(x)\nnorm = norm(conv)\nact = act(norm)\nreturn act"
    )
    assert text(result.after) == "input x\nconv = conv(x)\nact = act(conv)\nreturn act"
    assert [(s.node, s.where, s.note) for s in result.rewritten] == [("norm", "'norm'", "")]
    assert result.declined == ()
    assert result.evidence == {
        "batch_norms_before": 1,
        "batch_norms_left": 0,
        "training": "folded norms have no batch statistics any more",
    }


def test_algebra_of_one_channel() -> None:
    """W' = W·γ/√(σ² + ε), b' = (b − μ)·γ/√(σ² + ε) + β, by hand."""
    conv, norm = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, eps=1.0)
    values = [(conv.weight, 3.0), (conv.bias, 5.0), (norm.weight, 4.0), (norm.bias, 7.0),
              (norm.running_mean, 1.0), (norm.running_var, 3.0)]  # fmt: skip
    for tensor, value in values:
        nn.init.constant_(tensor, value)  # type: ignore[arg-type]
    result = fold(nn.Sequential(conv, norm).eval(), image(1, 1, 3, 5))
    made: Any = result.after.module(result.after.node("_0"))
    assert (made.weight.item(), made.bias.item()) == (6.0, 15.0)


# ---- what folds --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"groups": 2},
        {"groups": 4},
        {"groups": 4, "bias": False},
        {"stride": (2, 1)},
        {"dilation": (1, 2)},
        {"padding": (2, 0)},
        {"padding": "same"},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": 1, "padding_mode": "replicate"},
        {"padding": (1, 2), "padding_mode": "circular"},
        {"bias": False},
        {"groups": 2, "stride": 2, "dilation": 2, "padding": 3, "bias": False},
    ],
    ids=str,
)
def test_folds_every_kind_of_convolution(options: dict[str, Any]) -> None:
    assert norms_left(fold(seeded(ConvBn(4, 8, **options)), image(2, 4, 9, 13))) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"affine": False},
        {"eps": 0.5},
        {"eps": 1e-12},
        {"momentum": None},
        {"momentum": 0.9},
        {"affine": False, "momentum": None, "eps": 0.1},
    ],
    ids=str,
)
def test_folds_every_kind_of_norm(options: dict[str, Any]) -> None:
    assert norms_left(fold(stack(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **options)))) == 0


RANKS = [
    (nn.Linear(5, 7), nn.BatchNorm1d(7), (5,)),
    (nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7, affine=False), (5,)),
    (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), (3, 11)),
    (nn.Conv1d(4, 6, 3, stride=2, padding=2, groups=2, bias=False), nn.BatchNorm1d(6), (4, 11)),
    (nn.Conv1d(4, 6, 3, padding=1, dilation=2, padding_mode="reflect"), nn.BatchNorm1d(6), (4, 11)),
    (nn.Conv3d(2, 4, (1, 3, 2), groups=2), nn.BatchNorm3d(4), (2, 3, 5, 4)),
    (nn.Conv3d(2, 4, 2, stride=(1, 2, 1), padding=1, bias=False), nn.BatchNorm3d(4), (2, 3, 5, 4)),
    (
        nn.Conv3d(2, 4, 3, padding=1, groups=2, padding_mode="circular"),
        nn.BatchNorm3d(4),
        (2, 3, 5, 4),
    ),
    (nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4), (3, 9, 13)),
    (nn.ConvTranspose1d(3, 4, 3), nn.BatchNorm1d(4), (3, 11)),
    (
        nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1, groups=2, bias=False),
        nn.BatchNorm1d(6),
        (4, 11),
    ),
    (nn.ConvTranspose2d(3, 4, (3, 2)), nn.BatchNorm2d(4), (3, 9, 13)),
    (
        nn.ConvTranspose2d(4, 6, 3, stride=(2, 3), padding=1, output_padding=(1, 2), groups=2),
        nn.BatchNorm2d(6),
        (4, 5, 7),
    ),
    (nn.ConvTranspose2d(4, 4, 3, dilation=2, groups=4, bias=False), nn.BatchNorm2d(4), (4, 5, 7)),
    (
        nn.ConvTranspose3d(4, 2, (1, 2, 3), stride=2, groups=2, bias=False),
        nn.BatchNorm3d(2),
        (4, 3, 2, 4),
    ),
]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("layer", "norm", "shape"), RANKS, ids=[str(c[0]) for c in RANKS])
def test_folds_every_rank(
    layer: nn.Module, norm: nn.Module, shape: tuple[int, ...], batch: int
) -> None:
    result = fold(stack(layer, norm), image(batch, *shape))
    assert norms_left(result) == 0
    assert len(result.rewritten) == 1


def test_algebra_of_a_grouped_transposed_convolution() -> None:
    """Output channels are columns of the weight, by group: (in, out / groups, k)."""
    up, norm = nn.ConvTranspose1d(2, 4, 1, groups=2), nn.BatchNorm1d(4, eps=0.0)
    with torch.no_grad():
        up.weight.copy_(torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]))
        up.bias.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))  # type: ignore[union-attr]
        norm.weight.copy_(torch.tensor([10.0, 100.0, 1000.0, 10000.0]))
    result = fold(nn.Sequential(up, norm).eval(), image(2, 2, 5))
    made: Any = result.after.module(result.after.node("_0"))
    assert made.weight.flatten().tolist() == [10.0, 200.0, 3000.0, 40000.0]
    assert made.bias.tolist() == [10.0, 200.0, 3000.0, 40000.0]


def test_folds_a_transposed_convolution_that_is_told_its_output_size() -> None:
    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 4, 3, stride=2)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.norm(self.up(x, output_size=(20, 27)))
            return result

    result = fold(seeded(Told()))
    assert (norms_left(result), result.declined) == (0, ())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_folds_in_float64_and_stores_in_the_models_dtype(dtype: torch.dtype) -> None:
    model: Any = seeded(ConvBn()).to(dtype)
    result = fold(model, image(dtype=dtype))
    conv: Any = result.after.module(result.after.node("conv"))
    assert conv.weight.dtype == conv.bias.dtype == dtype
    norm = model.norm
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    wanted = model.conv.weight.double() * scale.reshape(-1, 1, 1, 1)
    # the last bits may differ: rsqrt and a quotient round differently in float64
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(conv.weight, wanted.to(dtype), rtol=2 * epsilon, atol=0)


def test_folds_a_model_in_training_mode_and_the_result_stays_in_it() -> None:
    model = seeded(ConvBn()).train()
    result = run_pass(FoldConvBn(), capture(model, image()))
    assert norms_left(result) == 0
    assert model.training
    module = to_module(result.after)
    assert module.training
    torch.testing.assert_close(module(image()), model.eval()(image()), rtol=1e-5, atol=1e-5)


def test_folds_a_frozen_norm() -> None:
    class Frozen(ConvBn):
        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self.norm.eval()
            return self

    model = seeded(Frozen())
    result = fold(model)
    assert norms_left(result) == 0
    module = to_module(result.after)
    model.train()
    torch.testing.assert_close(module.train()(image()), model(image()), rtol=1e-5, atol=1e-5)


def test_folds_a_functional_convolution_of_plain_weights() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.empty(4, 3, 3, 3))
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(F.conv2d(x, self.kernel, stride=2))

    result = fold(seeded(Functional()))
    assert norms_left(result) == 0
    assert keys(result) == ["kernel", "conv2d.weight", "conv2d.bias"]
    assert result.evidence["untied"] == [{"name": "kernel", "bytes_added": 4 * 3 * 9 * 4}]


class NormAct(nn.BatchNorm2d):
    """A norm that owns its activation, as timm's does."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(super().forward(x))


def test_folds_a_norm_that_owns_its_activation() -> None:
    result = fold(stack(nn.Conv2d(3, 4, 3), NormAct(4), nn.Conv2d(4, 5, 1), NormAct(5)))
    assert norms_left(result) == 0
    assert [str(n.target) for n in result.after.nodes if n.op == "call_module"] == [
        "0", "1.act", "2", "3.act",
    ]  # fmt: skip


def test_folds_norms_in_a_row() -> None:
    result = fold(stack(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)))
    assert norms_left(result) == 0
    assert len(result.rewritten) == 2


# ---- sharing -----------------------------------------------------------------------------------


class Shared(nn.Module):
    """One convolution at two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.a = nn.BatchNorm2d(3)
        self.b = nn.BatchNorm2d(3)


def test_convolution_called_twice_under_two_norms_is_untied() -> None:
    class TwoNorms(Shared):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.conv(self.a(self.conv(x))))

    result = fold(seeded(TwoNorms()))
    assert norms_left(result) == 0
    first, second = modules_called(result.after, nn.Conv2d)
    assert result.after.module(first) is not result.after.module(second)
    assert result.evidence["untied"] == [
        {"name": "conv.weight", "bytes_added": 3 * 3 * 9 * 4},
        {"name": "conv.bias", "bytes_added": 3 * 4},
    ]


def test_same_pair_called_twice_folds_once_and_stays_shared() -> None:
    class OnePair(Shared):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(self.conv(self.a(self.conv(x))))

    result = fold(seeded(OnePair()))
    assert norms_left(result) == 0
    first, second = modules_called(result.after, nn.Conv2d)
    assert result.after.module(first) is result.after.module(second)
    assert str(first.target) == "conv"
    assert "untied" not in result.evidence
    assert len(result.rewritten) == 2


def test_one_norm_after_two_convolutions_folds_into_both() -> None:
    class OneNorm(Shared):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Conv2d(3, 3, 1, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(self.conv(x)) + self.a(self.other(x))

    result = fold(seeded(OneNorm()))
    assert norms_left(result) == 0
    assert "a.weight" not in keys(result)


def test_convolution_called_again_without_a_norm_keeps_its_weights_there() -> None:
    class Bare(Shared):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(self.conv(x)) + 2 * self.conv(x)

    model: Any = seeded(Bare())
    result = fold(model)
    assert norms_left(result) == 0
    kept: Any = result.after.module(result.after.node("conv_1"))
    assert torch.equal(kept.weight, model.conv.weight)
    assert result.evidence["untied"][0] == {"name": "conv.weight", "bytes_added": 324}


def test_tied_parameters_of_two_convolutions_are_untied() -> None:
    class Tied(Shared):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Conv2d(3, 3, 3, padding=1)
            self.other.weight = self.conv.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.other(self.a(self.conv(x))))

    result = fold(seeded(Tied()))
    assert norms_left(result) == 0
    assert result.evidence["untied"] == [{"name": "conv.weight", "bytes_added": 324}]


def test_weight_that_is_read_elsewhere_stays_for_its_reader() -> None:
    class Penalty(Shared):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.a(self.conv(x)), self.conv.weight.square().sum()

    model: Any = seeded(Penalty())
    result = fold(model)
    assert norms_left(result) == 0
    assert torch.equal(result.after.graph_module.get_submodule("conv").weight, model.conv.weight)
    assert {"name": "conv.weight", "bytes_added": 324} in result.evidence["untied"]


def test_folded_convolutions_share_no_hooks() -> None:
    """A hook that the user hangs on one of them is not called by the other."""

    class TwoNorms(Shared):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(self.conv(x)) + self.b(self.conv(x))

    module = to_module(fold(seeded(TwoNorms())).after)
    first, second = (m for m in module.modules() if isinstance(m, nn.Conv2d))
    calls: list[str] = []
    first.register_forward_hook(lambda *_: calls.append("first"))
    module(image())
    assert calls == ["first"]
    assert not second._forward_hooks


# ---- declined ----------------------------------------------------------------------------------


def test_declines_a_norm_of_the_input() -> None:
    result = fold(stack(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3)))
    assert reasons(result) == [
        (
            "'0'",
            "its input comes from the input 'input_1', not from a convolution or a linear layer; "
            "its result goes to '1' (ReLU), which is no such layer",
        )
    ]
    assert result.rewritten == ()
    assert result.evidence == {"batch_norms_before": 1, "batch_norms_left": 1}


class Norm(nn.Module):
    """A norm after ``between``, which gets a convolution's result."""

    def __init__(self, between: Any, channels: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.pool = nn.MaxPool2d(2)
        self.norm = nn.BatchNorm2d(channels)
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(self.between(self, self.conv(x)))
        return result


@pytest.mark.parametrize(
    ("between", "channels", "source"),
    [
        (lambda net, x: net.pool(x), 4, "'pool' (MaxPool2d)"),
        (lambda net, x: torch.cat([x, x * 2], 1), 8, "'cat' (cat)"),
        (lambda net, x: x + x.flip(1), 4, "'add' (add)"),
    ],
    ids=["pool", "cat", "add"],
)
def test_declines_a_norm_that_follows_no_convolution(
    between: Any, channels: int, source: str
) -> None:
    result = fold(seeded(Norm(between, channels)))
    reason = (
        f"its input comes from {source}, not from a convolution or a linear layer; its result is "
        "an output"
    )
    assert reasons(result) == [("'norm'", reason)]
    assert text(result.after) == text(result.before)


def test_declines_a_convolution_with_another_reader() -> None:
    class Skip(ConvBn):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return self.norm(y) + y

    assert reasons(fold(seeded(Skip()))) == [
        (
            "'norm'",
            "the result of 'conv' is also read by 'add'; its result goes to 'add' (add), which is "
            "no such layer",
        )
    ]


def test_declines_a_convolution_that_is_an_output() -> None:
    class Both(ConvBn):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.conv(x)
            return y, self.norm(y)

    assert reasons(fold(seeded(Both()))) == [
        ("'norm'", "the result of 'conv' is also read by 'output'; its result is an output")
    ]


def test_declines_a_norm_without_running_statistics() -> None:
    model = stack(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    assert reasons(fold(model)) == [
        ("'1'", "it has no running statistics; train it with track_running_stats=True")
    ]


def test_declines_a_norm_that_uses_batch_statistics_in_evaluation() -> None:
    class Batch(ConvBn):
        def train(self, mode: bool = True) -> Batch:
            super().train(mode)
            self.norm.train()
            return self

    result = run_pass(FoldConvBn(), capture(seeded(Batch()), image()))
    assert reasons(result) == [("'norm'", "it normalises by batch statistics in evaluation too")]
    assert result.rewritten == ()


def test_declines_a_norm_whose_parameters_are_computed() -> None:
    class Conditional(ConvBn):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            norm = self.norm
            return F.batch_norm(
                self.conv(x), norm.running_mean, norm.running_var, norm.weight.exp(), norm.bias
            )

    result = fold(seeded(Conditional()))
    (found,) = result.declined
    assert found.reason == "the forward computes its statistics or parameters, or it has none"
    assert result.evidence == {"batch_norms_before": 1, "batch_norms_left": 1}


@pytest.mark.parametrize(
    "normed", [weight_norm, hooked_weight_norm], ids=["parametrized", "hooked"]
)
def test_declines_a_convolution_whose_weight_is_computed(normed: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = stack(normed(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))
    assert reasons(fold(model)) == [
        ("'1'", "the forward computes the weight or bias of 'conv2d' before it; its result is an "
                "output")
    ]  # fmt: skip


def test_declines_a_transposed_convolution_that_is_a_function() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.empty(3, 4, 3, 3))
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(F.conv_transpose2d(x, self.kernel, stride=2))

    ((_, reason),) = reasons(fold(seeded(Functional())))
    assert reason.startswith("the forward calls the function 'conv_transpose2d' before it; ")


def test_norm_that_standardises_weights_is_no_candidate() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = self.weight.reshape(1, self.out_channels, -1)
            weight = F.batch_norm(flat, None, None, training=True).reshape_as(self.weight)
            return F.conv2d(x, weight, self.bias)

    result = fold(stack(Standardised(3, 4, 3)))
    assert result.declined == result.rewritten == ()


def test_declines_a_norm_after_a_sequence_of_linear_results() -> None:
    model = stack(nn.Linear(5, 7), nn.BatchNorm1d(4))
    assert reasons(fold(model, image(2, 4, 5))) == [
        ("'1'", "it normalises axis 1 of 3 and '0' has its channels on another; its result is an "
                "output")
    ]  # fmt: skip


def test_declines_a_norm_over_the_length_of_an_unbatched_convolution() -> None:
    """(C, L) → BatchNorm1d normalises L, though L may happen to be the number of channels."""
    model = stack(nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5))
    ((_, reason),) = reasons(fold(model, image(3, 7)))
    assert reason.startswith("it normalises axis 1 of 2 and '0' has its channels on another; ")


def test_declines_what_comes_from_an_opaque_leaf() -> None:
    class Untraceable(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(x.detach().numpy() * 2)

    model = stack(nn.Conv2d(3, 4, 3), Untraceable(), nn.BatchNorm2d(4))
    assert reasons(fold(model)) == [
        ("'2'", "its input comes from '1', which could not be traced; its result is an output")
    ]


def test_declines_an_untraced_convolution() -> None:
    class Own(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(super().forward(x).detach().numpy() * 2)

    large = nn.Conv2d(4, 64, 3, padding=1)  # what is not traced must be a small part of the whole
    ((_, reason),) = reasons(fold(stack(Own(3, 4, 1), nn.BatchNorm2d(4), large)))
    assert reason.startswith("its input comes from '0', which could not be traced; ")


def through_numpy(module: nn.Module, args: Any, result: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(result.detach().numpy() * 2)


def test_declines_norms_that_do_more_than_torchs() -> None:
    class Own(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(super().forward(x).detach().numpy() * 2)

    hooked = nn.BatchNorm2d(4)
    hooked.register_forward_hook(through_numpy)
    large = nn.Conv2d(4, 64, 3)
    result = fold(stack(nn.Conv2d(3, 4, 3), Own(4), nn.Conv2d(4, 4, 1), hooked, large))
    assert reasons(result) == [
        ("'1'", "it was not traced, and may compute more than a BatchNorm (Own)"),
        ("'3'", "it was not traced, and may compute more than a BatchNorm (BatchNorm2d)"),
    ]


def test_declines_a_norm_that_is_kept_whole_for_what_it_does_in_training() -> None:
    class Noisy(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            return y + torch.rand_like(y) if self.training else y * 2

    result = fold(stack(nn.Conv2d(3, 4, 3), Noisy(4, affine=False)))
    assert reasons(result) == [
        ("'1'", "it was not traced, and may compute more than a BatchNorm (Noisy)")
    ]


def test_folds_subclasses_by_what_their_forward_computes() -> None:
    class Same(nn.BatchNorm2d):
        """Another name alone."""

    class Twice(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    lazy = nn.LazyBatchNorm2d()
    lazy(image(2, 4, 3, 5))
    layers = (nn.Conv2d(3, 4, 3), Same(4), nn.Conv2d(4, 4, 1), Twice(4), nn.Conv2d(4, 4, 1), lazy)
    result = fold(stack(*layers))
    assert (norms_left(result), len(result.rewritten)) == (0, 3)
    assert len([node for node in result.after.nodes if node.target is torch.mul]) == 1


# ---- what the result still is ------------------------------------------------------------------


class Net(nn.Module):
    """Two pairs, a norm that stays, and members that forward never reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBn()
        self.first = nn.BatchNorm2d(4)
        self.body = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1, padding=1))
        self.unread = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.register_buffer("mean", torch.ones(3, 1, 1))
        self.register_buffer("scratch", torch.ones(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.body(self.stem(x - self.mean))
        return result


def test_keys_of_what_is_left_stay() -> None:
    model = seeded(Net())
    result = fold(model)
    gone = {k for k in model.state_dict() if k.startswith("stem.norm.")}
    assert set(keys(result)) == set(model.state_dict()) - gone
    theirs, mine = model.state_dict(), to_module(result.after).state_dict()
    unchanged = [k for k in mine if not k.startswith("stem.conv.")]
    assert all(torch.equal(mine[k], theirs[k]) for k in unchanged)


def test_users_module_is_untouched() -> None:
    model = seeded(Net()).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modules = list(model.modules())
    module = to_module(run_pass(FoldConvBn(), capture(model, image())).after)
    module(image()).sum().backward()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert model.training
    assert list(model.modules()) == modules
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_result_trains_on() -> None:
    model: Any = seeded(ConvBn(bias=False))
    module: Any = to_module(fold(model).after).train()
    assert [(n, p.requires_grad, p.dtype) for n, p in module.named_parameters()] == [
        ("conv.weight", True, torch.float32), ("conv.bias", True, torch.float32),
    ]  # fmt: skip
    before = module.conv.weight.detach().clone()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(image()).square().mean().backward()
    optimizer.step()
    assert module.conv.weight.grad.abs().max() > 0
    assert not torch.equal(module.conv.weight, before)


def test_frozen_convolution_stays_frozen() -> None:
    model = seeded(ConvBn()).requires_grad_(False)
    assert not any(p.requires_grad for p in to_module(fold(model).after).parameters())


def test_folded_layer_is_a_plain_one_with_the_same_settings() -> None:
    options: dict[str, Any] = {
        "groups": 2, "stride": 2, "dilation": 2, "padding": 3, "padding_mode": "circular",
    }  # fmt: skip
    result = fold(seeded(ConvBn(4, 8, **options, bias=False)), image(2, 4, 9, 13))
    conv: Any = result.after.module(result.after.node("conv"))
    assert type(conv) is nn.Conv2d
    assert repr(conv) == repr(nn.Conv2d(4, 8, 3, **options))


# ---- random stacks -----------------------------------------------------------------------------


@st.composite
def stacks(draw: st.DrawFn) -> tuple[nn.Module, torch.Tensor]:
    """A small stack of convolutions with random options, most of them followed by norms."""
    groups = draw(st.sampled_from([1, 2, 4]))
    channels = inputs = 4
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 3))):
        outputs = draw(st.sampled_from([4, 8]))
        kernel = draw(st.sampled_from([(1, 1), (3, 3), (1, 3), (2, 1)]))
        layers.append(
            nn.Conv2d(
                channels, outputs, kernel, stride=draw(st.integers(1, 2)), padding=(2, 1),
                dilation=draw(st.integers(1, 2)), groups=groups, bias=draw(st.booleans()),
                padding_mode=draw(st.sampled_from(["zeros", "replicate", "circular"])),
            )
        )  # fmt: skip
        for _ in range(draw(st.integers(0, 2))):
            eps, affine = draw(st.sampled_from([1e-5, 1e-3, 0.1])), draw(st.booleans())
            layers.append(nn.BatchNorm2d(outputs, eps, affine=affine))
        layers += [nn.ReLU()] * draw(st.integers(0, 1))
        channels = outputs
    layers.append(nn.Conv2d(channels, 3, 1))  # linear: the result is not all zero
    model = seeded(nn.Sequential(*layers), seed=draw(st.integers(0, 2**16)))
    return model, image(draw(st.integers(1, 3)), inputs, 16, 21, seed=draw(st.integers(0, 99)))


@settings(max_examples=15, deadline=None)
@given(stacks())
def test_random_stacks_fold(drawn: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = drawn
    result = fold(model, x)
    assert norms_left(result) == 0
    assert result.declined == ()
