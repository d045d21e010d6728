"""Each operator of the table: its kind, its MACs by hand, the bytes that it writes, its kernels."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fxopt import layers, operators
from fxopt.analysis.cost import OperatorCost, cost
from fxopt.capture import capture
from fxopt.kernels import Fusion, InPlace, Window
from fxopt.operators import Description
from fxopt.passes import FoldConvBn
from fxopt.rewrite import run_pass


class Unary(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


class Binary(Unary):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:  # type: ignore[override]
        return self.function(x, y)


class Ternary(Unary):
    def forward(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> Any:  # type: ignore[override]
        return self.function(x, y, z)


def wrapped(function: Callable[..., Any], operands: int) -> nn.Module:
    return (Unary, Binary, Ternary)[operands - 1](function)


def costs(model: nn.Module, *inputs: torch.Tensor) -> list[OperatorCost]:
    rows = cost(capture(model.eval(), inputs)).operators
    return [row for row in rows if row.kind not in ("shape", "weight")]


CONVOLUTIONS = [
    # module, input, kind, MACs: outputs x weights of one filter
    (nn.Conv1d(6, 8, 5, padding=2), (3, 6, 11), "conv1d", (3 * 8 * 11) * (6 * 5)),
    (nn.Conv2d(6, 8, (3, 5)), (3, 6, 9, 14), "conv2d", (3 * 8 * 7 * 10) * (6 * 15)),
    (nn.Conv2d(6, 8, 3, stride=(2, 1)), (3, 6, 9, 14), "conv2d", (3 * 8 * 4 * 12) * (6 * 9)),
    (nn.Conv2d(6, 8, 3, dilation=2), (3, 6, 9, 14), "conv2d", (3 * 8 * 5 * 10) * (6 * 9)),
    (nn.Conv2d(6, 8, 3, groups=2), (3, 6, 9, 14), "conv2d", (3 * 8 * 7 * 12) * (3 * 9)),
    (nn.Conv2d(6, 6, 3, groups=6), (3, 6, 9, 14), "depthwise", (3 * 6 * 7 * 12) * 9),
    (nn.Conv2d(6, 12, 3, groups=6), (3, 6, 9, 14), "depthwise", (3 * 12 * 7 * 12) * 9),
    (nn.Conv2d(1, 8, 3), (3, 1, 9, 14), "conv2d", (3 * 8 * 7 * 12) * 9),
    (nn.Conv3d(2, 4, 2), (3, 2, 4, 5, 6), "conv3d", (3 * 4 * 3 * 4 * 5) * (2 * 8)),
    (nn.ConvTranspose1d(6, 4, 3), (3, 6, 7), "conv_transpose", (3 * 6 * 7) * (4 * 3)),
    (nn.ConvTranspose2d(6, 4, 3, 2), (3, 6, 5, 7), "conv_transpose", (3 * 6 * 35) * (4 * 9)),
    (
        nn.ConvTranspose2d(6, 4, 3, groups=2),
        (3, 6, 5, 7),
        "conv_transpose",
        (3 * 6 * 35) * (2 * 9),
    ),
    (nn.ConvTranspose3d(2, 4, 2), (3, 2, 3, 4, 5), "conv_transpose", (3 * 2 * 60) * (4 * 8)),
]


@pytest.mark.parametrize(
    ("layer", "shape", "kind", "macs"), CONVOLUTIONS, ids=[str(c[0]) for c in CONVOLUTIONS]
)
def test_convolution_modules(
    layer: nn.Module, shape: tuple[int, ...], kind: str, macs: int
) -> None:
    (row,) = costs(nn.Sequential(layer), torch.zeros(shape))
    assert (row.kind, row.macs) == (kind, macs)


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Linear(7, 5), (3, 7), 3 * 5 * 7),
        (nn.Linear(7, 5, bias=False), (3, 4, 7), 3 * 4 * 5 * 7),
        (nn.Linear(7, 5), (7,), 5 * 7),
    ],
)
def test_linear_modules(layer: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    (row,) = costs(nn.Sequential(layer), torch.zeros(shape))
    assert (row.kind, row.macs) == ("linear", macs)


def computed_weight_conv(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x, w * 2, stride=2, groups=2)


PRODUCTS: list[tuple[str, Callable[..., Any], list[tuple[int, ...]], str, int]] = [
    # name, function, inputs, kind, MACs
    ("matmul", torch.matmul, [(2, 3, 5, 7), (7, 4)], "matmul", 2 * 3 * 5 * 4 * 7),
    ("matmul broadcast", torch.matmul, [(2, 1, 5, 7), (3, 7, 4)], "matmul", 2 * 3 * 5 * 4 * 7),
    ("matmul operator", operator.matmul, [(5, 7), (7, 4)], "matmul", 5 * 4 * 7),
    ("method", lambda x, y: x.matmul(y), [(5, 7), (7, 4)], "matmul", 5 * 4 * 7),
    ("matrix by vector", torch.matmul, [(5, 7), (7,)], "matmul", 5 * 7),
    ("mm", torch.mm, [(5, 7), (7, 4)], "matmul", 5 * 4 * 7),
    ("bmm", torch.bmm, [(3, 5, 7), (3, 7, 4)], "matmul", 3 * 5 * 4 * 7),
    ("addmm", torch.addmm, [(4,), (5, 7), (7, 4)], "matmul", 5 * 4 * 7),
    ("baddbmm", torch.baddbmm, [(3, 5, 4), (3, 5, 7), (3, 7, 4)], "matmul", 3 * 5 * 4 * 7),
    ("addbmm", torch.addbmm, [(5, 4), (3, 5, 7), (3, 7, 4)], "matmul", 3 * 5 * 4 * 7),
    ("tensordot", lambda x, y: torch.tensordot(x, y, 1), [(2, 5, 7), (7, 4)], "matmul", 280),
    (
        "tensordot over two axes",
        lambda x, y: torch.tensordot(x, y, ([1, 2], [1, 0])),
        [(2, 5, 7), (7, 5, 4)],
        "matmul",
        2 * 35 * 4,
    ),
    (
        "einsum",
        lambda x, y: torch.einsum("bchw,oc->bohw", x, y),
        [(2, 3, 5, 7), (4, 3)],
        "matmul",
        2 * 4 * 35 * 3,
    ),
    (
        "einsum with ellipsis",
        lambda x, y: torch.einsum("...ij,...jk->...ik", x, y),
        [(2, 3, 5, 7), (3, 7, 4)],
        "matmul",
        2 * 3 * 5 * 4 * 7,
    ),
    (
        "einsum without output",
        lambda x, y: torch.einsum("ij,jk", x, y),
        [(5, 7), (7, 4)],
        "matmul",
        5 * 4 * 7,
    ),
    (
        "einsum that only scales",
        lambda x, y: torch.einsum("bchw,bc->bchw", x, y),
        [(2, 3, 5, 7), (2, 3)],
        "matmul",
        0,
    ),
    (
        "einsum that sums one operand first",
        lambda x, y: torch.einsum("ijx,jk->ik", x, y),
        [(5, 7, 3), (7, 4)],
        "matmul",
        5 * 4 * 7,
    ),
    (
        "einsum over index lists",
        lambda x, y: torch.einsum(x, [0, 1], y, [1, 2], [0, 2]),
        [(5, 7), (7, 4)],
        "matmul",
        5 * 4 * 7,
    ),
    (
        "einsum of three",
        lambda x, y, z: torch.einsum("ij,jk,kl->il", x, y, z),
        [(5, 7), (7, 4), (4, 6)],
        "matmul",
        5 * 7 * 4 + 5 * 4 * 6,
    ),
    (
        "attention",
        F.scaled_dot_product_attention,
        [(2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)],
        "attention",
        2 * 3 * 5 * 7 * (8 + 8),
    ),
    ("linear", F.linear, [(3, 4, 7), (5, 7)], "linear", 3 * 4 * 5 * 7),
    ("bilinear", F.bilinear, [(3, 4), (3, 5), (6, 4, 5)], "linear", 3 * 6 * 4 * 5),
    ("conv1d", F.conv1d, [(3, 4, 9), (8, 4, 3)], "conv1d", (3 * 8 * 7) * (4 * 3)),
    ("conv3d", F.conv3d, [(1, 2, 4, 5, 6), (3, 2, 2, 2, 2)], "conv3d", (3 * 60) * (2 * 8)),
    (
        "transposed",
        lambda x, w: F.conv_transpose2d(x, w, stride=2),
        [(3, 6, 5, 7), (6, 4, 3, 3)],
        "conv_transpose",
        (3 * 6 * 35) * (4 * 9),
    ),
]


@pytest.mark.parametrize(
    ("function", "shapes", "kind", "macs"), [p[1:] for p in PRODUCTS], ids=[p[0] for p in PRODUCTS]
)
def test_products_as_functions(
    function: Callable[..., Any], shapes: list[tuple[int, ...]], kind: str, macs: int
) -> None:
    (row,) = costs(wrapped(function, len(shapes)), *map(torch.zeros, shapes))
    assert (row.kind, row.macs) == (kind, macs)


# Operators for which torch.utils.flop_counter has no formula on the CPU.
UNKNOWN_TO_TORCH = ("matrix by vector", "addbmm", "attention", "bilinear")


@pytest.mark.parametrize(
    ("function", "shapes"),
    [p[1:3] for p in PRODUCTS if p[0] not in UNKNOWN_TO_TORCH],
    ids=[p[0] for p in PRODUCTS if p[0] not in UNKNOWN_TO_TORCH],
)
def test_products_agree_with_torchs_own_counter(
    function: Callable[..., Any], shapes: list[tuple[int, ...]]
) -> None:
    inputs = [torch.ones(shape) for shape in shapes]
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        function(*inputs)
    rows = costs(wrapped(function, len(shapes)), *inputs)
    assert sum(row.macs for row in rows) == counter.get_total_flops() // 2


def test_counts_a_grouped_convolution_with_a_computed_weight() -> None:
    rows = costs(
        wrapped(computed_weight_conv, 2), torch.zeros(3, 6, 9, 14), torch.zeros(8, 3, 3, 3)
    )
    assert [(row.kind, row.macs) for row in rows] == [
        ("elementwise", 0),
        ("conv2d", (3 * 8 * 4 * 6) * (3 * 9)),
    ]


@pytest.mark.parametrize("bidirectional", [False, True])
def test_counts_every_step_of_a_recurrent_layer(bidirectional: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(5, 6, bidirectional=bidirectional, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.lstm(x)[0]
            return result

    rows = costs(Net(), torch.zeros(3, 4, 5))
    directions = 2 if bidirectional else 1
    (lstm,) = (row for row in rows if row.kind == "recurrent")
    assert lstm.macs == 3 * 4 * directions * 4 * 6 * (5 + 6)


KINDS: list[tuple[Callable[..., Any], str]] = [
    (nn.BatchNorm2d(4), "batch_norm"),
    (nn.GroupNorm(2, 4), "norm"),
    (nn.InstanceNorm2d(4), "norm"),
    (nn.LayerNorm(7), "norm"),
    (nn.ReLU(), "activation"),
    (nn.Hardswish(), "activation"),
    (nn.SiLU(), "activation"),
    (nn.Softmax(1), "softmax"),
    (nn.MaxPool2d(2), "pool"),
    (nn.AvgPool2d(2), "pool"),
    (nn.AdaptiveAvgPool2d(1), "pool"),
    (nn.Upsample(scale_factor=2), "resize"),
    (nn.ZeroPad2d(1), "pad"),
    (lambda x: F.pad(x, (1, 0, 2, 1)), "pad"),
    (lambda x: F.interpolate(x, scale_factor=2.0), "resize"),
    (lambda x: torch.cat([x, x], 1), "concat"),
    (lambda x: torch.stack([x, x], 1), "concat"),
    (lambda x: x + x, "elementwise"),
    (lambda x: x * 2, "elementwise"),
    (lambda x: x.clamp(0, 1), "elementwise"),
    (lambda x: x.mean((2, 3)), "reduce"),
    (lambda x: torch.roll(x, 1, 2), "copy"),
    (lambda x: x.double(), "cast"),
    (lambda x: F.unfold(x, 2), "unfold"),
]


@pytest.mark.parametrize(
    ("function", "kind"), KINDS, ids=[f"{i} {k[1]}" for i, k in enumerate(KINDS)]
)
def test_kinds_of_operators_that_write_a_tensor_and_have_no_macs(
    function: Callable[..., Any], kind: str
) -> None:
    model = nn.Sequential(function) if isinstance(function, nn.Module) else wrapped(function, 1)
    x = torch.rand(2, 4, 6, 7)
    (row,) = costs(model, x)
    result = model(x)
    assert (row.kind, row.macs) == (kind, 0)
    assert row.activation_bytes == result.numel() * result.itemsize


VIEWS: list[tuple[Callable[..., Any], str]] = [
    (lambda x: x.view(2, 24, 7), "view"),
    (lambda x: x.unsqueeze(1), "view"),
    (lambda x: torch.flatten(x, 1), "view"),
    (lambda x: x.reshape(2, 4, 42), "view"),
    (lambda x: x.permute(0, 2, 3, 1), "permute"),
    (lambda x: x.transpose(1, 2), "permute"),
    (lambda x: x[:, 1:3], "slice"),
    (lambda x: x[:, :, 1], "slice"),
    (lambda x: x.chunk(2, 1), "slice"),
    (lambda x: x[:, :1].expand(2, 4, 6, 7), "expand"),
]


@pytest.mark.parametrize(
    ("function", "kind"), VIEWS, ids=[f"{i} {k[1]}" for i, k in enumerate(VIEWS)]
)
def test_views_write_nothing(function: Callable[..., Any], kind: str) -> None:
    rows = costs(wrapped(function, 1), torch.zeros(2, 4, 6, 7))
    assert kind in {row.kind for row in rows}
    assert sum(row.activation_bytes for row in rows) == 0


def test_a_reshape_of_a_permuted_tensor_writes_a_copy() -> None:
    rows = costs(
        wrapped(lambda x: x.permute(0, 2, 3, 1).reshape(2, 42, 4), 1), torch.zeros(2, 4, 6, 7)
    )
    assert [(row.kind, row.activation_bytes) for row in rows] == [
        ("permute", 0),
        ("view", 2 * 4 * 42 * 4),
    ]


def test_an_index_that_is_a_tensor_writes_a_copy() -> None:
    rows = costs(wrapped(lambda x, i: x[:, i], 2), torch.zeros(2, 4, 6, 7), torch.tensor([0, 2]))
    assert [(row.kind, row.activation_bytes) for row in rows] == [("slice", 2 * 2 * 42 * 4)]


def test_a_cast_to_the_same_dtype_writes_nothing() -> None:
    program = capture(wrapped(lambda x: x.to(torch.float32) + 1, 1), torch.zeros(2, 3))
    assert cost(program).activation_bytes == 2 * 3 * 4


def test_arithmetic_on_sizes_is_no_tensor_work() -> None:
    model = wrapped(lambda x: x.view(x.shape[0] * 2, -1), 1)
    rows = cost(capture(model, torch.zeros(2, 4, 6, 7))).operators
    assert {row.kind for row in rows} == {"shape", "view"}
    assert sum(row.activation_bytes + row.macs for row in rows) == 0


def test_a_scale_and_shift_is_elementwise_and_writes_once() -> None:
    program = capture(nn.Sequential(nn.BatchNorm2d(4)).eval(), torch.rand(2, 4, 6, 7))
    folded = run_pass(FoldConvBn(scale_shift=True), program).after
    (row,) = cost(folded).operators
    assert (row.kind, row.macs, row.activation_bytes) == ("elementwise", 0, 4 * 2 * 4 * 42)


def test_an_unknown_operator_is_counted_as_other_work() -> None:
    (row,) = costs(wrapped(torch.special.bessel_j0, 1), torch.zeros(2, 3))
    assert (row.kind, row.macs, row.activation_bytes) == ("other", 0, 2 * 3 * 4)


def test_stochastic_depth_writes_nothing_in_inference() -> None:
    ops = pytest.importorskip("torchvision").ops
    rows = costs(nn.Sequential(ops.StochasticDepth(0.5, "row"), nn.ReLU()), torch.ones(2, 3))
    assert [(row.kind, row.activation_bytes) for row in rows] == [
        ("dropout", 0),
        ("activation", 24),
    ]


# ---- what kernels can make of an operator -----------------------------------------------------

X, Y = torch.rand(2, 2, 4, 3, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "addcdiv": (X, Y, Y + 1), "addcmul": (X, Y, X), "atan2": (X, Y), "clamp": (X, 0.2, 0.6),
    "clamp_max": (X, 0.5), "clamp_min": (X, 0.5), "clip": (X, 0.2, 0.6), "fmod": (X, Y),
    "lerp": (X, Y, 0.3), "masked_fill": (X, Y > 0.5, 7.0), "prelu": (X, Y[1, :, 2]),
    "threshold": (X, 0.5, 0.1), "_threshold": (X, 0.5, 0.1), "where": (X > 0.5, X, Y), "batch_norm": (X, Y[0, :, 0], Y[1, :, 0]),
    **dict.fromkeys(("bitwise_and", "bitwise_or"), (X > 0.5, Y > 0.5)),
    "pow": (X, 2.0), "floordiv": (X, Y), "mod": (X, Y), "truediv": (X, Y),
    "scale_shift": (X, Y[0, :, 0], Y[1, :, 0]), "fake_quantize": (X, torch.tensor(0.1), 0, -8, 7),
}  # fmt: skip


def arguments(function: Callable[..., Any]) -> tuple[Any, ...]:
    """Operands of one shape that ``function`` takes."""
    if function.__name__ in ARGUMENTS:
        return ARGUMENTS[function.__name__]
    for given in ((X, Y), (X,)):
        try:
            function(*given)
        except (TypeError, RuntimeError):
            continue
        return given
    raise AssertionError(f"no operands for {function}")


def is_pointwise(function: Callable[..., Any], *given: Any) -> bool:
    """Whether a changed element changes nothing but the element of the result at its place."""
    result = function(*given)
    for position, operand in enumerate(given):
        if not isinstance(operand, torch.Tensor) or operand.shape != X.shape:
            continue
        changed = operand.clone()
        changed[1, 2, 1] = ~changed[1, 2, 1] if operand.dtype is torch.bool else 0.95
        other = function(*given[:position], changed, *given[position + 1 :])
        if other.shape != X.shape:
            return False
        differ = ~torch.isclose(other.double(), result.double(), equal_nan=True)
        differ[1, 2, 1] = False
        if differ.any():
            return False
    return True


POINTWISE = [
    function
    for function, entry in operators.FUNCTIONS.items()
    if entry.inplace is InPlace.ELEMENTWISE or function is F.batch_norm
]


@pytest.mark.parametrize(
    "function", POINTWISE, ids=[f"{i} {f.__name__}" for i, f in enumerate(POINTWISE)]
)
def test_what_the_table_calls_elementwise_is(function: Callable[..., Any]) -> None:
    assert is_pointwise(function, *arguments(function))


_ARGUMENTS: dict[str, tuple[float, ...]] = {
    "Threshold": (0.5, 0.1), "PReLU": (4,), "SkipInit": (0.2, 0.7),
    "FakeQuantize": (0.5,),
}  # fmt: skip


@pytest.mark.parametrize(
    "layer",
    [
        cls(*_ARGUMENTS.get(cls.__name__, ()))
        for cls, entry in operators.MODULES.items()
        if entry.inplace is InPlace.ELEMENTWISE and cls is not layers.ScaleShift
    ]
    + [nn.BatchNorm1d(4), layers.ScaleShift(torch.rand(4), torch.rand(4))],
    ids=lambda layer: type(layer).__name__,
)
def test_modules_that_the_table_calls_elementwise_are(layer: nn.Module) -> None:
    with torch.no_grad():
        assert is_pointwise(layer.eval(), X)


@pytest.mark.parametrize(
    "function",
    [
        nn.Softmax(1), nn.GLU(1), nn.GroupNorm(2, 4), nn.MaxPool1d(3, 1, 1),
        lambda x: torch.cumsum(x, 1), lambda x: torch.roll(x, 1, 1), lambda x: torch.flip(x, (1,)),
        lambda x: x.sort(1)[0], lambda x: x.mean(1, keepdim=True), lambda x: x @ x.mT,
        lambda x: torch.outer(x.flatten(), x.flatten()),
        lambda x: F.batch_norm(x, None, None, training=True),
    ],
    ids=range(12),
)  # fmt: skip
def test_what_is_not_elementwise_is_not_called_so(function: Callable[..., Any]) -> None:
    assert not is_pointwise(function, X)
    model = nn.Sequential(function) if isinstance(function, nn.Module) else wrapped(function, 1)
    assert all(d.inplace is InPlace.NONE for d in descriptions(model, X))


def descriptions(model: nn.Module, *inputs: torch.Tensor) -> list[Description]:
    program = capture(model.eval(), inputs)
    calls = (node for node in program.nodes if node.op not in ("placeholder", "output", "get_attr"))
    return [operators.describe(program, node) for node in calls]


def described(function: Any, *inputs: torch.Tensor) -> Description:
    """Of the last operator of a module or function."""
    model = nn.Sequential(function) if isinstance(function, nn.Module) else None
    return descriptions(model or wrapped(function, len(inputs)), *inputs)[-1]


def test_what_runs_in_a_convolutions_loop_needs_one_element_at_a_time() -> None:
    for entry in (*operators.FUNCTIONS.values(), *operators.MODULES.values()):
        if entry.fusion is Fusion.EPILOGUE:
            assert entry.inplace is InPlace.ELEMENTWISE


IMAGE = torch.rand(2, 4, 6, 7)
LAYERS: list[tuple[Any, InPlace, int, Fusion, Window]] = [
    (nn.Conv2d(4, 4, 3, groups=4), InPlace.PLANES, 4 * 5, Fusion.HOST, Window.SUM),
    (nn.Conv2d(4, 8, 3, groups=4), InPlace.NONE, 0, Fusion.HOST, Window.SUM),
    (nn.Conv2d(4, 4, 3, groups=2), InPlace.NONE, 0, Fusion.HOST, Window.SUM),
    (nn.Conv2d(4, 4, 3), InPlace.NONE, 0, Fusion.HOST, Window.SUM),
    (
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        InPlace.NONE,
        0,
        Fusion.HOST,
        Window.NONE,
    ),
    (nn.ConvTranspose2d(4, 4, 3, groups=4), InPlace.NONE, 0, Fusion.HOST, Window.NONE),
    (nn.Linear(7, 7), InPlace.NONE, 0, Fusion.HOST, Window.NONE),
    (nn.BatchNorm2d(4), InPlace.ELEMENTWISE, 0, Fusion.EPILOGUE, Window.NONE),
    (nn.BatchNorm2d(4, track_running_stats=False), InPlace.NONE, 0, Fusion.NONE, Window.NONE),
    (nn.ReLU6(), InPlace.ELEMENTWISE, 0, Fusion.EPILOGUE, Window.NONE),
    (lambda x: x.clamp(0, 6), InPlace.ELEMENTWISE, 0, Fusion.EPILOGUE, Window.NONE),
    (nn.GLU(1), InPlace.NONE, 0, Fusion.NONE, Window.NONE),
    (lambda x: x + x, InPlace.ELEMENTWISE, 0, Fusion.SUM, Window.NONE),
    (lambda x: torch.add(x, x, alpha=2), InPlace.ELEMENTWISE, 0, Fusion.NONE, Window.NONE),
    (lambda x: x + 1, InPlace.ELEMENTWISE, 0, Fusion.NONE, Window.NONE),
    (lambda x: x * x, InPlace.ELEMENTWISE, 0, Fusion.NONE, Window.NONE),
    (nn.MaxPool2d(2), InPlace.NONE, 0, Fusion.NONE, Window.MAX),
    (nn.AdaptiveMaxPool2d(2), InPlace.NONE, 0, Fusion.NONE, Window.MAX),
    (nn.AvgPool2d(2), InPlace.NONE, 0, Fusion.NONE, Window.SUM),
    (nn.AdaptiveAvgPool2d(2), InPlace.NONE, 0, Fusion.NONE, Window.SUM),
    (lambda x: F.max_pool3d(x, 2), InPlace.NONE, 0, Fusion.NONE, Window.MAX),
    (lambda x: F.avg_pool3d(x, 2), InPlace.NONE, 0, Fusion.NONE, Window.SUM),
]


@pytest.mark.parametrize(
    ("layer", "inplace", "scratch", "fusion", "window"),
    LAYERS,
    ids=range(len(LAYERS)),
)
def test_what_kernels_can_make_of_an_operator(
    layer: Any, inplace: InPlace, scratch: int, fusion: Fusion, window: Window
) -> None:
    found = described(layer, IMAGE)
    assert (found.inplace, found.scratch, found.fusion, found.window) == (
        inplace, scratch, fusion, window,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("pad", "constant"),
    [
        (lambda x: F.pad(x, (1, 0, 2, 1)), 0.0),
        (lambda x: F.pad(x, (1, 1), value=-float("inf")), -float("inf")),
        (lambda x: F.pad(x, (1, -1)), None),
        (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), None),
        (lambda x: F.pad(x, (x.shape[0] - 3, 1)), None),  # a width that the table cannot know
        (nn.ZeroPad2d(2), 0.0),
        (nn.ConstantPad2d(2, 3.5), 3.5),
        (nn.ZeroPad2d((0, 0, -1, 0)), None),
        (nn.ReflectionPad2d(2), None),
        (nn.ReLU(), None),
    ],
)
def test_constants_around_an_operand(pad: Any, constant: float | None) -> None:
    assert described(pad, IMAGE).padding == constant


def test_a_width_given_as_a_size_is_known() -> None:
    program = capture(wrapped(lambda x: F.pad(x, (x.shape[0] - 1, 1)), 1), IMAGE)
    *_, width, pad, _ = program.nodes
    assert operators.describe(program, pad).padding is None
    assert operators.describe(program, pad, {width.name: 1}).padding == 0.0
    assert operators.describe(program, pad, {width.name: -1}).padding is None


LIKE: list[Callable[..., Any]] = [
    torch.zeros_like, torch.ones_like, lambda x: torch.full_like(x, 2.0),
    lambda x: x.new_zeros(3), lambda x: x.new_ones(3), lambda x: x.new_full((3,), 2.0),
    torch.rand_like, torch.randn_like, lambda x: torch.randint_like(x, 9),
]  # fmt: skip


@pytest.mark.parametrize("function", LIKE, ids=[f"{i}" for i in range(len(LIKE))])
def test_a_tensor_like_another_does_not_read_it(function: Callable[..., Any]) -> None:
    program = capture(wrapped(function, 1), IMAGE)
    for node in program.nodes[1:-1]:
        description = operators.describe(program, node)
        if description.kind != "shape":
            assert operators.reads(node, description) == ()
            assert description.kind in ("constant", "random")


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: x.view_as(y), lambda x, y: x.reshape_as(y), lambda x, y: x.expand_as(y),
        lambda x, y: x.type_as(y), lambda x, y: x.to(y),
    ],
)  # fmt: skip
def test_an_operand_that_gives_a_shape_or_dtype_is_not_read(function: Callable[..., Any]) -> None:
    program = capture(wrapped(function, 2), (IMAGE, IMAGE.double()))
    read = {
        operand.name
        for node in program.nodes[2:-1]
        for operand in operators.reads(node, operators.describe(program, node))
    }
    assert "y" not in read


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: x + torch.rand(7), lambda x: x + torch.randn(7), lambda x: torch.bernoulli(x),
        lambda x: x.clone().bernoulli_(0.5), lambda x: x.clone().uniform_(),
    ],
)  # fmt: skip
def test_random_draws_are_told_from_constants(draw: Callable[..., Any]) -> None:
    assert "random" in {found.kind for found in descriptions(wrapped(draw, 1), IMAGE)}


def test_layers_that_keep_tensors_inside() -> None:
    sequence = torch.rand(2, 5, 4)
    found = descriptions(nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 3, batch_first=True)), sequence)
    assert {each.kind: each.composite for each in found} == {
        "linear": False, "recurrent": True, "slice": False,
    }  # fmt: skip


def test_a_slice_of_all_elements_is_a_view_in_their_order() -> None:
    rows = costs(wrapped(lambda x: x[:, :4].reshape(2, -1) + 1, 1), torch.zeros(2, 4, 6))
    assert [row.activation_bytes for row in rows] == [0, 0, 192]
    rows = costs(wrapped(lambda x: x[:, :3].reshape(2, -1) + 1, 1), torch.zeros(2, 4, 6))
    assert [row.activation_bytes for row in rows] == [0, 144, 144]
