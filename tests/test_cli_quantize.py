"""``fxopt quantize``: pictures and options in, tables and a file out, and every refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from seeded import seeded
from torch import nn

from fxopt import cli
from fxopt.quantize_report import QUANTIZE_SCHEMA

Image = pytest.importorskip("PIL.Image")

MODELS = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, channels=3, classes=4):
        super().__init__()
        self.stem = nn.Conv2d(channels, 6, 3, stride=2)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, classes)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.stem(x))).mean((2, 3)))


class Seg(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, x):
        return {"out": self.conv(x)}


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, image, mask):
        return self.conv(image) * mask


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)

    def forward(self, input):
        return self.conv(input).mean((2, 3))


class Best(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3)).argmax(1)


def grey():
    return Net(1, 3)


def timms():
    net = Net()
    net.pretrained_cfg = {
        "input_size": (3, 16, 16), "crop_pct": 0.8, "interpolation": "bicubic",
        "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5),
    }
    return net


def boom():
    raise ValueError("no width")
"""

SIZES = ("--resize", "18", "--crop", "16", "--mean", ".5", "--std", ".25,.5,.5")
Run = Callable[..., tuple[int, str, str]]


def draw(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    Image.fromarray(drawn).resize((24, 20), Image.Resampling.BICUBIC).save(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, pictures with labels in names, in folders and without, and arrays."""
    folder = tmp_path_factory.mktemp("quantize")
    (folder / "nets.py").write_text(MODELS)
    for index in range(4):
        draw(folder / "named" / f"dog_{index}.png", index)
        draw(folder / "folders" / f"{'cat' if index % 2 else 'dog'}" / f"{index}.png", index)
        draw(folder / "plain" / f"photo{index}.jpg", index)
        draw(folder / "far" / f"cat_{index + 280}.jpg", index)
    rng = np.random.default_rng(0)
    grey = rng.normal(size=(6, 1, 28, 28)).astype(np.float32)
    np.savez(folder / "grey.npz", x=grey, y=np.array([0, 1, 2, 0, 1, 2]))
    np.savez(folder / "colour.npz", x=rng.normal(size=(4, 3, 16, 16)))
    np.savez(folder / "larger.npz", x=rng.normal(size=(4, 3, 20, 20)))
    np.savez(folder / "two.npz", x=rng.normal(size=(4, 2, 16, 16)))
    np.savez(folder / "bytes.npz", x=rng.integers(0, 255, (4, 3, 16, 16)))
    np.savez(folder / "other.npz", images=grey)
    (folder / "broken").mkdir()
    (folder / "broken" / "a_1.png").write_bytes(b"no picture")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], place: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs ``fxopt quantize`` with pictures and models by name: ``(exit status, stdout, stderr)``."""
    monkeypatch.chdir(place)

    def call(model: str, *arguments: str) -> tuple[int, str, str]:
        status = cli.main(["quantize", model if ":" in model else f"nets.py:{model}", *arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return call


def test_tells_losses_sizes_and_agreement_and_writes_the_file(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "net.onnx"
    status, out, err = run("Net", "--calibration", "named", *SIZES, "--onnx", str(file))
    assert (status, err) == (0, "")
    assert out.startswith("Net in int8: observer ")
    for words in ("tensor", "SQNR", "head", "bytes in float", "in int8 (", f"ONNX: {file}",
                  "operators by themselves", "4 pictures in onnxruntime: top-1 agreement with float",
                  "top-1 accuracy: ", "torch float32 against float64: ",
                  "judged on the pictures that calibrated it"):  # fmt: skip
        assert words in out
    assert list(tmp_path.iterdir()) == [file]
    session = onnxruntime.InferenceSession(file)
    assert session.run(None, {"x": np.zeros((3, 3, 16, 16), np.float32)})[0].shape == (3, 4)


def test_json_is_one_document(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "net.onnx"
    arguments = ("--calibration", "named", "--test", "folders", *SIZES, "--json")
    status, out, err = run("Net", *arguments, "--onnx", str(file), "--activation-type", "int8")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert list(found) == ["schema", "model", "pass", "judged", "onnx", "executors", "notes"]
    assert (found["schema"], found["model"]) == (QUANTIZE_SCHEMA, "Net")
    assert found["onnx"]["integers"]["activation_type"] == "int8"
    assert found["onnx"]["bytes"] == file.stat().st_size
    assert found["notes"] == []
    evidence = found["pass"]["evidence"]
    assert evidence["weight_bytes"]["before"] > evidence["weight_bytes"]["after"]
    assert set(evidence["tensors"][0]) == {
        "node", "where", "range", "scale", "zero_point", "clipped", "sqnr_db"
    }  # fmt: skip
    assert set(found["judged"]) == {"pictures", "runtime", "sqnr_db", "agreement", "top1", "top5"}
    assert (found["judged"]["pictures"], found["judged"]["runtime"]) == (4, "onnxruntime")
    assert set(found["executors"][0]) == {"output", "sqnr_db", "own_sqnr_db", "top1", "own_top1"}
    kinds = {each.data_type for each in onnx.load(file).graph.initializer if not each.dims}
    assert onnx.TensorProto.UINT8 not in kinds


def test_options_reach_the_pass(run: Run) -> None:
    status, out, err = run(
        "Net", "--calibration", "plain", *SIZES, "--interpolation", "nearest", "--json", "--observer",
        "minmax", "--granularity", "tensor", "--weight-bits", "5", "--activation-bits", "6",
        "--skip", "head", "--no-verify",
    )  # fmt: skip
    assert (status, err) == (0, "")
    found = json.loads(out)
    options = found["pass"]["options"]
    assert [options[n] for n in ("observer", "granularity", "weight_bits", "activation_bits")] == [
        "minmax", "tensor", 5, 6
    ]  # fmt: skip
    assert [each["reason"] for each in found["pass"]["declined"]] == ["it is of skip=head"]
    assert found["onnx"] is None
    assert found["executors"] == []
    assert found["judged"]["runtime"] == "torch"
    assert found["judged"]["top1"] is None
    assert any("no labels" in note for note in found["notes"])


def test_labels_beyond_the_classes_are_not_used(run: Run) -> None:
    status, out, _ = run("Net", "--calibration", "far", *SIZES)
    assert status == 0
    assert "the labels are from 280 to 283 and the model has 4 classes: not used" in out
    assert "accuracy" not in out.replace("no accuracy", "")


def test_a_grey_model_from_arrays_with_weights(run: Run, place: Path, tmp_path: Path) -> None:
    from fxopt.zoo import load_model

    net = nn.Module()
    net.stem, net.norm, net.head = nn.Conv2d(1, 6, 3, stride=2), nn.BatchNorm2d(6), nn.Linear(6, 3)
    weights = tmp_path / "weights.pt"
    torch.save(seeded(net, seed=5).state_dict(), weights)
    x = np.load(place / "grey.npz")["x"]
    best = load_model(f"{place / 'nets.py'}:grey", weights=weights)(torch.tensor(x)).argmax(1)
    np.savez(tmp_path / "grey.npz", x=x, y=best.numpy())  # the model in float is always right
    file = tmp_path / "grey.onnx"
    arguments = ("--calibration", str(tmp_path / "grey.npz"), "--weights", str(weights), "--json")
    status, out, err = run("grey", *arguments, "--weight-bits", "2", "--onnx", str(file))
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["onnx"]["inputs"] == {"x": ["batch", 1, 28, 28]}
    logits = onnxruntime.InferenceSession(file).run(None, {"x": x})[0]
    right = float((logits.argmax(1) == best.numpy()).mean())
    judged = found["judged"]
    assert judged["pictures"] == 6
    assert judged["agreement"] == pytest.approx(right)
    assert judged["top1"] == [1.0, pytest.approx(right)]


def test_the_models_own_preprocessing_is_the_default(run: Run, tmp_path: Path) -> None:
    first, second = tmp_path / "a.onnx", tmp_path / "b.onnx"
    plain = ("--calibration", "named", "--no-verify", "--onnx")
    given = ("--resize", "20", "--crop", "16", "--mean", ".5", "--std", ".5,.5,.5")
    assert run("timms", *plain, str(first))[0] == 0
    assert run("Net", *plain, str(second), *given, "--interpolation", "bicubic")[0] == 0
    assert first.read_bytes() == second.read_bytes()


def test_input_says_the_size(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "net.onnx"
    given = ("--input", "1x3x12x16", "--onnx", str(file), "--json")
    status, out, _ = run("Net", "--calibration", "named", *given)
    assert status == 0
    assert json.loads(out)["onnx"]["inputs"] == {"x": ["batch", 3, 12, 16]}


def test_a_segmentation_net_is_not_judged_by_class(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "seg.onnx"
    arguments = ("--calibration", "plain", "--resize", "16", "--crop", "12x16", "--onnx", str(file))
    status, out, err = run("Seg", *arguments)
    assert (status, err) == (0, "")
    assert "the first output is no table of classes" in out
    assert "output output_out: batch x 2 x 12 x 16" in out
    assert "onnxruntime against torch on the pictures, output_out:" in out


@pytest.mark.parametrize("model", ["Named", "Best"])
def test_odd_names_and_outputs(run: Run, tmp_path: Path, model: str) -> None:
    """An input called ``input``; an output of class numbers alone."""
    file = tmp_path / "net.onnx"
    status, _, err = run(model, "--calibration", "named", *SIZES, "--onnx", str(file))
    assert (status, err) == (0, "")
    assert file.exists()


def test_a_wrong_file_is_a_mismatch(run: Run, tmp_path: Path, monkeypatch: Any) -> None:
    from fxopt import onnx_write

    def wrongly(*arguments: Any) -> None:
        onnx_write.write_onnx(*arguments)
        model = onnx.load(arguments[-1])
        for each in model.graph.initializer:
            if each.name == "stem_written.weight":
                each.raw_data = bytes(reversed(each.raw_data))
        onnx.save(model, arguments[-1])

    monkeypatch.setattr("fxopt.export.write_onnx", wrongly)
    file = tmp_path / "net.onnx"
    status, out, err = run("Net", "--calibration", "named", *SIZES, "--onnx", str(file))
    assert (status, out) == (1, "")
    assert err.startswith("fxopt: ") or "departs from torch by" in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


REFUSALS = {
    "no calibration": ("Net", (), "--calibration"),
    "no such place": ("Net", ("--calibration", "nowhere"), "there is no 'nowhere'"),
    "no pictures": ("Net", ("--calibration", "empty"), "there are no pictures in 'empty'"),
    "no picture": ("Net", ("--calibration", "broken", *SIZES), "broken/a_1.png"),
    "not an npz": ("Net", ("--calibration", "nets.py"), "neither a directory nor an .npz"),
    "no array x": ("Net", ("--calibration", "other.npz"), "has no array x; it has images"),
    "bytes": ("Net", ("--calibration", "bytes.npz"), "is used as it is"),
    "other channels": ("Net", ("--calibration", "two.npz"), "to have 3 channels"),
    "mask": ("Masked", ("--calibration", "named", *SIZES), "mask"),
    "no model": ("Nothing", ("--calibration", "named"), "Nothing"),
    "model that raises": ("boom", ("--calibration", "named"), "no width"),
    "no weights": ("Net", ("--calibration", "named", "--weights", "no.pt"), "no.pt"),
    "observer": ("Net", ("--calibration", "named", "--observer", "best"), "observer is minmax or"),
    "granularity": ("Net", ("--calibration", "named", "--granularity", "row"), "granularity"),
    "bits": ("Net", ("--calibration", "named", "--weight-bits", "9"), "weight_bits is from 2 to 8"),
    "no bits": ("Net", ("--calibration", "named", "--activation-bits", "1"), "activation_bits is"),
    "skip": ("Net", ("--calibration", "named", *SIZES, "--skip", "tail"), "no operator is at 'tail'"),
    "mean": ("Net", ("--calibration", "named", "--mean", "half"), "'half' is no number"),
    "means": ("Net", ("--calibration", "named", "--mean", "1,2"), "the mean has 2 values"),
    "std": ("Net", ("--calibration", "named", "--std", "0"), "must be above 0"),
    "crop": ("Net", ("--calibration", "named", "--crop", "2x2x2"), "is no size"),
    "superscript": ("Net", ("--calibration", "named", "--crop", "²"), "is no size"),
    "crop beyond": ("Net", ("--calibration", "named", "--resize", "8", "--crop", "9"), "larger than"),
    "resize": ("Net", ("--calibration", "named", "--resize", "0"), "--resize"),
    "interpolation": ("Net", ("--calibration", "named", "--interpolation", "cubic"), "unknown inter"),
    "two inputs": ("Net", ("--calibration", "named", "--input", "1x3x8x8", "--input", "1x3"), "--input"),
    "input": ("Net", ("--calibration", "named", "--input", "3x8x8"), "NxCxHxW"),
    "channels": ("Net", ("--calibration", "named", "--input", "1x4x8x8"), "4 channels"),
    "type": ("Net", ("--calibration", "named", "--activation-type", "int16"), "int16"),
    "half": ("Net", ("--calibration", "colour.npz", "--dtype", "float16"), "float"),
    "double": ("Net", ("--calibration", "colour.npz", "--dtype", "float64"), "float"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_name_the_thing_and_leave_nothing(run: Run, tmp_path: Path, case: str) -> None:
    model, arguments, message = REFUSALS[case]
    file = tmp_path / "net.onnx"
    status, out, err = run(model, *arguments, "--onnx", str(file))
    assert (status, out) == (2, ""), err
    assert message in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["missing/net.onnx", "."])
def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    run: Run, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxopt.zoo.load_model", lambda *_, **__: pytest.fail("work was done"))
    status, _, err = run("Net", "--calibration", "named", "--onnx", str(tmp_path / where))
    assert status == 2
    assert "cannot write" in err


@pytest.mark.parametrize("test", ["broken", "two.npz", "larger.npz"])
def test_pictures_to_judge_on_are_looked_at_first(run: Run, tmp_path: Path, test: str) -> None:
    file = tmp_path / "net.onnx"
    status, out, err = run(
        "Net", "--calibration", "colour.npz", "--test", test, "--onnx", str(file)
    )
    assert (status, out) == (2, "")
    assert test in err
    assert list(tmp_path.iterdir()) == []
