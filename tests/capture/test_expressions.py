"""Decisions and arithmetic on shapes, types and settings, as people write them."""

from __future__ import annotations

import functools
import itertools
import json
import numbers

import pytest
from capture.checks import assert_same, code, image, net
from capture.later import assert_same_later
from torch import Tensor

from fxopt.capture import capture
from fxopt.errors import CaptureError

OTHERS = [image(2, 3, 8, 6), image(2, 3, 11, 7), image(3, 3, 10, 7), image(1, 3, 10, 7),
          image(2, 3, 40, 33), image(2, 3, 7, 10)]  # fmt: skip
NAMES = {"functools": functools, "itertools": itertools, "json": json, "numbers": numbers,
         "Tensor": Tensor}  # fmt: skip

CAPTURED = [
    "x * (2 if isinstance(x.shape[2], int) else 3)",
    "F.interpolate(x, (lambda s: (s, s) if isinstance(s, int) else s)(x.shape[2]))",
    "x * (2 if isinstance(x.shape[2], numbers.Integral) else 3)",
    "x * (2 if isinstance(x.shape[2] / 2, float) else 3)", "x * (2 if isinstance(x.shape, torch.Size) else 3)",
    "x * (2 if isinstance(x.shape, (tuple, list)) else 3)", "x * (2 if isinstance(x.shape[0], Tensor) else 3)",
    "x * (2 if type(x) is Tensor else 3)", "x * np.prod(x.shape)", "x * float(np.sqrt(x.shape[2]))",
    "x * np.log(x.shape[3])", "x * int(np.ceil(x.shape[2] / 3))",
    "x + torch.from_numpy(np.arange(x.shape[3], dtype=np.float32))",
    "x + torch.from_numpy(np.linspace(0, 1, x.shape[3]).astype(np.float32))",
    "x + torch.tensor(np.arange(x.shape[3]), dtype=torch.float32)",
    "x + torch.tensor(list(range(x.shape[3])), dtype=torch.float32)",
    "x + torch.tensor([i / x.shape[3] for i in range(x.shape[3])])", "x * torch.tensor(x.shape[2:]).prod()",
    "x * torch.tensor([x.shape[2], x.shape[3]]).float().mean()", "x * torch.as_tensor(x.shape).sum()",
    "x * torch.tensor(x.shape[2] / 2)", "x * sum(x.shape)", "x * sorted(x.shape)[0]", "x * x.shape.index(3)",
    "x * x.shape.count(3)", "x * len(str(x.shape[2]))", "x.reshape(x.shape[::-1])", "x.reshape(*reversed(x.shape))",
    "x.reshape(list(x.shape[:2]) + [-1])", "x.reshape((x.shape[0],) + x.shape[1:2] + (-1,))",
    "x.new_zeros((1,) + x.shape[1:]) + x", "x.view(*x.shape[:-2], -1)", "x.view(x.shape[:2] + torch.Size([-1]))",
    "x.view(torch.Size((x.shape[0], -1)))", "x * math.prod(x.shape[2:])",
    "x * functools.reduce(operator.mul, x.shape, 1)", "x * x.shape[2:].numel()", "x * x[0].numel()", "x * x.nbytes",
    "x * x.itemsize", "x * x.element_size() * x.nelement()", "x if x.nbytes > 2000 else x * 2",
    "x * (2 if x.is_same_size(x[:, :, :7]) else 3)", "x * (2 if torch.is_same_size(x, x.transpose(2, 3)) else 3)",
    "x * (2 if x.size() == x.transpose(2, 3).size() else 3)", "x * (2 if x.shape < x.transpose(2, 3).shape else 3)",
    "x * (2 if tuple(x.shape[2:]) == (10, 7) else 3)", "x * (2 if list(x.shape)[2:] == [10, 7] else 3)",
    "x * (2 if (x.shape[2], x.shape[3]) in {(10, 7), (8, 6)} else 3)",
    "x * {(10, 7): 2}.get((x.shape[2], x.shape[3]), 3)", "x * {'10x7': 2}.get(f'{x.shape[2]}x{x.shape[3]}', 3)",
    "x * {'10x7': 2}.get('%dx%d' % (x.shape[2], x.shape[3]), 3)",
    "x * {'10x7': 2}.get('{}x{}'.format(*x.shape[2:]), 3)", "x * [1, 2, 3][x.shape[2] % 3]",
    "x * 'ab'.count('a') * x.shape[2].bit_length()", "x * len(bin(x.shape[2]))", "x * int(x.shape[2] ** 0.5)",
    "x * round(x.shape[2] ** 0.5, 2)", "x * (x.shape[2] == 10) * 2", "x * (x.shape[2] > 8)",
    "x * (not x.shape[2] % 2)", "x * (x.shape[2] and 3)", "x * (x.shape[2] // 20 or 3)",
    "x * max(x.shape[2], x.shape[3])", "x * max(x.shape[2:])", "x * min(1.0, 8 / x.shape[2])",
    "x * max([x.shape[2], 9], key=lambda v: -v)", "x * all(s > 2 for s in x.shape[1:])",
    "x * any(s == 11 for s in x.shape)", "x * len([s for s in x.shape if s % 2])",
    "x * len(list(zip(range(x.shape[2]), range(x.shape[3]))))", "x * len(range(0, x.shape[3], 3))",
    "x[:, :, ::max(1, x.shape[2] // 5)]", "x[:, :, : x.shape[2] // 2 * 2, : x.shape[3] & ~1]",
    "x[..., x.shape[3] // 2]", "x[:, :, -(x.shape[2] // 2):]", "x[:, :, [0, x.shape[2] - 1]]",
    "x[:, :, slice(x.shape[2] // 2, None)]", "x[:, :, torch.arange(x.shape[2] - 1, -1, -1)]",
    "x[(slice(None),) * (x.ndim - 1) + (0,)]", "torch.stack([x[:, :, i] for i in range(0, x.shape[2], 4)], 1)",
    "torch.cat(x.split(x.shape[2] // 2, 2)[:2], 1)", "torch.cat(x.split([x.shape[2] - 4, 4], 2), 2)",
    "x.unfold(2, x.shape[2] // 2, 1)", "F.avg_pool2d(x, x.shape[2:])", "F.avg_pool2d(x, kernel_size=x.size()[2:])",
    "F.max_pool2d(x, (x.shape[2] // 2, 2))", "F.adaptive_avg_pool2d(x, (x.shape[2] // 2, 1))",
    "F.interpolate(x, x.shape[2] * 2)", "F.interpolate(x, size=[s * 2 for s in x.shape[2:]], mode='bilinear')",
    "F.interpolate(x, scale_factor=16 / x.shape[2])", "F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))",
    "F.pad(x, [0, 0, 0, (8 - x.shape[2] % 8) % 8]) if x.shape[2] % 8 else x", "F.layer_norm(x, x.shape[1:])",
    "F.layer_norm(x, x.size()[-1:])", "x.expand(*x.shape)", "x.expand(2, *x.shape)",
    "x.repeat(1, 1, *[2] * (x.dim() - 2))", "x.broadcast_to((2,) + tuple(x.shape))",
    "torch.empty(x.shape[2:]).fill_(2.0) * x", "torch.eye(x.shape[3]) @ x.transpose(-1, -2)",
    "torch.ones(x.shape[2:]).tril() * x", "torch.full(x.shape[2:], x.shape[3] * 0.5) + x",
    "torch.zeros(x.size()) + x", "torch.randn(x.shape, generator=None) + x", "torch.linspace(-1, 1, x.shape[3]) * x",
    "torch.arange(0, 1, 1 / x.shape[3])[:7] + x[..., :7][..., :7]",
    "torch.arange(x.size(-1)).view(1, 1, 1, -1).expand_as(x) + x",
    "torch.arange(x.shape[2] * x.shape[3]).reshape(x.shape[2:]) + x",
    "torch.triu_indices(x.shape[2], x.shape[2])[0].sum() * x",
    "x.flatten(2).transpose(1, 2).unflatten(1, x.shape[2:])",
    "torch.unflatten(x.flatten(2), 2, (x.shape[2], x.shape[3]))", "x.movedim(1, -1).reshape(-1, x.shape[1])",
    "x.view(x.shape[0], -1).view_as(x)", "x.view(len(x), -1)",
    "x.type(x.type()) * (2 if x.type() == 'torch.FloatTensor' else 3)",
    "x * (2 if x.type().endswith('FloatTensor') else 3)",
    "x * (2 if x.dtype in (torch.float16, torch.bfloat16) else 3)",
    "x * (2 if str(x.dtype) == 'torch.float32' else 3)", "x * torch.finfo(x.dtype).eps",
    "x.masked_fill(x > 0, torch.finfo(x.dtype).min)", "x * (2 if x.layout == torch.strided else 3)",
    "x * (2 if x.is_sparse or x.is_quantized or x.is_complex() else 3)", "x * (2 if x.is_pinned() else 3)",
    "x * (2 if x.is_inference() else 3)", "x * (2 if torch.is_tensor(x) else 3)",
    "x * (2 if hasattr(x, 'tensors') else 3)", "getattr(x, 'tensor', x) * 2", "x * (2 if x.is_nested else 3)",
    "x * (2 if x.grad is None else 3)", "x * (2 if x.device.index is None else 3)",
    "x * (2 if x.device == torch.device('cpu') else 3)", "x * (2 if callable(x) else 3)",
    "x * (2 if x is not None and x.numel() else 3)", "x * hash(x.shape[2])", "x.to(x)",
    "x.to(dtype=x.dtype, device=x.device)", "x * (x.dtype.itemsize)", "x * (2 if x.dtype.is_floating_point else 3)",
    "x * (2 if torch.get_default_dtype() == x.dtype else 3)",
    "x * torch.promote_types(x.dtype, torch.float16).itemsize", "x * (2 if torch.numel(x) > 300 else 3)",
    "x * (2 if torch.is_complex(x) else 3)", "x * x.ndimension()", "x.sum(dim=tuple(range(2, x.dim())))",
    "x.mean(list(range(1, x.ndim)), keepdim=True)", "x.permute(*range(x.dim() - 1, -1, -1))",
    "x.permute(0, *range(2, x.ndim), 1)", "x.transpose(*sorted((3, 1)))", "x[:, np.int64(1)]", "x * np.float32(2)",
    "x * np.float64(2)", "np.float32(2) * x", "x.view(np.int64(2), -1) if len(x) == 2 else x",
    "x.mean(dim=np.int64(1))", "F.interpolate(x, size=(np.int64(5), np.int64(4)))",
    "x.reshape(np.array([2, -1]).tolist()) if len(x) == 2 else x", "x[None, ..., None]", "x[..., None, :]",
    "x[:, 1:2, ...]", "x[True]", "x[0, ..., 1:3, [0, 1]]", "x.take_along_dim(x.argsort(3), 3)", "x.flip(-1)",
    "x.roll((1, -1), dims=(2, 3))", "x.rot90(1, (2, 3))", "x.index_select(1, torch.tensor([2, 0]))",
    "torch.gather(x, 3, x.argsort(-1))", "x @ x.transpose(-1, -2)", "x.__matmul__(x.mT)", "x.__rsub__(1)", "2 ** x",
    "1 / (1 + x.abs())", "1 - x", "-x", "+x", "abs(x)", "~(x > 0)", "(x > 0) & (x < 1) | (x > 2)", "(x > 0) ^ True",
    "x % 0.3", "x.round(decimals=1)", "True & (x > 0)", "1 << (x.abs().int() % 4)",
]  # fmt: skip
REFUSED = [
    ("x * (2 if x.dim_order() == (0, 1, 2, 3) else 3)", "may change .dim_order."),
    ("x * (2 if x.is_contiguous(memory_format=torch.channels_last) else 3)", "memory format"),
    ("x * (2 if x._version == 0 else 3)", "asks for the ._version"),
]


@pytest.mark.parametrize("expression", CAPTURED)
def test_expression_over_shapes_and_types(expression: str) -> None:
    model = net(code(f"lambda self, x: {expression}", **NAMES))
    assert_same(model, image(), batch_fixed=True)
    assert_same_later(model, image(), *OTHERS)


@pytest.mark.parametrize(("expression", "reason"), REFUSED)
def test_refuses_question_about_memory(expression: str, reason: str) -> None:
    with pytest.raises(CaptureError, match=reason):
        capture(net(code(f"lambda self, x: {expression}")), image())
