"""Drawn plans: files that appear whole, with the names that fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from seeded import ConvBn, image, seeded
from test_cli import Run, net, run  # noqa: F401  (fixtures)
from torch import nn

import fxopt
from fxopt import ExportError, plan_memory
from fxopt.plot import plot_plans

pytest.importorskip("matplotlib")


@pytest.mark.parametrize(("suffix", "begins"), [(".svg", b"<?xml"), (".png", b"\x89PNG")])
def test_writes(tmp_path: Path, suffix: str, begins: bytes) -> None:
    path = tmp_path / f"plan{suffix}"
    plot_plans(path, {"net": plan_memory(seeded(ConvBn()), image())})
    assert path.read_bytes().startswith(begins)
    assert list(tmp_path.iterdir()) == [path]


def test_has_names_totals_and_both_plans(tmp_path: Path, run: Run, net: str) -> None:  # noqa: F811
    path = tmp_path / "plan.svg"
    arguments = ("--input", "1x3x8x12", "--preset", "pytorch", "-p", "fold_conv_bn")
    status, _, _ = run("memory", f"{net}:Net", *arguments, "--plot", str(path))
    drawn = path.read_text()
    assert status == 0
    for text in ("before: peak", "after: peak", "arena", "step", "address, KiB", "<!-- stem -->"):
        assert text in drawn


def test_many_tensors(tmp_path: Path) -> None:
    model = nn.Sequential(*[layer for _ in range(250) for layer in (nn.Conv2d(3, 3, 1), nn.ReLU())])
    plan = plan_memory(fxopt.capture(model.eval(), image(), verify=False), preset="pytorch")
    plot_plans(tmp_path / "many.svg", {"many": plan})
    assert len(plan.lifetimes) > 500


def test_refuses(tmp_path: Path, run: Run, net: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    for path, message in (
        (tmp_path / "plan.pdf", "ends in .svg or .png"),
        (tmp_path / "no" / "plan.svg", "name a file in a directory that exists"),
    ):
        status, out, err = run("memory", f"{net}:Net", "--input", "1x3x8x12", "--plot", str(path))
        assert (status, out) == (2, "")
        assert message in err
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ExportError, match=r"pip install 'fxopt\[plot\]'"):
        plot_plans(tmp_path / "plan.svg", {})


def test_no_operators(tmp_path: Path) -> None:
    plan = plan_memory(nn.Identity(), image())
    plot_plans(tmp_path / "plan.png", {"nothing": plan})
