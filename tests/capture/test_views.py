"""Views of every kind overwritten, results written into ``out=``, tensors initialised in forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from capture.checks import assert_same, code, image, net
from torch import Tensor, nn

from fxopt.capture import capture
from fxopt.errors import CaptureError


@pytest.mark.parametrize(
    "write",
    [
        "y.positive().add_(1)", "y.expand_as(y).add_(1)", "y.expand(-1, 4, -1, -1).add_(1)",
        "torch.as_tensor(y).add_(1)", "y.type(torch.float32).add_(1)", "y.movedim(1, -1)[..., 0].add_(1)",
        "torch.moveaxis(y, (0, 1), (1, 0)).mul_(2)", "y.hsplit(2)[1].add_(1)", "y[0].vsplit(2)[1].mul_(2)",
        "y.dsplit([2, 4])[1].zero_()", "y.diagonal(dim1=2, dim2=3).add_(1)", "torch.diagonal(y, 1, -2, -1).fill_(3)",
        "torch.atleast_3d(y).add_(1)", "torch.real(y).add_(1)", "y.broadcast_to(*y.shape).add_(1)",
        "y.T.add_(1)", "y.T[0].add_(1)", "y.view(torch.int32).add_(1)", "y.__setitem__(y > 0, 3.0)",
        "F.dropout(y, 0.5, False).add_(1)", "F.dropout2d(y, 0.5, self.training, inplace=True)",
        "F.alpha_dropout(y, 0.5, True, True)", "F.relu(input=y, inplace=True)", "y.fill_(y.mean().detach())",
    ],
)  # fmt: skip
def test_write_through_a_view(write: str) -> None:
    write = code(f"lambda self, y: {write}")

    def forward(self: Any, x: Tensor) -> Any:
        y = x * 1
        older = y[:, 1:]
        write(self, y)  # type: ignore[operator]
        return y + 1, older

    assert_same(net(forward), image(2, 4, 6, 5))


def test_write_to_the_parts_of_a_complex_value() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        z = torch.complex(x, x * 2)
        z.real.add_(1)
        z.imag.mul_(2)
        torch.view_as_real(z)[..., 0].add_(1)
        return torch.view_as_real(z)

    assert_same(net(forward), image())


def test_write_to_a_complex_view() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        y = (x * 1)[..., :2].contiguous()
        z = torch.view_as_complex(y)
        z.mul_(1j)
        return torch.view_as_real(z), y

    assert_same(net(forward), image())


def test_write_after_a_dropout_that_is_off_in_evaluation() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = nn.functional.dropout(y, 0.5, self.training)
        z += 1
        return y + z  # type: ignore[no-any-return]

    model = net(forward, conv=nn.Conv2d(3, 4, 3))
    assert_same(model, image(), eval_only=bool(capture(model, image()).modes.eval_only))


@pytest.mark.parametrize(
    "body",
    [
        "y = x * 1; torch.add(x, 2, out=y)",
        "y = torch.empty_like(x); torch.mul(x, 2, out=y); y = y[:, 1:]",
        "y = x.new_empty(0); torch.add(x, 1, out=y); y = y.reshape(y.shape[0], y.shape[1], -1)",
        "y = torch.empty(2, 6, 5); torch.sum(x, 1, out=y)",
        "v, i = torch.empty(2, 6, 5), torch.empty(2, 6, 5, dtype=torch.long); y = torch.max(x, 1, out=(v, i)); y = v + i",
        "y = torch.empty(2, 4, 6, 5, dtype=torch.float64); torch.add(x, 1, out=y)",
        "y = torch.empty_like(x); torch.exp(x[:, :2], out=y[:, :2]); torch.exp(x[:, 2:], out=y[:, 2:])",
    ],
)  # fmt: skip
def test_result_written_into_out(body: str) -> None:
    lines = "\n        ".join(body.split("; "))
    names: dict[str, Any] = {"torch": torch}
    exec(f"def forward(self, x):\n    with torch.no_grad():\n        {lines}\n    return y", names)
    assert_same(
        net(names["forward"]),
        image(2, 4, 6, 5),
        input_gradients=False,
        same_strides=False,
        batch_fixed=True,
    )


@pytest.mark.parametrize(
    "fill",
    [
        "nn.init.normal_(w)", "nn.init.normal_(tensor=w, mean=0.5)", "nn.init.constant_(w, 2.0)",
        "nn.init.uniform_(w[1:3], 1, 2)", "nn.init.kaiming_normal_(w)", "nn.init.xavier_uniform_(w)",
    ],
)  # fmt: skip
def test_tensor_initialised_in_forward(fill: str) -> None:
    function = code(f"lambda w: {fill}")

    def forward(self: Any, x: Tensor) -> Tensor:
        weight = torch.zeros(7, 7)
        function(weight)
        return x @ weight

    assert_same(net(forward), image())


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        ("y.transpose_(1, 2)", "transpose_ changes the shape of a tensor in place"),
        ("y.unsqueeze_(0)", "unsqueeze_ changes the shape of a tensor in place"),
        ("y.unfold(2, 2, 2).add_(1)", "view made by unfold; overwrite the tensor itself"),
        ("torch.add(y, 1, out=y[:, :, :1])", "out= argument of another shape"),
    ],
)
def test_refuses_write_that_is_not_followed(write: str, reason: str) -> None:
    function = code(f"lambda y: {write}")

    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x * 1
            function(y)
        return y

    with pytest.raises(CaptureError, match=reason):
        capture(net(forward), image())
