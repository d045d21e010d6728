"""Adaptive gradient clipping, and optimizers that do it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from seeded import image, seeded
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fxopt
from fxopt.optim import adaptive_gradient_clip, with_adaptive_gradient_clip
from fxopt.scaled_ws import ScaledWSConv2d, ScaledWSLinear


def parameter(values: torch.Tensor, gradient: torch.Tensor) -> nn.Parameter:
    made = nn.Parameter(values.clone())
    made.grad = gradient.clone()
    return made


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> nn.Parameter:
    """Weights of about 1, gradients of about ``scale``, in float64."""
    weight = image(*shape, seed=seed, dtype=torch.float64)
    return parameter(weight, scale * image(*shape, seed=seed + 1, dtype=torch.float64))


def test_the_papers_example_by_hand() -> None:
    weight = parameter(
        torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.6, 0.8]], dtype=torch.float64),
        torch.tensor([[0.03, 0.04], [1.0, 0.0], [0.003, 0.004]], dtype=torch.float64),
    )
    bias = parameter(torch.tensor([3.0, 4.0]), torch.tensor([6.0, 8.0]))
    adaptive_gradient_clip([weight, bias])
    assert weight.grad is not None
    assert bias.grad is not None
    expected = torch.tensor([[0.03, 0.04], [1e-5, 0.0], [0.003, 0.004]], dtype=torch.float64)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(bias.grad, torch.tensor([0.03, 0.04]))


SHAPES = {
    "convolution": (8, 4, 3, 3), "depthwise": (8, 1, 3, 3), "one axis": (8, 4, 3),
    "three axes": (4, 2, 2, 3, 2), "linear": (8, 5), "bias": (8,), "scalar": (1,),
}  # fmt: skip


@pytest.mark.parametrize("scale", [1e-3, 0.02, 1.0, 1e-9])
def test_equals_timms(scale: float) -> None:
    theirs = pytest.importorskip("timm.utils.agc").adaptive_clip_grad
    ours = [drawn(*shape, seed=n, scale=scale) for n, shape in enumerate(SHAPES.values())]
    with torch.no_grad():
        ours[0][2] = 0.0
        ours[4][:2] *= 1e-4
    reference = [parameter(each.detach(), each.grad) for each in ours]  # type: ignore[arg-type]
    adaptive_gradient_clip(ours, clip=0.05)
    theirs(reference, clip_factor=0.05)
    for one, other in zip(ours, reference, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(8, 1, 1, 1), (1, 8), (8, 1), (), (1,), (1, 1, 5, 1)])
def test_at_most_one_long_axis_is_one_unit(shape: tuple[int, ...]) -> None:
    """The gradient shrinks as a whole, to λ·‖W‖."""
    which = parameter(
        image(8)[: max(1, torch.Size(shape).numel())].reshape(shape), torch.ones(shape)
    )
    before = which.grad
    assert before is not None
    direction = before / before.norm()
    adaptive_gradient_clip(which)
    assert which.grad is not None
    torch.testing.assert_close(which.grad, 0.01 * which.detach().norm() * direction)


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (4, 1, 3, 3), (4, 6), (4, 2, 5), (4, 1, 1, 2)])
def test_each_filter_is_a_unit(shape: tuple[int, ...]) -> None:
    which = drawn(*shape)
    which.grad[1] = 1e-6  # type: ignore[index]
    expected = which.grad.clone()  # type: ignore[union-attr]
    for row in (0, 2, 3):
        expected[row] *= 0.01 * which[row].detach().norm() / expected[row].norm()
    adaptive_gradient_clip(which)
    torch.testing.assert_close(which.grad, expected, rtol=1e-12, atol=0)


def test_the_gradient_is_changed_in_place_and_what_has_none_is_left_out() -> None:
    which, other = drawn(4, 3), nn.Parameter(torch.ones(3))
    gradient = which.grad
    adaptive_gradient_clip([which, other, which])
    once = copy.deepcopy(gradient)
    assert which.grad is gradient
    assert other.grad is None
    adaptive_gradient_clip([which])
    torch.testing.assert_close(gradient, once)
    adaptive_gradient_clip([], exclude=())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    wide = drawn(8, 4, 3, 3)
    narrow = parameter(wide.detach().to(dtype), wide.grad.to(dtype))  # type: ignore[union-attr]
    adaptive_gradient_clip([wide, narrow])
    assert narrow.grad is not None
    assert narrow.grad.dtype == dtype
    torch.testing.assert_close(
        narrow.grad.double(), wide.grad, rtol=4 * torch.finfo(dtype).eps, atol=0
    )


def test_gradients_that_are_not_finite_stay_so() -> None:
    """A scaler or a guard that looks for them still finds them."""
    which = drawn(3, 4)
    which.grad[0, 0] = float("nan")  # type: ignore[index]
    which.grad[1, 0] = float("inf")  # type: ignore[index]
    adaptive_gradient_clip(which)
    finite = torch.isfinite(which.grad).all(1)  # type: ignore[arg-type]
    assert finite.tolist() == [False, False, True]


# ---- what is excluded --------------------------------------------------------------------------


class HeadFirst(nn.Module):
    """The classifier is registered first and called last."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)
        self.conv = ScaledWSConv2d(3, 6, 3)
        self.gate = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        x = x * torch.sigmoid(self.gate(x.mean((2, 3))))[..., None, None]
        result: torch.Tensor = self.head(x.mean((2, 3)))
        return result


