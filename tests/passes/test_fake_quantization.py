"""fake_quantize: its options and refusals, its figures, what comes before and after it."""

from __future__ import annotations

import copy
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from quantizing.nets import conv, graph, grids, net, quantise, reasons
from seeded import ConvBn, image, seeded, text
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxopt
from fxopt import MemoryModel, PipelineSpecError, PreconditionError
from fxopt.captured import to_module
from fxopt.fake_quantize import FakeQuantize
from fxopt.passes import FakeQuantization, FoldConvBn
from fxopt.quantized_layers import QuantizedLayer
from fxopt.quantizing.fidelity import quantisers

X = image(6, 3, 8, 8)


class Small(nn.Module):
    """A residual block between a stem and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBn(3, 8, padding=1)
        self.body, self.last = ConvBn(8, 8, padding=1, groups=8), ConvBn(8, 8, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = F.max_pool2d(x + self.last(self.body(x)), 2)
        result: torch.Tensor = self.head(x.mean((2, 3)))
        return result


def small() -> Any:
    return seeded(Small())


def plain() -> Any:
    """A net without norms."""
    return net(lambda s, x: s.c(F.relu(s.a(x)).mean((2, 3))), a=conv(), c=nn.Linear(4, 5))


def layers(result: Any) -> dict[str, Any]:
    module = to_module(result.after)
    return {n: each for n, each in module.named_modules() if isinstance(each, QuantizedLayer)}


# ---- calibration data --------------------------------------------------------------------------


def _batches(kind: str, path: Path) -> Any:
    labels = torch.arange(6)
    if kind == "file":
        torch.save(X, path)
        return str(path)
    given: dict[str, Any] = {
        "tensor": X,
        "list": [X[:2], X[2:]],
        "iterator": iter([X[:2], X[2:]]),
        "tuples": [(X[:3], labels[:3]), (X[3:], labels[3:])],
        "mappings": [{"x": X}],
        "mapping": {"x": X},
        "loader": DataLoader(TensorDataset(X, labels), 4),
        "shuffled": DataLoader(TensorDataset(X, labels), 4, shuffle=True),
        "float64": X.double(),
        "trained": X.clone().requires_grad_(),
        "with an empty batch": [X, X[:0]],
    }
    return given[kind]


KINDS = (
    "tensor", "list", "iterator", "tuples", "mappings", "mapping", "loader", "shuffled", "float64",
    "trained", "with an empty batch", "file",
)  # fmt: skip


@pytest.fixture(scope="module")
def reference() -> Any:
    return quantise(small(), X, observer="minmax")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_gives_the_same_grids(kind: str, tmp_path: Path, reference: Any) -> None:
    data = _batches(kind, tmp_path / "x.pt")
    result = quantise(small(), X, observer="minmax", calibration=data)
    for name, grid in grids(result).items():
        expected = grids(reference)[name]
        assert float(grid.scale) == pytest.approx(float(expected.scale), rel=1e-5)
        assert int(grid.zero_point) == int(expected.zero_point)


def test_two_inputs_as_tuples_and_by_name() -> None:
    model = net(lambda s, x, y: s.a(x) + s.b(y), a=conv(), b=conv())
    given = (X, X * 3)
    for data in ([given], [{"inputs_0": given[0], "inputs_1": given[1]}]):
        found = grids(quantise(model, *given, calibration=data, observer="minmax"))
        ranges = [found[name].range for name in ("inputs_0", "inputs_1")]
        assert ranges[1] == pytest.approx([3 * end for end in ranges[0]], rel=1e-5)


# ---- options -----------------------------------------------------------------------------------


def test_granularity() -> None:
    by_channel, by_tensor = (
        layers(quantise(small(), X, granularity=each)) for each in ("channel", "tensor")
    )
    for name, layer in by_channel.items():
        assert layer.weight_scale.shape == (len(layer.weight),)
        assert float(by_tensor[name].weight_scale) == float(layer.weight_scale.max())


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_bits(bits: int) -> None:
    result = quantise(small(), X, weight_bits=bits, activation_bits=9 - bits if bits < 8 else 3)
    assert {layer.bits for layer in layers(result).values()} == {bits}
    for layer in layers(result).values():
        assert layer.integer_weight().abs().max() == 2 ** (bits - 1) - 1
    assert {grid.bits for grid in grids(result).values()} == {9 - bits if bits < 8 else 3}


def test_more_bits_lose_less() -> None:
    losses = [
        quantise(small(), X, weight_bits=bits, activation_bits=bits).evidence["output_sqnr_db"]
        for bits in (3, 5, 8)
    ]
    found = [loss["output"] for loss in losses]
    assert found == sorted(found)
    assert found[0] + 18 < found[2]


def test_observers_differ() -> None:
    """A batch of small values, one with an outlier."""
    x = torch.cat([X[:4] * 0.1, X[4:] * 0.2])
    x[0, 0, 0, 0] = 40.0
    found = {
        name: grids(quantise(plain(), X, calibration=[x[:2], x[2:4], x[4:]], observer=name,
                             activation_bits=4))["inputs_0"].range
        for name in ("minmax", "moving_average", "percentile", "mse")
    }  # fmt: skip
    assert found["minmax"][1] == pytest.approx(40.0, rel=0.1)
    assert found["moving_average"][1] < found["minmax"][1]
    assert found["mse"][1] <= found["minmax"][1] * (1 + 1e-6)


def test_fold_auto_and_folding_first_are_one() -> None:
    program = fxopt.capture(small(), X)
    folded = fxopt.run_pass(FoldConvBn(), program).after
    by_hand = fxopt.run_pass(FakeQuantization(calibration=X), folded)
    auto = fxopt.run_pass(FakeQuantization(calibration=X, fold="auto"), program)
    assert text(by_hand.after) == text(auto.after)
    assert torch.equal(to_module(by_hand.after)(X), to_module(auto.after)(X))
    assert auto.record.preserves == "interface"
    assert auto.evidence["exact_sites"]["proved"] == 3


def test_spec_on_the_command_line(tmp_path: Path) -> None:
    torch.save(X, tmp_path / "x.pt")
    spec = (
        f"fake_quantize{{calibration={tmp_path / 'x.pt'},fold=auto,skip=stem,head,weight_bits=4}}"
    )
    module = fxopt.transform(small(), spec, X)
    (record,) = fxopt.history(module)
    assert record.options["skip"] == "stem,head"
    assert record.options["calibration"] == str(tmp_path / "x.pt")
    assert {each.where for each in record.declined} >= {"'stem.conv'", "'head'"}


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"weight_bits": 1}, "weight_bits is from 2 to 8, not 1"),
        ({"weight_bits": 9}, "weight_bits is from 2 to 8, not 9"),
        ({"weight_bits": 4.0}, "weight_bits is from 2 to 8, not 4.0"),
        ({"activation_bits": 0}, "activation_bits is from 2 to 8, not 0"),
        ({"activation_bits": True}, "activation_bits is from 2 to 8, not True"),
        (
            {"observer": "max"},
            "observer is minmax or moving_average or percentile or mse, not 'max'",
        ),
        ({"granularity": "row"}, "granularity is channel or tensor, not 'row'"),
        ({"fold": "no"}, "fold is auto or require, not 'no'"),
        ({"calibration": 5}, "calibration takes a tensor, batches or a DataLoader, not a int"),
        ({"calibration": torch.tensor(1.0)}, "not a tensor of shape ()"),
    ],
)
def test_refuses_an_option(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason.replace("(", r"\(").replace(")", r"\)")):
        FakeQuantization(**options)


def _not_finite(model: Any) -> Any:
    with torch.no_grad():
        model.head.weight[0, 0] = math.nan
    return model


def _dividing() -> Any:
    return net(lambda s, x: s.b(s.a(x) / (x[:, :1] * 0)), a=conv(), b=conv(4, 2))


REFUSALS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no data": (plain, {"calibration": None}, "has no calibration data.*calibration=FILE.pt"),
    "not folded": (small, {"fold": "require"}, "'stem.norm' is not folded.*run fold_conv_bn.*fold=auto"),
    "empty": (plain, {"calibration": []}, "the calibration data, a list, is empty"),
    "no samples": (plain, {"calibration": X[:0]}, "is empty"),
    "not a number": (plain, {"calibration": X * math.nan}, "data for 'inputs_0' is not finite"),
    "infinite": (plain, {"calibration": [X, X / 0]}, "data for 'inputs_0' is not finite"),
    "overflow inside": (_dividing, {}, r"on the calibration data 'div' \(.*\) is not finite"),
    "weights": (lambda: _not_finite(small()), {}, "'head.weight' is not finite"),
    "integers": (plain, {"calibration": X.to(torch.uint8)}, "is uint8; give what the model is given"),
    "channels": (plain, {"calibration": X[:, :2]}, r"shape \(6, 2, 8, 8\) does not fit the model"),
    "rank": (plain, {"calibration": X[0]}, r"shape \(3, 8, 8\) does not fit the model"),
    "array": (plain, {"calibration": X.numpy()}, "batch is a ndarray; the model takes inputs_0"),
    "wrong name": (plain, {"calibration": [{"y": X}]}, "batch is a dict; the model takes inputs_0"),
    "no file": (plain, {"calibration": "/nowhere.pt"}, "there is no calibration file '/nowhere.pt'"),
    "skip": (plain, {"skip": "a,nope"}, "no operator is at 'nope'.*named_modules"),
    "float16": (lambda: plain().half(), {}, "is float16, too coarse.*float.. first"),
    "bfloat16": (lambda: plain().bfloat16(), {}, "is bfloat16, too coarse.*float.. first"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses(name: str) -> None:
    make, options, reason = REFUSALS[name]
    model = make()
    x = X.to(next(model.parameters()).dtype)
    with pytest.raises(PreconditionError, match=reason):
        quantise(model, x, **options)


def test_refuses_a_standardised_convolution_that_is_not_folded() -> None:
    module = fxopt.transform(small(), "bn_to_scaled_ws", X)
    with pytest.raises(PreconditionError, match=r"'stem.conv' is not folded.*fold_scaled_ws"):
        fxopt.transform(module, [FakeQuantization(calibration=X)])


def test_refuses_the_meta_device() -> None:
    with torch.device("meta"):
        model = plain()
        program = fxopt.capture(model, torch.empty(6, 3, 8, 8))
    with pytest.raises(PreconditionError, match="which is on the meta device"):
        fxopt.run_pass(FakeQuantization(calibration=X), program)


def test_refuses_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "junk.pt").write_text("hello")
    with pytest.raises(PreconditionError, match=r"cannot read calibration data from '.*junk.pt'"):
        FakeQuantization(calibration=str(tmp_path / "junk.pt"))


def test_a_pipeline_says_what_is_wrong() -> None:
    with pytest.raises(PipelineSpecError, match="weight_bits is from 2 to 8, not 12"):
        fxopt.transform(plain(), "fake_quantize{weight_bits=12}", X)


# ---- figures -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured() -> tuple[Any, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A net at few bits, with the values before and after, from hooks on its two modules."""
    result = quantise(small(), X, weight_bits=3, activation_bits=3, observer="mse")
    after = to_module(result.after).eval()
    folded = to_module(fxopt.run_pass(FoldConvBn(), result.before).after).eval()
    was, now = _interpreted(folded), _interpreted(after)
    return result, was, now


