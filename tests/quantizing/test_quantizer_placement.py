"""Where quantisers stand: graphs of six-line models, before and after."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from quantizing.nets import conv, graph, grids, net, quantise, reasons
from seeded import image, text
from torch import nn

import fxopt
from fxopt.passes import FoldConvBn
from fxopt.quantized_layers import QuantizedLayer
from fxopt.quantizing.clamps import limits_of
from fxopt.quantizing.grid import Limits
from fxopt.quantizing.placement import placed


def se(gate: Callable[..., Any]) -> Any:
    """Squeeze-and-excitation with this gate."""

    def forward(self: Any, x: torch.Tensor) -> Any:
        y = self.a(x)
        squeezed = F.relu(self.r(F.adaptive_avg_pool2d(y, 1)))
        return self.c(y * gate(self.e(squeezed)))

    return net(forward, a=conv(), r=conv(4, 2, 1), e=conv(2, 4, 1), c=conv(4, 2))


MODELS: dict[str, Callable[[], Any]] = {
    "residual": lambda: net(
        lambda s, x: (lambda y: s.c(F.relu(y + s.b(y))))(F.relu(s.a(x))),
        a=conv(),
        b=conv(4, 4),
        c=conv(4, 2),
    ),
    "cat": lambda: net(
        lambda s, x: s.c(torch.cat([s.a(x), s.b(x)], 1)), a=conv(), b=conv(), c=conv(8, 2)
    ),
    "max-pool": lambda: net(lambda s, x: s.b(F.max_pool2d(s.a(x), 2)), a=conv(), b=conv(4, 2)),
    "pad": lambda: net(
        lambda s, x: s.b(F.pad(s.a(x), (1, 1, 1, 1), value=5.0)), a=conv(), b=conv(4, 2)
    ),
    "nearest": lambda: net(
        lambda s, x: s.b(F.interpolate(s.a(x), scale_factor=2)), a=conv(), b=conv(4, 2)
    ),
    "bilinear": lambda: net(
        lambda s, x: s.b(s.up(s.a(x))),
        a=conv(),
        b=conv(4, 2),
        up=nn.Upsample(scale_factor=2, mode="bilinear"),
    ),
    "shared": lambda: net(lambda s, x: s.a(s.a(x) * 5), a=conv(3, 3)),
    "relu": lambda: net(lambda s, x: s.b(F.relu(s.a(x))), a=conv(), b=conv(4, 2)),
    "relu6": lambda: net(
        lambda s, x: s.b(s.r(s.a(x))), a=conv(), b=conv(4, 2), r=nn.ReLU6(inplace=True)
    ),
    "clamp": lambda: net(lambda s, x: s.b(s.a(x).clamp(-0.5, 0.25)), a=conv(), b=conv(4, 2)),
    "hardtanh": lambda: net(
        lambda s, x: s.b(s.r(s.a(x))), a=conv(), b=conv(4, 2), r=nn.Hardtanh(-0.5, 0.25)
    ),
    "twice": lambda: net(
        lambda s, x: (lambda y: s.b(F.relu(y)) + s.c(y))(s.a(x)),
        a=conv(),
        b=conv(4, 2),
        c=conv(4, 2),
    ),
    "wider": lambda: net(
        lambda s, x: s.c(torch.cat([F.relu(s.a(x)), s.b(x)], 1)), a=conv(), b=conv(), c=conv(8, 2)
    ),
    "se sigmoid": lambda: se(torch.sigmoid),
    "se hardsigmoid": lambda: se(F.hardsigmoid),
    "silu": lambda: net(lambda s, x: s.b(F.silu(s.a(x))), a=conv(), b=conv(4, 2)),
    "layernorm": lambda: net(
        lambda s, x: s.b(s.n(s.a(x))), a=nn.Linear(8, 8), b=nn.Linear(8, 2), n=nn.LayerNorm(8)
    ),
    "hand norm": lambda: net(
        lambda s, x: (
            lambda y: s.b(
                (y - y.mean(-1, keepdim=True)) / torch.sqrt(y.var(-1, keepdim=True) + 1e-5)
            )
        )(s.a(x)),
        a=nn.Linear(8, 8),
        b=nn.Linear(8, 2),
    ),
    "chunk": lambda: net(
        lambda s, x: (lambda p: s.b(p[0] * p[1]))(s.a(x).chunk(2, 1)), a=conv(3, 8), b=conv(4, 2)
    ),
    "mha": lambda: net(
        lambda s, x: s.b(s.m(x, x, x)[0]),
        m=nn.MultiheadAttention(8, 2, batch_first=True),
        b=nn.Linear(8, 2),
    ),
    "attention": lambda: net(
        lambda s, x: s.b(torch.softmax(s.q(x) @ s.k(x).transpose(1, 2) / 3, -1) @ x),
        q=nn.Linear(8, 8),
        k=nn.Linear(8, 8),
        b=nn.Linear(8, 2),
    ),
    "scalars": lambda: net(lambda s, x: 1 - s.a(x) / 2, a=conv()),
    "param": lambda: net(lambda s, x: s.a(x) * s.g, a=conv(), g=nn.Parameter(torch.ones(4, 1, 1))),
    "also output": lambda: net(
        lambda s, x: (lambda y: (y, s.b(F.relu(y))))(s.a(x)), a=conv(), b=conv(4, 2)
    ),
}
AFTER = {
    "residual": [
        "a = a(inputs_0*)",
        "relu = relu(a)",
        "b = b(relu*)",
        "add = add(relu*, b*)",
        "relu_1 = relu_1(add)",
        "c = c(relu_1*)",
        "return c*",
    ],
    "cat": [
        "a = a(inputs_0*)",
        "b = b(inputs_0*)",
        "cat = cat([a*, b*], 1)",
        "c = c(cat**)",
        "return c*",
    ],
    "max-pool": [
        "a = a(inputs_0*)",
        "max_pool2d = max_pool2d(a*)",
        "b = b(max_pool2d**)",
        "return b*",
    ],
    "pad": [
        "a = a(inputs_0*)",
        "pad = pad(a*, (1, 1, 1, 1), constant, 5.0)",
        "b = b(pad*)",
        "return b*",
    ],
    "nearest": [
        "a = a(inputs_0*)",
        "interpolate = interpolate(a*, scale_factor=2, mode=nearest, antialias=False)",
        "b = b(interpolate**)",
        "return b*",
    ],
    "bilinear": [
        "a = a(inputs_0*)",
        "interpolate = interpolate(a*, scale_factor=2.0, mode=bilinear, antialias=False)",
        "b = b(interpolate*)",
        "return b*",
    ],
    "shared": [
        "a = a(inputs_0*)",
        "mul = mul(a*, 5)",
        "a_1 = a(mul*)",
        "return a_1*",
    ],
    "relu": [
        "a = a(inputs_0*)",
        "relu = relu(a)",
        "b = b(relu*)",
        "return b*",
    ],
    "relu6": [
        "a = a(inputs_0*)",
        "r = r(a)",
        "b = b(r*)",
        "return b*",
    ],
    "clamp": [
        "a = a(inputs_0*)",
        "clamp = clamp(a, -0.5, 0.25)",
        "b = b(clamp*)",
        "return b*",
    ],
    "hardtanh": [
        "a = a(inputs_0*)",
        "r = r(a)",
        "b = b(r*)",
        "return b*",
    ],
    "twice": [
        "a = a(inputs_0*)",
        "relu = relu(a*)",
        "b = b(relu*)",
        "c = c(a*)",
        "add = add(b*, c*)",
        "return add*",
    ],
    "wider": [
        "a = a(inputs_0*)",
        "relu = relu(a*)",
        "b = b(inputs_0*)",
        "cat = cat([relu*, b*], 1)",
        "c = c(cat**)",
        "return c*",
    ],
    "se sigmoid": [
        "a = a(inputs_0*)",
        "adaptive_avg_pool2d = adaptive_avg_pool2d(a*)",
        "r = r(adaptive_avg_pool2d*)",
        "relu = relu(r)",
        "e = e(relu*)",
        "sigmoid = sigmoid(e*)",
        "mul = mul(a*, sigmoid*)",
        "c = c(mul*)",
        "return c*",
    ],
    "se hardsigmoid": [
        "a = a(inputs_0*)",
        "adaptive_avg_pool2d = adaptive_avg_pool2d(a*)",
        "r = r(adaptive_avg_pool2d*)",
        "relu = relu(r)",
        "e = e(relu*)",
        "hardsigmoid = hardsigmoid(e*)",
        "mul = mul(a*, hardsigmoid*)",
        "c = c(mul*)",
        "return c*",
    ],
    "silu": [
        "a = a(inputs_0*)",
        "sigmoid = sigmoid(a*)",
        "mul = mul(a*, sigmoid*)",
        "b = b(mul*)",
        "return b*",
    ],
    "layernorm": [
        "a = a(inputs_0*)",
        "n = n(a*)",
        "b = b(n*)",
        "return b*",
    ],
    "hand norm": [
        "a = a(inputs_0*)",
        "mean = mean(a*, -1, keepdim=True)",
        "sub = sub(a*, mean)",
        "var = var(a*, -1, keepdim=True)",
        "add = add(var, 1e-05)",
        "sqrt = sqrt(add)",
        "div = div(sub, sqrt)",
        "b = b(div*)",
        "return b*",
    ],
    "chunk": [
        "a = a(inputs_0*)",
        "chunk = chunk(a*, 2, 1)",
        "getitem = getitem(chunk, 0)",
        "getitem_1 = getitem(chunk, 1)",
        "mul = mul(getitem**, getitem_1**)",
        "b = b(mul*)",
        "return b*",
    ],
    "mha": [
        "m = m(inputs_0, inputs_0, inputs_0)",
        "getitem = getitem(m, 0)",
        "b = b(getitem*)",
        "return b*",
    ],
    "attention": [
        "q = q(inputs_0*)",
        "k = k(inputs_0*)",
        "transpose = transpose(k*, 1, 2)",
        "matmul = matmul(q*, transpose**)",
        "div = div(matmul*, 3)",
        "softmax = softmax(div*, -1)",
        "matmul_1 = matmul(softmax*, inputs_0*)",
        "b = b(matmul_1*)",
        "return b*",
    ],
    "scalars": [
        "a = a(inputs_0*)",
        "div = div(a*, 2)",
        "rsub = rsub(div*, 1)",
        "return rsub*",
    ],
    "param": [
        "a = a(inputs_0*)",
        "g = g()",
        "mul = mul(a*, g*)",
        "return mul*",
    ],
    "also output": [
        "a = a(inputs_0*)",
        "relu = relu(a*)",
        "b = b(relu*)",
        "return a*, b*",
    ],
}
"""A star: quantised; two stars: it lies on the grid of what it is picked from."""
SEQUENCES = ("layernorm", "hand norm", "mha", "attention")


def example(name: str) -> torch.Tensor:
    return image(2, 5, 8) if name in SEQUENCES else image(2, 3, 8, 8)


@functools.cache
def quantised(name: str) -> Any:
    return quantise(MODELS[name](), example(name))


@pytest.mark.parametrize("name", MODELS)
def test_graph(name: str) -> None:
    """No quantiser before, these after; the user's operators stay, SiLU apart."""
    model = MODELS[name]()
    before = text(fxopt.capture(model, example(name))).splitlines()[1:]
    result = quantised(name)
    after = graph(result)
    assert after == AFTER[name]
    if name != "silu":
        assert [line.replace("*", "") for line in after] == before
    layers = [each for each in model.modules() if isinstance(each, (nn.Conv2d, nn.Linear))]
    called = [result.after.module(node) for node in result.after.nodes]
    inside = 1 if name == "mha" else 0  # its own projection
    assert len({id(each) for each in called if isinstance(each, QuantizedLayer)}) == (
        len(layers) - inside
    )


