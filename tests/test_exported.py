"""Programs of torch.export, written and read: the same layers at the same paths, or a refusal."""

from __future__ import annotations

import operator
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from seeded import ConvBn, image, seeded
from torch import nn

import fxopt
from fxopt.aten import Unspelled, spelled
from fxopt.captured import to_module
from fxopt.errors import CaptureError, ExportError, ExportMismatchError, GuardError, ModelSpecError
from fxopt.pt2 import export_pt2
from fxopt.saved_program import load_exported
from fxopt.zoo import load_model

BATCH = {0: torch.export.Dim.AUTO}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.relu(self.norm(self.conv(x)))
        return self.relu(x)


class Net(nn.Module):
    """Most kinds of layer, a tie, a buffer of its own, several inputs and a dict as result."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.layer1 = nn.Sequential(Block(), Block())
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.drop = nn.Dropout(0.3, inplace=True)
        self.group = nn.GroupNorm(2, 4)
        self.still = nn.BatchNorm2d(4, affine=False)
        self.head = nn.Linear(4, 4)
        self.tail = nn.Linear(4, 4)
        self.tail.weight = self.head.weight
        self.register_buffer("scale", torch.full((4,), 0.5))
        self.register_buffer("shift", torch.ones(4), persistent=False)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, *, steep: bool = False
    ) -> dict[str, Any]:
        x = self.pool(self.layer1(self.stem(x)))
        x = F.silu(self.still(self.group(x)), inplace=True)
        y = self.drop(F.adaptive_avg_pool2d(x, 1).flatten(1))
        if mask is not None:
            y = y * mask
        out = self.tail(F.gelu(self.head(y))) * self.scale + self.shift
        return {"out": out, "more": [x[:, 1:3, ::2], y.view(y.shape[0], 2, -1), 7 if steep else 3]}


def net() -> Net:
    model = seeded(Net()).eval()
    model.tail.weight = model.head.weight
    return model


def saved(
    file: Path, model: nn.Module, *args: torch.Tensor, kwargs: Any = None, shapes: Any = None
) -> Path:
    exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    torch.export.save(exported, file)
    return file


def spelling(program: fxopt.Program) -> list[tuple[str, str]]:
    """What is called, and in which of the user's modules."""
    return [
        (
            type(program.module(node)).__name__.removeprefix("Borrowed")  # which of a tie is told
            if node.op == "call_module"
            else str(getattr(node.target, "__name__", node.target)),
            program.origins[node.name].path,
        )
        for node in program.nodes
        if node.op.startswith("call") and node.target not in ("size", operator.getitem)
    ]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "net.pt2"


def test_reads_what_others_exported(file: Path) -> None:
    model = net()
    example = (image(2, 3, 12, 10), torch.randn(2, 4))
    shapes = {"x": BATCH, "mask": BATCH, "steep": None}
    saved(file, model, *example, kwargs={"steep": True}, shapes=shapes)
    loaded = load_model(str(file))
    assert type(loaded).__name__ == "Net"
    assert set(loaded.state_dict()) == set(model.state_dict())
    program = fxopt.capture(loaded)
    assert spelling(program) == spelling(fxopt.capture(model, example, {"steep": True}))
    module = to_module(program)
    inputs = (image(5, 3, 12, 10), torch.randn(5, 4))
    wanted, found = model(*inputs, steep=True), module(*inputs, steep=True)
    assert torch.equal(wanted["out"], found["out"])
    for ours, theirs in zip(wanted["more"][:2], found["more"][:2], strict=True):
        assert torch.equal(ours, theirs)
    assert found["more"][2] == 7
    with pytest.raises(GuardError, match=r"x.shape\[3\] == 10 \(decided at net.pt2:1\)"):
        module(image(5, 3, 12, 11), inputs[1], steep=True)


