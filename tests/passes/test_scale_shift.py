"""fold_conv_bn{scale_shift=true}: a norm that no layer takes in becomes a scale and shift."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from folding import fold, keys, norms_left, notes, reasons, stack
from seeded import image, modules_called, seeded, text
from torch import nn

import fxopt
from fxopt.capture import capture
from fxopt.captured import to_module
from fxopt.layers import ScaleShift
from fxopt.passes import FoldConvBn
from fxopt.rewrite import run_pass

ALONE = "now a scale and shift"


class Lone(nn.Module):
    """A norm between two layers that take nothing in."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(2)
        self.norm = nn.BatchNorm2d(3, **options)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.act(self.norm(self.pool(x)))
        return result


def scale_shift_of(model: nn.Module, *inputs: torch.Tensor) -> Any:
    """The one layer that was made."""
    result = fold(model, *inputs, scale_shift=True)
    assert (norms_left(result), result.declined) == (0, ())
    (node,) = modules_called(result.after, ScaleShift)
    return result.after.module(node)


def test_graph_before_and_after() -> None:
    result = fold(seeded(Lone()), scale_shift=True)
    assert text(result.after) == text(result.before)
    assert notes(result) == [("norm", ALONE)]
    assert result.record.options == {"scale_shift": True}
    assert keys(result) == ["norm.weight", "norm.bias"]
    assert result.evidence == {
        "batch_norms_before": 1,
        "batch_norms_left": 0,
        "training": "folded norms have no batch statistics any more",
    }


def test_is_off_by_default() -> None:
    result = fold(seeded(Lone()))
    assert (norms_left(result), result.rewritten) == (1, ())
    assert result.after is result.before


def test_algebra_of_one_channel() -> None:
    """w = γ/√(σ² + ε) = 4/2, b = β - μ·w = 7 - 2, by hand."""
    norm = nn.BatchNorm1d(1, eps=1.0)
    values = [(norm.weight, 4.0), (norm.bias, 7.0), (norm.running_mean, 1.0),
              (norm.running_var, 3.0)]  # fmt: skip
    for tensor, value in values:
        nn.init.constant_(tensor, value)  # type: ignore[arg-type]
    made = scale_shift_of(nn.Sequential(norm).eval(), image(4, 1))
    assert (made.weight.item(), made.bias.item()) == (2.0, 5.0)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(5), (3, 5)),
        (nn.BatchNorm1d(5), (3, 5, 4)),
        (nn.BatchNorm2d(5, affine=False), (3, 5, 2, 3)),
        (nn.BatchNorm3d(5, eps=0.1), (2, 5, 2, 3, 4)),
        (nn.SyncBatchNorm(5), (2, 5, 2, 3)),
    ],
    ids=str,
)
def test_every_rank(norm: nn.Module, shape: tuple[int, ...]) -> None:
    assert scale_shift_of(stack(norm), image(*shape)).weight.shape == (5,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_has_the_models_dtype(dtype: torch.dtype) -> None:
    made = scale_shift_of(seeded(Lone()).to(dtype), image(dtype=dtype))
    assert made.weight.dtype == made.bias.dtype == dtype


def test_float32_statistics_of_half_activations_keep_their_precision() -> None:
    made = scale_shift_of(seeded(Lone()), image(dtype=torch.bfloat16))
    assert made.weight.dtype == torch.float32
    assert made(image(dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_mean_far_from_zero_costs_nothing() -> None:
    model: Any = seeded(Lone())
    model.norm.running_mean += 1000
    x = image() + 1000
    result = run_pass(FoldConvBn(scale_shift=True), capture(model, x), example=[x])
    assert norms_left(result) == 0


def test_trains_as_the_norms_parameters_did() -> None:
    model: Any = seeded(Lone())
    model.norm.bias.requires_grad_(False)
    made = scale_shift_of(model)
    assert (made.weight.requires_grad, made.bias.requires_grad) == (True, False)
    plain = scale_shift_of(seeded(Lone(affine=False)))
    assert not plain.weight.requires_grad
    assert not plain.bias.requires_grad


def test_result_trains_pickles_and_runs_at_any_batch_size() -> None:
    model = seeded(Lone())
    module: Any = to_module(fold(model, scale_shift=True).after)
    twin = pickle.loads(pickle.dumps(module))
    x = image(5, 3, 10, 12)
    assert torch.equal(twin(x), module(x))
    torch.testing.assert_close(module(x), model(x), rtol=1e-5, atol=1e-5)
    module.train()(x).square().mean().backward()
    assert module.norm.weight.grad.abs().max() > 0


def test_exports_to_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    module = fxopt.transform(seeded(Lone()), "fold_conv_bn{scale_shift=true}", image())
    fxopt.export_onnx(module, tmp_path / "lone.onnx")
    graph = onnx.load(tmp_path / "lone.onnx").graph
    assert [node.op_type for node in graph.node] == ["AveragePool", "Mul", "Add", "Relu"]


# ---- which norms -------------------------------------------------------------------------------


def test_what_folds_still_folds() -> None:
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1),
              nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1))  # fmt: skip
    result = fold(stack(*layers), scale_shift=True)
    assert (norms_left(result), result.declined) == (0, ())
    assert dict(notes(result)) == {"_1": "", "_3": "folded forwards into '4'", "_6": ALONE}


