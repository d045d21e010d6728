"""Which layers go over to quantised units, and which stay in float units, with the reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from quantizing.nets import conv, net, quantise, reasons
from seeded import image, seeded, text
from torch import nn

import fxopt
from fxopt.captured import program_of, to_module
from fxopt.fake_quantize import identity_mode
from fxopt.passes import FakeQuantization, PatchExecution
from fxopt.patching.regions import unpatched
from fxopt.patching.stage import PatchedStage
from fxopt.quantized_layers import QuantizedLayer
from fxopt.quantizing.fidelity import quantisers
from fxopt.quantizing.units import bound_to_float, quantized_calls, with_units

X = image(2, 3, 6, 8)


def units(program: Any) -> dict[str, tuple[bool | None, str | None]]:
    """Of each layer that is called, by path."""
    return {
        str(node.target): (layer.qas, layer.update_rounding)
        for node, layer in quantized_calls(unpatched(program))
    }


def chain() -> Any:
    return net(
        lambda s, x: s.c(F.relu(s.b(F.relu(s.a(x)))).mean((2, 3))),
        a=conv(), b=conv(4, 4, groups=2, bias=False), c=nn.Linear(4, 5),
    )  # fmt: skip


def again(program: Any, **options: Any) -> Any:
    """The pass on a quantised program; the data must not matter."""
    return fxopt.run_pass(FakeQuantization(calibration=X * 7, **options), program)


# ---- all layers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "note"),
    [
        ({"qas": True}, (True, None), "trains in quantised units with QAS"),
        ({"qas": False}, (False, None), "trains in quantised units"),
        ({"qas": True, "real_int8": True}, (True, "nearest"), "trains in quantised units with QAS"),
        (
            {"qas": False, "real_int8": True, "update_rounding": "stochastic"},
            (False, "stochastic"), "trains in quantised units",
        ),
    ],
)  # fmt: skip
def test_every_layer_goes_over_once(options: Any, kind: Any, note: str) -> None:
    result = quantise(chain(), X, **options)
    assert units(result.after) == dict.fromkeys("abc", kind)
    last = [each for each in result.rewritten if each.note]
    assert [(each.node, each.note) for each in last] == [(name, note) for name in "abc"]
    assert result.declined == ()
    assert text(result.after) == text(quantise(chain(), X).after)
    assert result.record.preserves == "interface"


def test_layers_that_are_skipped_have_none() -> None:
    result = quantise(chain(), X, qas=True, real_int8=True, skip="b")
    assert units(result.after) == {"a": (True, "nearest"), "c": (True, "nearest")}
    assert set(reasons(result)) == {"b"}


def test_a_program_of_no_layers() -> None:
    result = quantise(net(lambda s, x: F.relu(x) + 1), X, qas=True)
    assert units(result.after) == {}


CONVERSIONS: list[dict[str, Any]] = [
    {"qas": False}, {"qas": True}, {"qas": True, "real_int8": True},
    {"qas": True, "real_int8": True, "update_rounding": "stochastic"}, {"qas": False},
]  # fmt: skip


def test_a_quantised_program_goes_over_and_on() -> None:
    """Float units, plain int8, QAS, whole numbers, and back to masters that are free."""
    program = quantise(chain(), X).after
    expected = to_module(program)(X)
    for options in CONVERSIONS:
        result = again(program, **options)
        rounding = options.get("update_rounding", "nearest") if "real_int8" in options else None
        assert units(result.after) == dict.fromkeys("abc", (options["qas"], rounding))
        assert len(result.rewritten) == 3
        assert result.evidence == {
            "already_quantized": "the program was, and nothing but its units has changed"
        }
        # to whole numbers nothing is lost, because the forward has them
        assert torch.equal(to_module(result.after)(X), expected)
        idle = again(result.after, **options)
        assert (idle.rewritten, idle.declined) == ((), ())
        assert idle.after is result.after
        kept = again(result.after)
        assert (kept.rewritten, kept.after) == ((), result.after)
        program = result.after


def test_converting_leaves_the_program_before_as_it_was() -> None:
    before = quantise(chain(), X).after
    state = copy.deepcopy(before.graph_module.state_dict())
    result = again(before, qas=True, real_int8=True)
    assert units(before) == dict.fromkeys("abc", (None, None))
    now = before.graph_module.state_dict()
    assert all(torch.equal(each, now[name]) for name, each in state.items())
    for name, each in result.after.graph_module.named_parameters():
        assert each is not before.graph_module.get_parameter(name)


def test_masters_of_a_trained_module_are_kept() -> None:
    module = to_module(quantise(chain(), X, qas=False).after).train()
    optimizer = torch.optim.SGD(module.parameters(), 1.0)
    module(X).square().sum().backward()
    optimizer.step()
    other = fxopt.transform(module, [FakeQuantization(calibration=X, qas=True)])
    for name, each in module.named_parameters():
        assert torch.equal(other.get_parameter(name), each)
        assert other.get_parameter(name).grad is None
    assert other.training


def test_with_units() -> None:
    program = quantise(chain(), X).after
    for qas in (True, False):
        found = with_units(program, qas=qas)
        assert units(found) == dict.fromkeys("abc", (qas, None))
        assert torch.equal(found.graph_module(X)[0], program.graph_module(X)[0])
    assert units(with_units(with_units(program, qas=False), qas=True))["a"] == (True, None)


# ---- one module, many calls --------------------------------------------------------------------


def test_a_layer_called_twice_is_one_layer() -> None:
    model = net(lambda s, x: s.a(F.relu(s.a(x))) + s.b(x), a=conv(3, 3), b=conv(3, 3))
    result = quantise(model, X, qas=True)
    assert units(result.after) == dict.fromkeys("ab", (True, None))
    assert reasons(result) == {}
    calls = [layer for _, layer in quantized_calls(result.after)]
    assert len(calls) == 3
    assert len(set(map(id, calls))) == 2
    module = to_module(result.after).train()
    assert [n for n, _ in module.named_parameters()] == ["a.weight", "a.bias", "b.weight", "b.bias"]


def test_a_layer_under_two_names_is_one_layer() -> None:
    shared = conv(3, 3)
    result = quantise(net(lambda s, x: s.b(F.relu(s.a(x))), a=shared, b=shared), X, qas=True)
    calls = [layer for _, layer in quantized_calls(result.after)]
    assert len(set(map(id, calls))) == 1
    assert calls[0].qas is True
    assert reasons(result) == {}


# ---- tensors that others read too --------------------------------------------------------------


def tied(name: str, *, bias: bool = True) -> Any:
    model = net(lambda s, x: s.a(x) + s.b(x), a=conv(bias=bias), b=conv(bias=bias))
    setattr(model.b, name, getattr(model.a, name))
    return model


class TiedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.middle = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(F.relu(self.middle(self.table(index))))
        return result


def normed() -> Any:
    """A LayerNorm whose shift is the bias of a layer."""
    model = net(lambda s, x: s.a(s.n(x)), a=nn.Linear(6, 6), n=nn.LayerNorm(6))
    model.n.bias = model.a.bias
    return model


def functional_norm() -> Any:
    """A norm as a function of a layer's bias, which captured is a layer that borrows it."""
    model = net(lambda s, x: s.a(F.layer_norm(x, (6,), s.gain, s.a.bias)), a=nn.Linear(6, 6))
    model.gain = nn.Parameter(torch.ones(6))
    return model