def test_layers_stand_at_their_paths_and_their_tensors_under_their_keys(file: Path) -> None:
    saved(file, net(), image(2, 3, 12, 10), shapes={"x": BATCH})
    program = fxopt.capture(load_exported(file))
    members = dict(program.graph_module.named_modules())
    assert isinstance(members["layer1.0.conv"], nn.Conv2d)
    assert isinstance(members["layer1.1.norm"], nn.BatchNorm2d)
    assert isinstance(members["layer1.0.relu"], nn.ReLU)
    assert members["tail"].weight is members["head"].weight
    assert "'layer1.0.conv'" in {program.where(node) for node in program.nodes}


def test_reports_the_lines_of_the_exporting_code(file: Path) -> None:
    saved(file, net(), image(2, 3, 12, 10))
    program = fxopt.capture(load_exported(file))
    cut = next(node for node in program.nodes if node.target is operator.getitem)
    assert program.origins[cut.name].line.startswith("test_exported.py:")


def test_it_has_no_training_mode_and_says_so(file: Path) -> None:
    saved(file, net(), image(2, 3, 12, 10))
    program = fxopt.capture(load_exported(file))
    assert "torch.export keeps one mode, and this is the evaluation" in fxopt.report(program).text()
    with pytest.raises(CaptureError, match="torch.export keeps one mode"):
        to_module(program).train()


def test_folds_the_norms_of_a_file(file: Path) -> None:
    model = seeded(ConvBn()).eval()
    saved(file, model, image(2, 3, 9, 7), shapes=(BATCH,))
    folded = fxopt.transform(load_exported(file), ["fold_conv_bn"])
    (record,) = fxopt.history(folded)
    assert len(record.rewritten) == 1
    torch.testing.assert_close(folded(image(4, 3, 9, 7)), model(image(4, 3, 9, 7)))


def test_converts_the_example_with_the_model(file: Path) -> None:
    saved(file, net(), image(2, 3, 12, 10))
    loaded = load_model(str(file), dtype=torch.float64)
    program = fxopt.capture(loaded)
    assert [type_.dtype for type_ in program.inputs().values()] == [torch.float64]


