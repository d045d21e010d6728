"""ONNX files: what is in them, that they compute what torch computes, and every refusal."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import fxopt
from fxopt import onnx_run
from fxopt.capture import capture
from fxopt.errors import ExportError, ExportMismatchError, GuardError
from fxopt.export import export_onnx
from fxopt.files import check_path
from fxopt.inputs import InputSpec, example_tensors
from fxopt.onnx_batch import bound_of, depth, plan_batch
from fxopt.onnx_run import deviation, own_rounding
from fxopt.zoo import load_model

EXAMPLE = torch.randn(1, 3, 12, 10, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Convolution and BatchNorm with statistics that are not the identity's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)
        for tensor in (self.norm.weight, self.norm.bias, self.norm.running_mean):
            nn.init.normal_(tensor)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.eval()

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


def run(path: Path, **inputs: torch.Tensor) -> list[Any]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return list(session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()}))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "net.onnx"


def test_writes_a_file_that_computes_the_model_at_any_batch_size(file: Path) -> None:
    net = Net()
    report = export_onnx(net, file, example_inputs=EXAMPLE)
    assert report.dynamic_batch
    assert report.inputs == {"x": ("batch", 3, 12, 10)}
    assert report.outputs == {"output": ("batch", 4)}
    assert report.bytes == file.stat().st_size
    assert [d.batch for d in report.deviations] == [2, 3]
    assert all(d.error is not None and d.error <= d.bound for d in report.deviations)
    x = torch.randn(7, 3, 12, 10)
    torch.testing.assert_close(torch.from_numpy(run(file, x=x)[0]), net(x).detach())


def test_leaves_nothing_but_the_file(file: Path, tmp_path: Path) -> None:
    export_onnx(Net(), file, example_inputs=EXAMPLE)
    assert list(tmp_path.iterdir()) == [file]


def test_takes_a_program_and_a_transformed_module(tmp_path: Path) -> None:
    net = Net()
    captured = capture(net, EXAMPLE)
    folded = fxopt.transform(net, ["fold_conv_bn"], EXAMPLE)
    for source in (captured, folded):
        report = export_onnx(source, tmp_path / "net.onnx")
        assert report.inputs == {"x": ("batch", 3, 12, 10)}
    x = torch.randn(2, 3, 12, 10)
    found = torch.from_numpy(run(tmp_path / "net.onnx", x=x)[0])
    torch.testing.assert_close(found, net(x).detach())


def test_writes_the_weights_that_the_module_has_now(file: Path) -> None:
    folded = fxopt.transform(Net(), ["fold_conv_bn"], EXAMPLE)
    with torch.no_grad():
        folded.get_parameter("head.bias").fill_(100.0)
    export_onnx(folded, file)
    assert run(file, x=EXAMPLE)[0].min() > 50


def test_writes_other_sizes_if_an_example_is_given(file: Path) -> None:
    report = export_onnx(capture(Net(), EXAMPLE), file, example_inputs=torch.zeros(1, 3, 20, 8))
    assert report.inputs == {"x": ("batch", 3, 20, 8)}


def test_refuses_an_example_that_a_guard_refuses(file: Path) -> None:
    net = Function(lambda x: x.relu() if x.shape[-1] > 8 else x.sigmoid())
    with pytest.raises(GuardError, match="8"):
        export_onnx(capture(net, EXAMPLE), file, example_inputs=torch.zeros(1, 3, 12, 6))


def test_names_inputs_and_outputs_as_the_user_does(file: Path) -> None:
    class Two(nn.Module):
        def forward(self, image: torch.Tensor, *, scale: torch.Tensor) -> dict[str, torch.Tensor]:
            y = image * scale
            return {"scaled": y, "again": y, "mean": y.mean((1, 2, 3))}

    kwargs = {"scale": torch.ones(1, 3, 1, 1)}
    report = export_onnx(Two().eval(), file, example_inputs=EXAMPLE, example_kwargs=kwargs)
    assert list(report.inputs) == ["image", "scale"]
    assert list(report.outputs) == ["output_scaled", "output_again", "output_mean"]
    assert len(report.deviations) == 6


def test_leaves_outputs_out_that_are_no_tensors(file: Path) -> None:
    report = export_onnx(Function(lambda x: (x.relu(), 7)), file, example_inputs=EXAMPLE)
    assert list(report.outputs) == ["output_0"]
    assert "output 'output_1' is not a tensor and is not in the file" in report.notes


def test_fixes_the_batch_size_that_a_guard_fixes(file: Path) -> None:
    net = Function(lambda x: x.relu() * int(x.shape[0]))
    report = export_onnx(net, file, example_inputs=EXAMPLE)
    assert not report.dynamic_batch
    assert report.inputs == {"x": (1, 3, 12, 10)}
    assert [d.batch for d in report.deviations] == [1]
    assert any("fixed by the guard" in note for note in report.notes)
    assert report.guards_not_carried == ()


def test_finds_a_batch_size_that_the_guards_allow(file: Path) -> None:
    net = Function(lambda x: x.relu() if x.shape[0] > 4 else x.sigmoid())
    report = export_onnx(net, file, example_inputs=torch.randn(5, 3, 4, 4))
    assert report.dynamic_batch
    assert {d.batch for d in report.deviations} == {5, 6}
    assert len(report.guards_not_carried) == 1
    assert "x.shape[0] > 4" in report.guards_not_carried[0]


def test_fixes_the_batch_size_where_the_graph_runs_at_no_other(file: Path) -> None:
    report = export_onnx(Function(lambda x: x.reshape(3, 120).relu()), file, example_inputs=EXAMPLE)
    assert not report.dynamic_batch
    assert any("does not run at batch 2" in note for note in report.notes)


def test_lists_arguments_that_were_fixed(file: Path) -> None:
    class Flagged(nn.Module):
        def forward(self, x: torch.Tensor, *, steep: bool = False) -> torch.Tensor:
            return x * 2 if steep else x.relu()

    report = export_onnx(
        Flagged().eval(), file, example_inputs=EXAMPLE, example_kwargs={"steep": True}
    )
    assert report.guards_not_carried == ("steep is True",)


def test_says_that_a_buffer_is_not_written(file: Path) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x + self.calls

    report = export_onnx(Counting().eval(), file, example_inputs=EXAMPLE)
    assert any("does not write the buffer" in note for note in report.notes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_writes_other_precisions(file: Path, dtype: torch.dtype) -> None:
    net = Net().to(dtype)
    report = export_onnx(net, file, example_inputs=EXAMPLE.to(dtype))
    assert all(d.error is not None and d.error <= d.bound for d in report.deviations)
    if dtype == torch.float64:
        assert report.runtime == "onnx reference evaluator"
        assert max(d.error for d in report.deviations if d.error is not None) < 1e-14
        assert any("onnxruntime cannot run this file" in note for note in report.notes)


def test_float64_is_as_near_as_the_attributes_in_the_file(file: Path) -> None:
    net = Function(nn.functional.hardsigmoid).double()
    report = export_onnx(net, file, example_inputs=EXAMPLE.double())
    assert all(d.error is not None and 1e-12 < d.error < d.bound for d in report.deviations)


def test_refuses_a_precision_that_the_operator_set_lacks(file: Path) -> None:
    with pytest.raises(ExportError, match="bfloat16"):
        export_onnx(Net().bfloat16(), file, example_inputs=EXAMPLE.bfloat16())
    assert not file.exists()


def test_takes_integer_inputs(file: Path) -> None:
    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 3)

        def forward(self, index: torch.Tensor) -> torch.Tensor:
            return self.table(index)

    report = export_onnx(Embedding().eval(), file, example_inputs=torch.tensor([[4, 0, 2]]))
    assert all(d.error == 0 for d in report.deviations)
    assert export_onnx(capture(Embedding().eval(), torch.tensor([[1, 0]])), file).dynamic_batch


def test_compares_integer_outputs_by_element(file: Path) -> None:
    report = export_onnx(Function(lambda x: x.argmax(1)), file, example_inputs=EXAMPLE)
    assert all(d.error == 0 and d.bound == onnx_run.DECISIONS for d in report.deviations)


def test_says_where_there_is_no_evidence(file: Path) -> None:
    report = export_onnx(Function(lambda x: x.clamp(0, 0)), file, example_inputs=EXAMPLE)
    assert all(d.error is None and "all zero" in d.remark for d in report.deviations)
    assert "no evidence" in report.text()
    report = export_onnx(Function(lambda x: x / 0), file, example_inputs=EXAMPLE)
    assert all(d.error is None and "not finite" in d.remark for d in report.deviations)


def test_does_not_run_the_file_if_told_so(file: Path) -> None:
    report = export_onnx(Net(), file, verify=False, example_inputs=EXAMPLE)
    assert report.deviations == ()
    assert report.runtime == ""
    assert "verification is off" in report.text()
    assert run(file, x=EXAMPLE)


def test_changes_neither_the_module_nor_the_random_state_and_prints_nothing(
    file: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    net = Net().train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    state = torch.get_rng_state()
    export_onnx(net, file, example_inputs=EXAMPLE)
    assert net.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert capfd.readouterr() == ("", "")
    assert list(recwarn) == []


def test_the_same_model_gives_the_same_bytes_without_paths(tmp_path: Path) -> None:
    for name in ("one.onnx", "two.onnx"):
        export_onnx(Net(), tmp_path / name, example_inputs=EXAMPLE)
    content = (tmp_path / "one.onnx").read_bytes()
    assert content == (tmp_path / "two.onnx").read_bytes()
    assert b".py" not in content
    onnx.checker.check_model(str(tmp_path / "one.onnx"), full_check=True)


def test_takes_a_later_opset(file: Path) -> None:
    assert export_onnx(Net(), file, opset=20, example_inputs=EXAMPLE).opset == 20
    assert onnx.load(file).opset_import[0].version == 20


def wrong_by(factor: float) -> Callable[[Path], Any]:
    """A runtime whose outputs are off by ``factor``."""

    def runner(path: Path) -> Any:
        session = onnxruntime.InferenceSession(path)

        def outputs(feeds: Mapping[str, Any]) -> list[Any]:
            return [np.asarray(y) * np.float32(factor) for y in session.run(None, dict(feeds))]

        return outputs, "a wrong runtime", ""

    return runner


@pytest.mark.parametrize("factor", [1.0001, math.nan])
def test_writes_no_file_that_departs_from_torch(
    file: Path, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxopt.export.runner_of", wrong_by(factor))
    file.write_bytes(b"what was there")
    with pytest.raises(ExportMismatchError, match="'output' of the file departs") as caught:
        export_onnx(Net(), file, example_inputs=EXAMPLE)
    assert caught.value.exit_code == 1
    assert file.read_bytes() == b"what was there"
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("missing/net.onnx", "No such file or directory"),
        ("file/net.onnx", "Not a directory"),
        ("directory", "is a directory"),
    ],
)
def test_refuses_a_path_before_any_work(
    tmp_path: Path, place: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    monkeypatch.setattr("fxopt.export.capture", lambda *_: pytest.fail("work was done"))
    with pytest.raises(ExportError, match=reason):
        export_onnx(Net(), tmp_path / place, example_inputs=EXAMPLE)
    with pytest.raises(ExportError, match=reason):
        check_path(tmp_path / place)


def test_names_the_operator_that_has_no_onnx_form(file: Path) -> None:
    with pytest.raises(ExportError, match=r"operator '\w+\.\w*bessel_j0' cannot be written"):
        export_onnx(Function(torch.special.bessel_j0), file, example_inputs=EXAMPLE)
    assert list(file.parent.iterdir()) == []


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_names_the_extra_of_a_missing_package(
    file: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError, match=rf"'{package}'.*pip install 'fxopt\[onnx\]'"):
        export_onnx(Net(), file, example_inputs=EXAMPLE)


def test_refuses_an_opset_that_the_exporter_does_not_write(file: Path) -> None:
    with pytest.raises(ExportError, match="opset 17 is too old"):
        export_onnx(Net(), file, opset=17, example_inputs=EXAMPLE)


def test_refuses_a_model_without_tensor_outputs(file: Path) -> None:
    with pytest.raises(ExportError, match="returns no tensor"):
        export_onnx(Function(lambda x: x.dim()), file, example_inputs=EXAMPLE)


def exactly(function: Callable[[Any], Any]) -> Callable[[Path], Any]:
    """A runtime that rounds nowhere but in the result."""
    return lambda path: (
        lambda feeds: [function(feeds["x"].astype(np.float64)).astype(np.float32)],
        "an exact runtime",
        "",
    )


def test_a_network_may_depart_as_far_as_it_magnifies_rounding(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def net(x: Any) -> Any:
        return (x + 1000.0) - 1000.0

    monkeypatch.setattr("fxopt.export.runner_of", exactly(net))
    program = capture(Function(net), EXAMPLE)
    (own,) = own_rounding(program.graph_module, [EXAMPLE], program.graph_module(EXAMPLE))
    report = export_onnx(program, file)
    for found in report.deviations:
        assert found.error is not None
        assert bound_of(torch.float32, 2) < found.error <= found.bound < 8 * own


def test_half_of_the_digits_must_agree_in_any_network(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def net(x: Any) -> Any:
        return (x + 1e6) - 1e6

    monkeypatch.setattr("fxopt.export.runner_of", exactly(net))
    with pytest.raises(ExportMismatchError, match="departs from torch"):
        export_onnx(Function(net), file, example_inputs=EXAMPLE)


def test_a_shape_that_differs_is_no_rounding() -> None:
    found = deviation("y", 2, torch.ones(2, 3), torch.ones(3, 2), 1e-6)
    assert found.error == math.inf
    assert "(3, 2) where torch gives (2, 3)" in found.remark


def test_the_bound_grows_with_the_root_of_the_depth() -> None:
    epsilon = torch.finfo(torch.float32).eps
    assert bound_of(torch.float32, 1) == 16 * epsilon
    assert bound_of(torch.float32, 100) == 40 * epsilon
    assert bound_of(torch.float64, 100) == epsilon
    assert depth(capture(Net(), EXAMPLE)) == 5


def test_inputs_that_share_the_first_axis_share_the_batch() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
            return x * table.sum()

    program = capture(Two().eval(), (torch.randn(2, 3), torch.randn(5)))
    assert plan_batch(program, [torch.zeros(2, 3), torch.zeros(5)]).batched == (True, False)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "deeplabv3_mobilenet_v3_large"])
def test_real_networks_stay_under_the_bound(file: Path, name: str) -> None:
    inputs, _ = example_tensors([InputSpec((1, 3, 64, 96))])
    model = load_model(f"torchvision:{name}")
    report = export_onnx(capture(model, inputs, verify=False), file)
    assert report.dynamic_batch
    assert all(d.error is not None and d.error <= d.bound for d in report.deviations)
    assert max(d.bound for d in report.deviations) < 1e-5