def three() -> Any:
    model = net(lambda s, x: s.a(x) + s.b(x) + s.c(x), a=conv(), b=conv(), c=conv())
    model.b.weight = model.c.weight = model.a.weight
    return model


I = torch.arange(12).reshape(3, 4) % 7  # noqa: E741
BOUND: dict[str, tuple[Callable[[], Any], torch.Tensor, dict[str, str], set[str]]] = {
    "weights": (
        lambda: tied("weight"), X,
        {"a": "its weight is also read by 'b'", "b": "its weight is also read by 'a'"}, set(),
    ),
    "biases": (
        lambda: tied("bias"), X,
        {"a": "its bias is also read by 'b'", "b": "its bias is also read by 'a'"}, set(),
    ),
    "embedding": (TiedEmbedding, I, {"head": "its weight is also read by 'table'"}, {"middle"}),
    "norm": (normed, image(3, 6), {"a": "its bias is also read by 'n'"}, set()),
    "a functional norm": (
        functional_norm,
        image(3, 6),
        {"a": "its bias is also read by 'layer_norm'"},
        set(),
    ),
    "the forward": (
        lambda: net(lambda s, x: s.a(x) * s.a.weight.mean() + s.b(x), a=conv(), b=conv()), X,
        {"a": "its weight is also read by the forward"}, {"b"},
    ),
    "the forward, a bias": (
        lambda: net(lambda s, x: s.a(x) * s.a.bias.mean() + s.b(x), a=conv(), b=conv()), X,
        {"a": "its bias is also read by the forward"}, {"b"},
    ),
    "three": (
        three, X, {"a": "its weight is also read by 'b'",
                              "b": "its weight is also read by 'a'",
                              "c": "its weight is also read by 'a'"}, set(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BOUND)
def test_declines_a_layer_that_shares_a_tensor(name: str) -> None:
    make, x, expected, others = BOUND[name]
    model = seeded(make())
    options = {"qas": True, "real_int8": True, "bias_correction": False}
    result = quantise(model, x, **options)
    assert {k: v for k, v in reasons(result).items() if "units" in v} == {
        node: f"it trains in float units: {reason}" for node, reason in expected.items()
    }
    assert sorted(bound_to_float(result.after).values()) == sorted(expected.values())
    kinds = {node.name: layer.qas for node, layer in quantized_calls(result.after)}
    assert kinds == {**dict.fromkeys(expected, None), **dict.fromkeys(others, True)}
    plain = quantise(model, x, bias_correction=False)
    module, float_module = to_module(result.after).train(), to_module(plain.after).train()
    assert torch.equal(module(x), float_module(x))
    # it is still one tensor
    assert len(list(module.parameters())) == len(list(float_module.parameters()))
    # and a second application does no more
    assert again(result.after, **options).rewritten == ()


def test_biases_that_are_corrected_are_tied_no_more() -> None:
    """Each has a correction of its own, and so its own units."""
    result = quantise(tied("bias"), X, qas=True)
    assert units(result.after) == dict.fromkeys("ab", (True, None))


def test_tied_layers_walk_as_with_qas() -> None:
    """One SGD step in identity mode; the tied ones in float units, the other in its own."""
    model = tied("weight")
    model.register_module("c", seeded(conv(4, 2), 3))
    model.function = lambda s, x: s.c(F.relu(s.a(x) + s.b(x)))
    plain: Any = copy.deepcopy(model).train()
    unit = to_module(quantise(model, X, qas=True, bias_correction=False).after).train()
    with identity_mode():
        for each in (plain, unit):
            optimizer = torch.optim.SGD(each.parameters(), 0.1)
            each(X).square().mean().backward()
            optimizer.step()
    # rounding of one step in float32
    torch.testing.assert_close(unit.a.weight, plain.a.weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(unit.c.float_weight(), plain.c.weight.detach(), rtol=1e-6, atol=1e-7)
    assert unit.b.weight is unit.a.weight


@pytest.mark.parametrize("qas", [True, False])
def test_training_begins_from_the_biases_as_they_are(qas: bool) -> None:
    model = seeded(net(lambda s, x: s.b(F.relu(s.a(x))), a=conv(), b=conv(4, 2)))
    for given, corrected in (({}, False), ({"bias_correction": True}, True)):
        unit = fxopt.transform(model, [FakeQuantization(calibration=X, qas=qas, **given)], X)
        # float32: one rounding each of a quotient and a product
        same = torch.allclose(unit.b.float_bias(), model.b.bias, rtol=1e-6, atol=0)
        assert same is not corrected
    plain = fxopt.transform(model, [FakeQuantization(calibration=X)], X)
    assert not torch.allclose(plain.b.bias, model.b.bias, rtol=1e-6, atol=0)


def test_a_quantised_program_needs_no_data() -> None:
    """The remedy that errors about stages name."""
    module = fxopt.transform(
        seeded(net(lambda s, x: s.a(x), a=conv())), [FakeQuantization(calibration=X)], X
    )
    unit = fxopt.transform(module, "fake_quantize{qas=true}", X)
    assert torch.equal(unit(X), module(X))
    (record,) = fxopt.history(unit)[-1:]
    assert record.evidence["already_quantized"].endswith("nothing but its units has changed")
    assert record.evidence.get("exact_sites") or record.preserves == "values"


# ---- functional layers -------------------------------------------------------------------------


class Functional(nn.Module):
    """A convolution as a function of parameters of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.shift = (
            nn.Parameter(torch.empty(4, 3, 3, 3)),
            nn.Parameter(torch.empty(4)),
        )
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(F.conv2d(x, self.kernel, self.shift, padding=1))
        result: torch.Tensor = self.head(x.mean((2, 3)))
        return result


def test_functional_layers_go_over() -> None:
    model = seeded(Functional())
    plain, unit = (quantise(model, X, qas=qas) for qas in (None, True))
    assert units(unit.after) == dict.fromkeys(("conv2d", "head"), (True, None))
    assert reasons(unit) == {}
    module = to_module(unit.after).train()
    assert torch.equal(module(X), to_module(plain.after)(X))
    module(X).sum().backward()
    assert module.conv2d.weight.grad is not None


CORRECTED = pytest.mark.xfail(strict=True, reason="the bias that was corrected stays beside it")


@pytest.mark.parametrize("corrected", [False, pytest.param(True, marks=CORRECTED)])
def test_every_parameter_of_functional_layers_trains(corrected: bool) -> None:
    after = quantise(seeded(Functional()), X, qas=True, bias_correction=corrected).after
    module = to_module(after).train()
    module(X).sum().backward()
    assert [name for name, each in module.named_parameters() if each.grad is None] == []


def test_bytes_of_functional_layers_are_those_of_float_units() -> None:
    plain, unit = (
        quantise(seeded(Functional()), X, qas=qas, bias_correction=False).evidence["weight_bytes"]
        for qas in (None, True)
    )
    assert plain == unit


def test_a_parameter_that_a_functional_layer_and_the_forward_read() -> None:
    model = seeded(Functional())
    model.forward = lambda x: model.head(  # type: ignore[method-assign]
        (F.conv2d(x, model.kernel, model.shift) * model.kernel.mean()).mean((2, 3))
    )
    result = quantise(model, X, qas=True, bias_correction=False)
    assert reasons(result) == {
        "conv2d": "it trains in float units: its weight is also read by the forward"
    }


# ---- patched stages ----------------------------------------------------------------------------

PATCH = PatchExecution(until="b", grid="2x2")


def stages(program: Any) -> int:
    return sum(isinstance(program.module(node), PatchedStage) for node in program.nodes)


@pytest.mark.parametrize("qas", [True, False])
def test_stages_before_and_after(qas: bool) -> None:
    """In float, in float units, in quantised units: when it was patched changes nothing."""
    which = FakeQuantization(calibration=X, qas=qas)
    floats = FakeQuantization(calibration=X, bias_correction=False)
    program = fxopt.capture(chain(), X)
    orders = ([PATCH, which], [which, PATCH], [PATCH, floats, which], [floats, PATCH, which])
    whole = fxopt.run_pass(which, program).after
    for order in orders:
        after = fxopt.pipeline.run_pipeline(program, order)[-1].after  # type: ignore[attr-defined]
        assert stages(after) == 1
        assert units(after) == dict.fromkeys("abc", (qas, None))
        found, expected = to_module(after).train(), to_module(whole).train()
        # tiles, float32
        torch.testing.assert_close(found(X), expected(X), rtol=1e-5, atol=1e-5)
        for each in (found, expected):
            each(X).square().sum().backward()
        for name, each in expected.named_parameters():
            largest = float(each.grad.abs().max())
            # sums over tiles in another order, float32
            torch.testing.assert_close(
                found.get_parameter(name).grad, each.grad, rtol=1e-4, atol=1e-5 * largest
            )


def test_a_stage_is_written_out_and_made_again() -> None:
    program = fxopt.capture(chain(), X)
    first = fxopt.pipeline.run_pipeline(program, [FakeQuantization(calibration=X), PATCH])[-1].after  # type: ignore[attr-defined]
    result = again(first, qas=True)
    notes = [(each.node, each.note) for each in result.rewritten]
    assert notes == [
        ("patched_stage", "written out, to run in tiles again once it is quantised"),
        *((name, "trains in quantised units with QAS") for name in "abc"),
        ("b", "runs in tiles again"),
    ]
    assert torch.equal(to_module(result.after)(X), to_module(first)(X))
    idle = again(result.after, qas=True)
    assert (idle.rewritten, idle.after) == ((), result.after)
    other = again(result.after, qas=False)
    assert units(other.after) == dict.fromkeys("abc", (False, None))
    assert stages(other.after) == 1


def test_a_stage_of_layers_that_are_bound_stays() -> None:
    model = tied("weight")
    model.function = lambda s, x: (F.relu(s.a(x)) + s.b(x)).mean((2, 3))
    program = fxopt.capture(model, X)
    passes = [
        FakeQuantization(calibration=X, bias_correction=False),
        PatchExecution(until="add", grid="2x2"),
    ]
    first = fxopt.pipeline.run_pipeline(program, passes)[-1].after  # type: ignore[attr-defined]
    assert stages(first) == 1
    result = again(first, qas=True)
    assert (result.rewritten, result.after) == ((), first)
    assert {n for n, reason in reasons(result).items() if "float units" in reason} == {"a", "b"}


def test_in_identity_mode_a_stage_is_in_float() -> None:
    program = fxopt.capture(chain(), X)
    which = FakeQuantization(calibration=X, qas=True, bias_correction=False)
    after = fxopt.pipeline.run_pipeline(program, [PATCH, which])[-1].after  # type: ignore[attr-defined]
    assert stages(after) == 1
    with identity_mode():
        found = to_module(after)(X)
    # tiles and s·(W/s), float32
    torch.testing.assert_close(found, chain()(X), rtol=1e-5, atol=1e-5)


def test_modules_are_converted_too() -> None:
    """What fxopt.transform returned, and what was captured from it."""
    module = to_module(quantise(chain(), X, qas=True).after)
    for program in (program_of(module), fxopt.capture(module, X)):
        assert units(program) == dict.fromkeys("abc", (True, None))
        assert len(quantisers(program)) == 5  # type: ignore[arg-type]
    real = fxopt.transform(module, [FakeQuantization(calibration=X, qas=False, real_int8=True)], X)
    kinds = {each.update_rounding for each in real.modules() if isinstance(each, QuantizedLayer)}
    assert kinds == {"nearest"}
