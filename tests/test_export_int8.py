"""Quantised programs as ONNX integers: what is in the file, that each operator computes what torch
computes, and that a file that does not is caught."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from seeded import image, seeded
from torch import nn

from fxopt.capture import capture
from fxopt.errors import ExportError, ExportMismatchError
from fxopt.export import export_onnx
from fxopt.onnx_report import IntegerReport, OnnxReport
from fxopt.passes import FakeQuantization
from fxopt.program import Program
from fxopt.quantizing.evidence import quantized_layers
from fxopt.quantizing.fidelity import quantisers
from fxopt.rewrite import run_pass

MAP = (1, 3, 8, 8)
SCALES = ("QuantizeLinear", "DequantizeLinear")


def quantised(model: nn.Module, *example: torch.Tensor, **options: Any) -> Program:
    """``model``, quantised on seeded inputs like ``example``, floats or small integers."""
    given = example or (image(*MAP),)
    program = capture(seeded(model), given)
    drawn = [
        image(4, *each.shape[1:], seed=3 + place) if each.is_floating_point() else each
        for place, each in enumerate(given)
    ]
    pass_ = FakeQuantization(calibration=[tuple(drawn)], fold="auto", **options)
    return run_pass(pass_, program).after


class Function(nn.Module):
    """``function(self, x)`` with layers of its own."""

    def __init__(self, function: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


@dataclass(frozen=True)
class Written:
    """A program, its file, and what was said of it."""

    program: Program
    path: Path
    report: OnnxReport

    @property
    def model(self) -> Any:
        return onnx.load(self.path)

    @property
    def integers(self) -> IntegerReport:
        assert self.report.integers is not None
        return self.report.integers

    @property
    def kinds(self) -> list[str]:
        return [node.op_type for node in self.model.graph.node]

    def in_float(self) -> list[tuple[str, str]]:
        assert self.integers.optimised is not None
        return [(each.kind, each.reason) for each in self.integers.optimised.in_float]

    def arrays(self) -> dict[str, Any]:
        return {each.name: numpy_helper.to_array(each) for each in self.model.graph.initializer}

    def layers(self) -> Iterator[Layer]:
        """The operators with weights, in the order of the file."""
        arrays = self.arrays()
        made = {name: node for node in self.model.graph.node for name in node.output}
        for node in self.model.graph.node:
            if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
                x, weight, bias, *_ = (*(made[name] for name in node.input), None)
                kept = [
                    None if part is None else _constant(part, arrays) for part in (weight, bias)
                ]
                yield Layer(node.op_type, arrays[x.input[1]], *kept)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Constant:
    whole: Any
    scale: Any
    zero_point: Any
    axis: int | None


@dataclass(frozen=True)
class Layer:
    kind: str
    input_scale: Any
    weight: Constant
    bias: Constant | None


def _constant(node: Any, arrays: dict[str, Any]) -> Constant:
    assert node.op_type == "DequantizeLinear"
    axis = next((each.i for each in node.attribute if each.name == "axis"), None)
    return Constant(*(arrays[name] for name in node.input), axis)


def run(path: Path, *inputs: torch.Tensor) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = {each.name: x.numpy() for each, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.as_tensor(found) for found in session.run(None, feeds)]


def write(
    folder: Path, model: nn.Module | Program, *example: torch.Tensor, **settings: Any
) -> Written:
    program = model if isinstance(model, Program) else quantised(model, *example)
    path = folder / "net.onnx"
    return Written(program, path, export_onnx(program, path, **settings))


class Layers(nn.Module):
    """Every kind of layer that has weights in two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.act = nn.ReLU6()
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.grouped = nn.Conv2d(6, 4, 1, groups=2, bias=False)
        self.up = nn.ConvTranspose2d(4, 6, 2, 2, groups=2)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(self.act(self.norm(self.stem(x)))).relu()
        result: torch.Tensor = self.head(self.up(self.grouped(x)).mean((2, 3)))
        return result


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write(tmp_path_factory.mktemp("layers"), Layers())