def one_grid(result: Any, *names: str) -> bool:
    found = [grids(result)[name] for name in names]
    return len({(float(each.scale), int(each.zero_point)) for each in found}) == 1


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("cat", ("a", "b", "cat")),
        ("max-pool", ("a", "max_pool2d")),
        ("pad", ("a", "pad")),
        ("nearest", ("a", "interpolate")),
        ("bilinear", ("a", "interpolate")),
        ("shared", ("inputs_0", "mul")),
        ("wider", ("relu", "b", "cat")),
        ("chunk", ("a", "getitem", "getitem_1")),
        ("attention", ("k", "transpose")),
    ],
)
def test_one_scale_across_what_does_not_rescale(name: str, tensors: tuple[str, ...]) -> None:
    result = quantised(name)
    assert one_grid(result, *tensors)
    assert not one_grid(result, *grids(result))


def test_layers_know_the_scale_of_what_they_read() -> None:
    for name in MODELS:
        result = quantised(name)
        seen = 0
        for node in result.after.nodes:
            layer: Any = result.after.module(node)
            if isinstance(layer, QuantizedLayer):
                read: Any = result.after.module(node.all_input_nodes[0])
                assert float(layer.input_scale) == float(read.scale)
                seen += 1
        assert seen or name in ("mha",) or not AFTER[name]