def with_gradients(model: nn.Module) -> nn.Module:
    for tensor in model.parameters():
        tensor.grad = torch.ones_like(tensor)
    return model


def unclipped(model: nn.Module) -> list[str]:
    return [n for n, p in model.named_parameters() if bool((p.grad == 1).all())]  # type: ignore[union-attr]


def test_of_a_module_the_weight_of_the_last_linear_is_excluded() -> None:
    model = with_gradients(seeded(HeadFirst()))
    state = torch.get_rng_state()
    adaptive_gradient_clip(model)
    assert unclipped(model) == ["head.weight"]
    assert torch.equal(state, torch.get_rng_state())


def test_of_a_captured_module_too() -> None:
    model = with_gradients(fxopt.transform(seeded(HeadFirst()), [], image()))
    adaptive_gradient_clip(model)
    assert unclipped(model) == ["head.weight"]


@pytest.mark.parametrize(
    "given",
    [lambda m: m.named_parameters(), lambda m: dict(m.named_parameters()), lambda m: m.parameters(),
     lambda m: list(m.parameters())],
)  # fmt: skip
def test_of_named_and_bare_tensors_nothing_is(given: Callable[[nn.Module], Any]) -> None:
    model = with_gradients(seeded(HeadFirst()))
    adaptive_gradient_clip(given(model))
    assert unclipped(model) == []


@pytest.mark.parametrize(
    ("exclude", "kept"),
    [
        ((), []),
        (["head"], ["head.weight", "head.bias"]),
        (["conv.gain", "gate.weight"], ["conv.gain", "gate.weight"]),
    ],
)
def test_excludes_by_name(exclude: list[str], kept: list[str]) -> None:
    for given in (lambda m: m, lambda m: m.named_parameters()):
        model = with_gradients(seeded(HeadFirst()))
        adaptive_gradient_clip(given(model), exclude=exclude)  # type: ignore[arg-type]
        assert unclipped(model) == kept


def test_a_tied_tensor_is_excluded_by_either_name() -> None:
    for name in ("0.weight", "2.weight"):
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
        model[2].weight = model[0].weight
        adaptive_gradient_clip(with_gradients(model), exclude=[name])
        assert unclipped(model) == ["0.weight"]


def test_other_last_linears() -> None:
    standardised = nn.Sequential(nn.Linear(4, 4), ScaledWSLinear(4, 4))
    parametrized = nn.Sequential(nn.Linear(4, 4), parametrizations.weight_norm(nn.Linear(4, 4)))
    twice = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    twice.append(twice[0])
    none = nn.Sequential(nn.Conv2d(3, 4, 3))
    older = [make(nn.Linear(4, 4)) for make in (nn.utils.weight_norm, nn.utils.spectral_norm)]
    pruned = prune.l1_unstructured(nn.Linear(4, 4), "weight", amount=0.3)
    expected = [
        (standardised, ["1.weight"]), (twice, ["0.weight"]), (none, []),
        (nn.Sequential(nn.Linear(4, 4), older[0]), ["1.weight_g", "1.weight_v"]),
        (nn.Sequential(nn.Linear(4, 4), older[1]), ["1.weight_orig"]),
        (nn.Sequential(pruned), ["0.weight_orig"]),
        (parametrized, [f"1.parametrizations.weight.original{i}" for i in (0, 1)]),
    ]  # fmt: skip
    for model, kept in expected:
        adaptive_gradient_clip(with_gradients(model))
        assert unclipped(model) == kept
    assert parametrize.is_parametrized(parametrized[1])


def test_a_model_that_gets_another_head_is_looked_at_again() -> None:
    model: Any = seeded(HeadFirst())
    for _ in range(2):
        adaptive_gradient_clip(with_gradients(model))
        assert unclipped(model) == ["head.weight"]
        model.head = nn.Linear(6, 3)


