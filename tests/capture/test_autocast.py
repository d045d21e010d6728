"""``torch.autocast`` inside a forward: its casts become nodes, gradients included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capture.checks import assert_same, code, image, net, targets
from torch import Tensor, nn

from fxopt.capture import capture
from fxopt.errors import CaptureError


def lower(body: str, **members: Any) -> Any:
    """A model that computes the expression ``body`` of ``x`` in bfloat16 where autocast says so."""
    expression = code(f"lambda self, x: {body}")

    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return expression(self, x)  # type: ignore[no-any-return]

    return net(forward, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(3), **members)


@pytest.mark.parametrize(
    "body",
    [
        "self.conv(x)", "self.conv(x).float()", "self.norm(x)", "self.conv(self.norm(x)).relu()",
        "F.conv2d(x, self.conv.weight)", "x @ x.mT", "torch.matmul(x, x.mT).softmax(-1)",
        "torch.bmm(x[:, 0], x[:, 1].mT)", "F.linear(x, x[0, 0])", "torch.einsum('bchw,bdhw->bcd', x, x)",
        "torch.einsum('bchw->bwch', x)", "F.scaled_dot_product_attention(x, x, x)", "F.softmax(x, 1)",
        "F.layer_norm(x, x.shape[1:])", "torch.cat([self.conv(x), F.avg_pool2d(x, 3, 1)[:, :1]], 1)",
        "F.mse_loss(self.conv(x), self.conv(x) * 2)", "F.l1_loss(self.conv(x), self.conv(x).float())",
        "self.conv(x).prod(1)", "F.pad(self.conv(x), (1, 1, 1, 1), mode='reflect')", "F.pad(self.conv(x), (1, 1))",
        "self.conv(x) + self.conv(x * 2)", "F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1))", "x.double().sum()",
        "F.conv2d(x.double(), self.conv.weight.double())", "self.conv(x).log_softmax(1).exp().sum((2, 3))",
        "F.interpolate(self.conv(x), scale_factor=2)", "F.gelu(self.conv(x)).mean((2, 3))",
    ],
)  # fmt: skip
def test_expression_under_autocast(body: str) -> None:
    assert_same(lower(body), image())


def test_decorated_forward() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        @torch.autocast("cpu", torch.bfloat16)
        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)  # type: ignore[no-any-return]

    assert_same(Net(), image())


def test_float32_island_inside_autocast() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.conv(x)
            with torch.autocast("cpu", enabled=False):
                z = self.head(y.float())
            return z * y.amax()  # type: ignore[no-any-return]

    model = net(forward, conv=nn.Conv2d(3, 4, 3), head=nn.Conv2d(4, 2, 1))
    assert targets(assert_same(model, image())).count("Conv2d") == 1


def test_switched_off_inside_is_no_obstacle() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.conv(x.float())  # type: ignore[no-any-return]

    assert_same(net(forward, conv=nn.Conv2d(3, 4, 3)), image())


def test_weight_is_cast_once_a_region() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.conv(self.conv(x)).relu()  # type: ignore[no-any-return]

    program = assert_same(net(forward, conv=nn.Conv2d(3, 3, 3)), image())
    assert sum(node.target == "conv.weight" for node in program.nodes) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("torch.tensordot(x, x, 4)", "calls tensordot under autocast"),
        ("torch.einsum('bchw,bdh->bd', x, x[..., 0])", "calls einsum 'bchw,bdh->bd' under autocast"),
        ("torch.einsum('bchw,bdhw,b->cd', x, x, x[:, 0, 0, 0])", "calls einsum"),
    ],
)  # fmt: skip
def test_refuses_operators_that_cast_inside(body: str, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        capture(lower(body), image())


def test_refuses_an_lstm_under_autocast() -> None:
    with pytest.raises(CaptureError, match=r"(?s)'lstm'.*under autocast.*test_autocast.py"):
        capture(lower("self.lstm(x[:, 0])[0]", lstm=nn.LSTM(7, 5)), image())


def test_captured_under_autocast_it_follows_its_callers() -> None:
    model = net(lambda self, x: F.relu(self.conv(x)), conv=nn.Conv2d(3, 4, 3))
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(model, image())
