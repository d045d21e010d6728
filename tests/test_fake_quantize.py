"""FakeQuantize: the formula, its gradient, what backward keeps, and what it refuses."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from seeded import image

from fxopt.fake_quantize import FakeQuantize, check_bits, fake_quantize


def by_numpy(x: torch.Tensor, scale: float, zero: int, low: int, high: int) -> np.ndarray:
    """``s·(clamp(round(x/s) + z) - z)`` in float64; numpy rounds halves to even."""
    scale = float(np.float32(scale))
    steps = np.clip(np.rint(x.double().numpy() / scale) + zero, low, high)
    result: np.ndarray = (steps - zero) * scale
    return result


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("zero", ["least", "middle", "most"])
def test_is_the_formula(bits: int, zero: str) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    point = {"least": low, "middle": 1 if bits > 2 else 0, "most": high}[zero]
    layer = FakeQuantize(0.11, point, bits)
    x = torch.linspace(-40, 40, 2001, dtype=torch.float64)
    np.testing.assert_array_equal(layer(x).numpy(), by_numpy(x, 0.11, point, low, high))
    integers = layer.integers(x)
    assert integers.dtype == torch.int32
    assert (low, high) == (layer.low, layer.high) == (integers.min(), integers.max())
    assert layer(x).unique().numel() == 2**bits
    np.testing.assert_allclose(layer.range, [layer(x).min(), layer(x).max()], rtol=1e-15)


def test_halves_go_to_the_even_number() -> None:
    """x/s is exact: the scale is a power of two."""
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]) * 0.25
    assert FakeQuantize(0.25).integers(x).tolist() == [-2, -2, 0, 0, 2, 2]
    # the half is rounded before the zero point is added
    assert FakeQuantize(0.25, zero_point=1).integers(x).tolist() == [-1, -1, 1, 1, 3, 3]


@settings(max_examples=60, deadline=None)
@given(
    scale=st.floats(2.0**-100, 2.0**100, width=32),
    zero=st.integers(-128, 127),
    steps=st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=20),
)
def test_is_the_formula_at_any_scale(scale: float, zero: int, steps: list[float]) -> None:
    """In float64, where x/s is as exact as numpy's."""
    x = torch.tensor(steps, dtype=torch.float64) * scale
    found = FakeQuantize(scale, zero)(x)
    np.testing.assert_array_equal(found.numpy(), by_numpy(x, scale, zero, -128, 127))
    torch.testing.assert_close(FakeQuantize(scale, zero)(found), found, rtol=0, atol=0)


@pytest.mark.parametrize("zero", [-128, -5, 0, 127])
def test_zero_stays_zero(zero: int) -> None:
    assert FakeQuantize(0.3, zero)(torch.zeros(2)).tolist() == [0.0, 0.0]


# ---- gradients ---------------------------------------------------------------------------------


def test_gradient_passes_on_the_grid_and_is_zero_beyond() -> None:
    """The grid is -4 … 3.5; what rounds to an end lies on it, what rounds beyond does not."""
    x = torch.tensor([-9.0, -4.3, -4.2, 0.1, 3.7, 3.8, 99.0], requires_grad=True)
    y = FakeQuantize(0.5, bits=4)(x)
    y.backward(torch.arange(1.0, 8.0))
    assert x.grad is not None
    assert x.grad.tolist() == [0, 0, 3, 4, 5, 0, 0]


def test_backward_keeps_the_mask_alone() -> None:
    x = image(4, 5).requires_grad_()
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        FakeQuantize(0.02)(x)
    assert [(each.dtype, each.shape) for each in kept] == [(torch.bool, x.shape)]


def test_scale_and_zero_point_do_not_train() -> None:
    layer = FakeQuantize(0.1)
    assert list(layer.parameters()) == []
    assert [name for name, _ in layer.named_buffers()] == ["scale", "zero_point"]


def test_values_are_the_same_with_and_without_a_gradient() -> None:
    x = image(3, 4) * 20
    with torch.no_grad():
        plain = FakeQuantize(0.1, 3)(x)
    torch.testing.assert_close(FakeQuantize(0.1, 3)(x.requires_grad_()), plain, rtol=0, atol=0)


def test_operands_are_not_written() -> None:
    x = image(3, 4)
    before, layer = x.clone(), FakeQuantize(0.1, 3)
    layer(x), layer(x.requires_grad_()).sum().backward(), layer.integers(x)
    assert torch.equal(before, x)
    assert (float(layer.scale), int(layer.zero_point)) == (float(np.float32(0.1)), 3)


def test_second_derivative_is_zero() -> None:
    x = image(3, dtype=torch.float64).requires_grad_()
    (first,) = torch.autograd.grad(FakeQuantize(0.1)(x).square().sum(), x, create_graph=True)
    torch.testing.assert_close(first, 2 * FakeQuantize(0.1)(x))
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, torch.full_like(x, 2.0))  # straight through again