@pytest.mark.parametrize("captured", [False, True])
def test_a_linear_function_is_a_linear_layer(captured: bool) -> None:
    class Functional(HeadFirst):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.gate(self.conv(x).mean((2, 3)))
            return F.linear(x, self.head.weight, self.head.bias)

    model = seeded(Functional())
    model = with_gradients(fxopt.transform(model, [], image()) if captured else model)
    adaptive_gradient_clip(model)
    assert unclipped(model) == ["head.weight"]


@pytest.mark.parametrize(
    "wrap", [torch.compile, nn.DataParallel, torch.optim.swa_utils.AveragedModel]
)
def test_looks_into_wrappers(wrap: Callable[[nn.Module], Any]) -> None:
    model = with_gradients(wrap(seeded(HeadFirst())))
    adaptive_gradient_clip(model)
    (name,) = unclipped(model)
    assert name.endswith("head.weight")


def test_the_last_one_may_depend_on_the_mode() -> None:
    class Auxiliary(HeadFirst):
        def forward(self, x: torch.Tensor) -> Any:
            result = super().forward(x)
            return (result, self.gate(x.mean((2, 3)).repeat(1, 2))) if self.training else result

    model = seeded(Auxiliary())
    for training, kept in ((True, ["gate.weight"]), (False, ["head.weight"])):
        adaptive_gradient_clip(with_gradients(model.train(training)))
        assert unclipped(model) == kept


class Undecided(HeadFirst):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if x.sum() > 0 else x


def test_refuses_to_guess_which_linear_is_last() -> None:
    model = with_gradients(seeded(Undecided()))
    with pytest.raises(ValueError, match=r"Undecided calls last cannot be told .*exclude=\["):
        adaptive_gradient_clip(model)
    assert len(unclipped(model)) == len(list(model.parameters()))
    adaptive_gradient_clip(model, exclude=["head.weight"])
    assert unclipped(model) == ["head.weight"]


