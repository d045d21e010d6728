"""Values that are the same for every input may be read; other values may not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from capture.checks import assert_same, code, image, net
from capture.later import assert_same_later
from torch import Tensor, nn

from fxopt.capture import capture
from fxopt.errors import CaptureError

READ = [
    "torch.linspace(0, 0.3, 4).tolist()[-1] * x", "[r.item() for r in torch.linspace(0, 0.3, 3)][1] * x",
    "torch.tensor([1.0, 2.0]).sum().item() * x", "torch.ones(3).tolist()[0] * x", "int(torch.tensor(3)) * x",
    "x * (2 if torch.tensor(3.0) > 2 else 3)", "x * (2 if torch.equal(torch.ones(2), torch.ones(2)) else 3)",
    "x * torch.tensor([1, 2, 3]).max().item()", "torch.tensor([1.0, 2.0]).numpy().sum() * x",
    "x[:, : int(torch.tensor(2))]", "x * torch.arange(torch.tensor(7))", "x * int(torch.arange(x.shape[2]).sum())",
    "x * torch.full((3,), x.shape[2]).tolist()[0]", "x * torch.linspace(0, 1, 3, device=x.device).tolist()[1]",
    "x * nn.functional.relu(torch.tensor([-1.0, 2.0])).tolist()[1]",
]  # fmt: skip
SIZED = [
    "torch.argwhere(torch.ones(3)) + x.mean()", "torch.nonzero(torch.eye(3)) * x.mean()",
    "torch.bincount(torch.tensor([0, 1, 1])) * x.mean()", "torch.unique(torch.tensor([1, 1, 2])) * x.mean()",
    "torch.where(torch.eye(3) > 0)[0] + x.mean()", "F.one_hot(torch.tensor([0, 2])) + x.mean()",
    "torch.repeat_interleave(x, torch.tensor([1, 2, 1]), 1)", "torch.repeat_interleave(x, torch.tensor(2), 1)",
    "x.repeat_interleave(torch.tensor([2]), dim=1)", "x.repeat_interleave(torch.tensor([1, 2, 0]), dim=1)",
]  # fmt: skip
INDEXED = [
    "x[:, torch.arange(3) != 1]", "x[:, torch.tensor([True, False, True])]", "x[:, torch.tensor(1)]",
    "x[:, torch.tensor([0, 2]).tolist()]", "x[:, range(2)]", "x[:, np.array([0, 2])]",
    "x[:, np.array([True, False, True])]", "x[torch.tensor(True)]",
    "x[..., torch.ones(x.shape[2], x.shape[3], dtype=torch.bool).tril()]",
    "x[:, torch.tensor([1, 0, 1], dtype=torch.uint8)]", "x[torch.tensor(2) - 1].mean() * x",
]  # fmt: skip


@pytest.mark.parametrize("expression", READ + SIZED + INDEXED)
def test_value_of_a_constant_is_read(expression: str) -> None:
    model = net(code(f"lambda self, x: {expression}"))
    assert_same(model, image())
    assert_same_later(model, image(), image(2, 3, 8, 7), image(3, 3, 10, 7))


def test_constant_written_in_forward_is_read_as_written() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        mask = torch.zeros(3)
        mask[1] = 1
        mask[2] += 1
        return x[:, mask > 0] * mask.tolist()[2]

    assert_same(net(forward), image())


def test_write_through_a_constant_mask() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, torch.tensor([True, False, True])] += 1
        return y

    assert_same(net(forward), image())


def test_stochastic_depth_rates_computed_in_forward() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        rates = [rate.item() for rate in torch.linspace(0, 0.3, len(self.blocks))]
        for block, rate in zip(self.blocks, rates, strict=True):
            x = x + block(x) * (1 - rate)
        return x

    assert_same(net(forward, blocks=nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(3))), image())


def test_causal_mask_is_recognised_by_the_encoder() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.encoder(x, mask=mask)  # type: ignore[no-any-return]

    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    model = net(forward, encoder=nn.TransformerEncoder(layer, 2))
    assert_same(model, image(2, 5, 8), tolerance=1e-5)


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("x * int(self.steps)", r"by the values of a tensor \(int\), which depend on 'steps'"),
        ("x * self.scale.tolist()[0]", r"\(tolist\), which depend on 'scale'"),
        ("x * torch.rand(1).item()", r"\(item\), which depend on random numbers"),
        ("x * torch.randperm(3).tolist()[0]", r"\(tolist\), which depend on random numbers"),
        ("x * torch.empty(1).item()", "which depend on memory that nobody has written"),
        ("x * x.sum().item()", r"\(item\), which differ from input to input"),
        ("torch.from_numpy(x.numpy())", "makes a NumPy array of a tensor"),
        ("x + np.ones(7, dtype=np.float32)", "makes a NumPy array of a tensor"),
        ("x[:, x.mean((0, 2, 3)).argmax()]", "indexes by a number that a tensor computes"),
        ("x[x > 0].mean()", "size of a result depends on values: indexing by a mask .use torch.where"),
        ("x.nonzero()", "size of a result depends on values: nonzero .use torch.where"),
        ("x.round().unique()", "size of a result depends on values: unique"),
        ("torch.masked_select(x, x > 0)", "depends on values: masked_select .use torch.where"),
        ("torch.where(x > 0)[0]", "depends on values: where with one argument"),
        ("F.one_hot(x.long().abs())", "depends on values: one_hot .give num_classes"),
        ("torch.repeat_interleave(x, x[0, :, 0, 0].long().abs(), 1)", "repeat_interleave .give output_size"),
        ("torch.eye(7).to_sparse() @ x[0, 0].t()", "makes a sparse tensor"),
        ("torch.quantize_per_tensor(x, 0.1, 0, torch.qint8).dequantize()", "cannot tell the shape of dequantize"),
        ("torch.nested.nested_tensor([x[0], x[1]]).to_padded_tensor(0.0)", "where the tracer cannot follow"),
    ],
)  # fmt: skip
def test_refuses_values_that_may_change(expression: str, reason: str) -> None:
    model = net(
        code(f"lambda self, x: {expression}"),
        steps=torch.tensor(3),
        scale=nn.Parameter(torch.ones(2)),
    )
    with pytest.raises(CaptureError, match=reason + r".* at \w+.py:\d+") as caught:
        capture(model, image())
    assert len(str(caught.value)) < 400