def test_a_norm_waits_for_the_norm_between_it_and_its_layer() -> None:
    layers = (nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3))
    result = fold(stack(*layers), scale_shift=True)
    assert [note for _, note in notes(result)] == ["folded forwards into '2'"] * 2


def test_norm_called_twice_is_one_layer() -> None:
    class Twice(Lone):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x.relu()) + self.norm(x.sigmoid())

    result = fold(seeded(Twice()), scale_shift=True)
    first, second = modules_called(result.after, ScaleShift)
    assert result.after.module(first) is result.after.module(second)
    assert "untied" not in result.evidence
    assert keys(result) == ["norm.weight", "norm.bias"]


def test_norm_called_twice_folds_here_and_stays_there() -> None:
    class Mixed(Lone):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.conv(x)).mean() + self.norm(x.relu())

    result = fold(seeded(Mixed()), scale_shift=True)
    assert (norms_left(result), result.declined) == (0, ())
    assert sorted(note for _, note in notes(result)) == ["", ALONE]
    assert set(keys(result)) == {"norm.weight", "norm.bias", "conv.weight", "conv.bias"}


def test_functional_norm_of_plain_tensors() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.empty(3))
            self.beta = nn.Parameter(torch.empty(3))
            self.register_buffer("mean", torch.empty(3))
            self.register_buffer("variance", torch.empty(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.batch_norm(x, self.mean, self.variance, self.gamma, self.beta)  # type: ignore[arg-type]

    model: Any = seeded(Functional())
    with torch.no_grad():
        model.mean.copy_(image(3))
        model.variance.copy_(image(3).abs() + 0.5)
    made = scale_shift_of(model)
    assert made.weight.requires_grad


def test_norm_that_owns_its_activation_keeps_it() -> None:
    class NormAct(nn.BatchNorm2d):
        def __init__(self) -> None:
            super().__init__(3)
            self.act = nn.PReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.act(super().forward(x))
            return result

    result = fold(stack(NormAct()), scale_shift=True)
    assert keys(result) == ["0.weight", "0.bias", "0.act.weight"]


def test_declines_a_norm_without_running_statistics() -> None:
    assert reasons(fold(seeded(Lone(track_running_stats=False)), scale_shift=True)) == [
        ("'norm'", "it has no running statistics; train it with track_running_stats=True")
    ]


def test_declines_a_norm_that_uses_batch_statistics_in_evaluation() -> None:
    class Batch(Lone):
        def train(self, mode: bool = True) -> Batch:
            super().train(mode)
            self.norm.train()
            return self

    result = run_pass(FoldConvBn(scale_shift=True), capture(seeded(Batch()), image()))
    assert reasons(result) == [("'norm'", "it normalises by batch statistics in evaluation too")]


def test_a_frozen_norm_becomes_one() -> None:
    class Frozen(Lone):
        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self.norm.eval()
            return self

    model = seeded(Frozen())
    module = to_module(fold(model, scale_shift=True).after)
    model.train()
    torch.testing.assert_close(module.train()(image()), model(image()), rtol=1e-5, atol=1e-5)
