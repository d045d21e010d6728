"""Weights and biases in quantised units: values, gradients, casts, checkpoints; by hand."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from seeded import image, seeded
from test_quantized_layers import GRANULARITIES, INPUT_SCALE, LAYERS, flooring
from torch import nn

from fxopt.fake_quantize import FakeQuantize, identity_mode
from fxopt.integer_training import UpdateRounding, cast, cast_after_steps, scaled
from fxopt.quantized_layers import Granularity, QuantizedLayer
from fxopt.quantized_tensors import INT32
from fxopt.quantizing.layers import in_units, quantized

ROUNDINGS: tuple[UpdateRounding, ...] = ("nearest", "stochastic")


def leaf(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, requires_grad=True)


# ---- scaled ------------------------------------------------------------------------------------


def test_rounds_halves_to_even_clamps_and_scales() -> None:
    master = leaf(0.4, 0.5, 1.5, 2.5, -0.5, -1.5, 7.4, 7.6, 900.0, -7.6, -900.0)
    found = scaled(master, torch.tensor(0.5), -7, 7, qas=True)
    assert found.tolist() == [0, 0, 1, 1, 0, -1, 3.5, 3.5, 3.5, -3.5, -3.5]


@pytest.mark.parametrize("qas", [True, False])
def test_scale_of_each_channel(qas: bool) -> None:
    """``G/s`` with QAS, ``G·s`` without, and each channel by its own ``s``."""
    master = torch.tensor([[1.2, -3.0], [2.0, 0.0]], requires_grad=True)
    gradient = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    scale = torch.tensor([[0.5], [4.0]])
    result = scaled(master, scale, -7, 7, qas)
    assert result.tolist() == [[0.5, -1.5], [8.0, 0.0]]
    result.backward(gradient)
    expected = [[2.0, 4.0], [0.75, 1.0]] if qas else [[0.5, 1.0], [12.0, 16.0]]
    assert master.grad is not None
    assert master.grad.tolist() == expected


@pytest.mark.parametrize("qas", [True, False])
@pytest.mark.parametrize(
    ("master", "gradient", "passes"),
    [
        (7.4, 1.0, True), (7.4, -1.0, True),  # rounds to the end
        (7.6, 1.0, True), (7.6, -1.0, False),  # would be rounded beyond it
        (90.0, 1.0, True), (90.0, -1.0, False), (math.inf, 1.0, True), (math.inf, -1.0, False),
        (-7.4, 1.0, True), (-7.4, -1.0, True), (-7.6, 1.0, False), (-7.6, -1.0, True),
        (-math.inf, 1.0, False), (-math.inf, -1.0, True),
    ],
)  # fmt: skip
def test_beyond_the_grid_only_gradients_that_lead_back(
    master: float, gradient: float, passes: bool, qas: bool
) -> None:
    value = leaf(master)
    scaled(value, torch.tensor(0.5), -7, 7, qas).backward(torch.tensor([gradient]))
    assert value.grad is not None
    assert value.grad.tolist() == [gradient * (2.0 if qas else 0.5) if passes else 0.0]


def test_a_weight_beyond_the_grid_returns() -> None:
    """Pulled outwards it stays, pulled inwards it is back on the grid after some steps."""
    value = leaf(8.9)
    optimizer = torch.optim.SGD([value], 0.25)

    def step(direction: float) -> float:
        optimizer.zero_grad()
        (direction * scaled(value, torch.tensor(1.0), -7, 7, qas=True)).sum().backward()
        optimizer.step()
        return value.item()

    assert [step(-1.0) for _ in range(3)] == [pytest.approx(8.9)] * 3
    assert [step(1.0) for _ in range(8)][-1] == pytest.approx(6.9)


def test_not_a_number_stays_one() -> None:
    value = leaf(math.nan, 1.0)
    found = scaled(value, torch.tensor(0.5), -7, 7, qas=True)
    assert math.isnan(found[0].item())
    assert found[1].item() == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_keeps_the_dtype_of_master_and_gradient(dtype: torch.dtype) -> None:
    value = leaf(0.6, 3.0, dtype=dtype)
    found = scaled(value, torch.tensor(0.5, dtype=dtype), -7, 7, qas=True)
    found.sum().backward()
    assert value.grad is not None
    assert (found.dtype, value.grad.dtype) == (dtype, dtype)
    assert (found.tolist(), value.grad.tolist()) == ([0.5, 1.5], [2.0, 2.0])


def test_what_goes_in_stays_as_it_is() -> None:
    value, scale = leaf(0.6, 9.0), torch.tensor(0.5)
    gradient = torch.tensor([-1.0, -1.0])
    scaled(value, scale, -7, 7, qas=True).backward(gradient)
    assert (value.tolist(), scale.item()) == ([pytest.approx(0.6), 9.0], 0.5)
    assert gradient.tolist() == [-1.0, -1.0]
    with torch.no_grad():
        assert not scaled(value, scale, -7, 7, qas=True).requires_grad


def test_backward_keeps_a_byte_an_element() -> None:
    """What lies beyond which end, int8, besides the scale."""
    value = torch.zeros(1000, requires_grad=True)
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scaled(value, torch.tensor(0.5), -7, 7, qas=True)
    assert sum(each.numel() * each.element_size() for each in kept) == 1000 + 4


# ---- identity mode -----------------------------------------------------------------------------


@pytest.mark.parametrize("qas", [True, False])
def test_identity_mode_rounds_and_clamps_nothing(qas: bool) -> None:
    value = leaf(0.26, 900.0, -900.0)
    with identity_mode():
        found = scaled(value, torch.tensor(0.5), -7, 7, qas)
    assert found.tolist() == [pytest.approx(0.13), 450.0, -450.0]
    found.backward(torch.tensor([1.0, -1.0, 1.0]))
    factor = 2.0 if qas else 0.5
    assert value.grad is not None
    assert value.grad.tolist() == [factor, -factor, factor]


def test_identity_mode_ends_with_its_block_and_on_errors() -> None:
    quantiser, x = FakeQuantize(0.5), torch.tensor([0.3, 1e6])
    rounded = quantiser(x).tolist()
    with identity_mode():
        with identity_mode():
            pass
        assert quantiser(x) is x
    assert quantiser(x).tolist() == rounded
    with pytest.raises(RuntimeError, match="inside"), identity_mode():
        raise RuntimeError("inside")
    assert quantiser(x).tolist() == rounded != x.tolist()


def test_identity_mode_is_that_of_the_thread() -> None:
    quantiser, x = FakeQuantize(0.5), torch.tensor([0.3])
    found: list[float] = []
    with identity_mode():
        other = threading.Thread(target=lambda: found.append(quantiser(x).item()))
        other.start()
        other.join()
    assert found == [0.5]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", LAYERS)
def test_in_identity_mode_a_layer_is_the_plain_one(name: str, granularity: Granularity) -> None:
    plain, layer, x = made(name, granularity)
    with identity_mode():
        found = in_units(layer, True)(x)
    # division and multiplication by the scale, in float64
    torch.testing.assert_close(found, plain(x), rtol=1e-13, atol=1e-13)


# ---- layers in quantised units -----------------------------------------------------------------


def made(
    name: str, granularity: Granularity = "channel", bits: int = 8,
    dtype: torch.dtype = torch.float64,
) -> tuple[Any, Any, torch.Tensor]:  # fmt: skip
    """The plain layer, the quantised one in float units, and an input on the input's grid."""
    layer, shape = LAYERS[name]
    layer = seeded(copy.deepcopy(layer)).to(dtype)
    x = (image(*shape, dtype=dtype) / INPUT_SCALE).round() * INPUT_SCALE
    return layer, quantized(copy.deepcopy(layer), INPUT_SCALE, granularity, bits), x


