"""``fxopt patch``: the report, its JSON, the files that it writes, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cli import Run, run  # noqa: F401  (a fixture)

NET = """
from torch import nn


def make():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 24, 1), nn.ReLU(), nn.Conv2d(24, 8, 3, 2, 1)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
    )
"""
SHAPE = ("--input", "1x3x32x48")
INT8 = ("--bytes-per-element", "1", "--input-streamed")


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(NET)
    return f"{tmp_path / 'net.py'}:make"


def test_the_report(run: Run, model: str) -> None:  # noqa: F811
    status, out, _ = run("patch", model, *SHAPE, *INT8, "--until", "3", "--grid", "2x3")
    assert status == 0
    # before: 8 + 24 maps of 16 x 24; a tile of the 24 has 9 x 9 positions at most
    for line in (
        "Sequential, memory model tinyengine, elements 1 B each, input streamed",
        "from 'input_1' to '3' on 2x3 tiles (rows 4, 4; columns 4, 4, 4)",
        "peak   12,288 B (12.0 KiB) -> 3,360 B (3.3 KiB), 3.66 times less",
    ):
        assert line in out
    assert "equal  float64, largest error" in out
    assert [row.split() for row in out.splitlines() if row.startswith("3.0 ")] == [
        ["3.0", "16x24", "9x9", "1x1", "1.15"]
    ]


def test_the_report_as_json(run: Run, model: str) -> None:  # noqa: F811
    status, out, _ = run("patch", model, *SHAPE, *INT8, "--json")
    document = json.loads(out)
    assert status == 0
    assert document["schema"] == "fxopt.patch/1"
    assert document["before"]["peak_bytes"] == 12288
    choice = document["choice"]
    assert choice in document["front"]
    assert choice["overhead"] <= 0.15
    peaks = [each["peak_bytes"] for each in document["front"]]
    overheads = [each["overhead"] for each in document["front"]]
    assert peaks == sorted(peaks, reverse=True)
    assert overheads == sorted(overheads)
    (region,) = choice["regions"]
    assert (region["start"], region["until"], region["halo"]) == ("input_1", "3", "recompute")
    assert region["grid"] == [len(region["rows"]), len(region["cols"])]
    assert (region["rows"][-1][1], region["cols"][-1][1]) == (8, 12)


def test_a_budget(run: Run, model: str) -> None:  # noqa: F811
    status, out, _ = run("patch", model, *SHAPE, *INT8, "--sram", "4KiB", "--json")
    document = json.loads(out)
    assert status == 0
    fitting = [each for each in document["front"] if each["peak_bytes"] <= 4096]
    assert document["choice"] == fitting[0]
    status, out, _ = run("patch", model, *SHAPE, *INT8, "--sram", "1MB")
    assert status == 0
    assert "not patched: the network fits as it is: its peak is 12,288 bytes" in out
    status, out, _ = run("patch", model, *SHAPE, *INT8, "--max-overhead", "0")
    assert status == 0 if "tiles" in out else status == 1


def test_files(run: Run, model: str, tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("onnxruntime")
    pytest.importorskip("matplotlib")
    onnx, plot = tmp_path / "net.onnx", tmp_path / "net.svg"
    given = ("--grid", "2x2", "--onnx", str(onnx), "--plot", str(plot), "--json")
    status, out, _ = run("patch", model, *SHAPE, *given)
    assert status == 0
    assert json.loads(out)["onnx"]["dynamic_batch"] is True
    assert onnx.stat().st_size > 0
    assert plot.read_text().startswith("<?xml")


def test_memory_of_a_patched_net_is_executed(run: Run, model: str) -> None:  # noqa: F811
    spec = "patch_execution{until=3,grid=3x2}"
    status, out, _ = run("memory", model, *SHAPE, "-p", "fold_conv_bn", "-p", spec, "--execute")
    assert status == 0
    assert "outputs equal (bit for bit" in out


def test_transform_says_what_was_chosen(run: Run, model: str) -> None:  # noqa: F811
    status, out, _ = run("transform", model, *SHAPE, "-p", "patch_execution{until=3,grid=3x2}")
    assert status == 0
    assert "patch_execution{until=3,grid=3x2,preset=tinyengine}: 1 site rewritten" in out
    assert "choice: peak_bytes " in out
    assert "front: 1 (in the JSON)" in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--grid", "9x"), "'9x' is no grid; write ROWSxCOLUMNS, 4x4 say"),
        (("--grid", "9x2", "--until", "3"), "grid 9x2 does not cut a map of 8x12 at '3'"),
        (("--until", "4"), "'AdaptiveAvgPool2d' is not known to work on a neighbourhood"),
        (("--until", "nowhere"), "until 'nowhere' names no module"),
        (("--sram", "1kB"), "no patching fits into 1,000 bytes: the least that is reached"),
        (("--sram", "lots"), "lots"),
        (("--sram", "9kB", "--max-overhead", "0.1"), "give sram or max_overhead, not both"),
        (("--max-overhead", "-1"), "max-overhead"),
        (("--preset", "nope"), "no preset is called 'nope'"),
        (("--halo", "cache"), "recompute"),
        (("--onnx", "/nowhere/net.onnx"), "cannot write '/nowhere/net.onnx'"),
        (("--plot", "net.txt"), "the name ends in .svg or .png"),
    ],
)
def test_refusals(run: Run, model: str, options: tuple[str, ...], said: str) -> None:  # noqa: F811
    status, out, err = run("patch", model, *SHAPE, *INT8, *options)
    assert (status, out) == (2, "")
    assert said in err
    assert "Traceback" not in err