def test_settled_tensors_lie_on_their_grid() -> None:
    """What is given back as it is would not change if it were quantised."""
    for name in MODELS:
        result = quantised(name)
        settled = {n: g for n, g in grids(result).items() if g.settled}
        values = _values(result, example(name), list(settled))
        for node, grid in settled.items():
            grid.settled = False
            torch.testing.assert_close(grid(values[node]), values[node], rtol=0, atol=1e-6)
            grid.settled = True


def _values(result: Any, x: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
    from fxopt.observe import Observer
    from fxopt.proof.running import evaluation_module

    nodes = [result.after.node(name) for name in names]
    found = Observer(nodes, evaluation_module(result.after))([x])
    return dict(zip(names, found, strict=True))


# ---- clamps ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "clamp", "range"),
    [
        ("relu", "relu", (0.0, math.inf)),
        ("relu6", "r", (0.0, 6.0)),
        ("clamp", "clamp", (-0.5, 0.25)),
        ("hardtanh", "r", (-0.5, 0.25)),
        ("residual", "relu", (0.0, math.inf)),
        ("residual", "relu_1", (0.0, math.inf)),
    ],
)
def test_range_behind_a_fused_clamp_is_inside(
    name: str, clamp: str, range: tuple[float, float]
) -> None:
    result = quantised(name)
    low, high = grids(result)[clamp].range
    assert range[0] <= low <= 0 < high <= range[1]
    assert clamp in {node.name for node in placed(result.before, {}).fused}