# ---- tensors of all kinds ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_result_has_the_dtype_and_shape_of_its_input(dtype: torch.dtype) -> None:
    # 0-dim and narrow, the result is float32, as torch promotes it
    scalar: list[tuple[int, ...]] = [()] if dtype in (torch.float32, torch.float64) else []
    for shape in [*scalar, (0,), (3,), (2, 1, 4)]:
        x = torch.ones(shape, dtype=dtype)
        found = FakeQuantize(0.5)(x)
        assert (found.dtype, found.shape) == (dtype, x.shape)
        assert bool((found == 1).all())


def test_layout_and_strides_do_not_matter() -> None:
    x, layer = image(2, 3, 4, 5), FakeQuantize(0.1, 3)
    expected = layer(x)
    assert torch.equal(layer(x.to(memory_format=torch.channels_last)), expected)
    assert torch.equal(layer(x.transpose(1, 3)), expected.transpose(1, 3))
    assert torch.equal(layer(x[:1].expand(4, 3, 4, 5)), expected[:1].expand(4, 3, 4, 5))


def test_not_a_number_stays_one() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf], requires_grad=True)
    y = FakeQuantize(0.5)(x)
    y.sum().backward()
    assert x.grad is not None
    assert (math.isnan(y[0].item()), y[1:].tolist()) == (True, [63.5, -64.0])
    assert x.grad.tolist() == [0.0, 0.0, 0.0]


def test_settled_gives_back_the_tensor_itself() -> None:
    x = image(3)
    assert FakeQuantize(0.5, settled=True)(x) is x
    assert FakeQuantize(0.5)(x) is not x


def test_moves_and_casts_with_its_model() -> None:
    layer = FakeQuantize(0.1, 3).double()
    assert (layer.scale.dtype, layer.zero_point.dtype) == (torch.float64, torch.int32)
    assert layer.to("meta")(torch.ones(2, device="meta")).shape == (2,)
    assert repr(layer) == "FakeQuantize(bits=8)"


def _reloaded(layer: FakeQuantize) -> Any:
    stored = io.BytesIO()
    torch.save(layer.state_dict(), stored)
    stored.seek(0)
    other = FakeQuantize(1.0, -7)
    other.load_state_dict(torch.load(stored, weights_only=True))
    return other


@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), _reloaded],
    ids=["deepcopy", "pickle", "state_dict"],
)
def test_copies_do_the_same(again: Any) -> None:
    layer, x = FakeQuantize(0.037, 11), image(50) * 3
    made = again(layer)
    assert torch.equal(made(x), layer(x))
    made.scale.fill_(1.0)
    assert float(layer.scale) != 1


def test_scale_spreads_over_channels() -> None:
    x = image(2, 3, 4)
    scale = torch.tensor([0.1, 1.0, 10.0]).view(3, 1)
    found = fake_quantize(x, scale, 0, -8, 7)
    for channel, each in enumerate(scale.flatten()):
        assert torch.equal(found[:, channel], fake_quantize(x[:, channel], each, 0, -8, 7))


def test_text() -> None:
    layer = FakeQuantize(0.5, -3, 4, settled=True)
    assert repr(layer) == "FakeQuantize(scale=0.5, zero_point=-3, bits=4, settled)"


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"scale": 0.0}, "scale is positive and finite"),
        ({"scale": -1.0}, "scale is positive and finite"),
        ({"scale": math.inf}, "scale is positive and finite"),
        ({"scale": math.nan}, "scale is positive and finite"),
        ({"scale": 1e-50}, "scale is positive and finite"),
        ({"scale": 1e300}, "scale is positive and finite"),
        ({"zero_point": 128}, "zero_point is from -128 to 127, not 128"),
        ({"zero_point": -129}, "zero_point is from -128 to 127, not -129"),
        ({"zero_point": 2, "bits": 2}, "zero_point is from -2 to 1, not 2"),
        ({"bits": 1}, "bits is from 2 to 8, not 1"),
        ({"bits": 9}, "bits is from 2 to 8, not 9"),
        ({"bits": True}, "bits is from 2 to 8, not True"),
        ({"bits": 8.0}, "bits is from 2 to 8, not 8.0"),
    ],
)
def test_refuses(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        FakeQuantize(**{"scale": 1.0, **arguments})


def test_an_integer_scale_is_a_float_buffer() -> None:
    assert FakeQuantize(1).scale.dtype == torch.float32


@pytest.mark.parametrize("bits", range(2, 9))
def test_widths(bits: int) -> None:
    check_bits("weight_bits", bits)


def test_width_is_named() -> None:
    with pytest.raises(ValueError, match="weight_bits is from 2 to 8, not 0"):
        check_bits("weight_bits", 0)