def test_reads_decomposed_programs(file: Path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.norm = nn.BatchNorm2d(4)
            self.up = nn.ConvTranspose2d(4, 4, 2)
            self.group = nn.GroupNorm(2, 4)
            self.layer = nn.LayerNorm(7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.group(self.up(F.relu(self.norm(self.conv(x)))))
            return F.max_pool2d(F.pad(self.layer(x), (1, 1)), 2).softmax(1)

    model = seeded(Plain()).eval()
    exported = torch.export.export(model, (image(2, 3, 8, 8),), dynamic_shapes=(BATCH,))
    torch.export.save(exported.run_decompositions(), file)
    program = fxopt.capture(load_exported(file))
    kinds = [kind for kind, _ in spelling(program)]
    assert {"Conv2d", "BatchNorm2d", "conv_transpose2d", "GroupNorm", "LayerNorm"} <= set(kinds)
    folded = fxopt.run_pass(fxopt.passes.FoldConvBn(), program)  # type: ignore[attr-defined]
    assert len(folded.rewritten) == 1
    torch.testing.assert_close(to_module(program)(image(3, 3, 8, 8)), model(image(3, 3, 8, 8)))


class Function(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


def filled(x: torch.Tensor) -> torch.Tensor:
    y = x * 1
    y[:, 0] = torch.tensor(2.0)
    return y


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
        lambda x: F.interpolate(x, size=(9, 5), mode="bilinear", align_corners=True),
        lambda x: F.interpolate(x, scale_factor=2),
        lambda x: F.interpolate(x, size=(7, 7), mode="bicubic"),
        lambda x: F.hardswish(F.relu6(F.hardsigmoid(x), inplace=True)),
        lambda x: F.hardtanh(F.leaky_relu_(x * 2, 0.2), -0.5, 0.5),
        lambda x: F.elu(F.softplus(F.mish(x))) + F.celu(x, 0.5) + F.logsigmoid(x) + F.selu(x),
        lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
        lambda x: F.adaptive_max_pool2d(x, 2),
        lambda x: F.instance_norm(x) + F.layer_norm(x, [6, 6]) + F.group_norm(x, 2),
        lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
        lambda x: x[:, torch.tensor([0, 2])] + x[:, -3:-1],
        lambda x: torch.einsum("nchw,ncvw->nhv", x, x),
        lambda x: torch.stack(x.split([1, 3], 1)[1].chunk(3, 1)).to(torch.float64).to("cpu"),
        lambda x: torch.linalg.vector_norm(x, dim=1),
        lambda x: x.unfold(2, 3, 1).contiguous(),
        lambda x: F.dropout(x, 0.5, False) + F.dropout2d(x, 0.5, False),
        lambda x: x.type(torch.int64) // 2,
        lambda x: (
            x.amax((2, 3), keepdim=True),
            x.argmax(1),
            x.flatten(2).transpose(1, 2) @ x[0, :, 0],
        ),
        lambda x: F.scaled_dot_product_attention(x, x, x),
        lambda x: torch.where(x > 0, x, x.new_zeros(1)).clamp(-1, 0.5).log_softmax(1),
        filled,
    ],
)
def test_calls_operators_as_the_user_did(file: Path, function: Callable[..., Any]) -> None:
    model = Function(function)
    saved(file, model, image(2, 4, 6, 6))
    program = fxopt.capture(load_exported(file))
    targets = [str(node.target) for node in program.nodes]
    assert not any("aten" in target for target in targets)
    wanted, found = model(image(2, 4, 6, 6)), to_module(program)(image(2, 4, 6, 6))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


class Within(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: torch.Tensor) -> Any:
        y = x * 2
        view = y.flatten()
        return self.part(y), view


def test_a_layer_that_overwrites_its_input_does_so(file: Path) -> None:
    model = Within(nn.ReLU(inplace=True)).eval()
    saved(file, model, image(2, 3))
    found = fxopt.transform(load_exported(file), [])(image(2, 3))
    assert torch.equal(found[0].flatten(), found[1])
    assert torch.equal(found[1], model(image(2, 3))[1])


def test_a_layer_may_be_the_whole_model(file: Path) -> None:
    saved(file, nn.ReLU().eval(), image(2, 3))
    program = fxopt.capture(load_exported(file))
    assert [kind for kind, _ in spelling(program)] == ["ReLU"]


def test_an_operator_that_cannot_be_followed_is_named(file: Path) -> None:
    saved(file, Within(Function(torch.nonzero)).eval(), image(2, 3))
    with pytest.raises(CaptureError, match="Within cannot be captured: .*nonzero"):
        fxopt.capture(load_exported(file))


def test_a_buffer_that_forward_writes_is_written(file: Path) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x + self.calls

    saved(file, Counts().eval(), torch.ones(2))
    module = fxopt.transform(load_exported(file), [])
    assert [float(module(torch.ones(2))[0]) for _ in range(2)] == [2.0, 3.0]


# ---- refusals --------------------------------------------------------------------------------


def doubled(x: torch.Tensor) -> torch.Tensor:
    return torch.ops.fxopt_test.twice(x)  # type: ignore[no-any-return]


@torch.library.custom_op("fxopt_test::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@twice.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            ConvBn().train(),
            r"the operator 'aten.batch_norm.default' \('batch_norm'\): it runs in training mode; "
            r"call .eval\(\) before torch.export.export",
        ),
        (Function(lambda x: F.dropout(x, 0.5, True)), "'aten.dropout.default' .* in training mode"),
        (Function(doubled), r"'fxopt_test.twice.default' \('twice'\): it has no counterpart among"),
        (
            Function(lambda x: F.max_pool2d(x, 2, return_indices=True)[1]),
            "'aten.max_pool2d_with_indices.default' .*: only its first result has a counterpart",
        ),
        (
            Function(lambda x: torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: y + 1, (x,))),
            "the operator 'cond' .*: it is no operator of torch's",
        ),
    ],
)
def test_refuses_a_program_by_its_operator(file: Path, model: nn.Module, reason: str) -> None:
    saved(file, model, image(2, 3, 9, 7))
    with pytest.raises(ModelSpecError, match=reason) as caught:
        load_model(str(file))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"the program in '{file}' cannot be used: ")


