"""Dtypes, layouts and devices of inputs and weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capture.checks import assert_same, captured, image, net, seeded, targets
from torch import Tensor, nn

from fxopt.capture import capture
from fxopt.captured import to_module
from fxopt.errors import CaptureError


def small() -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(True), nn.Conv2d(4, 2, 1)]
    return seeded(nn.Sequential(*layers))  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_whole_model_in_another_floating_dtype(dtype: torch.dtype) -> None:
    assert_same(small().to(dtype), image().to(dtype))


def test_complex_input_and_weights() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return (
            torch.view_as_real(x * self.weight + x.conj() * 2j).abs()
            + x.real
            - x.imag.unsqueeze(-1)[..., 0, None]
        )

    def simple(self: Any, x: Tensor) -> Tensor:
        return (x * self.weight).abs()

    x = torch.complex(image(2, 3, 4), image(2, 3, 4, seed=1))
    assert_same(net(simple, weight=nn.Parameter(torch.randn(4, dtype=torch.complex64))), x)


def test_spectral_convolution() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(x, norm="ortho")
        mixed = torch.einsum("bchw,cd->bdhw", spectrum, torch.view_as_complex(self.weight))
        return torch.fft.irfft2(mixed, s=x.shape[-2:], norm="ortho")

    assert_same(net(forward, weight=nn.Parameter(torch.randn(3, 4, 2))), image(), tolerance=1e-6)


def test_byte_image_scaled_in_forward() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.conv(x.float() / 255)

    x = torch.randint(0, 256, (2, 3, 10, 7), dtype=torch.uint8)
    assert_same(net(forward, conv=nn.Conv2d(3, 4, 3)), x)


def test_input_cast_to_the_dtype_of_the_weights() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.conv(x.to(self.conv.weight.dtype)).to(x.dtype)

    assert_same(net(forward, conv=nn.Conv2d(3, 4, 3).double()), image(), tolerance=1e-6)


def test_integer_and_boolean_inputs() -> None:
    def forward(self: Any, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.embedding(tokens).masked_fill(mask[..., None], 0).sum(1) / (~mask).sum(
            1, keepdim=True
        )

    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert_same(net(forward, embedding=nn.Embedding(9, 4)), (tokens, tokens > 6))


def test_mixed_precision_in_one_model() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.low(x.bfloat16())
        return self.norm(y.float()).to(y.dtype)

    members = {"low": nn.Conv2d(3, 4, 3).bfloat16(), "norm": nn.GroupNorm(2, 4)}
    assert_same(net(forward, **members), image())


def test_promotion_of_scalars_and_dtypes() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        counts = (x > 0).sum(1, keepdim=True)
        return counts / 2, counts * 0.5 + x, counts // 2, counts.float().mean(), x.half() * 2.0 + x

    assert_same(net(forward), image())


def test_channels_last_input() -> None:
    assert_same(small(), image().to(memory_format=torch.channels_last))


def test_channels_last_model() -> None:
    model = small().to(memory_format=torch.channels_last)
    x = image().to(memory_format=torch.channels_last)
    program = assert_same(model, x)
    weight = to_module(program).get_submodule("0").weight
    assert weight.stride() == model[0].weight.stride()


def test_channels_last_inside() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.conv(x.contiguous(memory_format=torch.channels_last))
        return y.permute(0, 2, 3, 1).reshape(y.shape[0], -1, 4)

    assert_same(net(forward, conv=nn.Conv2d(3, 4, 3)), image())


def test_captured_contiguous_called_with_channels_last() -> None:
    model = small().eval()
    module = captured(model, image())
    x = image().to(memory_format=torch.channels_last)
    torch.testing.assert_close(module(x), model(x), rtol=0, atol=1e-6)


def test_view_of_a_non_contiguous_value_raises_as_in_eager() -> None:
    model = net(lambda self, x: x.view(x.shape[0], -1, 7))
    module = captured(model, image())
    x = image().to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        model(x)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        module(x)


def test_flattening_view_of_channels_last_is_not_silently_reordered() -> None:
    model = net(lambda self, x: x.view(x.size(0), -1))
    module = captured(model, image())
    x = image().to(memory_format=torch.channels_last)
    assert torch.equal(module(x), x.reshape(2, -1))


def test_non_contiguous_and_expanded_and_negative_strided_inputs() -> None:
    model = small()
    assert_same(model, image(2, 3, 7, 10).transpose(2, 3))
    assert_same(model, image(2, 3, 20, 14)[:, :, ::2, ::2])
    assert_same(model, image(1, 3, 10, 7).expand(2, -1, -1, -1))
    assert_same(model, image(2, 6, 10, 7)[:, 3:])


def test_parameter_that_is_a_non_contiguous_view() -> None:
    model = net(lambda self, x: x @ self.matrix, matrix=nn.Parameter(torch.randn(4, 7).t()))
    assert_same(model, image())


@pytest.mark.parametrize("size", [(3, 3), (5, 17), (31, 4), (1, 9), (13, 1)])
def test_odd_and_non_square_sizes(size: tuple[int, int]) -> None:
    layers = [nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.MaxPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(2),
              nn.Flatten(), nn.Linear(16, 5)]  # fmt: skip
    assert_same(seeded(nn.Sequential(*layers)), image(2, 3, *size))


def test_empty_batch_gives_what_eager_gives() -> None:
    model = small().eval()
    module = captured(model, image())
    assert module(image()[:0]).shape == model(image()[:0]).shape


def test_large_batch_dimension_is_symbolic() -> None:
    module = captured(small(), image()).eval()
    assert module(image(17, 3, 4, 5)).shape[0] == 17


def test_values_that_are_not_finite_pass_through() -> None:
    x = image()
    x[0, 0, 0, 0], x[1, 0, 0, 0] = float("nan"), float("inf")
    assert_same(net(lambda self, x: F.relu(x) * 2), x, batch_fixed=True, input_gradients=False)


def test_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    x = torch.empty(2, 3, 10, 7, device="meta")
    program = capture(model, x)
    assert targets(program) == ["Conv2d", "BatchNorm2d", "ReLU", "Conv2d"]
    assert to_module(program)(x).shape == (2, 2, 8, 5)


def test_meta_model_with_a_real_example_is_captured() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 3))
    assert targets(capture(model, image())) == ["Conv2d"]


def test_dtype_that_does_not_fit_is_refused_naming_the_layer() -> None:
    with pytest.raises(CaptureError, match=r"'0' \(Conv2d\) raises RuntimeError"):
        capture(small(), image().double())


def test_default_dtype_and_device_of_new_tensors() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        grid = torch.linspace(0, 1, x.shape[3], device=x.device)
        return (
            x + grid + torch.zeros(7, device=x.device, dtype=x.dtype) + torch.ones(1).to(x.device)
        )

    assert_same(net(forward), image())


def test_device_questions() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        if x.is_cuda or x.device.type != "cpu" or str(x.device) != "cpu" or x.get_device() >= 0:
            return x
        return x * 2 if x.device == self.weight.device else x

    assert_same(net(forward, weight=nn.Parameter(torch.rand(3))), image())


def test_tensor_subclass_input_is_captured() -> None:
    class Tagged(torch.Tensor):
        pass

    model = small()
    x = image().as_subclass(Tagged)
    assert_same(model, x)
    assert type(captured(model, x)(x)) is type(model(x)) is Tagged


def test_parameter_as_input() -> None:
    assert_same(small(), nn.Parameter(image()))


def test_sparse_input_is_refused() -> None:
    model = net(
        lambda self, x: torch.sparse.mm(x, self.weight), weight=nn.Parameter(torch.rand(4, 3))
    )
    x = image(5, 4).relu().to_sparse()
    with pytest.raises(CaptureError, match="'x' is torch.sparse_coo; give a dense tensor"):
        capture(model, x)