CLAMPS: dict[str, tuple[Callable[[Any, torch.Tensor], torch.Tensor], Limits | None]] = {
    "relu method": (lambda s, x: s.a(x).relu(), Limits(0.0)),
    "relu in place": (lambda s, x: F.relu(s.a(x), inplace=True), Limits(0.0)),
    "relu by keyword": (lambda s, x: F.relu(input=s.a(x)), Limits(0.0)),
    "relu6": (lambda s, x: F.relu6(s.a(x)), Limits(0.0, 6.0)),
    "clamp at most": (lambda s, x: s.a(x).clamp(max=0.5), Limits(high=0.5)),
    "clamp at least": (lambda s, x: torch.clamp(s.a(x), -0.5), Limits(-0.5)),
    "clamp_min": (lambda s, x: s.a(x).clamp_min(-0.25), Limits(-0.25)),
    "clip": (lambda s, x: torch.clip(s.a(x), min=0, max=1), Limits(0, 1)),
    "hardtanh": (lambda s, x: F.hardtanh(s.a(x)), Limits(-1.0, 1.0)),
    "hardtanh by hand": (lambda s, x: F.hardtanh(s.a(x), -0.5, max_val=2.0), Limits(-0.5, 2.0)),
    "without 0": (lambda s, x: s.a(x).clamp(0.25, 1.0), None),
    "bounds that are tensors": (lambda s, x: torch.clamp(s.a(x), x.min(), x.max()), None),
    "another activation": (lambda s, x: F.hardswish(s.a(x)), None),
    "threshold": (lambda s, x: F.threshold(s.a(x), 0.0, 0.0), None),
}