@pytest.fixture(scope="module")
def as_int8(layers: Written, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The same program in the other type and in a later set of operators."""
    folder = tmp_path_factory.mktemp("int8")
    return write(folder, layers.program, activation_type="int8", opset=21)


def last_step(written: Written) -> float:
    """The scale of the quantiser that comes last."""
    return float(list(quantisers(written.program).values())[-1].scale)


NAMES = ("stem", "depthwise", "grouped", "up", "head")


def test_weights_are_int8_and_biases_int32(layers: Written) -> None:
    kept = quantized_layers(layers.program)
    for name, found in zip(NAMES, layers.layers(), strict=True):
        assert found.weight.whole.dtype == np.int8
        assert not found.weight.zero_point.any()
        assert np.array_equal(found.weight.whole, kept[name].integer_weight().numpy())
        assert np.array_equal(found.weight.scale, kept[name].weight_scale.numpy())
        assert (found.bias is None) == (name == "grouped")
        if found.bias is not None:
            assert found.bias.whole.dtype == np.int32
            assert not found.bias.zero_point.any()
            assert np.array_equal(found.bias.whole, kept[name].integer_bias().numpy())


def test_scales_of_biases_are_the_products_exactly(layers: Written, as_int8: Written) -> None:
    for written in (layers, as_int8):
        biased = [each for each in written.layers() if each.bias is not None]
        assert len(biased) == 4
        for each in biased:
            product = np.float32(each.input_scale) * each.weight.scale
            assert product.dtype == np.float32
            repeats = len(each.bias.scale) // len(product)  # type: ignore[union-attr]
            assert repeats == (2 if each.kind == "ConvTranspose" else 1)
            assert np.array_equal(each.bias.scale, np.tile(product, repeats))  # type: ignore[union-attr]


def test_weights_have_a_scale_for_each_output_channel_on_its_axis(layers: Written) -> None:
    found = {n: each.weight for n, each in zip(NAMES, layers.layers(), strict=True)}
    assert {name: (w.axis, w.scale.shape) for name, w in found.items()} == {
        "stem": (0, (6,)), "depthwise": (0, (6,)), "grouped": (0, (4,)), "up": (1, (3,)),
        "head": (0, (5,)),
    }  # fmt: skip
    assert all(each.bias.axis == 0 for each in layers.layers() if each.bias is not None)


def test_one_scale_for_a_weight_has_no_axis(tmp_path: Path) -> None:
    program = quantised(Layers(), granularity="tensor")
    written = write(tmp_path, program)
    for name, found in zip(NAMES, written.layers(), strict=True):
        assert found.weight.axis is None
        assert found.weight.scale.shape == ()
        assert np.abs(found.weight.whole).max() == 127
        if name != "grouped":
            assert found.bias is not None
            product = np.float32(found.input_scale) * found.weight.scale
            assert np.array_equal(found.bias.scale, np.full(len(found.bias.whole), product))
    assert written.integers.agreement is not None
    assert written.integers.agreement.worst <= 1


def test_the_only_floats_in_the_file_are_scales(layers: Written) -> None:
    scales = {n.input[1] for n in layers.model.graph.node if n.op_type in SCALES}
    floats = {name for name, array in layers.arrays().items() if array.dtype == np.float32}
    assert floats <= scales


@pytest.mark.parametrize(("kind", "shift"), [("uint8", 128), ("int8", 0)])
def test_activations_are_whole_numbers_of_the_type(
    layers: Written, as_int8: Written, kind: str, shift: int
) -> None:
    written = layers if kind == "uint8" else as_int8
    assert written.integers.activation_type == kind
    made = {n.name: n for n in written.model.graph.node if n.op_type == "QuantizeLinear"}
    arrays, grids = written.arrays(), quantisers(written.program)
    assert made.keys() >= {node.name for node in grids}
    for node, grid in grids.items():
        zero_point = arrays[made[node.name].input[2]]
        assert zero_point.dtype == kind
        assert int(zero_point) == int(grid.zero_point) + shift
        assert arrays[made[node.name].input[1]] == np.float32(grid.scale)


def test_both_types_give_the_same_outputs(layers: Written, as_int8: Written) -> None:
    x = image(5, 3, 8, 8)
    assert torch.equal(run(layers.path, x)[0], run(as_int8.path, x)[0])


def test_the_set_of_operators_is_as_asked_for(layers: Written, as_int8: Written) -> None:
    for written, opset in ((layers, 18), (as_int8, 21)):
        assert written.model.opset_import[0].version == written.report.opset == opset


def test_every_operator_is_compared(layers: Written) -> None:
    agreement = layers.integers.agreement
    assert agreement is not None
    assert [each.node for each in agreement.operators] == [
        n.name for n in quantisers(layers.program)
    ]
    assert all(each.elements > 0 for each in agreement.operators)
    assert agreement.worst <= 1
    # halves between two whole numbers are rare
    assert agreement.differing <= agreement.elements / 1000
    assert f"{agreement.differing:,} of {agreement.elements:,} numbers" in layers.report.text()


def test_outputs_are_near_torchs_at_any_batch_size(layers: Written) -> None:
    assert layers.report.dynamic_batch
    step = last_step(layers)
    for batch in (1, 2, 7):
        x = image(batch, 3, 8, 8, seed=batch)
        (found,), (expected,) = run(layers.path, x), layers.program.graph_module(x)
        assert found.shape == (batch, 5)
        assert float((found - expected.detach()).abs().max()) <= 2 * step


def test_ends_are_compared_beside_torchs_own_rounding(layers: Written) -> None:
    assert layers.integers.agreement is not None
    (end,) = layers.integers.agreement.end_to_end
    assert end.output == "output"
    assert end.top1 == 1.0
    assert end.own_top1 == 1.0
    assert end.own_sqnr_db is not None
    assert end.own_sqnr_db > 100
    assert "torch float32 against float64" in layers.report.text()


def test_clamps_that_a_quantiser_does_are_left_out(layers: Written) -> None:
    assert not {"Clip", "Relu", "Max", "Min"} & set(layers.kinds)


def test_what_stays_in_float_is_told_with_its_reason(layers: Written) -> None:
    reason = "onnxruntime has no integer kernel for ConvTranspose"
    assert layers.in_float() == [("ConvTranspose", reason)]
    assert f"1 ConvTranspose: {reason}" in layers.report.text()
    optimised = layers.integers.optimised
    assert optimised is not None
    assert optimised.integer >= 5
    assert optimised.float_share == 1 / (1 + optimised.integer)


def test_writes_one_file_of_a_quarter_of_the_size(tmp_path: Path) -> None:
    net = Function(
        lambda self, x: self.b(self.a(x).relu()), a=nn.Linear(256, 512), b=nn.Linear(512, 64)
    )
    written = write(tmp_path, net, image(1, 256))
    plain = export_onnx(seeded(net), tmp_path / "plain.onnx", example_inputs=image(1, 256))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.onnx", "plain.onnx"]
    assert written.report.bytes == written.path.stat().st_size
    assert written.report.bytes / plain.bytes < 0.27


def test_the_same_program_gives_the_same_bytes_without_paths(
    layers: Written, tmp_path: Path
) -> None:
    again = write(tmp_path, layers.program, verify=False)
    content = again.path.read_bytes()
    assert content == layers.path.read_bytes()
    assert b".py" not in content
    assert b"fxopt_name" not in content
    assert again.integers.agreement is None
    assert again.integers.optimised is None
    assert "verification is off" in again.report.text()


def test_the_program_is_not_changed(layers: Written) -> None:
    assert all(not n.name.endswith("_written") for n in layers.program.nodes)
    assert all(layer.scale.dtype == torch.float32 for layer in quantisers(layers.program).values())


def test_json_has_what_the_text_says(layers: Written) -> None:
    found = layers.report.to_dict()["integers"]
    assert list(found) == [
        "activation_type", "narrow", "outputs", "operators", "end_to_end", "optimised",
    ]  # fmt: skip
    assert found["optimised"]["in_float"][0]["kind"] == "ConvTranspose"
    assert 0 < found["optimised"]["float_share"] < 1
    assert set(found["operators"][0]) == {"node", "where", "elements", "differing", "worst"}


# ---- fewer bits ------------------------------------------------------------------------------


def test_fewer_bits_are_eight_with_a_narrower_range(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 2, 1))
    written = write(tmp_path, quantised(net, activation_bits=4, weight_bits=3))
    assert written.integers.narrow == len(quantisers(written.program)) + 2
    assert "tensors of fewer bits, written as 8 with a narrower range" in written.report.text()
    assert {int(abs(each.weight.whole).max()) for each in written.layers()} == {3}
    arrays = written.arrays()
    cuts = [node for node in written.model.graph.node if node.op_type == "Clip"]
    assert len(cuts) == len(quantisers(written.program))
    for cut in cuts:
        low, high = (arrays[name] for name in cut.input[1:])
        assert (low.dtype, int(low), int(high)) == (np.uint8, 120, 135)
    x = image(3, 3, 8, 8) * 5
    (found,), (expected,) = run(written.path, x), written.program.graph_module(x)
    assert len(found.unique()) <= 16
    # a step of a map moves the sum by less than one of the result
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1.001 * last_step(written))


# ---- operators --------------------------------------------------------------------------------


def fine(written: Written, but: Set[str] = frozenset()) -> None:
    """Every quantiser ``but`` those was compared, and none is off by more than a step."""
    agreement = written.integers.agreement
    assert agreement is not None
    compared = {each.node for each in agreement.operators}
    assert {node.name for node in quantisers(written.program)} - compared <= but
    assert agreement.worst <= 1


def test_numbers_are_operands_in_integers(tmp_path: Path) -> None:
    def by_numbers(self: Any, x: torch.Tensor) -> list[torch.Tensor]:
        y = self.conv(x)
        return [
            y + 1.5, y + (-2), 3 + y, y - 0.5, y - (-2), y * 3, y * -0.75, -2 * y, y / 3, y / -4.0,
            torch.add(y, 2), y.mul(-1.5), operator.sub(y, 1),
        ]  # fmt: skip

    written = write(tmp_path, Function(by_numbers, conv=nn.Conv2d(3, 4, 3)))
    fine(written)
    assert written.in_float() == []
    x = image(2, 3, 8, 8, seed=5)
    grids = [q for n, q in quantisers(written.program).items() if n.all_input_nodes[0].name != "x"]
    for found, expected, grid in zip(
        run(written.path, x), written.program.graph_module(x), grids[-13:], strict=True
    ):
        assert float((found - expected.detach()).abs().max()) <= 1.01 * float(grid.scale)


def test_means_of_maps_are_pooled_in_integers(tmp_path: Path) -> None:
    def pooled(self: Any, x: torch.Tensor) -> list[torch.Tensor]:
        a, b, c, d, e, f = (conv(x).relu() for conv in self.convs)
        flat = [a.mean((2, 3)), b.mean([-1, -2]), torch.mean(c, (3, 2), False)]
        kept = [d.mean((2, 3), keepdim=True), self.pool(e), F.adaptive_avg_pool2d(f, 1)]
        return [*map(self.head, flat), *(a * each for each in kept)]

    convs = nn.ModuleList(nn.Conv2d(3, 4, 3) for _ in range(6))
    layers = {"convs": convs, "pool": nn.AdaptiveAvgPool2d(1), "head": nn.Linear(4, 2)}
    written = write(tmp_path, Function(pooled, **layers))
    fine(written)
    assert written.kinds.count("ReduceMean") == 0
    assert written.kinds.count("GlobalAveragePool") == 6
    assert written.in_float() == []


def test_other_means_stay_as_they_are(tmp_path: Path) -> None:
    def partly(self: Any, x: torch.Tensor) -> list[torch.Tensor]:
        y = self.conv(x)
        return [y * y.mean(1, keepdim=True), y * y.mean((1, 2), keepdim=True), y.flatten(2).mean(2)]

    written = write(tmp_path, Function(partly, conv=nn.Conv2d(3, 4, 3)))
    fine(written)
    assert "GlobalAveragePool" not in written.kinds
    assert ("ReduceMean", "onnxruntime has no integer kernel for ReduceMean") in written.in_float()


def test_linear_layers_take_any_number_of_axes(tmp_path: Path) -> None:
    def linear(self: Any, x: torch.Tensor) -> list[torch.Tensor]:
        four = self.d(self.a(x).relu())
        three = self.b(four.flatten(1, 2))
        return [self.c(three[:, 0]), three]

    layers = {
        "a": nn.Linear(8, 6),
        "b": nn.Linear(6, 4, bias=False),
        "c": nn.Linear(4, 3),
        "d": nn.Linear(6, 6),
    }
    written = write(tmp_path, Function(linear, **layers))
    fine(written)
    assert written.in_float() == []
    assert [tuple(y.shape) for y in run(written.path, image(5, 3, 8, 8))] == [(5, 3), (5, 24, 4)]


def test_pads_that_repeat_values_and_pads_of_one_side(tmp_path: Path) -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mirrored = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
            self.around = nn.Conv2d(4, 4, 3, padding=(2, 1), padding_mode="circular")
            self.edge = nn.Conv2d(4, 4, 3, padding=1, padding_mode="replicate")
            self.strided = nn.Conv2d(4, 2, 3, stride=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.edge(self.around(self.mirrored(x).relu()))
            return self.strided(F.pad(x, (0, 1, 0, 1)))

    written = write(tmp_path, Padded())
    fine(written, but={"pad_quantizer"})  # the pad is the convolution's own
    assert [kind for kind, _ in written.in_float()] == ["Pad"] * 3
    x = image(2, 3, 8, 8, seed=9)
    (found,), (expected,) = run(written.path, x), written.program.graph_module(x)
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=2 * last_step(written))


def test_parameters_are_operands_in_integers(tmp_path: Path) -> None:
    layers = {"conv": nn.Conv2d(3, 4, 3), "gain": nn.Parameter(torch.ones(4, 1, 1)),
              "shift": nn.Parameter(torch.ones(1)), "last": nn.Conv2d(4, 2, 1)}  # fmt: skip
    net = Function(lambda self, x: self.last(self.conv(x) * self.gain.exp() + self.shift), **layers)
    written = write(tmp_path, net)
    fine(written, but={"exp_quantizer", "shift_quantizer"})  # these are constants of the file
    assert written.in_float() == []
    scales = {n.input[1] for n in written.model.graph.node if n.op_type in SCALES}
    arrays = written.arrays()
    assert all(name in scales for name, a in arrays.items() if a.dtype == np.float32)


def test_skipped_layers_stay_in_float_with_a_reason(tmp_path: Path) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)
    )
    written = write(tmp_path, quantised(net, skip="4"))
    fine(written)
    kinds = {kind for kind, _ in written.in_float()} - {"ReorderOutput"}  # a layout of memory
    assert kinds == {"Conv"}
    floats = {a.shape for a in written.arrays().values() if a.dtype == np.float32 and a.ndim > 1}
    assert floats == {(2, 4, 1, 1)}


@pytest.mark.xfail(strict=True, reason="onnxruntime quantises the float weight by itself")
def test_a_skipped_layer_between_quantised_ones_runs_in_float(tmp_path: Path) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)
    )
    written = write(tmp_path, quantised(net, skip="2"))
    assert [kind for kind, _ in written.in_float()] != []


def test_operators_without_an_integer_form_are_islands(tmp_path: Path) -> None:
    def island(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.sqrt(self.conv(x).abs() + 1))

    layers = {"conv": nn.Conv2d(3, 4, 3), "last": nn.Conv2d(4, 2, 1)}
    written = write(tmp_path, Function(island, **layers))
    fine(written)
    assert ("Sqrt", "onnxruntime has no integer kernel for Sqrt") in written.in_float()


def test_several_outputs_shared_layers_and_equal_branches(tmp_path: Path) -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 2, 1)

        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            once = self.conv(x).relu()
            twice = self.conv(once)
            y = self.last(twice) + self.last(twice)
            return {
                "y": y,
                "again": y,
                "tangent": torch.tan(twice),
                "class": y.mean((2, 3)).argmax(1),
            }

    written = write(tmp_path, Several())
    fine(written)
    agreement = written.integers.agreement
    assert agreement is not None
    assert {each.output for each in agreement.end_to_end} == {
        "output_y", "output_again", "output_tangent"
    }  # fmt: skip
    assert sum(a.dtype == np.int8 and a.ndim == 4 for a in written.arrays().values()) <= 3
    x = image(3, 3, 8, 8)
    y, again, tangent, best = run(written.path, x)
    expected = written.program.graph_module(x)
    assert torch.equal(y, again)
    assert [tuple(each.shape) for each in (y, tangent, best)] == [(3, 2, 8, 8), (3, 3, 8, 8), (3,)]
    torch.testing.assert_close(y, expected[0].detach(), rtol=0, atol=2 * last_step(written))


def test_a_batch_that_is_fixed_stays_fixed(tmp_path: Path) -> None:
    net = Function(lambda self, x: self.conv(x).reshape(4, 144), conv=nn.Conv2d(3, 4, 3))
    written = write(tmp_path, net, image(4, 3, 8, 8))
    fine(written)
    assert not written.report.dynamic_batch
    assert written.report.inputs == {"x": (4, 3, 8, 8)}


def test_a_model_without_anything_quantised_is_written_as_ever(tmp_path: Path) -> None:
    program = quantised(Function(lambda self, x: torch.exp(x)))
    written = write(tmp_path, program)
    assert written.report.integers is None
    assert all(each.error is not None for each in written.report.deviations)
    assert "int8" not in written.report.text()


@pytest.mark.parametrize("name", ["input", "image"])
def test_inputs_bear_the_users_names(tmp_path: Path, name: str) -> None:
    """``input`` is a name that torch.fx gives away as ``input_1``."""
    space: dict[str, Any] = {"nn": nn}
    exec(f"class Net(nn.Conv2d):\n    def forward(self, {name}):\n"
         f"        return self._conv_forward({name}, self.weight, self.bias)", space)  # fmt: skip
    net = nn.Sequential(nn.Conv2d(3, 4, 3)) if name == "input" else space["Net"](3, 4, 3)
    written = write(tmp_path, net)
    assert list(written.report.inputs) == [name]
    fine(written)


def test_parameters_that_train_are_written_too(tmp_path: Path) -> None:
    """torch differentiates by classes of its own, some of them made while a model is captured."""
    written = write(tmp_path, nn.Sequential(nn.Conv2d(3, 4, 1), nn.PReLU(4), nn.Conv2d(4, 2, 1)))
    fine(written)
    assert written.in_float() == [("PRelu", "onnxruntime has no integer kernel for PRelu")]


# ---- files that are wrong ---------------------------------------------------------------------


def first(model: Any, suffix: str) -> Any:
    return next(each for each in model.graph.initializer if each.name.endswith(suffix))


def change(suffix: str, by: Callable[[Any], Any]) -> Callable[[Any], None]:
    def changed(model: Any) -> None:
        tensor = first(model, suffix)
        array = by(numpy_helper.to_array(tensor).copy())
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    return changed


def bump(array: Any) -> Any:
    array.flat[0] += 40 if array.flat[0] < 0 else -40
    return array


def without_bias(model: Any) -> None:
    next(node for node in model.graph.node if node.op_type == "Conv").input.pop()


def other_axis(model: Any) -> None:
    """The depthwise weight's scales in reverse."""
    change("depthwise_written.scale", lambda a: a[::-1].copy())(model)


def pads(model: Any) -> None:
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    attribute = next(each for each in conv.attribute if each.name == "pads")
    del attribute.ints[:]
    attribute.ints.extend([0, 0, 2, 2])


WRONG: dict[str, Callable[[Any], None]] = {
    "weight": change("stem_written.weight", bump),
    "weight of a linear layer": change("head_written.weight", bump),
    "bias": change("stem_written.bias", lambda a: a + 2000),
    "no bias": without_bias,
    "scale of a weight": change("depthwise_written.scale", lambda a: a * np.float32(1.2)),
    "scales in another order": other_axis,
    "scale of a bias": change("up_written.bias_scale", lambda a: a * np.float32(3)),
    "scale of an activation": change("act_quantizer_written.scale", lambda a: a * np.float32(1.1)),
    "zero point": change("grouped_1_quantizer_written.zero_point", lambda a: a + np.uint8(2)),
    "zero point of the input": change("x_quantizer_written.zero_point", lambda a: a + np.uint8(2)),
    "scale of the output": change("head_1_quantizer_written.scale", lambda a: a * np.float32(1.1)),
    "pads": pads,
}


@pytest.fixture
def tampered(
    layers: Written, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[Any], None]], None]:
    """Lets the exporter write the file of the layers, changed."""

    def by(changed: Callable[[Any], None]) -> None:
        def wrongly(*arguments: Any) -> None:
            model = layers.model
            changed(model)
            onnx.save(model, arguments[-1])

        monkeypatch.setattr("fxopt.export.write_onnx", wrongly)

    return by


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_file_is_caught_and_not_written(
    layers: Written, tmp_path: Path, what: str, tampered: Any
) -> None:
    tampered(WRONG[what])
    path = tmp_path / "net.onnx"
    path.write_bytes(b"what was there")
    with pytest.raises(ExportMismatchError, match="of the file departs from torch by") as caught:
        export_onnx(layers.program, path)
    assert caught.value.exit_code == 1
    assert path.read_bytes() == b"what was there"
    assert list(tmp_path.iterdir()) == [path]


