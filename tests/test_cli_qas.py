"""``fxopt qas-ratio``: a model in, a table, a document or a picture out, and every refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fxopt import cli

MODELS = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.stem(x))).mean((2, 3)))


class Stage(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x):
        return {"out": self.two(torch.relu(self.one(x)))}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.head(torch.relu(self.two(torch.relu(self.one(x.mean((1, 2)))))))


class Doubled(nn.Module):
    def forward(self, x):
        return x * 2


class Best(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3)).argmax(1)
"""

INPUT = ("--input", "2x3x8x8")
NAMES = ["stem.weight", "stem.bias", "head.weight", "head.bias"]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and files of inputs with labels and without."""
    folder = tmp_path_factory.mktemp("qas")
    (folder / "nets.py").write_text(MODELS)
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(6) % 4
    files: dict[str, Any] = {
        "x": x,
        "labelled": [(x[:4], labels[:4]), (x[4:], labels[4:])],
        "far": [(x, labels + 1)],
        "two": x[:, :2],
        "single": [x[0], x[1]],
        "bytes": x.to(torch.uint8),
        "empty": x[:0],
        "broken": x / 0,
        "number": 5,
        "scalar": torch.tensor(5.0),
        "named": {"x": x},
        "misnamed": {"y": x},
        "pair": (x, labels),
    }
    for name, content in files.items():
        torch.save(content, folder / f"{name}.pt")
    (folder / "text.pt").write_text("no tensor")
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], place: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs ``fxopt qas-ratio`` with models and files by name: ``(exit status, stdout, stderr)``."""
    monkeypatch.chdir(place)

    def call(model: str, *arguments: str) -> tuple[int, str, str]:
        spec = model if "." in model else f"nets.py:{model}"
        status = cli.main(["qas-ratio", spec, *INPUT, *arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return call


def test_table(run: Run) -> None:
    status, out, err = run("Net")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == (
        "Net, norm over gradient's norm on unit normal 32x3x8x8 (cross-entropy, seeded labels)"
    )
    header = "tensor shape scale per fp32 int8 int8+QAS int8/fp32 QAS/fp32 channels"
    assert lines[2].split() == header.split()
    assert [line.split()[:3] for line in lines[4:8]] == [
        ["stem.weight", "6x3x3x3", "channel"], ["stem.bias", "6", "channel"],
        ["head.weight", "4x6", "channel"], ["head.bias", "4", "channel"],
    ]  # fmt: skip
    assert [line.split(" ")[0] for line in lines[9:]] == ["int8+QAS", "int8", "decades"]


def test_json_is_one_document(run: Run) -> None:
    status, out, err = run("Net", "--data", "labelled.pt", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert list(found) == ["schema", "model", "inputs", "loss", "rows", "in_float_units"]
    assert found["schema"] == "fxopt.qas-ratio/1"
    assert (found["model"], found["inputs"]) == ("Net", "labelled.pt")
    assert found["loss"] == "cross-entropy, the data's labels"
    assert [row["tensor"] for row in found["rows"]] == NAMES
    for row in found["rows"]:
        assert set(row) == {
            "tensor", "shape", "per", "fp32", "int8", "qas", "int8_over_fp32", "qas_over_fp32",
            "channels", "compared",
        }  # fmt: skip
        assert row["int8_over_fp32"] > 100 * row["qas_over_fp32"]
        assert row["int8"] > 100 * row["qas"]


def test_says_what_python_says(run: Run, place: Path) -> None:
    import fxopt
    from fxopt.qas_report import qas_ratio_text
    from fxopt.zoo import load_model

    program = fxopt.capture(load_model(f"{place / 'nets.py'}:Net", seed=3), torch.randn(2, 3, 8, 8))
    found = fxopt.qas_ratio(program, place / "x.pt", granularity="tensor")
    status, out, _ = run("Net", "--data", "x.pt", "--granularity", "tensor", "--seed", "3")
    assert status == 0
    wanted = qas_ratio_text(found).replace(str(place / "x.pt"), "x.pt")
    assert out.rstrip("\n") == wanted


def test_data_may_be_by_name(run: Run) -> None:
    assert run("Net", "--data", "named.pt")[0] == 0


def test_granularity_is_that_of_the_weights(run: Run) -> None:
    status, out, _ = run("Net", "--granularity", "tensor", "--json")
    assert status == 0
    assert {row["per"] for row in json.loads(out)["rows"]} == {"tensor"}


def test_measures_what_a_pass_has_quantised(run: Run) -> None:
    given = "calibration=x.pt,granularity=tensor,fold=auto,bias_correction=false"
    documents = []
    for units in ("", ",qas=true", ",qas=false"):
        status, out, err = run(
            "Net", "-p", f"fake_quantize{{{given}{units}}}", "--data", "x.pt", "--json"
        )
        assert (status, err) == (0, "")
        documents.append([row["qas"] for row in json.loads(out)["rows"]])
    # weights in quantised units are rounded once more in float32
    assert documents[1] == pytest.approx(documents[0], rel=1e-5)
    assert documents[2] == pytest.approx(documents[0], rel=1e-5)


@pytest.mark.parametrize("quantise_first", [True, False])
def test_takes_patched_stages(run: Run, quantise_first: bool) -> None:
    passes = ["fake_quantize{calibration=x.pt,qas=true}", "patch_execution{until=one,grid=2x2}"]
    passes = passes if quantise_first else passes[::-1]
    options = [each for which in passes for each in ("-p", which)]
    status, out, err = run("Stage", *options, "--data", "x.pt")
    assert (status, err) == (0, "")
    assert "(seeded projection of the outputs)" in out
    assert [line.split(" ")[0] for line in out.splitlines()[4:8]] == [
        "one.weight", "one.bias", "two.weight", "two.bias"
    ]  # fmt: skip


def test_takes_a_pickled_quantised_module(run: Run, place: Path, tmp_path: Path) -> None:
    import fxopt
    from fxopt.calibration import Calibration
    from fxopt.captured import to_module
    from fxopt.passes import FakeQuantization
    from fxopt.zoo import load_model

    program = fxopt.capture(load_model(f"{place / 'nets.py'}:Net"), torch.randn(2, 3, 8, 8))
    which = FakeQuantization(calibration=Calibration(place / "x.pt"), fold="auto", qas=True)
    after = fxopt.run_pass(which, program).after
    file = tmp_path / "int8.pt"
    torch.save(to_module(after), file)
    status, out, err = run(str(file), "--trust-pickle", "--data", "x.pt", "--json")
    assert (status, err) == (0, "")
    wanted = {row.tensor: row.qas for row in fxopt.qas_ratio(after, place / "x.pt").rows}
    found = {row["tensor"]: row["qas"] for row in json.loads(out)["rows"]}
    assert found == pytest.approx(wanted, rel=1e-6)
    status, out, err = run(str(file))
    assert (status, out) == (2, "")
    assert "--trust-pickle" in err


def test_names_layers_in_float_units(run: Run) -> None:
    status, out, _ = run("Tied")
    assert status == 0
    assert "in float units: 'one': its weight is also read by 'two'" in out
    assert "one.weight" not in out


@pytest.mark.parametrize(("suffix", "begins"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_plots(run: Run, tmp_path: Path, suffix: str, begins: bytes) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / f"ratios.{suffix}"
    status, out, err = run("Net", "--plot", str(file))
    assert (status, err) == (0, "")
    assert "int8+QAS is" in out  # the table is printed too
    assert file.read_bytes().startswith(begins)
    assert list(tmp_path.iterdir()) == [file]


def test_the_picture_has_names(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "ratios.svg"
    assert run("Net", "--plot", str(file), "--json")[0] == 0
    drawn = file.read_text()
    for text in ("int8 + QAS", "fp32", "Net on unit normal 32x3x8x8", "weight, bias, weight"):
        assert f"<!-- {text}" in drawn or text in drawn


def test_the_random_state_stays(run: Run) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert run("Net")[0] == 0
    assert torch.equal(torch.get_rng_state(), before)


REFUSALS = {
    "no file": ("Net", ("--data", "gone.pt"), "there is no calibration file 'gone.pt'"),
    "a directory": ("Net", ("--data", "."), "there is no calibration file '.'"),
    "no tensor": ("Net", ("--data", "text.pt"), "cannot read calibration data from 'text.pt'"),
    "a number": ("Net", ("--data", "number.pt"), "holds a int"),
    "channels": ("Net", ("--data", "two.pt"), "of shape (6, 2, 8, 8) does not fit the model"),
    "no batch": ("Net", ("--data", "single.pt"), "of shape (3, 8, 8) does not fit the model"),
    "bytes": ("Net", ("--data", "bytes.pt"), "is uint8; give what the model is given, float32"),
    "empty": ("Net", ("--data", "empty.pt"), "the calibration data, empty.pt, is empty"),
    "infinite": ("Net", ("--data", "broken.pt"), "is not finite"),
    "misnamed": ("Net", ("--data", "misnamed.pt"), "the model takes x"),
    "labels": ("Net", ("--data", "far.pt"), "the labels are from 1 to 4 and the model has 4 classes"),
    "granularity": ("Net", ("--granularity", "row"), "'row' is not one of 'channel', 'tensor'"),
    "granularity twice": (
        "Net", ("-p", "fake_quantize{calibration=x.pt,fold=auto}", "--granularity", "channel"),
        "Net is quantised already; leave granularity out",
    ),
    "not folded": (
        "Net", ("-p", "fake_quantize{calibration=x.pt}"), "run fold_conv_bn (fold_scaled_ws) first"
    ),
    "no layers": ("Doubled", (), "has no layer in quantised units; it has none to quantise"),
    "no floats": ("Best", (), "Best has no floating output, so that nothing has a gradient"),
    "half": ("Net", ("--dtype", "float16"), "too coarse to simulate integers in"),
    "no model": ("Nothing", (), "has no callable 'Nothing'"),
    "pass": ("Net", ("-p", "nonsense"), "unknown pass 'nonsense'; there are "),
    "option of a pass": ("Net", ("-p", "fake_quantize{qas=maybe}"), "qas"),
    "suffix": ("Net", ("--plot", "ratios.pdf"), "the name ends in .svg or .png"),
    "place": ("Net", ("--plot", "no/ratios.svg"), "name a file in a directory that exists"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_name_the_thing_and_leave_nothing(
    run: Run, place: Path, tmp_path: Path, case: str
) -> None:
    model, arguments, message = REFUSALS[case]
    before = sorted(place.iterdir())
    plot = () if "--plot" in arguments else ("--plot", str(tmp_path / "ratios.svg"))
    status, out, err = run(model, *arguments, *plot)
    assert (status, out) == (2, ""), err
    assert message in err
    assert "Traceback" not in err
    # click says how a command is used, and a pass what it does not know and where
    assert case in ("granularity", "pass", "option of a pass") or err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    assert sorted(p for p in place.iterdir() if p.name != "__pycache__") == [
        p for p in before if p.name != "__pycache__"
    ]


@pytest.mark.parametrize("arguments", [("--plot", "no/ratios.svg"), ("-p", "quantise")])
def test_is_refused_before_any_work(
    run: Run, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setattr("fxopt.zoo.load_model", lambda *_, **__: pytest.fail("work was done"))
    assert run("Net", *arguments)[0] == 2


# findings of the review that are not fixed yet


def test_a_missing_file_is_refused_before_any_work(run: Run, monkeypatch: Any) -> None:
    monkeypatch.setattr("fxopt.zoo.load_model", lambda *_, **__: pytest.fail("work was done"))
    assert run("Net", "--data", "gone.pt")[0] == 2


def test_a_file_of_one_number_is_refused(run: Run) -> None:
    status, _, err = run("Net", "--data", "scalar.pt")
    assert status == 2
    assert "scalar.pt" in err


def test_a_pair_of_inputs_and_labels_is_taken_or_explained(run: Run) -> None:
    status, out, err = run("Net", "--data", "pair.pt")
    assert "the data's labels" in out if status == 0 else "label" in err