@pytest.mark.parametrize("name", CLAMPS)
def test_limits_of_every_clamp(name: str) -> None:
    """And whether a quantiser stands between the convolution and the clamp."""
    forward, expected = CLAMPS[name]
    result = quantise(net(forward, a=conv()))
    program = result.before
    last = program.output_node().all_input_nodes[0]
    assert limits_of(program, last) == expected
    assert ("a" in grids(result)) == (expected is None)


@pytest.mark.parametrize("layer", [nn.PReLU(4), nn.GELU(), nn.Hardswish(), nn.Sigmoid(), nn.ELU()])
def test_other_activations_have_a_quantiser_on_either_side(layer: nn.Module) -> None:
    result = quantise(net(lambda s, x: s.b(s.act(s.a(x))), a=conv(), b=conv(4, 2), act=layer))
    assert graph(result) == ["a = a(inputs_0*)", "act = act(a*)", "b = b(act*)", "return b*"]


def test_clamps_in_a_row_are_one() -> None:
    result = quantise(net(lambda s, x: s.b(F.relu(s.a(x)).clamp(-1, 0.5)), a=conv(), b=conv(4, 2)))
    assert graph(result)[:4] == [
        "a = a(inputs_0*)", "relu = relu(a)", "clamp = clamp(relu, -1, 0.5)", "b = b(clamp*)",
    ]  # fmt: skip
    assert 0.499 < grids(result)["clamp"].range[1] <= 0.5


def test_a_clamp_that_is_narrower_than_its_grid_is_an_operator() -> None:
    """ReLU has all of the grid and is fused, ReLU6 on the same grid would be lost."""

    def forward(s: Any, x: torch.Tensor) -> Any:
        return s.c(torch.cat([F.relu(s.a(x) * 9), F.relu6(s.b(x) * 9)], 1))

    result = quantise(net(forward, a=conv(), b=conv(), c=conv(8, 2)))
    assert [line for line in graph(result) if "relu" in line] == [
        "relu = relu(mul)", "relu6 = relu6(mul_1*)", "cat = cat([relu*, relu6*], 1)",
    ]  # fmt: skip
    assert {node.name for node in placed(result.before, {}).fused} == {"relu"}
    assert grids(result)["relu"].range[0] == 0
    assert grids(result)["relu"].range[1] > 6


def test_a_clamp_on_the_input_is_an_operator() -> None:
    result = quantise(net(lambda s, x: s.a(F.relu(x)), a=conv()))
    assert graph(result) == ["relu = relu(inputs_0*)", "a = a(relu*)", "return a*"]


def test_two_clamps_of_one_shared_convolution() -> None:
    """Its input, of both signs, is on the grid of what the clamps give."""
    result = quantise(net(lambda s, x: s.a(F.relu6(s.a(F.relu(s.a(x))))), a=conv(3, 3)))
    assert one_grid(result, "inputs_0", "relu", "relu6")
    assert graph(result)[1] == "relu = relu(a*)"


# ---- grids hold what is written on them --------------------------------------------------------


@pytest.mark.parametrize("value", [-1.0, 0.0, 7.0])
def test_grid_holds_what_a_pad_writes(value: float) -> None:
    """Beyond a clamp's limits too."""

    def forward(s: Any, x: torch.Tensor) -> Any:
        return s.b(F.pad(F.relu6(s.a(x)), (1, 1, 1, 1), value=value))

    result = quantise(net(forward, a=conv(), b=conv(4, 2)))
    low, high = grids(result)["pad"].range
    step = float(grids(result)["pad"].scale)
    assert low - step <= value <= high + step
    assert result.evidence["output_sqnr_db"]["output"] > 25


