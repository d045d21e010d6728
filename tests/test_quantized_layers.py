"""Quantised layers: every kind, beside the plain layer and a reimplementation in float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from seeded import image, seeded
from torch import nn

from fxopt.quantized_layers import KINDS, Granularity, QuantizedLayer
from fxopt.quantizing.layers import floored_channels, quantized

INPUT_SCALE = 0.05
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, dilation=2, padding="same"), (2, 4, 6, 7)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, bias=False), (2, 4, 6, 7)),
    "circular": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 6, 7)),
    "conv3d": (nn.Conv3d(4, 6, (1, 2, 3)), (2, 4, 3, 4, 5)),
    "linear": (nn.Linear(4, 6), (2, 3, 4)),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5)),
    "transposed 2d": (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (2, 4, 5, 6)),
    "transposed groups": (nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2), (2, 4, 5, 6)),
    "transposed depthwise": (nn.ConvTranspose2d(4, 4, 2, groups=4, bias=False), (2, 4, 5, 6)),
    "transposed 3d": (nn.ConvTranspose3d(4, 6, 2), (2, 4, 3, 4, 5)),
}  # fmt: skip
GRANULARITIES: tuple[Granularity, ...] = ("channel", "tensor")


def made(
    name: str, granularity: Granularity = "channel", bits: int = 8
) -> tuple[Any, Any, torch.Tensor]:
    """The plain layer in float64, the quantised one, and an input on the input's grid."""
    layer, shape = LAYERS[name]
    layer = seeded(copy.deepcopy(layer)).double()
    x = (image(*shape, dtype=torch.float64) / INPUT_SCALE).round() * INPUT_SCALE
    return layer, quantized(copy.deepcopy(layer), INPUT_SCALE, granularity, bits), x


def by_hand(layer: Any, granularity: Granularity, bits: int = 8) -> tuple[Any, Any]:
    """Weight and bias as integer kernels have them, channel by channel, in float64."""
    weight, bias = layer.weight.detach().clone(), layer.bias
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    groups = layer.groups if transposed else 1
    axis = 1 if transposed else 0
    most = 2 ** (bits - 1) - 1
    channels = weight.shape[axis]
    found = None if bias is None else bias.detach().clone().view(groups, channels)
    scales = []
    for channel in range(channels):
        largest = weight.select(axis, channel).abs().max().item() / most
        b = 0.0 if found is None else found[:, channel].abs().max().item()
        scales.append(max(largest, b / (INPUT_SCALE * 2**30), torch.finfo(torch.float64).tiny))
    if granularity == "tensor":
        scales = [max(scales)] * channels
    for channel, scale in enumerate(scales):
        part = weight.select(axis, channel)
        part.copy_((part / scale).round() * scale)
        if found is not None:
            step = INPUT_SCALE * scale
            found[:, channel] = (found[:, channel] / step).round() * step
    return weight, None if found is None else found.flatten()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", LAYERS)
def test_is_the_plain_layer_with_quantised_tensors(name: str, granularity: Granularity) -> None:
    plain, layer, x = made(name, granularity)
    weight, bias = by_hand(plain, granularity)
    torch.testing.assert_close(layer.quantized_weight(), weight, rtol=1e-14, atol=0)
    with torch.no_grad():
        plain.weight.copy_(weight)
        if bias is not None:
            torch.testing.assert_close(layer.quantized_bias(), bias, rtol=1e-12, atol=1e-14)
            plain.bias.copy_(bias)
    assert not torch.equal(layer.quantized_weight(), layer.weight)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("name", ["conv2d", "transposed groups", "linear"])
def test_integers_times_scales_are_the_tensors(name: str, bits: int) -> None:
    _, layer, _ = made(name, bits=bits)
    weight, bias, most = layer.integer_weight(), layer.integer_bias(), 2 ** (bits - 1) - 1
    assert (weight.dtype, bias.dtype) == (torch.int8, torch.int32)
    assert (weight.min().item(), weight.max().item()) in {(-most, most), (-most, most - 1)} or (
        weight.abs().max() == most
    )
    # each channel reaches the end of the grid
    others = [axis for axis in range(weight.dim()) if axis != layer.axis]
    assert bool((weight.abs().amax(others) == most).all())
    scale = layer.weight_scale.view(
        [-1 if axis == layer.axis else 1 for axis in range(weight.dim())]
    )
    torch.testing.assert_close(weight * scale, layer.quantized_weight())
    torch.testing.assert_close(bias * layer.bias_scale(), layer.quantized_bias())


@pytest.mark.parametrize("name", ["transposed 1d", "transposed 2d", "transposed 3d"])
def test_transposed_takes_an_output_size(name: str) -> None:
    plain, layer, x = made(name)
    size = [each + 1 - getattr(plain, "output_padding", (0,))[0] for each in plain(x).shape[2:]]
    if plain.stride[0] == 1:
        size = list(plain(x).shape[2:])
    with torch.no_grad():
        plain.weight.copy_(layer.quantized_weight())
        plain.bias.copy_(layer.quantized_bias())
    expected = plain(x, output_size=size)
    torch.testing.assert_close(layer(x, output_size=size), expected, rtol=1e-12, atol=1e-12)
    assert list(expected.shape[2:]) == size


def test_every_kind_is_here() -> None:
    assert {type(layer) for layer, _ in LAYERS.values()} == set(KINDS)