def test_looks_only_where_linear_layers_are() -> None:
    """The backbone decides by values; an encoder of torch's runs as it is, before the head."""

    class Backbone(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if x.sum() > 0 else x

    encoder = nn.TransformerEncoderLayer(4, 2, 8)
    layers = (Backbone(3, 4, 3), nn.Linear(4, 4), encoder, nn.Linear(4, 2))
    model = with_gradients(nn.Sequential(*layers))
    adaptive_gradient_clip(model)
    assert unclipped(model) == ["3.weight"]
    with pytest.raises(ValueError, match="'2' runs as it is, and holds linear layers"):
        adaptive_gradient_clip(nn.Sequential(*layers[:3]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clip": 0.0}, "clip is a positive number, not 0.0"),
        ({"eps": float("nan")}, "eps is a positive number, not nan"),
        ({"clip": "0.01"}, "clip is a positive number, not '0.01'"),
        ({"clip": True}, "clip is a positive number, not True"),
        ({"exclude": ["tail"]}, "there is no parameter 'tail'"),
        ({"exclude": "head"}, "a list of names, not the text 'head'"),
    ],
)
def test_refuses_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    model = with_gradients(seeded(HeadFirst()))
    with pytest.raises(ValueError, match=message):
        adaptive_gradient_clip(model, **arguments)
    assert len(unclipped(model)) == len(list(model.parameters()))


def test_refuses_names_of_bare_tensors_and_what_is_no_tensor() -> None:
    with pytest.raises(ValueError, match="exclude takes names, and tensors have none"):
        adaptive_gradient_clip([drawn(3)], exclude=["a"])
    with pytest.raises(TypeError, match="there is a str among them"):
        adaptive_gradient_clip(["a"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="pairs of a name and a tensor, not a NoneType"):
        adaptive_gradient_clip(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="it is TorchScript"):
        adaptive_gradient_clip(torch.jit.trace(seeded(HeadFirst()), image()))


def test_refuses_sparse_gradients() -> None:
    model = nn.Embedding(5, 3, sparse=True)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"of shape \(5, 3\) is sparse"):
        adaptive_gradient_clip(model)


# ---- optimizers --------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, clip: Callable[[], None]) -> None:
    for step in range(3):
        optimizer.zero_grad()
        F.mse_loss(model(image(4, 3, 6, 7, seed=step)), image(4, 4)).backward()
        clip()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_clips_before_anything_else(name: str) -> None:
    """The same walk as with the function called by hand; schedulers take the optimizer."""
    model = seeded(HeadFirst())
    twin = copy.deepcopy(model)
    own = OPTIMIZERS[name](model.parameters())
    optimizer = with_adaptive_gradient_clip(own, model, clip=0.02)
    assert optimizer is own
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    train(model, optimizer, lambda: None)
    train(
        twin, OPTIMIZERS[name](twin.parameters()), lambda: adaptive_gradient_clip(twin, clip=0.02)
    )
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(model.head.weight, seeded(HeadFirst()).head.weight)  # type: ignore[union-attr, arg-type]


def test_by_default_all_that_the_optimizer_has_is_clipped() -> None:
    model = with_gradients(seeded(HeadFirst()))
    optimizer = with_adaptive_gradient_clip(torch.optim.SGD(model.conv.parameters(), 0.1))  # type: ignore[union-attr]
    optimizer.add_param_group({"params": model.head.parameters()})  # type: ignore[union-attr]
    optimizer.step()
    assert unclipped(model) == ["gate.weight", "gate.bias"]


@pytest.mark.parametrize("by_name", [False, True])
def test_a_closures_gradients_are_clipped_each_time(by_name: bool) -> None:
    model = seeded(HeadFirst())
    optimizer = with_adaptive_gradient_clip(torch.optim.LBFGS(model.parameters(), 0.1), model)
    norms: list[float] = []

    def closure() -> torch.Tensor:
        norms.append(float(model.conv.weight.grad.norm()) if norms else 0.0)  # type: ignore[union-attr, operator]
        optimizer.zero_grad()
        loss = F.mse_loss(model(image(4, 3, 6, 7)), image(4, 4))
        loss.backward()
        norms.append(float(model.conv.weight.grad.norm()))  # type: ignore[union-attr, operator]
        return loss

    loss = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
    assert isinstance(loss, torch.Tensor)
    assert len(norms) > 4
    for computed, clipped in zip(norms[1::2], norms[2::2], strict=False):
        assert clipped < computed


@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("name", ["sgd", "fused"])
def test_a_scaled_gradient_is_clipped_as_what_it_is(name: str, unscaled: bool) -> None:
    """Also where the scaler leaves it to a fused optimizer to scale back, after the clipping."""
    model = seeded(HeadFirst())
    twin = copy.deepcopy(model)
    optimizer = with_adaptive_gradient_clip(OPTIMIZERS[name](model.parameters()), model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        optimizer.zero_grad()
        loss = F.mse_loss(model(image(4, 3, 6, 7, seed=step)), image(4, 4))
        scaler.scale(loss).backward()
        if unscaled:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    train(twin, OPTIMIZERS[name](twin.parameters()), lambda: adaptive_gradient_clip(twin))
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_what_the_optimizer_gets_later_is_clipped_too() -> None:
    """A new head, a new group; and of a model only what the optimizer has."""
    model: Any = seeded(HeadFirst())
    optimizer = torch.optim.SGD(model.conv.parameters(), 0.1)
    with_adaptive_gradient_clip(optimizer, model)
    model.head = nn.Linear(6, 4)
    optimizer.add_param_group({"params": model.head.parameters()})
    with_gradients(model)
    optimizer.step()
    assert unclipped(model) == ["head.weight", "gate.weight", "gate.bias"]


def test_refuses_what_it_could_not_clip_with() -> None:
    model = seeded(HeadFirst())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="SGD has none of these parameters to clip"):
        with_adaptive_gradient_clip(optimizer, seeded(HeadFirst()))
    with pytest.raises(TypeError, match="a HeadFirst is no torch.optim.Optimizer"):
        with_adaptive_gradient_clip(model, optimizer)  # type: ignore[arg-type]

    class Around(torch.optim.Optimizer):
        """As libraries wrap an optimizer: ``__init__`` of the base does not run."""

        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self.inner, self.param_groups = inner, inner.param_groups

        def step(self, closure: Any = None) -> Any:
            return self.inner.step(closure)

    with pytest.raises(ValueError, match="Around has a step that torch runs no hooks before"):
        with_adaptive_gradient_clip(Around(optimizer))


def test_refuses_at_once() -> None:
    optimizer = torch.optim.SGD(seeded(HeadFirst()).parameters(), 0.1)
    with pytest.raises(ValueError, match="clip is a positive number"):
        with_adaptive_gradient_clip(optimizer, clip=-1)
    with pytest.raises(ValueError, match="exclude takes names"):
        with_adaptive_gradient_clip(optimizer, exclude=["head"])
    with pytest.raises(ValueError, match="cannot be told"):
        with_adaptive_gradient_clip(optimizer, seeded(Undecided()))
