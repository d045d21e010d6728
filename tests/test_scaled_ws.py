"""The layers with scaled weight standardisation."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from seeded import image, seeded
from torch import nn
from torch.nn.utils import parametrize

import fxopt
from fxopt.scaled_ws import (
    EPS,
    ScaledWS,
    ScaledWSConv1d,
    ScaledWSConv2d,
    ScaledWSConv3d,
    ScaledWSLinear,
)


def layer(kind: type[ScaledWS] = ScaledWSConv2d, *args: Any, **options: Any) -> Any:
    """Seeded, in float64."""
    return seeded(kind(*(args or (6, 4, 3)), **options)).double()


CONVS: dict[str, tuple[type[ScaledWS], tuple[int, ...], dict[str, Any], tuple[int, ...]]] = {
    "plain": (ScaledWSConv2d, (6, 4, 3), {}, (2, 6, 9, 7)),
    "strided": (ScaledWSConv2d, (6, 4, 3), {"stride": (2, 1), "padding": (1, 2)}, (2, 6, 9, 7)),
    "groups": (ScaledWSConv2d, (6, 4, 3), {"groups": 2, "dilation": 2}, (2, 6, 9, 7)),
    "depthwise": (ScaledWSConv2d, (6, 12, 3), {"groups": 6, "padding": "same"}, (2, 6, 9, 7)),
    "pointwise": (ScaledWSConv2d, (6, 4, 1), {"bias": False}, (2, 6, 9, 7)),
    "circular": (ScaledWSConv2d, (6, 4, 3), {"padding": 1, "padding_mode": "circular"}, (2, 6, 9, 7)),
    "one axis": (ScaledWSConv1d, (6, 4, 3), {"padding": 1}, (2, 6, 9)),
    "three axes": (ScaledWSConv3d, (6, 4, (1, 2, 3)), {}, (2, 6, 3, 4, 5)),
    "linear": (ScaledWSLinear, (6, 4), {}, (2, 5, 6)),
}  # fmt: skip


@pytest.mark.parametrize("keep_mean", [False, True])
@pytest.mark.parametrize("name", CONVS)
def test_is_the_plain_layer_of_the_formulas_weight(name: str, keep_mean: bool) -> None:
    """Filter after filter, as the paper writes it."""
    kind, args, options, shape = CONVS[name]
    made = layer(kind, *args, gamma=1.7, keep_mean=keep_mean, **options)
    filters = []
    for index, given in enumerate(made.weight.detach()):
        count = given.numel()
        mean = given.sum() / count
        variance = ((given - mean) ** 2).sum() / count
        norm = max((count * variance).item(), EPS) ** 0.5
        extra = made.mean[index] if keep_mean else 0.0
        filters.append(1.7 * made.gain[index] * (given - mean) / norm + extra)
    plain = type(made).plain(*args, **options).double()
    plain.weight = nn.Parameter(torch.stack(filters))
    plain.bias = made.bias
    x = image(*shape, dtype=torch.float64)
    torch.testing.assert_close(made(x), plain(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
def test_equals_timms_layer(groups: int) -> None:
    """timm adds its ε to the variance; so small it is no matter. Its keys are the same."""
    theirs = pytest.importorskip("timm.layers").ScaledStdConv2d
    reference = theirs(6, 4, 3, padding=1, groups=groups, gamma=1.7, eps=1e-30).double()
    made = layer(ScaledWSConv2d, 6, 4, 3, padding=1, groups=groups, gamma=1.7)
    assert list(made.state_dict()) == list(reference.state_dict())
    state = made.state_dict()
    reference.load_state_dict({k: state[k].view_as(v) for k, v in reference.state_dict().items()})
    x = image(2, 6, 9, 7, dtype=torch.float64)
    torch.testing.assert_close(made(x), reference(x), rtol=1e-12, atol=1e-12)


def test_one_filter_by_hand() -> None:
    """w = (1, 3, 2, 2): μ = 2, N·σ² = 2, so ŵ = 2·3·(-1, 1, 0, 0)/√2."""
    made = ScaledWSLinear(4, 1, gamma=2.0)
    with torch.no_grad():
        made.weight.copy_(torch.tensor([[1.0, 3.0, 2.0, 2.0]]))
        made.gain.fill_(3.0)
    expected = torch.tensor([[-6.0, 6.0, 0.0, 0.0]]) / 2**0.5
    torch.testing.assert_close(made.standardised_weight(), expected)


def test_begins_with_gain_1_and_bias_0() -> None:
    made = ScaledWSConv2d(3, 5, 3, keep_mean=True, dtype=torch.float64)
    assert [made.gain.tolist(), made.bias.tolist(), made.mean.tolist()] == [
        [1] * 5,
        [0] * 5,
        [0] * 5,
    ]  # type: ignore[union-attr]
    norms = torch.linalg.vector_norm(made.standardised_weight().flatten(1), dim=1)
    torch.testing.assert_close(norms, torch.ones(5, dtype=torch.float64))
    with torch.no_grad():
        made.gain.zero_()
    made.reset_parameters()
    assert made.gain.tolist() == [1] * 5


def test_the_floor_is_of_variance_times_fan_in() -> None:
    made = layer()
    with torch.no_grad():
        made.weight.mul_(1e-3).add_(1.0)  # N·σ² about 54·1e-6/54
        made.gain.fill_(1.0)
    centred = made.weight - made.weight.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(made.standardised_weight(), centred / EPS**0.5, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_dead_filter_gives_zero_and_finite_gradients(value: float) -> None:
    made = layer()
    with torch.no_grad():
        made.weight[1] = value
    x = image(2, 6, 9, 7, dtype=torch.float64)
    result = made(x)
    assert torch.allclose(result[:, 1], made.bias[1])
    result.square().sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in made.parameters())


def test_gradients() -> None:
    made = layer(ScaledWSConv2d, 2, 3, 2, keep_mean=True)
    names = list(dict(made.named_parameters()))

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        given = dict(zip(names, parameters, strict=True))
        result: torch.Tensor = torch.func.functional_call(made, given, (x,))
        return result

    x = image(1, 2, 3, 4, dtype=torch.float64).requires_grad_()
    parameters = (p.detach().clone().requires_grad_() for p in made.parameters())
    assert torch.autograd.gradcheck(run, (x, *parameters))


class Twice(nn.Module):
    """One layer, called twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = ScaledWSConv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.conv(self.conv(x).relu())
        return result