def test_refuses_an_argument_that_the_function_has_not() -> None:
    with pytest.raises(Unspelled, match="torch's function has no 'scale'"):
        spelled(torch.ops.aten.elu.default, (1, 1.0, 2.0), {})
    with pytest.raises(Unspelled, match="no counterpart"):
        spelled(torch.ops.aten._unsafe_masked_index.default, (1, 1, [], 0), {})
    assert spelled(torch.ops.aten._assert_scalar.default, (1, ""), {}) is None


def test_refuses_a_program_without_example_inputs(file: Path) -> None:
    exported = torch.export.export(ConvBn().eval(), (image(2, 3, 9, 7),))
    exported.example_inputs = None
    torch.export.save(exported, file)
    with pytest.raises(ModelSpecError, match="it has no example inputs, without which"):
        load_exported(file)


@pytest.mark.parametrize(
    ("member", "what"),
    [
        ("net/data/aotinductor/model/a.so", "compiled code"),
        ("net/data/constants/custom_obj_0", "a pickled object"),
        ("net/data/constants/opaque_obj_0", "a pickled object"),
    ],
)
def test_refuses_a_file_whose_loading_runs_code(file: Path, member: str, what: str) -> None:
    saved(file, ConvBn().eval(), image(2, 3, 9, 7))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(member, b"")
    with pytest.raises(ModelSpecError, match=f"holds {what}, and to load that is to run it"):
        load_exported(file)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("the file's code was run",))