@pytest.mark.parametrize("name", LAYERS)
def test_is_a_plain_layer_too(name: str) -> None:
    plain: Any = seeded(copy.deepcopy(LAYERS[name][0]))
    layer = quantized(plain, INPUT_SCALE)
    assert isinstance(layer, type(plain))
    assert isinstance(layer, QuantizedLayer)
    assert layer.weight is plain.weight
    assert layer.bias is plain.bias
    assert set(layer.state_dict()) == {*plain.state_dict(), "weight_scale", "input_scale"}
    assert repr(layer).endswith("8 bits per channel)")


def test_shape_of_the_scales() -> None:
    shapes = {name: tuple(made(name)[1].weight_scale.shape) for name in LAYERS}
    assert shapes == {
        **dict.fromkeys(("conv1d", "conv2d", "circular", "conv3d", "linear"), (6,)),
        "depthwise": (8,),
        **dict.fromkeys(("transposed 1d", "transposed 2d", "transposed 3d"), (6,)),
        "transposed groups": (3,), "transposed depthwise": (1,),
    }  # fmt: skip
    assert made("conv2d", "tensor")[1].weight_scale.shape == ()


@pytest.mark.parametrize("mode", [True, False])
def test_keeps_mode_and_what_trains(mode: bool) -> None:
    layer = nn.Conv2d(2, 3, 1).train(mode)
    layer.weight.requires_grad_(False)
    result: Any = quantized(layer, INPUT_SCALE)
    assert (result.training, result.weight.requires_grad, result.bias.requires_grad) == (
        mode, False, True,
    )  # fmt: skip


def test_gradients_go_straight_through() -> None:
    plain, layer, x = made("conv2d")
    layer(x).sum().backward()
    found = [layer.weight.grad.clone(), layer.bias.grad.clone()]
    layer.weight.grad = layer.bias.grad = None
    plain(x).sum().backward()
    torch.testing.assert_close(found, [plain.weight.grad, plain.bias.grad])


def test_weights_that_grew_beyond_the_grid_get_no_gradient() -> None:
    _, layer, x = made("linear")
    with torch.no_grad():
        layer.weight[0, 0] = 1000.0
    layer(x).sum().backward()
    assert layer.weight.grad[0, 0] == 0
    assert bool((layer.weight.grad.flatten()[1:] != 0).all())


# ---- dead channels and biases ------------------------------------------------------------------


def flooring(weight: float, bias: float, input_scale: float = 0.5) -> Any:
    """A linear layer of two channels, of which the second has these values."""
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -2.0], [weight, weight / 2]]))
        layer.bias.copy_(torch.tensor([0.3, bias]))
    return quantized(layer, input_scale)


@pytest.mark.parametrize(
    ("weight", "bias", "expected", "floored"),
    [
        # a channel of (almost) zeros has room to train: the scale of the largest one
        (0.0, 0.0, 2 / 127, False),
        (1e-42, 3e4, 2 / 127, False),
        (0.0, 3e9, 3e9 / (0.5 * 2**30), True),
        (1e-20, 0.0, 2 / 127, False),
        (1e-6, 0.0, 1e-6 / 127, False),
        (1e-6, -3e4, 3e4 / (0.5 * 2**30), True),
        (1e30, 3e4, 1e30 / 127, False),
    ],
)
def test_scale_of_a_channel(weight: float, bias: float, expected: float, floored: bool) -> None:
    layer = flooring(weight, bias)
    assert layer.weight_scale.tolist()[1] == pytest.approx(expected, rel=1e-6)
    assert floored_channels(layer) == ([1] if floored else [])
    integers = layer.integer_bias()
    assert integers.abs().max() <= 2**30
    # the bias is one of the grid's numbers: half a step of s_x·s_W, and float32's rounding
    step = float(layer.bias_scale()[1])
    assert abs(layer.quantized_bias()[1].item() - bias) <= step / 2 + abs(bias) * 1e-6
    assert bool(torch.isfinite(layer(torch.ones(1, 2))).all())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_layer_of_zeros_has_the_scale_of_a_fresh_one(granularity: Granularity) -> None:
    layer = nn.Conv2d(4, 6, 3)
    with torch.no_grad():
        layer.weight.zero_()
    made = quantized(layer, INPUT_SCALE, granularity)
    torch.testing.assert_close(
        made.weight_scale, torch.full_like(made.weight_scale, 1 / (127 * (4 * 9) ** 0.5))
    )


def test_bias_that_outgrows_int32_in_training_stays_at_its_end() -> None:
    layer = flooring(0.0, 3e4)
    with torch.no_grad():
        layer.bias.mul_(torch.tensor([1.0, 1e6]))
    assert layer.integer_bias()[1] > 2**31 - 2**10
    torch.testing.assert_close(layer.integer_bias() * layer.bias_scale(), layer.quantized_bias())


@pytest.mark.parametrize("input_scale", [1e-38, 1e-20, 1e20, 3e38])
def test_any_input_scale(input_scale: float) -> None:
    layer = flooring(1.0, 0.5, input_scale)
    scales = [layer.weight_scale, layer.bias_scale(), layer.quantized_weight()]
    assert all(bool(torch.isfinite(each).all()) for each in scales)
    assert bool((layer.weight_scale > 0).all())


def test_not_a_number_shows() -> None:
    _, layer, x = made("conv2d")
    x[0, 0, 0, 0] = math.nan
    assert bool(torch.isnan(layer(x)).any())
    with torch.no_grad():
        layer.weight[0, 0] = math.nan
    assert bool(torch.isnan(layer.quantized_weight()).any())


@pytest.mark.parametrize("bits", [0, 1, 9, True])
def test_refuses_a_width(bits: int) -> None:
    with pytest.raises(ValueError, match=f"weight_bits is from 2 to 8, not {bits}"):
        quantized(nn.Linear(2, 2), 0.1, bits=bits)