def test_a_shared_layer_standardises_once_under_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = seeded(Twice()).double().train(), image(dtype=torch.float64)
    calls = []
    own = ScaledWS._standardised

    def counted(self: ScaledWS) -> torch.Tensor:
        calls.append(self)
        return own(self)

    monkeypatch.setattr(ScaledWS, "_standardised", counted)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    assert len(calls) == 2
    with parametrize.cached():
        cached = gradients()
    assert len(calls) == 3
    for one, other in zip(plain, cached, strict=True):
        torch.testing.assert_close(one, other)


def test_the_cache_is_of_this_layers_tensors_in_this_mode() -> None:
    """Not of what torch keeps for a parametrized weight, of a layer that is gone, without grad."""
    x = image(2, 6, 9, 7, dtype=torch.float64)
    normed = torch.nn.utils.parametrizations.weight_norm(layer())
    expected = normed(x)
    with parametrize.cached():
        own = normed.weight
        torch.testing.assert_close(normed(x), expected)
        assert normed.weight is own
    made = layer()
    with parametrize.cached():
        with torch.no_grad():
            made(x)
        made(x).sum().backward()
        other = {name: torch.ones_like(p) for name, p in made.named_parameters()}
        found = torch.func.functional_call(made, other, (x,))
        torch.testing.assert_close(found, torch.ones_like(found))
        made.fold()
    assert made.gain.grad is not None
    with parametrize.cached():
        for seed in range(5):
            fresh = seeded(ScaledWSConv2d(6, 4, 3), seed).double()
            found = fresh(x)
            torch.testing.assert_close(found, fresh.fold()(x))
            del fresh


def test_nothing_is_cached_in_evaluation() -> None:
    made = layer().eval()
    x = image(2, 6, 9, 7, dtype=torch.float64)
    with torch.no_grad():
        before = made(x)
        made.weight.data[0, 0] += 1.0
        assert not torch.allclose(made(x), before)
        with parametrize.cached():
            made(x)
        made.weight.data[0, 0] -= 1.0
        torch.testing.assert_close(made(x), before)