def test_grid_holds_what_bicubic_upsampling_gives() -> None:
    """It overshoots: below 0 behind a ReLU."""

    def forward(s: Any, x: torch.Tensor) -> Any:
        return s.b(F.interpolate(F.relu(s.a(x)), scale_factor=2, mode="bicubic"))

    result = quantise(net(forward, a=conv(), b=conv(4, 2)))
    assert grids(result)["interpolate"].range[0] < -0.2
    assert result.evidence["output_sqnr_db"]["output"] > 30


@pytest.mark.parametrize("kind", ["lstm", "max", "var_mean", "topk", "attention"])
def test_every_result_of_a_float_operator_is_observed(kind: str) -> None:
    """They are picked from a tuple, which nothing observes."""

    def forward(s: Any, x: torch.Tensor) -> Any:
        if kind == "lstm":
            output, (last, _) = s.lstm(x)
            return s.b(output), s.b(last)
        if kind == "attention":
            output, shares = s.mha(x, x, x)
            return s.b(output), s.c(shares)
        if kind == "var_mean":
            var, mean = torch.var_mean(s.b(x), 1)
            return s.b(var), s.b(mean)
        return s.b(s.b(x).max(1)[0] if kind == "max" else s.b(x).topk(2, 1)[0])

    layers = {"lstm": nn.LSTM(8, 8, batch_first=True),
              "mha": nn.MultiheadAttention(8, 2, batch_first=True)}  # fmt: skip
    result = quantise(net(forward, b=nn.Linear(8, 8), c=nn.Linear(5, 2), **layers), image(2, 5, 8))
    picked = {name: each for name, each in grids(result).items() if name.startswith("getitem")}
    assert picked
    for grid in picked.values():
        assert not grid.settled
        assert float(grid.scale) < 0.5
    if kind == "attention":
        assert not one_grid(result, *picked)


# ---- what stays in float -----------------------------------------------------------------------


def test_norms_stay_in_float_with_their_reasons() -> None:
    assert reasons(quantised("layernorm")) == {"n": "'LayerNorm' has no integer form"}
    found = reasons(quantised("hand norm"))
    assert list(found) == ["mean", "sub", "var", "add", "sqrt", "div"]
    assert set(found.values()) == {
        f"it is part of a norm that is written out, around '{name}'" for name in ("div", "sqrt")
    }


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda x: torch.erf(x), "'erf' has no integer form"),
        (lambda x: torch.fft.rfft2(x).real, "'fft_rfft2' has no integer form"),
        (lambda x: x.masked_fill(x > 0, 0.5), "'masked_fill' has no integer form"),
        (lambda x: F.scaled_dot_product_attention(x, x, x), "'scaled_dot_product_attention' has"),
        (lambda x: F.log_softmax(x, 1), "'log_softmax' has no integer form"),
        (
            lambda x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1), align_corners=False),
            "'grid_sample' has no",
        ),
        (lambda x: torch.sqrt(x.abs()), "it is part of a norm that is written out, around 'sqrt'"),
    ],
)
def test_operators_without_an_integer_form(forward: Any, reason: str) -> None:
    result = quantise(net(lambda s, x: forward(x)))
    assert any(each.startswith(reason.split(" has")[0]) for each in reasons(result).values())
    assert not any(isinstance(each, QuantizedLayer) for each in result.after.graph_module.modules())


def test_a_clamp_behind_what_stays_in_float_is_said_to_follow_it() -> None:
    result = quantise(net(lambda s, x: F.relu(torch.erf(s.a(x))), a=conv()))
    assert reasons(result)["relu"] == "it follows an operator that stays in float"
    assert graph(result)[-1] == "return relu"


