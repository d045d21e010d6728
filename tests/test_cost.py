"""Costs of whole nets: by hand, against torch's own counter, and against published figures."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

from fxopt.analysis.cost import Cost, cost
from fxopt.capture import capture


class SqueezeExcite(nn.Module):
    """A net with a stem, a depthwise convolution, squeeze-excite, a branch and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 5, padding=2, groups=8)
        self.reduce, self.expand = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4, dilation=2)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2, groups=2)
        self.head = nn.Linear(6, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.depthwise(x)
        x = x * torch.sigmoid(self.expand(torch.relu(self.reduce(x.mean((2, 3), keepdim=True)))))
        x = self.up(self.grouped(x))
        result: torch.Tensor = self.head(torch.flatten(x.mean((2, 3)), 1))
        return result


class SharedConvolution(nn.Module):
    """One convolution called at two sizes, and a second name for its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.twin = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.twin.weight = self.conv.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.max_pool2d(self.conv(x), 2)
        result: torch.Tensor = self.twin(self.conv(x))
        return result


def cost_of(model: nn.Module, *shape: int) -> Cost:
    torch.manual_seed(0)
    return cost(capture(model.eval(), torch.randn(shape)))


def test_totals_of_a_small_net_by_hand() -> None:
    found = cost_of(SqueezeExcite(), 3, 3, 21, 30)
    # Batch 3; the maps are 11 x 15, then 7 x 11 (dilated 3 x 3), then 14 x 22.
    macs = {
        "conv2d": 3 * (8 * 165 * 27 + 2 * 8 + 8 * 2 + 12 * 77 * 2 * 9),
        "depthwise": 3 * 8 * 165 * 25,
        "conv_transpose": 3 * 12 * 77 * 3 * 4,
        "linear": 3 * 60,
    }
    assert found.macs_by_kind == dict(sorted(macs.items(), key=lambda item: -item[1]))
    assert found.macs == sum(macs.values())
    parameters = 8 * 27 + 16 + (8 * 25 + 8) + (16 + 2) + (16 + 8) + (12 * 18 + 12)
    parameters += (12 * 3 * 4 + 6) + 70
    assert found.parameters == parameters
    # The norm keeps a mean and a variance for 8 channels and an int64 count of batches.
    assert found.weight_bytes == 4 * (parameters + 16) + 8
    assert not found.at_least


def test_activation_bytes_by_hand() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Dropout(0.5), nn.MaxPool2d(2), nn.Flatten()
    )
    found = cost_of(net, 2, 3, 8, 10)
    written = {row.node: row.activation_bytes for row in found.operators if row.activation_bytes}
    assert list(written.values()) == [2 * 8 * 48 * 4, 2 * 8 * 48 * 4, 2 * 8 * 12 * 4]
    assert found.activation_bytes == sum(written.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_bytes_follow_the_dtype(dtype: torch.dtype) -> None:
    net = nn.Conv2d(3, 8, 3).to(dtype).eval()
    found = cost(capture(nn.Sequential(net), torch.zeros(2, 3, 8, 10, dtype=dtype)))
    assert found.weight_bytes == (8 * 27 + 8) * dtype.itemsize
    assert found.activation_bytes == 2 * 8 * 48 * dtype.itemsize


def test_shared_weights_count_once_and_every_call_has_its_macs() -> None:
    found = cost_of(SharedConvolution(), 1, 4, 6, 10)
    convolutions = [row for row in found.operators if row.kind == "conv2d"]
    assert [row.parameters for row in convolutions] == [148, 148, 144]
    assert [row.macs for row in convolutions] == [60 * 4 * 36, 15 * 4 * 36, 15 * 4 * 36]
    assert found.parameters == 148
    assert found.weight_bytes == 4 * 148


def test_a_computed_weight_belongs_to_what_reads_it() -> None:
    net = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 8, 3)))
    found = cost_of(net, 2, 3, 8, 10)
    assert found.parameters == 8 * 27 + 8 + 8  # direction, length and bias
    assert found.macs == (2 * 8 * 48) * 27


def test_a_parameter_used_by_itself_is_counted() -> None:
    class Scaled(nn.Module):
        offset: torch.Tensor
        scratch: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.rand(4, 1, 1))
            self.register_buffer("offset", torch.rand(4, 1, 1))
            self.register_buffer("scratch", torch.rand(4, 1, 1), persistent=False)
            self.unread = nn.Parameter(torch.rand(100))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.gamma + self.offset + self.scratch

    found = cost_of(Scaled(), 2, 4, 3, 5)
    assert (found.parameters, found.weight_bytes) == (4, 4 * (4 + 4))


def test_a_convolution_by_function_counts_its_own_parameters() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.rand(8, 3, 3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.conv2d(x, self.kernel, stride=2)

    found = cost_of(Functional(), 3, 3, 9, 14)
    assert (found.parameters, found.macs) == (8 * 27, (3 * 8 * 4 * 6) * 27)


NETS: list[tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = [
    ("squeeze-excite", SqueezeExcite, (3, 3, 37, 50)),
    ("shared", SharedConvolution, (2, 4, 12, 18)),
    (
        "three-dimensional",
        lambda: nn.Sequential(
            nn.Conv3d(2, 4, 3, padding=1, groups=2), nn.ReLU(), nn.ConvTranspose3d(4, 2, 2, 2)
        ),
        (2, 2, 4, 5, 6),
    ),
    (
        "sequence",
        lambda: nn.Sequential(nn.Conv1d(4, 6, 5, dilation=2), nn.SiLU(), nn.Linear(9, 3)),
        (3, 4, 17),
    ),
]


@pytest.mark.parametrize(("build", "shape"), [n[1:] for n in NETS], ids=[n[0] for n in NETS])
def test_macs_are_half_of_the_flops_that_torch_counts(
    build: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    model = build().eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.zeros(shape))
    assert counter.get_total_flops() > 0
    assert cost_of(model, *shape).macs == counter.get_total_flops() // 2


def test_macs_and_activations_grow_with_the_batch_and_weights_do_not() -> None:
    one, three = cost_of(SqueezeExcite(), 1, 3, 21, 30), cost_of(SqueezeExcite(), 3, 3, 21, 30)
    assert three.macs == 3 * one.macs
    assert three.activation_bytes == 3 * one.activation_bytes
    assert three.weight_bytes == one.weight_bytes


# Parameters and MACs (convolutions and linear layers) at 224 x 224: He et al. (2016) give 3.8e9
# for ResNet-50 v1, of which this v1.5 variant has 4.1e9; Tan & Le (2019) give 5.3M and 0.39e9.
PUBLISHED = [
    ("torchvision", "resnet50", 25_557_032, 4_089_184_256),
    ("timm", "efficientnet_b0", 5_288_548, 385_814_752),
]


@pytest.mark.parametrize(("library", "name", "parameters", "macs"), PUBLISHED)
def test_published_figures(library: str, name: str, parameters: int, macs: int) -> None:
    zoo = pytest.importorskip(library)
    build = zoo.models.get_model if library == "torchvision" else zoo.create_model
    found = cost_of(build(name), 1, 3, 224, 224)
    assert (found.parameters, found.macs) == (parameters, macs)
