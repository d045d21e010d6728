"""Passes of other packages: found by entry point, and harmless where they are broken."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from installed import install, install_project
from torch import nn

import fxopt
from fxopt import cli
from fxopt.errors import PipelineSpecError
from fxopt.pipeline import available_passes, broken_passes, parse_pipeline

PASS = """
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxopt.passes import FoldConvBn


@dataclass(frozen=True)
class Mine(FoldConvBn):
    name: ClassVar[str] = "{name}"
    {option}


class NoDataclass:
    name = "plain"


@dataclass(frozen=True)
class NoRewrite:
    name: ClassVar[str] = "half"
    preserves: ClassVar[str] = "values"
    sites: ClassVar[None] = None


function = print
"""


def source(name: str = "mine", option: str = "pass") -> str:
    return PASS.format(name=name, option=option)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of installed packages, whose modules are forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(
            sys.modules[name].__file__
        ):
            del sys.modules[name]


def test_runs_a_pass_of_an_installed_package(site: Path) -> None:
    install_project(site)
    assert broken_passes() == ()
    assert list(available_passes()) == sorted(available_passes())
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ReLU())
    done = fxopt.transform(model, "relu_once{limit=9}", torch.randn(2, 3, 5, 5))
    (record,) = fxopt.history(done)
    assert (record.name, record.options, len(record.rewritten)) == ("relu_once", {"limit": 9}, 1)
    assert sum(node.op == "call_module" for node in done.graph.nodes) == 2


def test_lists_it_with_its_options(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install_project(site)
    assert cli.main(["passes"]) == 0
    out = capsys.readouterr().out
    assert "relu_once  Remove a ReLU whose input is a ReLU's.\n    limit: int = 100" in out
    assert "note:" not in out


@pytest.mark.parametrize(
    ("name", "value", "text", "reason"),
    [
        ("mine", "gone_module:Mine", "", "'gone_module:Mine' does not load (ModuleNotFoundError: "),
        ("mine", "a_pass:Absent", source(), "'a_pass:Absent' does not load (AttributeError: "),
        ("mine", "a_pass:Mine", "raise SystemExit(3)", "does not load (SystemExit: 3)"),
        ("mine", "a_pass:function", source(), "is no pass: a pass is a frozen dataclass"),
        ("plain", "a_pass:NoDataclass", source(), "is no pass: a pass is a frozen dataclass"),
        ("half", "a_pass:NoRewrite", source(), "is no pass: it has no 'rewrite'"),
        ("yours", "a_pass:Mine", source(), "calls itself 'mine'; give the entry point that name"),
        (
            "mine",
            "a_pass:Mine",
            source(option="sizes: Nowhere = None"),
            "has an option of a type that has no text form",
        ),
        (
            "fold_conv_bn",
            "a_pass:Mine",
            source("fold_conv_bn"),
            "'fxopt' itself and 'a-package' have a pass of that name; rename the latter's",
        ),
    ],
)
def test_a_broken_pass_is_told_and_hinders_no_other(
    site: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: str,
    text: str,
    reason: str,
) -> None:
    install(site, "a-package", {name: value}, a_pass=text)
    install_project(site)
    (broken,) = broken_passes()
    assert (broken.name, broken.source) == (name, "'a-package'")
    assert reason in broken.reason
    assert {"fold_conv_bn", "relu_once"} <= set(available_passes())
    assert available_passes()["fold_conv_bn"] is fxopt.passes.FoldConvBn  # type: ignore[attr-defined]
    assert cli.main(["passes"]) == 0
    assert f"note: pass '{name}' of 'a-package' cannot be used: " in capsys.readouterr().out


def test_asking_for_a_broken_pass_says_why(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(site, "a-package", {"mine": "gone_module:Mine"})
    with pytest.raises(PipelineSpecError, match="pass 'mine' of 'a-package' cannot be used: 'gone"):
        parse_pipeline("mine")
    assert cli.main(["transform", "m.py:x", "-p", "mine"]) == 2
    assert "pass 'mine' of 'a-package' cannot be used" in capsys.readouterr().err


def test_of_two_packages_with_one_name_neither_has_it(site: Path) -> None:
    install(site, "a-package", {"mine": "a_pass:Mine"}, a_pass=source())
    install(site, "b-package", {"mine": "b_pass:Mine"}, b_pass=source())
    assert "mine" not in available_passes()
    reasons = {broken.source: broken.reason for broken in broken_passes()}
    assert set(reasons) == {"'a-package'", "'b-package'"}
    assert reasons["'a-package'"] == (
        "'a-package' and 'b-package' announce it both; uninstall one, or give transform() an instance"
    )


def test_a_package_that_is_seen_twice_is_one(
    site: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = tmp_path_factory.mktemp("again")
    monkeypatch.syspath_prepend(str(again))
    install_project(site)
    install_project(again)
    assert broken_passes() == ()
    assert "relu_once" in available_passes()