def test_unpickles_nothing_but_tensors(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    saved(file, ConvBn().eval(), image(2, 3, 9, 7))
    changed = file.with_name("evil.pt2")
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if "sample_inputs" in name:
                content = pickle.dumps(Evil())
            new.writestr(name, content)
    with pytest.raises(ModelSpecError, match="torch.export.load refuses"):
        load_exported(changed)


def test_refuses_files_that_are_missing_or_no_archive(file: Path) -> None:
    with pytest.raises(ModelSpecError, match="there is no file '.*net.pt2'"):
        load_exported(file)
    saved(file, ConvBn().eval(), image(2, 3, 9, 7))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelSpecError, match="is no archive of torch.export.save; was it written"):
        load_exported(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(ModelSpecError, match=r"torch.export.load refuses '.*net.pt2' \(") as caught:
        load_exported(file)
    assert "\n" not in str(caught.value)


def test_refuses_arguments_of_another_structure(file: Path) -> None:
    class Pair(nn.Module):
        def forward(self, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            return pair[0] + pair[1]

    saved(file, Pair(), (torch.ones(2), torch.ones(2)))  # type: ignore[arg-type]
    loaded = load_exported(file)
    assert float(loaded((torch.ones(2), torch.ones(2)))[0]) == 2.0
    with pytest.raises(TypeError, match="another structure than the exported program takes"):
        loaded([torch.ones(2), torch.ones(2)])


# ---- writing ---------------------------------------------------------------------------------


def test_writes_what_can_be_read_again(file: Path) -> None:
    model = net()
    example = (image(1, 3, 12, 10), torch.randn(1, 4))
    captured = fxopt.transform(model, ["fold_conv_bn"], example, {"steep": True})
    before = {key: tensor.clone() for key, tensor in captured.state_dict().items()}
    report = fxopt.export_pt2(captured, file)
    assert report.dynamic_batch
    assert report.inputs == {"x": ("batch", 3, 12, 10), "mask": ("batch", 4)}
    assert {(found.output, found.batch) for found in report.deviations} >= {("output_out", 3)}
    assert all(found.error == 0 for found in report.deviations)
    assert report.bytes == file.stat().st_size
    assert all(torch.equal(tensor, before[key]) for key, tensor in captured.state_dict().items())
    loaded = load_exported(file)
    assert type(loaded).__name__ == "Net"
    assert set(loaded.state_dict()) == set(captured.state_dict())
    program = fxopt.capture(loaded)
    assert program.inputs()["x"].shape == (1, 3, 12, 10)
    inputs = (image(5, 3, 12, 10), torch.randn(5, 4))
    wanted = captured(*inputs, steep=True)
    assert torch.equal(to_module(program)(*inputs, steep=True)["out"], wanted["out"])
    plain = torch.export.load(file).module()
    assert torch.equal(plain(*inputs, steep=True)["out"], wanted["out"])


def test_captures_a_plain_module_and_leaves_nothing_else_behind(file: Path) -> None:
    model = ConvBn()
    state = torch.get_rng_state()
    report = export_pt2(model, file, example_inputs=image(2, 3, 9, 7))
    assert torch.equal(torch.get_rng_state(), state)
    assert [path.name for path in file.parent.iterdir()] == ["net.pt2"]
    assert "any batch size, evaluation only" in report.text()
    assert report.to_dict()["inputs"] == {"x": ["batch", 3, 9, 7]}
    unchecked = export_pt2(model, file, example_inputs=image(2, 3, 9, 7), verify=False)
    assert "verification is off" in unchecked.text()


def test_a_batch_that_a_guard_fixes_stays_fixed_and_other_guards_are_told(file: Path) -> None:
    fixed = export_pt2(Function(lambda x: x.view(2, -1)), file, example_inputs=image(2, 3, 4, 4))
    assert not fixed.dynamic_batch
    assert "this batch size only" in fixed.text()
    few = Function(lambda x: x * 2 if x.shape[0] > 4 else x)
    guarded = export_pt2(few, file, example_inputs=image(2, 3, 4, 4))
    assert "x.shape[0] <= 4" in guarded.guards_not_carried[0]
    assert "guard not in the file: " in guarded.text()


def test_says_where_torch_fixes_the_batch(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.export.Dim, "AUTO", torch.export.Dim.STATIC)
    report = export_pt2(ConvBn(), file, example_inputs=image(1, 3, 9, 7))
    assert report.inputs == {"x": (1, 3, 9, 7)}
    assert not report.dynamic_batch
    assert {found.batch for found in report.deviations} == {1}
    assert report.notes == ("the batch size is fixed by torch.export",)


def test_refuses_a_file_that_departs(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("before")
    load = torch.export.load

    def wrong(path: Path) -> torch.export.ExportedProgram:
        program = load(path)
        program.state_dict["conv.weight"].data *= 1.001
        return program

    monkeypatch.setattr("torch.export.load", wrong)
    with pytest.raises(ExportMismatchError, match=r"output 'output' of the file departs") as caught:
        export_pt2(ConvBn(), file, example_inputs=image(2, 3, 9, 7))
    assert caught.value.exit_code == 1
    assert file.read_text() == "before"
    assert [path.name for path in file.parent.iterdir()] == ["net.pt2"]


def test_refuses_a_file_that_does_not_run(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails(nn.Module):
        def module(self) -> nn.Module:
            return Function(lambda x: x.nothing)

    monkeypatch.setattr("torch.export.load", lambda path: Fails())
    with pytest.raises(ExportError, match="the file does not run on inputs of .*AttributeError"):
        export_pt2(ConvBn(), file, example_inputs=image(2, 3, 9, 7))
    assert not file.exists()


@pytest.mark.parametrize("place", ["export", "save"])
def test_refuses_what_torch_cannot_write(
    file: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("\nno luck\nat length")

    monkeypatch.setattr(f"torch.export.{place}", fails)
    with pytest.raises(ExportError, match=r"torch.export.*RuntimeError: no luck$"):
        export_pt2(ConvBn(), file, example_inputs=image(2, 3, 9, 7))
    assert list(file.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("place", "reason"),
    [("net.onnx", "torch.export's files end in .pt2"), ("no/net.pt2", "No such file")],
)
def test_refuses_a_place(tmp_path: Path, place: str, reason: str) -> None:
    with pytest.raises(ExportError, match=f"cannot write '.*{place}': {reason}"):
        export_pt2(ConvBn(), tmp_path / place, example_inputs=image(2, 3, 9, 7))
