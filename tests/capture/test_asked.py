"""Questions whose answer depends on how the model is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from capture.checks import assert_same, image, net
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fxopt.capture import capture
from fxopt.errors import CaptureError


def test_need_of_a_gradient_that_decides_nothing() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.stem(x)
        if y.requires_grad:
            return checkpoint(self.conv, y, use_reentrant=False)  # type: ignore[no-any-return]
        return self.conv(y)  # type: ignore[no-any-return]

    assert_same(net(forward, stem=nn.Conv2d(3, 3, 1), conv=nn.Conv2d(3, 4, 3)), image())


def test_refuses_a_decision_by_the_need_of_a_gradient() -> None:
    model = net(lambda self, x: self.conv(x) * (2 if self.conv(x).requires_grad else 3),
                conv=nn.Conv2d(3, 4, 3))  # fmt: skip
    with pytest.raises(CaptureError, match=r"decides by the \.requires_grad .* test_asked\.py:\d+"):
        capture(model, image())


def test_refuses_a_hook_on_the_gradient_of_a_parameter() -> None:
    model = net(lambda self, x: self.conv(x), conv=nn.Conv2d(3, 4, 3))
    model.conv.weight.register_hook(lambda gradient: gradient * 2)
    with pytest.raises(CaptureError, match=r"'conv\.weight' has a hook on its gradient"):
        capture(model, image())


def test_number_of_bytes_follows_the_size() -> None:
    assert_same(net(lambda self, x: x * x.nbytes), image())


def test_same_size_is_guarded() -> None:
    program = assert_same(net(lambda self, x, y: x if x.is_same_size(y) else y), (image(), image()))
    assert str(program.guards.shapes[0]).startswith("x.shape[0] == y.shape[0]")


def test_size_is_an_int_and_a_shape_a_size() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        assert isinstance(x.shape, torch.Size)
        assert isinstance(x.shape[0], int)
        assert isinstance(x.shape[0] / 2, float)
        return x.view(x.shape[0], -1)

    assert_same(net(forward), image())


def test_slice_of_a_sequence_of_layers_is_followed() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    program = assert_same(net(lambda self, x: self.net[:-1](x) + self.net(x), net=layers), image())
    assert "net.0" in {node.target for node in program.nodes}


def test_refuses_a_layer_made_of_parameters_of_its_own() -> None:
    loose = [nn.Conv2d(3, 4, 3)]
    with pytest.raises(CaptureError, match="a Conv2d that is no registered submodule"):
        capture(net(lambda self, x: loose[0](x)), image())


def test_compiled_parts_are_followed_as_they_were_written() -> None:
    function = torch.compile(lambda x: x * 2 + 1)
    model = net(lambda self, x: function(self.conv(x)), conv=torch.compile(nn.Conv2d(3, 4, 3)))
    # compiled kernels add the 27 products of an output in an order of their own, by the machine
    assert_same(model, image(), tolerance=27 * torch.finfo(torch.float32).eps)