def scales_by_hand(layer: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """s_W for each weight and s_x·s_W for each bias, element by element."""
    weight, scale = layer.weight, layer.weight_scale
    axis = 1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0
    steps = torch.empty_like(weight)
    for channel in range(weight.shape[axis]):
        steps.select(axis, channel).fill_(scale.item() if scale.dim() == 0 else scale[channel])
    if layer.bias is None:
        return steps, None
    biases = torch.empty_like(layer.bias)
    for output in range(len(biases)):
        own = scale if scale.dim() == 0 else scale[output % weight.shape[axis]]
        biases[output] = own * layer.input_scale
    return steps, biases


CASES = [(name, g) for name in LAYERS for g in GRANULARITIES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "granularity"), CASES)
def test_units_change_no_value(name: str, granularity: Granularity, dtype: torch.dtype) -> None:
    _, layer, x = made(name, granularity, dtype=dtype)
    for qas in (True, False):
        unit = in_units(layer, qas)
        assert torch.equal(unit(x), layer(x))
        assert torch.equal(unit.integer_weight(), layer.integer_weight())
        if layer.bias is not None:
            assert torch.equal(unit.integer_bias(), layer.integer_bias())
        whole = in_units(layer, qas, "nearest")
        assert torch.equal(whole(x), layer(x))
        assert torch.equal(whole.weight, layer.integer_weight().to(dtype))