def test_skipped_layers_stay_in_float() -> None:
    result = quantise(MODELS["residual"](), skip="b")
    assert reasons(result)["b"] == "it is of skip=b"
    called = {n.name for n in result.after.nodes
              if isinstance(result.after.module(n), QuantizedLayer)}  # fmt: skip
    assert called == {"a", "c"}
    assert "b" in grids(result)  # the sum reads it


def test_skip_names_what_holds_the_layers_and_nothing_else() -> None:
    class Block(nn.Sequential):
        pass

    model = net(lambda s, x: s.ab(s.a(x)), a=conv(), ab=Block(conv(4, 4), nn.ReLU(), conv(4, 2)))
    result = quantise(model, skip="ab")
    called = [str(n.target) for n in result.after.nodes
              if isinstance(result.after.module(n), QuantizedLayer)]  # fmt: skip
    assert called == ["a"]
    skipped = quantise(model, skip="a")
    called = [str(n.target) for n in skipped.after.nodes
              if isinstance(skipped.after.module(n), QuantizedLayer)]  # fmt: skip
    assert called == ["ab.0", "ab.2"]


def test_skipped_silu_is_one_operator() -> None:
    model = net(lambda s, x: s.b(s.act(s.a(x))), a=conv(), b=conv(4, 2), act=nn.SiLU())
    assert graph(quantise(model, skip="act")) == [
        "a = a(inputs_0*)", "act = act(a*)", "b = b(act*)", "return b*",
    ]  # fmt: skip


# ---- weights -----------------------------------------------------------------------------------


class Functional(nn.Module):
    """Layers by function, of the parameters as they are and of what is computed from them."""

    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(image(4, 3, 3, 3, seed=5))
        self.bias = nn.Parameter(image(4, seed=6))
        self.row = nn.Parameter(image(8, seed=7))
        self.function = forward

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: F.conv2d(x, s.weight, s.bias),
        lambda s, x: F.conv2d(x, s.weight - s.weight.mean((1, 2, 3), keepdim=True), s.bias),
        lambda s, x: F.conv2d(input=x, bias=s.bias * 2, weight=s.weight * 3, padding="same"),
        lambda s, x: F.conv_transpose2d(x, s.weight[:3] * 2, stride=2, output_padding=1),
        lambda s, x: F.linear(x, s.weight[:, 0, 0, :1].repeat(1, 8) * 2),
    ],
    ids=["parameters", "standardised", "keywords", "transposed", "linear"],
)
def test_functional_layers_are_quantised(forward: Any) -> None:
    result = quantise(Functional(forward).eval())
    assert result.declined == ()
    layers = [n for n in result.after.nodes
              if isinstance(result.after.module(n), QuantizedLayer)]  # fmt: skip
    assert len(layers) == 1
    assert result.evidence["output_sqnr_db"]["output"] > 30


def test_weights_that_depend_on_the_input_stay_in_float() -> None:
    for forward in (
        lambda s, x: F.conv2d(x, s.weight * x.mean()),
        lambda s, x: F.linear(x, s.row),
    ):
        (reason,) = reasons(quantise(Functional(forward).eval())).values()
        assert reason.startswith("its weight or bias is computed in the forward")


def test_computed_weights_stay_in_float_without_folding() -> None:
    result = quantise(Functional(lambda s, x: F.conv2d(x, s.weight * 2)).eval(), fold="require")
    (reason,) = reasons(result).values()
    assert "fold=auto computes it once" in reason


def test_subclasses_of_layers_are_layers() -> None:
    class Mine(nn.Conv2d):
        pass

    result = quantise(net(lambda s, x: s.a(x), a=Mine(3, 4, 3)))
    assert result.declined == ()