def _interpreted(module: Any) -> dict[str, torch.Tensor]:
    class Keeping(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            found[n.name] = value
            return value

    found: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        program: Any = fxopt.captured.program_of(module)  # type: ignore[attr-defined]
        Keeping(program.graph_module).run(X)
    return found


def test_figures_of_tensors(measured: Any) -> None:
    result, was, now = measured
    rows = {row["node"]: row for row in result.evidence["tensors"]}
    calls = {n.all_input_nodes[0].name: n.name for n in quantisers(result.after)}
    assert list(rows) == [name for name, grid in grids(result).items() if not grid.settled]
    some_clipped = 0
    for name, row in rows.items():
        scale, zero = row["scale"], row["zero_point"]
        low, high = (-4 - zero) * scale, (3 - zero) * scale
        assert row["range"] == pytest.approx([low, high])
        x, y = was[name].double().numpy(), now[calls[name]].double().numpy()
        steps = np.rint(x / scale) + zero
        beyond = (x < low - scale / 2) | (x > high + scale / 2)
        assert row["clipped"] == pytest.approx(beyond.mean(), abs=1e-9)
        assert ((steps < -4) | (steps > 3)).mean() == pytest.approx(beyond.mean(), abs=0.01)
        sqnr = 10 * np.log10((x**2).sum() / ((x - y) ** 2).sum())
        assert row["sqnr_db"] == pytest.approx(sqnr, abs=1e-3)
        assert set(np.unique(np.rint(y / scale))) <= set(range(-4 - zero, 4 - zero))
        some_clipped += row["clipped"] > 0
    assert some_clipped


def test_figures_of_outputs(measured: Any) -> None:
    result, *_ = measured
    x = small()(X).detach().double()
    y = to_module(result.after).eval()(X).detach().double()
    sqnr = 10 * torch.log10(x.square().sum() / (x - y).square().sum()).item()
    assert result.evidence["output_sqnr_db"] == {"output": pytest.approx(sqnr, abs=1e-3)}
    agreeing = (x.argmax(1) == y.argmax(1)).double().mean().item()
    assert result.evidence["top1_agreement"] == {"output": pytest.approx(agreeing)}
    assert result.evidence["measured_on"] == "a list"


def test_figures_of_weights() -> None:
    result = quantise(plain(), X)
    weights, biases, scales = 4 * 27 + 4 * 5, 4 + 5, 4 + 5
    assert result.evidence["weight_bytes"] == {
        "before": 4 * (weights + biases),
        "after": weights + 4 * biases + 4 * scales,
    }


def test_floored_channels_are_reported() -> None:
    model = plain()
    with torch.no_grad():
        model.a.weight[1], model.a.bias[1] = 1e-6, 5.0
        model.c.weight[3], model.c.bias[3] = 1e-6, 1e3
    assert quantise(model, X).evidence["floored_channels"] == {"a": [1], "c": [3]}
    assert quantise(plain(), X).evidence["floored_channels"] == {}


def test_evidence_is_json(measured: Any) -> None:
    result, *_ = measured
    again = json.loads(json.dumps(dict(result.evidence), allow_nan=False))
    assert again["tensors"] == result.evidence["tensors"]


def test_losses_are_none_where_there_is_no_signal_or_no_noise() -> None:
    result = quantise(net(lambda s, x: (x * 0, s.a(x)), a=conv()), X)
    assert result.evidence["output_sqnr_db"]["output_0"] is None


# ---- the user's own ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [True, False])
def test_the_users_module_and_randomness_stay(mode: bool) -> None:
    model = small().train(mode)
    model.stem.conv.weight.requires_grad_(False)
    state, kinds = copy.deepcopy(model.state_dict()), [type(each) for each in model.modules()]
    modes = [each.training for each in model.modules()]
    loader = DataLoader(TensorDataset(X), 2, shuffle=True)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    quantise(model, X, calibration=loader)
    with pytest.raises(PreconditionError):
        quantise(model, X, calibration=X * math.nan)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert all(torch.equal(state[name], each) for name, each in model.state_dict().items())
    assert kinds == [type(each) for each in model.modules()]
    assert modes == [each.training for each in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.stem.conv.weight.requires_grad
    assert torch.is_grad_enabled()


def test_weights_are_the_users_parameters() -> None:
    model = plain()
    result = quantise(model, X)
    assert layers(result)["a"].weight is not model.a.weight  # a program holds copies
    named = [dict(each.graph_module.named_parameters()) for each in (result.before, result.after)]
    assert all(named[0][name] is named[1][name] for name in ("a.weight", "c.weight"))
    uncorrected = quantise(model, X, bias_correction=False)
    names = [
        dict(each.graph_module.named_parameters())
        for each in (uncorrected.before, uncorrected.after)
    ]
    assert names[0]["a.bias"] is names[1]["a.bias"]


def test_a_second_application_changes_nothing() -> None:
    first = quantise(small(), X)
    second = fxopt.run_pass(FakeQuantization(calibration=X), first.after)
    assert (second.rewritten, second.after) == ((), first.after)
    assert second.evidence == {
        "already_quantized": "the program was, and nothing in it has changed"
    }


def test_is_deterministic() -> None:
    results = [quantise(small(), X) for _ in range(2)]
    assert results[0].evidence == results[1].evidence
    modules = [to_module(each.after) for each in results]
    assert torch.equal(modules[0](X), modules[1](X))


def test_a_shuffling_loader_gives_one_order() -> None:
    """Whatever the global seed; the moving average depends on the order."""
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        loader = DataLoader(TensorDataset(X), 1, shuffle=True)
        model = plain()
        results.append(quantise(model, X, calibration=loader, observer="moving_average"))
    assert results[0].evidence["tensors"] == results[1].evidence["tensors"]


def test_float64_models_keep_their_dtype() -> None:
    result = quantise(small().double(), X.double())
    assert to_module(result.after)(X.double()).dtype == torch.float64
    single = quantise(small(), X)
    assert result.evidence["output_sqnr_db"]["output"] == pytest.approx(
        single.evidence["output_sqnr_db"]["output"], abs=1.0
    )


# ---- what comes after --------------------------------------------------------------------------


def quantised() -> Any:
    return fxopt.transform(small(), [FakeQuantization(calibration=X, fold="auto")], X)


def test_training_goes_on() -> None:
    module = quantised().train()
    scales = [each.scale.clone() for each in module.modules() if isinstance(each, FakeQuantize)]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = (module(X) - 1).square().mean()
        loss.backward()
        assert all(parameter.grad is not None for parameter in module.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    now = [each.scale for each in module.modules() if isinstance(each, FakeQuantize)]
    assert all(map(torch.equal, scales, now))
    torch.testing.assert_close(module.eval()(X), module.train()(X))


def test_state_goes_over_to_another_module() -> None:
    module, other = quantised(), fxopt.transform(
        seeded(Small(), 7), [FakeQuantization(calibration=X * 2, fold="auto")], X
    )  # fmt: skip
    assert not torch.equal(module(X), other(X))
    other.load_state_dict(module.state_dict())
    assert torch.equal(module(X), other(X))
    assert torch.equal(copy.deepcopy(module)(X), module(X))


def test_captures_again() -> None:
    module = quantised()
    again = fxopt.capture(module, X)
    assert text(again) == text(fxopt.captured.program_of(module))  # type: ignore[attr-defined, arg-type]
    assert torch.equal(to_module(again)(X), module(X))


def test_other_passes_find_nothing_afterwards() -> None:
    module = fxopt.transform(quantised(), "fold_conv_bn,bn_to_scaled_ws,fold_scaled_ws")
    assert [len(record.rewritten) for record in fxopt.history(module)[1:]] == [0, 0, 0]
    assert torch.equal(module(X), quantised()(X))


@pytest.mark.parametrize("first", ["fold_conv_bn", "bn_to_scaled_ws"])
def test_other_passes_come_before(first: str) -> None:
    module = fxopt.transform(small(), [first, FakeQuantization(calibration=X, fold="auto")], X)
    record = fxopt.history(module)[-1]
    assert record.declined == ()
    kinds = [type(each).__name__ for each in module.modules()]
    assert sum(kind.startswith("Quantized") for kind in kinds) == 4
    assert not {"BatchNorm2d", "ScaledWSConv2d", "Conv2d", "Linear"} & set(kinds)


class Inverted(nn.Module):
    """An inverted bottleneck, which fuse_mbconv makes one convolution of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 4)
        self.up, self.deep = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.down = nn.Conv2d(8, 4, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (8, 8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = F.relu6(self.norms[0](self.up(x)))
        y = F.relu6(self.norms[1](self.deep(y)))
        return x + self.norms[2](self.down(y))  # type: ignore[no-any-return]


def test_fusing_comes_before() -> None:
    passes = ["fuse_mbconv", FakeQuantization(calibration=X, fold="auto")]
    module = fxopt.transform(seeded(Inverted()), passes, X)
    fused, record = fxopt.history(module)
    assert len(fused.rewritten) == 1
    assert record.declined == ()
    assert record.evidence["output_sqnr_db"]["output"] > 20


def test_exports_as_pt2(tmp_path: Path) -> None:
    module = quantised()
    fxopt.export_pt2(module, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(loaded(X), module(X), rtol=0, atol=1e-6)


# ---- memory ------------------------------------------------------------------------------------

PLANNED = {
    "small": small,
    "flatten": lambda: net(lambda s, x: s.c(F.max_pool2d(s.a(x), 4).flatten(1)), a=conv(),
                           c=nn.Linear(16, 3)),
    "cat and chunk": lambda: net(lambda s, x: s.c(torch.cat(s.a(x).chunk(2, 1)[::-1], 1)), a=conv(),
                                 c=conv(4, 2)),
    "pad": lambda: net(lambda s, x: s.c(F.pad(F.relu(s.a(x)), (1, 1, 1, 1))), a=conv(), c=conv(4, 2)),
    "permuted": lambda: net(lambda s, x: s.c(s.a(x).permute(0, 2, 3, 1)), a=conv(),
                            c=nn.Linear(4, 3)),
    "upsampled": lambda: net(lambda s, x: s.c(F.interpolate(s.a(x), scale_factor=2)), a=conv(),
                             c=conv(4, 2)),
    "returned view": lambda: net(lambda s, x: s.a(x).flatten(1), a=conv()),
    "depthwise": lambda: net(lambda s, x: s.c(F.relu6(s.b(F.relu6(s.a(x))))), a=conv(3, 8),
                             b=conv(8, 8, groups=8), c=conv(8, 3)),
    "gate": lambda: net(lambda s, x: s.a(x) * torch.sigmoid(s.a(x).mean((2, 3), keepdim=True)),
                        a=conv()),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANNED)
@pytest.mark.parametrize("size", [None, 1])
def test_memory_plan_is_no_larger(name: str, size: int | None) -> None:
    """Quantisers are how kernels write their results."""
    model = MemoryModel(bytes_per_element=size)
    program = fxopt.run_pass(FoldConvBn(), fxopt.capture(PLANNED[name](), X)).after
    after = fxopt.run_pass(FakeQuantization(calibration=X), program).after
    peaks = [fxopt.plan_memory(each, memory_model=model).peak_bytes for each in (program, after)]
    assert peaks[1] <= peaks[0]


def test_graph_of_the_whole() -> None:
    assert graph(quantise(small(), X)) == [
        "stem_conv = stem.conv(x*)",
        "stem_act = stem.act(stem_conv)",
        "body_conv = body.conv(stem_act*)",
        "body_act = body.act(body_conv)",
        "last_conv = last.conv(body_act*)",
        "last_act = last.act(last_conv)",
        "add = add(stem_act*, last_act*)",
        "max_pool2d = max_pool2d(add*)",
        "mean = mean(max_pool2d**, (2, 3))",
        "head = head(mean*)",
        "return head*",
    ]
    assert reasons(quantise(small(), X)) == {}