@pytest.mark.parametrize("name", CONVS)
def test_folds_into_the_plain_layer(name: str) -> None:
    kind, args, options, shape = CONVS[name]
    made = layer(kind, *args, gamma=1.7, keep_mean=True, **options)
    plain = made.fold()
    assert type(plain) is kind.plain
    assert set(vars(plain)) == set(vars(kind.plain(*args, **options)))
    x = image(*shape, dtype=torch.float64)
    assert torch.equal(plain(x), made(x))
    with torch.no_grad():
        for tensor in plain.parameters():
            tensor.zero_()
    assert made.weight.any()
    assert made.bias is None or made.bias.any()


def test_folding_keeps_the_mode_and_what_trains() -> None:
    made = layer().train().requires_grad_(False)
    plain = made.fold()
    assert (plain.training, plain.weight.requires_grad) == (True, False)


def test_copies_and_pickles() -> None:
    made = layer(keep_mean=True)
    x = image(2, 6, 9, 7, dtype=torch.float64)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(twin(x), made(x))
        assert twin.weight is not made.weight
    assert repr(made) == (
        "ScaledWSConv2d(6, 4, kernel_size=(3, 3), stride=(1, 1), gamma=1, eps=0.0001, "
        "keep_mean=True)"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    """A few roundings of the weight, and those of the convolution, as large as the result."""
    made = layer(gamma=1.7)
    x = image(2, 6, 9, 7, dtype=dtype)
    found = copy.deepcopy(made).to(dtype)(x)
    assert found.dtype == dtype
    expected = made(x.double())
    bound = 16 * torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("factor", [0.05, 300.0])
def test_half_precision_of_large_and_small_filters(factor: float) -> None:
    """N·σ² is computed in float32: it leaves the range of float16."""
    wide = layer(ScaledWSConv2d, 64, 4, 3)
    with torch.no_grad():
        wide.weight.mul_(factor)
        narrow = copy.deepcopy(wide).half()
        found, expected = narrow.standardised_weight().double(), wide.standardised_weight()
    assert float((found - expected).norm() / expected.norm()) < 8 * torch.finfo(torch.float16).eps


def test_is_called_traced_and_made_as_the_plain_layer() -> None:
    net = nn.Sequential(
        ScaledWSConv2d(3, 4, 3, keep_mean=True), nn.Flatten(), ScaledWSLinear(12, 2)
    )
    x = image(2, 3, 3, 5)
    torch.testing.assert_close(torch.fx.symbolic_trace(net)(x), net(x))
    torch.testing.assert_close(net[0](input=x), net[0](x))
    assert nn.utils.skip_init(ScaledWSConv2d, 3, 4, 3).weight.shape == (4, 3, 3, 3)
    assert ScaledWSLinear(3, 0)(image(2, 3)).shape == (2, 0)


@pytest.mark.parametrize("options", [{"gamma": float("nan")}, {"eps": 0.0}, {"eps": -1.0}])
def test_refuses_wrong_constants(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="gamma is finite and eps positive, not"):
        ScaledWSConv2d(3, 4, 3, **options)


def test_capture_keeps_the_layer_and_counts_it_as_a_convolution() -> None:
    net = nn.Sequential(
        ScaledWSConv2d(3, 8, 3, padding=1), nn.ReLU(), ScaledWSConv2d(8, 8, 3, groups=8)
    )
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8))
    reports = [fxopt.report(fxopt.capture(seeded(each), image())) for each in (net, plain)]
    assert [row.kind for row in reports[0].operators] == ["conv2d", "activation", "depthwise"]
    assert reports[0].totals.macs == reports[1].totals.macs
    assert F.conv2d not in {n.target for n in fxopt.capture(net, image()).nodes}


def test_runs_in_its_planned_arena() -> None:
    """The depthwise convolution is written over its operand, with its standardised weight."""
    net = nn.Sequential(ScaledWSConv2d(3, 8, 3), nn.ReLU(), ScaledWSConv2d(8, 8, 3, groups=8))
    program = fxopt.capture(seeded(net), image())
    plan = fxopt.plan_memory(program, memory_model=fxopt.MemoryModel.preset("tinyengine"))
    (found,) = fxopt.execute_in_arena(program, plan, image())
    torch.testing.assert_close(found, net(image()), rtol=1e-5, atol=1e-5)