def test_transposed_convolution_with_a_computed_output_size() -> None:
    """By keyword, and before the input."""

    def forward(s: Any, x: torch.Tensor, y: torch.Tensor) -> Any:
        size = [y.shape[2], y.shape[3]]
        return s.up(output_size=size, input=x), s.up(x, output_size=size)

    result = quantise(net(forward, up=nn.ConvTranspose2d(3, 4, 3, 2)), image(2, 3, 5, 6),
                      image(2, 3, 12, 14))  # fmt: skip
    assert [tuple(result.after.types[n.name].shape) for n in
            result.after.output_node().all_input_nodes] == [(2, 4, 12, 14)] * 2  # fmt: skip


def test_one_layer_under_two_names_is_one() -> None:
    shared = conv(3, 3)
    result = quantise(net(lambda s, x: s.b(s.a(x) * 9), a=shared, b=shared))
    assert one_grid(result, "inputs_0", "mul")


# ---- operands ----------------------------------------------------------------------------------


def test_inputs_of_all_kinds() -> None:
    def forward(s: Any, x: torch.Tensor, index: torch.Tensor, mask: torch.Tensor) -> Any:
        return s.a(x) * mask, s.l(s.e(index)), index + 1, x

    model = net(forward, a=conv(), e=nn.Embedding(9, 4), l=nn.Linear(4, 2))
    inputs = (
        image(2, 3, 8, 8),
        torch.arange(6).view(2, 3),
        torch.ones(2, 1, 8, 8, dtype=torch.bool),
    )
    result = quantise(model, *inputs)
    assert graph(result) == [
        "a = a(inputs_0*)", "mul = mul(a*, inputs_2)", "e = e(inputs_1)", "l = l(e*)",
        "add = add(inputs_1, 1)", "return mul*, l*, add, inputs_0*",
    ]  # fmt: skip


def test_several_inputs() -> None:
    def forward(s: Any, x: torch.Tensor, y: torch.Tensor) -> Any:
        return s.a(x) + s.b(y), F.silu(x)

    result = quantise(
        net(forward, a=conv(), b=conv()), image(2, 3, 8, 8), image(2, 3, 8, 8, seed=9)
    )
    assert result.declined == ()
    assert {"inputs_0", "inputs_1"} <= grids(result).keys()


def test_numbers_on_either_side() -> None:
    forms: list[Any] = [lambda x: 1 - x, lambda x: 2 * x, lambda x: x + 1, lambda x: -x,
                        lambda x: x / 4, lambda x: x**2, lambda x: x.abs()]  # fmt: skip
    for form in forms:
        result = quantise(net(lambda s, x, form=form: form(s.a(x)), a=conv()))
        assert result.declined == ()
        assert len(grids(result)) == 3
    for unbounded in (lambda x: 2 / (x.abs() + 1), lambda x: x**0.5, lambda x: x // 1):
        result = quantise(net(lambda s, x, form=unbounded: form(s.a(x.abs()).abs()), a=conv()))
        assert result.declined != ()


def test_weights_alone_need_no_quantiser() -> None:
    """What follows from parameters only is no operator; where one reads it, it is quantised."""
    result = quantise(net(lambda s, x: s.a(x) * torch.sigmoid(s.g), a=conv(),
                          g=nn.Parameter(torch.ones(4, 1, 1))))  # fmt: skip
    assert graph(result)[1:4] == ["g = g()", "sigmoid = sigmoid(g)", "mul = mul(a*, sigmoid*)"]


def test_a_program_with_nothing_to_quantise_stays() -> None:
    for forward in (lambda s, x: x, lambda s, x: torch.erf(x), lambda s, x: x.flatten(1)):
        result = quantise(net(forward))
        assert result.rewritten == ()
        assert result.after is result.before


def test_folding_comes_first() -> None:
    """Norms behind convolutions are folded, others become convolutions of one tap."""
    norm = nn.BatchNorm2d(3)
    model = net(lambda s, x: s.a(F.relu(s.n(x))), n=norm, a=conv())
    result = quantise(model)
    assert graph(result) == ["n = n(inputs_0*)", "relu = relu(n)", "a = a(relu*)", "return a*"]
    folded = fxopt.run_pass(FoldConvBn(scale_shift=True), result.before).after
    assert folded is not result.before