@pytest.mark.parametrize(("name", "granularity"), CASES)
def test_masters_are_the_tensors_over_their_scales(name: str, granularity: Granularity) -> None:
    plain, layer, _ = made(name, granularity)
    unit = in_units(layer, True)
    steps, biases = scales_by_hand(layer)
    # one rounding of a division in float64
    torch.testing.assert_close(unit.weight, plain.weight / steps, rtol=1e-15, atol=0)
    torch.testing.assert_close(unit.float_weight(), plain.weight.detach(), rtol=1e-15, atol=0)
    assert unit.weight.abs().max().item() == pytest.approx(127)
    if biases is not None:
        torch.testing.assert_close(unit.bias, plain.bias / biases, rtol=1e-15, atol=0)
        torch.testing.assert_close(unit.float_bias(), plain.bias.detach(), rtol=1e-15, atol=0)


@pytest.mark.parametrize("qas", [True, False])
@pytest.mark.parametrize(("name", "granularity"), CASES)
def test_gradients_of_every_kind(name: str, granularity: Granularity, qas: bool) -> None:
    """Those of the plain layer with the rounded tensors, times or over the scale of each element."""
    _, layer, x = made(name, granularity)
    unit: Any = in_units(layer, qas)
    folded: Any = unit.fold()
    direction = image(*folded(x).shape, seed=3, dtype=torch.float64)
    for each in (unit, folded):
        (each(x) * direction).sum().backward()
    steps, biases = scales_by_hand(layer)
    expected = folded.weight.grad / steps if qas else folded.weight.grad * steps
    # the same sums in float64, and one more rounding
    torch.testing.assert_close(unit.weight.grad, expected, rtol=1e-12, atol=0)
    if biases is not None:
        expected = folded.bias.grad / biases if qas else folded.bias.grad * biases
        torch.testing.assert_close(unit.bias.grad, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("qas", [True, False])
def test_ratios_of_norms(qas: bool) -> None:
    """Equation 3 of the paper: with QAS ``‖W̄‖/‖G̃‖ = ‖W‖/‖G‖``, without s⁻² times that."""
    _, layer, x = made("linear", "tensor")
    unit: Any = in_units(layer, qas)
    folded: Any = unit.fold()
    for each in (unit, folded):
        each(x).square().sum().backward()
    steps = {"weight": layer.weight_scale, "bias": layer.weight_scale * layer.input_scale}
    for name, step in steps.items():
        ours, theirs = (getattr(each, name) for each in (unit, layer))
        now = (ours / ours.grad.norm()).norm()
        was = theirs.norm() / getattr(folded, name).grad.norm()
        assert (now / was).item() == pytest.approx(1.0 if qas else step.item() ** -2, rel=1e-9)


def test_a_layer_called_twice_sums_its_gradients() -> None:
    _, layer, x = made("linear")
    unit: Any = in_units(layer, True)
    unit(x).sum().backward()
    once = unit.weight.grad.clone()
    unit.weight.grad = None
    (unit(x) + 2 * unit(x)).sum().backward()
    torch.testing.assert_close(unit.weight.grad, 3 * once, rtol=1e-12, atol=0)


def test_gradients_of_a_floored_channel_are_finite() -> None:
    """Small weights beside a large bias: s_W is the bias over s_x·2³⁰, and its inverse no infinity."""
    unit: Any = in_units(flooring(1e-6, 3e4), True)
    unit(torch.ones(3, 2)).sum().backward()
    assert unit.weight.grad[1].tolist() == pytest.approx([3 * 0.5 * 2**30 / 3e4] * 2, rel=1e-6)
    assert unit.bias.grad[1].item() == pytest.approx(3 * 2**30 / 3e4, rel=1e-6)


@pytest.mark.parametrize("weight", [0.0, 1e-35, 1e-20])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_a_dead_channel_does_not_break_training(kind: Any, weight: float) -> None:
    """Weights and bias of (nearly) zero: no gradient is infinite, nothing becomes NaN."""
    unit: Any = in_units(flooring(weight, 0.0, INPUT_SCALE), True)
    optimizer = kind(
        unit.parameters(), 1e-3, **({"momentum": 0.9} if kind is torch.optim.SGD else {})
    )
    for sign in (10.0, -10.0, 10.0):
        optimizer.zero_grad()
        (sign * unit(torch.ones(3, 2))).sum().backward()
        assert bool(
            torch.isfinite(torch.nn.utils.get_total_norm([p.grad for p in unit.parameters()]))
        )
        optimizer.step()
    assert bool(torch.isfinite(unit(torch.ones(1, 2))).all())


@pytest.mark.parametrize("bits", range(2, 9))
def test_any_width(bits: int) -> None:
    _, layer, x = made("conv2d", bits=bits)
    unit: Any = in_units(layer, True, "nearest")
    assert torch.equal(unit(x), layer(x))
    optimizer = torch.optim.SGD(unit.parameters(), 1e3)
    unit(x).sum().backward()
    optimizer.step()
    most = 2 ** (bits - 1) - 1
    assert set(unit.weight.unique().tolist()) <= set(range(-most, most + 1))
    assert unit.weight.abs().max() == most


@pytest.mark.parametrize("mode", [True, False])
def test_keeps_mode_what_trains_buffers_and_the_layer_itself(mode: bool) -> None:
    plain = seeded(nn.Conv2d(2, 3, 1)).train(mode)
    plain.bias.requires_grad_(False)  # type: ignore[union-attr]
    layer = quantized(plain, INPUT_SCALE)
    before = copy.deepcopy(layer.state_dict())
    layer.register_buffer("bias_shift", torch.ones(3), persistent=False)
    for rounding in (None, *ROUNDINGS):
        unit = in_units(layer, True, rounding)
        assert (unit.training, unit.weight.requires_grad, unit.bias.requires_grad) == (
            mode, True, False,
        )  # fmt: skip
        assert set(unit.state_dict()) == {*before, "quantised_units"}
        assert torch.equal(unit.get_buffer("bias_shift"), torch.ones(3))
        assert unit.weight.is_leaf
        assert unit.weight.grad is None
    assert layer.weight is plain.weight
    assert layer.qas is None
    assert all(torch.equal(before[name], each) for name, each in layer.state_dict().items())


def test_units_to_other_units_keep_the_very_masters() -> None:
    _, layer, _ = made("linear")
    first = in_units(layer, False)
    second = in_units(first, True)
    assert second.weight is first.weight
    assert second.bias is first.bias
    assert (second.qas, first.qas) == (True, False)
    whole = in_units(second, True, "stochastic")
    assert torch.equal(whole.weight, whole.weight.round())
    assert not torch.equal(first.weight, first.weight.round())


def test_folds_into_the_plain_layer() -> None:
    _, layer, x = made("transposed groups")
    for each in (in_units(layer, True), in_units(layer, False, "nearest")):
        folded = each.fold()
        assert type(folded) is nn.ConvTranspose2d
        assert not {"qas", "bits", "update_rounding"} & vars(folded).keys()
        torch.testing.assert_close(folded(x), layer(x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("qas", "end"),
    [(True, "8 bits per channel, in quantised units with QAS)"),
     (False, "8 bits per channel, in quantised units)")],
)  # fmt: skip
def test_says_its_units(qas: bool, end: str) -> None:
    assert repr(in_units(quantized(nn.Linear(2, 2), 0.1), qas)).endswith(end)


@pytest.mark.parametrize("rounding", [None, "nearest"])
def test_on_the_meta_device(rounding: UpdateRounding | None) -> None:
    unit = in_units(made("conv2d")[1], True, rounding)
    state = unit.state_dict()
    unit.to(device="meta")
    assert "in quantised units" in repr(unit)
    assert unit(torch.empty(2, 4, 6, 7, device="meta", dtype=torch.float64)).shape == (2, 6, 6, 7)
    unit.load_state_dict(state, assign=True)
    x = made("conv2d")[2]
    assert torch.equal(unit(x), made("conv2d")[1](x))
    assert unit.weight.requires_grad


# ---- casts -------------------------------------------------------------------------------------


def test_casts_to_the_nearest() -> None:
    values = torch.tensor([0.4, 0.5, 1.5, -2.5, 126.6, 127.4, 200.0, -200.0, math.inf])
    found = cast(values, -127, 127, "nearest")
    assert found.tolist() == [0, 0, 2, -2, 127, 127, 127, -127, 127]
    assert values[0].item() == pytest.approx(0.4)


def test_stochastic_rounding_is_one_of_both_neighbours() -> None:
    values = image(3000, seed=2) * 60
    torch.manual_seed(0)
    found = cast(values, -127, 127, "stochastic")
    inside = values.abs() < 126
    assert bool((found == found.round()).all())
    assert bool(((found == values.floor()) | (found == values.ceil()))[inside].all())
    assert found.abs().max() <= 127
    assert not torch.equal(found, values.round().clamp(-127, 127))


@pytest.mark.parametrize("value", [0.0, 0.25, -0.25, 3.9, -126.5, 1000.125])
def test_stochastic_rounding_is_right_on_the_mean(value: float) -> None:
    torch.manual_seed(0)
    count = 40_000
    found = cast(torch.full((count,), value), *INT32, "stochastic").double().mean().item()
    fraction = value - math.floor(value)
    # five standard deviations of a mean of so many draws; and float32's sums of value and draw
    deviation = (fraction * (1 - fraction) / count) ** 0.5
    assert abs(found - value) <= 5 * deviation + 1e-4


def test_stochastic_rounding_draws_from_the_global_generator() -> None:
    values = image(50, seed=2)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(cast(values, -127, 127, "stochastic"))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("whole", [2.0**12 + 1, 1e6, 2.0**23 + 1])
def test_stochastic_rounding_leaves_whole_numbers(whole: float) -> None:
    """A bias that nothing changed must not drift; biases are whole numbers up to 2³¹."""
    torch.manual_seed(0)
    values = torch.full((20_000,), whole)
    assert torch.equal(cast(values, *INT32, "stochastic"), values)


# ---- casts after steps -------------------------------------------------------------------------


def whole_layer(rounding: UpdateRounding = "nearest", name: str = "linear") -> tuple[Any, Any]:
    _, layer, x = made(name, dtype=torch.float32)
    return in_units(layer, True, rounding), x


def is_whole(layer: Any) -> bool:
    return all(torch.equal(each, each.round()) for each in layer.parameters())


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_step_leaves_whole_numbers(rounding: UpdateRounding) -> None:
    layer, x = whole_layer(rounding)
    before = [each.detach().clone() for each in layer.parameters()]
    optimizer = torch.optim.SGD(layer.parameters(), 0.01)
    layer(x).square().sum().backward()
    gradients = [each.grad.clone() for each in layer.parameters()]
    optimizer.step()
    assert is_whole(layer)
    for was, gradient, now in zip(before, gradients, layer.parameters(), strict=True):
        wanted = was - 0.01 * gradient
        assert not torch.equal(was, now)
        inside = wanted.abs() < 126 if was.dim() > 1 else wanted.abs() < math.inf
        # half a step to the nearest, less than one to either neighbour
        most = 0.5 if rounding == "nearest" else 1.0
        assert (wanted - now)[inside].abs().max() <= most + 1e-3


def test_casts_what_the_optimizer_has_and_nothing_else() -> None:
    layer, x = whole_layer()
    other, _ = whole_layer(name="conv2d")
    layer(x).sum().backward()
    with torch.no_grad():
        layer.bias.add_(0.25)
        other.weight.add_(0.25)
    torch.optim.SGD([layer.weight], 0.1).step()
    assert torch.equal(layer.weight, layer.weight.round())
    assert not torch.equal(layer.bias, layer.bias.round())
    assert not torch.equal(other.weight, other.weight.round())
    torch.optim.SGD([layer.bias], 0.1).step()
    assert is_whole(layer)


def test_clamps_after_a_step_and_comes_back() -> None:
    layer, x = whole_layer()
    layer(x).sum().backward()
    optimizer = torch.optim.SGD(layer.parameters(), 1.0)
    with torch.no_grad():
        layer.weight.grad.fill_(-1e4)
    optimizer.step()
    assert layer.weight.unique().tolist() == [127]
    layer.weight.grad.fill_(2.0)
    optimizer.step()
    assert layer.weight.unique().tolist() == [125]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_layers_that_share_a_tensor_cast_it_once(rounding: UpdateRounding) -> None:
    layer, x = whole_layer(rounding)
    twin, _ = whole_layer(rounding)
    twin.weight, twin.bias = layer.weight, layer.bias
    (layer(x) + twin(x)).sum().backward()
    optimizer = torch.optim.SGD(layer.parameters(), 0.01)
    torch.manual_seed(0)
    optimizer.step()
    drawn = torch.rand(1)
    torch.manual_seed(0)
    if rounding == "stochastic":
        torch.rand_like(layer.weight), torch.rand_like(layer.bias)
    assert torch.equal(drawn, torch.rand(1))
    assert is_whole(layer)


def test_other_optimizers_and_their_randomness_stay() -> None:
    layer, x = whole_layer("stochastic")
    layer(x).sum().backward()
    weight = nn.Parameter(torch.tensor([0.3]))
    weight.grad = torch.ones(1)
    state = torch.get_rng_state()
    torch.optim.SGD([weight], 0.1).step()
    assert torch.equal(state, torch.get_rng_state())
    assert weight.item() == pytest.approx(0.2)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies_cast_too(copied: Any) -> None:
    layer, x = whole_layer()
    other = copied(layer)
    optimizer = torch.optim.SGD(other.parameters(), 1e-3)
    other(x).sum().backward()
    optimizer.step()
    assert is_whole(other)
    assert not torch.equal(other.weight, layer.weight)


def test_the_list_of_layers_keeps_none_alive() -> None:
    from fxopt.integer_training import _TO_CAST

    gc.collect()
    before = len(_TO_CAST)
    layer, x = whole_layer()
    layer(x)
    cast_after_steps(layer)
    assert len(_TO_CAST) == before + 1
    del layer
    gc.collect()
    assert len(_TO_CAST) == before


def test_a_closure_evaluated_many_times() -> None:
    layer, x = whole_layer()
    optimizer = torch.optim.LBFGS(layer.parameters(), 0.1, max_iter=3)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = layer(x).square().mean()
        loss.backward()
        return loss

    before = closure().item()
    for _ in range(3):
        optimizer.step(closure)
        assert is_whole(layer)
    assert closure().item() < before


def test_a_scaler_that_skips_its_step_leaves_all() -> None:
    layer, x = whole_layer()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu")
    before = layer.weight.detach().clone()
    scaler.scale(layer(x).sum() * math.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(layer.weight, before)
    optimizer.zero_grad()
    scaler.scale(layer(x).sum()).backward()
    scaler.step(optimizer)
    assert is_whole(layer)
    assert not torch.equal(layer.weight, before)


def test_identity_mode_casts_nothing() -> None:
    layer, x = whole_layer()
    optimizer = torch.optim.SGD(layer.parameters(), 1e-3)
    with identity_mode():
        layer(x).sum().backward()
        optimizer.step()
    assert not is_whole(layer)


def test_a_compiled_layer_casts() -> None:
    layer, x = whole_layer()
    optimizer = torch.optim.SGD(layer.parameters(), 1e-3)
    torch.compile(layer, backend="eager")(x).sum().backward()
    optimizer.step()
    assert is_whole(layer)


def test_gradients_that_autograd_did_not_make() -> None:
    """Of a method that estimates them from forwards (SPSA, MeZO)."""
    layer, x = whole_layer()
    optimizer = torch.optim.SGD(layer.parameters(), 1e-3)
    with torch.no_grad():
        layer(x)
    for each in layer.parameters():
        each.grad = torch.ones_like(each)
    optimizer.step()
    assert is_whole(layer)


def test_stochastic_rounding_depends_on_the_seed_alone() -> None:
    """Not on the order in which layers came to be, or a set has them."""
    results = []
    for turn in (1, -1):
        pairs = [whole_layer("stochastic", name) for name in ("linear", "conv2d")[::turn]][::turn]
        net = nn.ModuleList(layer for layer, _ in pairs)
        optimizer = torch.optim.SGD(net.parameters(), 0.3)
        for layer, x in pairs:
            layer(x).sum().backward()
        torch.manual_seed(0)
        optimizer.step()
        results.append([each.detach().clone() for each in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("rounding", [None, *ROUNDINGS])
def test_variables_that_were_kept_are_loaded_again(rounding: Any) -> None:
    unit, target = other(rounding), other(rounding)
    with torch.no_grad():
        target.weight.zero_()
    target.load_state_dict(unit.state_dict(keep_vars=True))
    assert torch.equal(target.weight, unit.weight)


# ---- checkpoints -------------------------------------------------------------------------------


def saved(state: Any) -> Any:
    """``state`` through a file, as ``torch.load`` reads it by default."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


def other(rounding: UpdateRounding | None = None, qas: bool | None = True) -> Any:
    """A layer with other weights."""
    layer = quantized(seeded(nn.Linear(4, 6), 7), INPUT_SCALE * 2)
    return layer if qas is None else in_units(layer, qas, rounding)


@pytest.mark.parametrize("through", [saved, dict, OrderedDict, copy.deepcopy])
@pytest.mark.parametrize("to", [None, *ROUNDINGS])
@pytest.mark.parametrize("rounding", [None, *ROUNDINGS])
def test_state_goes_over(rounding: Any, to: Any, through: Any) -> None:
    _, layer, x = made("linear", dtype=torch.float32)
    unit, target = in_units(layer, True, rounding), other(to, qas=False)
    assert not torch.equal(target(x), unit(x))
    state = through(unit.state_dict())
    kinds = {name: each.dtype for name, each in state.items()}
    target.load_state_dict(state)
    assert torch.equal(target(x), unit(x))
    assert target.weight.dtype == torch.float32
    assert kinds == {name: each.dtype for name, each in state.items()}
    wanted = torch.float32 if rounding is None else torch.int8
    assert kinds["weight"] == wanted


def test_saves_integers_of_whole_layers() -> None:
    layer, _ = whole_layer()
    state = layer.state_dict()
    assert {name: state[name].dtype for name in ("weight", "bias")} == {
        "weight": torch.int8, "bias": torch.int32,
    }  # fmt: skip
    assert torch.equal(state["weight"].float(), layer.weight)
    assert torch.equal(state["bias"].float(), layer.bias)
    kept = layer.state_dict(keep_vars=True)
    assert kept["weight"] is layer.weight
    bare, _ = whole_layer(name="depthwise")
    assert "bias" not in bare.state_dict()


def test_loads_by_assignment() -> None:
    layer, x = whole_layer()
    target = other("nearest")
    target.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(target(x), layer(x))
    assert isinstance(target.weight, nn.Parameter)
    assert target.weight.requires_grad


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("given", "own", "reason"),
    [
        (None, True, "'0.weight' is in float units and the layer's in quantised ones: quantise"),
        (None, False, "'0.weight' is in float units and the layer's in quantised ones: quantise"),
        (True, None, "'0.weight' is in quantised units and the layer's in float ones: quantise"),
    ],
)
def test_refuses_other_units(given: Any, own: Any, reason: str, strict: bool) -> None:
    target = nn.Sequential(other(qas=own))
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(RuntimeError, match=reason):
        target.load_state_dict(nn.Sequential(other(qas=given)).state_dict(), strict=strict)
    assert all(torch.equal(before[n], each) for n, each in target.state_dict().items())


def test_refuses_the_checkpoint_of_a_plain_layer() -> None:
    state = nn.Sequential(nn.Linear(4, 6)).state_dict()
    with pytest.raises(RuntimeError, match="'0.weight' is in float units"):
        nn.Sequential(other()).load_state_dict(state, strict=False)
    nn.Sequential(other(qas=None)).load_state_dict(state, strict=False)


def test_refuses_integers_for_float_units() -> None:
    state = dict(other("nearest").state_dict())
    with pytest.raises(RuntimeError, match="'weight' is in quantised units"):
        other(qas=None).load_state_dict(state)


def test_refuses_other_units_without_metadata() -> None:
    """What ``{name: tensor.cpu() …}`` and safetensors keep."""
    with pytest.raises(RuntimeError, match="float units"):
        other().load_state_dict(dict(other(qas=None).state_dict()))


def test_what_is_no_tensor_is_named() -> None:
    state = {name: np.asarray(each) for name, each in other().state_dict().items()}
    with pytest.raises(RuntimeError, match="weight"):
        other().load_state_dict(state)


def test_missing_and_unexpected_keys_are_torchs() -> None:
    state = other().state_dict()
    del state["weight_scale"]
    state["nonsense"] = torch.ones(1)
    with pytest.raises(RuntimeError) as caught:
        other().load_state_dict(state)
    assert '"weight_scale"' in str(caught.value)
    assert '"nonsense"' in str(caught.value)
    found = other().load_state_dict(state, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (["weight_scale"], ["nonsense"])


# ---- beside other tools ------------------------------------------------------------------------


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_under_autocast_weights_are_those_of_float_units(quiet: None) -> None:
    _, layer, x = made("linear", dtype=torch.float32)
    unit: Any = in_units(layer, True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = unit(x), layer(x)
    assert torch.equal(found, expected)
    found.float().sum().backward()
    expected.float().sum().backward()
    steps, _ = scales_by_hand(layer)
    # gradients in bfloat16, the same in both
    torch.testing.assert_close(unit.weight.grad, layer.weight.grad / steps, rtol=1e-6, atol=0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    layer, x = whole_layer()
    plain = copy.deepcopy(layer)
    checkpoint(layer, x.requires_grad_(), use_reentrant=reentrant).sum().backward()
    plain(x).sum().backward()
    assert torch.equal(layer.weight.grad, plain.weight.grad)
    torch.optim.SGD(layer.parameters(), 1e-3).step()
    assert is_whole(layer)


def test_functional_call_takes_other_masters() -> None:
    unit, x = in_units(made("linear", dtype=torch.float32)[1], True), made("linear")[2].float()
    given = {name: (each * 0.5).detach().requires_grad_() for name, each in unit.named_parameters()}
    torch.func.functional_call(unit, given, (x,)).sum().backward()
    assert all(each.grad is not None for each in given.values())
    assert unit.weight.grad is None


def test_channels_last() -> None:
    unit, x = in_units(made("conv2d", dtype=torch.float32)[1], True), made("conv2d")[2].float()
    expected = unit(x)
    unit.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found = unit(x.to(memory_format=torch.channels_last))
    # another kernel's order of 36 products in float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert isinstance(unit, QuantizedLayer)