def test_names_the_operator_that_is_wrong(layers: Written, tmp_path: Path, tampered: Any) -> None:
    tampered(WRONG["scale of a weight"])
    with pytest.raises(
        ExportMismatchError, match=r"'relu|depthwise|test_export_int8.*where one is"
    ):
        export_onnx(layers.program, tmp_path / "net.onnx")


def test_an_untouched_file_passes_the_same_way(
    layers: Written, tmp_path: Path, tampered: Any
) -> None:
    tampered(lambda model: None)
    assert write(tmp_path, layers.program).integers.agreement == layers.integers.agreement


# ---- what was wrong once ----------------------------------------------------------------------


def test_two_inputs_are_quantised(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            return self.conv(first) + self.conv(second)

    written = write(tmp_path, Two(), image(*MAP), image(*MAP, seed=2))
    fine(written)
    assert list(written.report.inputs) == ["first", "second"]
    assert written.in_float() == []


@pytest.mark.parametrize("name", ["sort", "max", "lstm"])
def test_an_item_of_what_has_no_integer_form_is_put_on_its_grid(tmp_path: Path, name: str) -> None:
    functions: dict[str, Callable[..., torch.Tensor]] = {
        "sort": lambda self, x: self.last(self.conv(x).sort(1)[0]),
        "max": lambda self, x: self.last(self.conv(x) * self.conv(x).max(1, keepdim=True)[0]),
        "lstm": lambda self, x: self.head(self.lstm(x.flatten(2))[0]),
    }
    layers = {"conv": nn.Conv2d(3, 4, 3), "last": nn.Conv2d(4, 2, 1), "head": nn.Linear(5, 2),
              "lstm": nn.LSTM(64, 5, batch_first=True)}  # fmt: skip
    fine(write(tmp_path, Function(functions[name], **layers)))


def test_a_vector_is_multiplied(tmp_path: Path) -> None:
    net = seeded(nn.Linear(8, 3))
    program = capture(net, image(8))
    pass_ = FakeQuantization(calibration=[image(8, seed=2)], fold="auto")
    fine(write(tmp_path, run_pass(pass_, program).after))


def test_an_output_of_class_numbers_alone(tmp_path: Path) -> None:
    net = Function(lambda self, x: self.conv(x).mean((2, 3)).argmax(1), conv=nn.Conv2d(3, 4, 3))
    written = write(tmp_path, net)
    fine(written)
    assert written.integers.agreement is not None
    assert written.integers.agreement.end_to_end == ()


@pytest.mark.parametrize("what", ["weight", "scale of the output"])
def test_what_follows_the_last_quantiser_is_compared(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = Function(
        lambda self, x: self.head(self.conv(x).mean((2, 3))),
        conv=nn.Conv2d(3, 4, 3),
        head=nn.Linear(4, 3),
    )
    program = quantised(net, **({"skip": "head"} if what == "weight" else {}))
    written = write(tmp_path, program, verify=False)

    def wrongly(*arguments: Any) -> None:
        model = written.model
        if what == "weight":
            change("head.weight", lambda a: -3 * a)(model)
        else:
            wrong = numpy_helper.from_array(np.float32(0.7), "wrong")
            model.graph.initializer.append(wrong)
            model.graph.node[-1].input[1] = "wrong"
        onnx.save(model, arguments[-1])

    monkeypatch.setattr("fxopt.export.write_onnx", wrongly)
    with pytest.raises(ExportMismatchError):
        export_onnx(program, tmp_path / "wrong.onnx")


def test_a_cast_in_the_forward_leaves_no_float64_to_compare_with(tmp_path: Path) -> None:
    net = Function(
        lambda self, x: self.last(self.conv(x).to(torch.float32)),
        conv=nn.Conv2d(3, 4, 3),
        last=nn.Conv2d(4, 2, 1),
    )
    written = write(tmp_path, net)
    fine(written)
    assert written.integers.agreement is not None
    own = written.integers.agreement.end_to_end[0].own_sqnr_db
    assert own is not None
    assert math.isnan(own)


def test_a_float64_program_is_written_or_refused_with_a_remedy(tmp_path: Path) -> None:
    program = quantised(nn.Conv2d(3, 4, 3).double(), image(*MAP, dtype=torch.float64))
    try:
        write(tmp_path, program)
    except ExportError as error:
        assert "float()" in str(error)


def test_an_opset_that_there_is_not_is_refused_or_told(layers: Written, tmp_path: Path) -> None:
    try:
        written = write(tmp_path, layers.program, opset=99, verify=False)
    except ExportError:
        return
    assert written.report.opset == written.model.opset_import[0].version


def test_an_unknown_type_of_activations_is_refused(layers: Written, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="int16"):
        write(tmp_path, layers.program, activation_type="int16")
