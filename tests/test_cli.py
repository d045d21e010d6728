"""The command line: results on stdout, the rest on stderr, and every refusal with its status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch

from fxopt import cli
from fxopt.cli_options import BROKEN_PIPE

MODELS = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return torch.relu(self.norm(self.stem(x)))


class Masked(nn.Module):
    def forward(self, image, mask):
        return image * mask


class Seen(nn.Module):
    example_input_array = torch.zeros(1, 2, 5, 5)

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3)

    def forward(self, x):
        return self.conv(x)


def boom():
    raise ValueError("no width")


def nothing():
    return None
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def net(tmp_path: Path) -> str:
    (tmp_path / "nets.py").write_text(MODELS)
    return f"{tmp_path / 'nets.py'}"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line here: ``(exit status, stdout, stderr)``."""

    def call(*arguments: str) -> tuple[int, str, str]:
        status = cli.main(arguments)
        out, err = capsys.readouterr()
        return status, out, err

    return call


def fxopt(*arguments: str, shell: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line as a process, its stdout piped into ``shell``."""
    program = f"{sys.executable} -c 'import sys; from fxopt.cli import main; sys.exit(main())' "
    command = f"set -o pipefail; {program} {' '.join(arguments)} {shell}"
    return subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from fxopt.cli import main; status = main(['--help']); "
        "print(status, [m for m in ('torch', 'numpy', 'tqdm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Commands:" in done.stdout
    assert done.stdout.splitlines()[-1] == "0 []"


def test_version(run: Run) -> None:
    status, out, _ = run("--version")
    assert status == 0
    assert out.startswith("fxopt, version ")


def test_lists_passes(run: Run) -> None:
    status, out, err = run("passes")
    assert (status, err) == (0, "")
    assert any(line.startswith("fold_conv_bn  Fold BatchNorms") for line in out.splitlines())


def test_lists_options_with_types_and_defaults() -> None:
    @dataclass(frozen=True)
    class Example:
        """Do something.

        At length.
        """

        name: ClassVar[str] = "example"
        bits: int = 8
        side: Literal["left", "right"] = "left"

    assert cli._pass_help("example", Example).splitlines() == [
        "example  Do something.",
        "    bits: int = 8",
        "    side: left|right = left",
    ]


def test_reports(run: Run, net: str) -> None:
    status, out, err = run("report", f"{net}:Net", "--input", "2x3x9x8")
    assert (status, err) == (0, "")
    assert "2x4x7x6" in out
    assert "\x1b" not in out


def test_reports_in_json(run: Run, net: str) -> None:
    status, out, err = run("report", f"{net}:Net", "--input", "2x3x9x8", "--json")
    assert (status, err) == (0, "")
    document = json.loads(out)
    assert document["input_shapes"] == {"x": [2, 3, 9, 8]}
    assert document["totals"]["macs"] == 2 * 4 * 7 * 6 * 27


def test_reports_by_module(run: Run, net: str) -> None:
    arguments = ("report", f"{net}:Net", "--input", "2x3x9x8", "--group-by", "module")
    status, out, err = run(*arguments)
    assert (status, err) == (0, "")
    assert "Net (own forward)" in out
    document = json.loads(run(*arguments, "--depth", "2", "--json")[1])
    assert document["module_depth"] == 2
    assert [row["path"] for row in document["modules"]] == ["stem", "norm", ""]


def test_reports_in_markdown(run: Run, net: str) -> None:
    status, out, err = run("report", f"{net}:Net", "--input", "2x3x9x8", "--markdown")
    assert (status, err) == (0, "")
    assert out.startswith("## Net, x 2x3x9x8 float32\n\n### Operators\n\n| operator")


def test_takes_inputs_by_name_and_dtype(run: Run, net: str) -> None:
    arguments = ("--input", "1x3x4x4", "--input", "mask=1x1x4x4:int64", "--dtype", "float64")
    status, out, _ = run("report", f"{net}:Masked", *arguments, "--json")
    assert status == 0
    assert json.loads(out)["input_dtypes"] == {"image": "float64", "mask": "int64"}


def test_takes_the_inputs_that_the_model_names(run: Run, net: str) -> None:
    status, out, err = run("report", f"{net}:Seen", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["input_shapes"] == {"x": [1, 2, 5, 5]}


def test_says_what_it_assumed(run: Run, net: str) -> None:
    status, _, err = run("report", f"{net}:Net")
    assert status == 0
    assert err.startswith("fxopt: warning: ")
    assert "(1, 3, 224, 224)" in err
    assert len(err.splitlines()) == 1


def test_transforms(run: Run, net: str) -> None:
    arguments = ("-p", "fold_conv_bn", "--input", "1x3x9x8")
    status, out, err = run("transform", f"{net}:Net", *arguments)
    assert (status, err) == (0, "")
    assert ": 1 site rewritten, 0 declined" in out
    assert "verified in float64" in out
    assert "BatchNorms left in the graph: 0" in out
    _, out, _ = run("transform", f"{net}:Net", *arguments, "--no-verify")
    assert "verified: no (switched off)" in out


def test_transforms_by_module_in_markdown(run: Run, net: str, tmp_path: Path) -> None:
    arguments = ("-p", "fold_conv_bn", "--input", "1x3x9x8", "--no-verify")
    shown = ("--group-by", "module", "--markdown", "--onnx", str(tmp_path / "net.onnx"))
    status, out, err = run("transform", f"{net}:Net", *arguments, *shown)
    assert (status, err) == (0, "")
    assert "### Change by module" in out
    assert "changed: 1 of 3 modules" in out
    assert "```\nONNX: " in out
    assert out.endswith("\n```\n")


def test_transforms_and_writes_onnx(run: Run, net: str, tmp_path: Path) -> None:
    file = tmp_path / "net.onnx"
    arguments = ("-p", "fold_conv_bn", "--input", "1x3x9x8", "--onnx", str(file))
    status, out, err = run("transform", f"{net}:Net", *arguments)
    assert (status, err) == (0, "")
    assert "onnxruntime against torch" in out
    assert file.is_file()
    status, out, err = run("transform", f"{net}:Net", *arguments, "--json")
    assert (status, err) == (0, "")
    document = json.loads(out)
    assert document["passes"][0]["rewritten"] == 1
    assert document["passes"][0]["verification"]["dtype"] == "float64"
    assert all(d["error"] <= d["bound"] for d in document["onnx"]["deviations"])


def test_exports(run: Run, net: str, tmp_path: Path) -> None:
    file = tmp_path / "net.onnx"
    arguments = (f"{net}:Net", str(file), "--input", "1x3x9x8")
    status, out, err = run("export", *arguments)
    assert (status, err) == (0, "")
    assert "any batch size" in out
    plain = file.stat().st_size
    status, out, _ = run("export", *arguments, "-p", "fold_conv_bn", "--no-verify")
    assert status == 0
    assert "verification is off" in out
    assert 0 < file.stat().st_size <= plain


def test_saves_a_program_that_is_a_model_again(run: Run, net: str, tmp_path: Path) -> None:
    file = str(tmp_path / "net.pt2")
    arguments = ("-p", "fold_conv_bn", "--input", "1x3x9x8", "--save", file)
    status, out, err = run("transform", f"{net}:Net", *arguments)
    assert (status, err) == (0, "")
    assert "any batch size, evaluation only" in out
    status, out, _ = run("transform", f"{net}:Net", *arguments, "--json")
    assert json.loads(out)["pt2"]["inputs"] == {"x": ["batch", 3, 9, 8]}
    status, out, err = run("report", file)
    assert (status, err) == (0, "")
    assert "Net, x 1x3x9x8 float32" in out
    assert "evaluation only: " in out


def test_loads_a_pickle_only_if_told(run: Run, tmp_path: Path) -> None:
    file = str(tmp_path / "net.pt")
    torch.save(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)), file)
    status, out, err = run("report", file, *SMALL)
    assert (status, out) == (2, "")
    assert "give --trust-pickle" in err
    assert run("report", file, *SMALL, "--trust-pickle")[0] == 0


def test_the_seed_and_the_weights_decide(run: Run, net: str, tmp_path: Path) -> None:
    from fxopt.zoo import load_model

    written = []
    torch.save(load_model(f"{net}:Net", seed=5).state_dict(), tmp_path / "w.pt")
    for options in (("--seed", "5"), ("--weights", str(tmp_path / "w.pt")), ("--seed", "6")):
        file = tmp_path / "net.onnx"
        arguments = (f"{net}:Net", str(file), "--input", "1x3x9x8", "--no-verify")
        assert run("export", *arguments, *options)[0] == 0
        written.append(file.read_bytes())
    assert written[0] == written[1] != written[2]


SMALL = ("--input", "1x3x9x8")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("report", "torchvision:resnet81"), "torchvision has no model 'resnet81'; did you mean"),
        (("report", "resnet18"), "cannot read the model 'resnet18'"),
        (("report", "{net}:Nets"), "has no callable 'Nets'; callables there: Masked, Net, "),
        (("report", "{net}:boom"), "boom() raised ValueError: no width (nets.py:"),
        (("report", "{net}:nothing"), "gives None, not an nn.Module"),
        (("report", "{net}:Net", "--input", "3x9"), "'stem' (Conv2d)"),
        (("report", "{net}:Net", "--input", "1x5x9x8"), "'stem' (Conv2d)"),
        (("report", "{net}:Net", "--input", "1x3xx8"), "cannot read the input '1x3xx8'"),
        (("report", "{net}:Net", "--input", "1x3:f4"), "unknown dtype 'f4'"),
        (("report", "{net}:Net", *SMALL, "--input", "y=1"), "unexpected keyword argument 'y'"),
        (("report", "{net}:Net", *SMALL, "--weights", "no.pt"), "no weights file 'no.pt'"),
        (
            ("report", "{net}:Net", "--weights", "{w}"),
            "1 missing (norm.bias); 1 unexpected (e",
        ),
        (("transform", "{net}:Net", "-p", "fold_conv_nb"), "unknown pass 'fold_conv_nb'"),
        (("transform", "{net}:Net", "-p", "fold_conv_bn{x=1}"), "has no option 'x'"),
        (("report", "no_such_package:Net"), "there is no Python module 'no_such_package'"),
        (("report", "no.pt2"), "there is no file 'no.pt2'"),
        (("report", "{w}"), "holds a state_dict, which has no code; name the model"),
        (
            ("transform", "{net}:Net", "-p", "fold_conv_bn", "--save", "no/net.pt2"),
            "cannot write 'no/net.pt2': No such file",
        ),
        (
            ("transform", "{net}:Net", "-p", "fold_conv_bn", "--save", "net.pt"),
            "cannot write 'net.pt': torch.export's files end in .pt2",
        ),
        (("export", "{net}:Net", "no/net.onnx"), "cannot write 'no/net.onnx': No such file"),
        (("export", "{net}:Net", "/"), "cannot write '/': it is a directory"),
        (
            ("transform", "{net}:Net", "-p", "fold_conv_bn", "--onnx", "no/net.onnx"),
            "cannot write 'no/net.onnx': No such file",
        ),
    ],
)
def test_refuses_with_one_message_and_status_2(
    run: Run, net: str, tmp_path: Path, arguments: tuple[str, ...], reason: str
) -> None:
    from fxopt.zoo import load_model

    state = load_model(f"{net}:Net").state_dict()
    state["extra"] = state.pop("norm.bias")
    torch.save(state, tmp_path / "w.pt")
    filled = [
        part.replace("{net}", net).replace("{w}", str(tmp_path / "w.pt")) for part in arguments
    ]
    status, out, err = run(*filled)
    assert (status, out) == (2, "")
    first, *rest = err.splitlines()
    assert first.startswith("fxopt: error: ")
    assert reason in first
    # A pipeline spec is shown again, with a mark under the character that is wrong.
    assert not rest or rest[-1].strip() == "^"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("frobnicate",), "No such command 'frobnicate'"),
        (("report",), "Missing argument 'MODEL'"),
        (("report", "m", "--colour"), "No such option"),
        (("report", "m", "--dtype", "int3"), "Invalid value for '--dtype': 'int3' is not one of"),
        (("report", "m", "--seed", "x"), "Invalid value for '--seed'"),
        (("transform", "m"), "Missing option '-p'"),
        (("report", "m", "--depth", "2"), "--depth is for --group-by module"),
        (("report", "m", "--group-by", "module", "--depth", "0"), "0 is not in the range x>=1"),
        (("report", "m", "--group-by", "kind"), "'kind' is not 'module'"),
        (("report", "m", "--json", "--markdown"), "--json and --markdown exclude each other"),
        (
            ("transform", "m", "-p", "x", "--json", "--markdown"),
            "--json and --markdown exclude each other",
        ),
    ],
)
def test_refuses_wrong_usage_with_status_2(
    run: Run, arguments: tuple[str, ...], reason: str
) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert reason in err
    assert "Traceback" not in err


def test_a_wrong_answer_has_status_1(
    run: Run, net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fxopt.errors import ExportMismatchError

    def departs(*_: object, **__: object) -> None:
        raise ExportMismatchError("output 'y' departs")

    monkeypatch.setattr("fxopt.export.export_onnx", departs)
    status, out, err = run("export", f"{net}:Net", str(tmp_path / "net.onnx"), *SMALL)
    assert (status, out, err) == (1, "", "fxopt: error: output 'y' departs\n")


def test_a_bug_of_ours_has_status_70_and_a_traceback_if_asked(
    run: Run, net: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr(sys.modules["fxopt.report"], "report", fails)
    status, out, err = run("report", f"{net}:Net", *SMALL)
    assert (status, out) == (70, "")
    assert err.startswith("fxopt: this is a bug in fxopt: KeyError: 'lost'")
    assert len(err.splitlines()) == 1
    monkeypatch.setenv("FXOPT_TRACEBACK", "1")
    _, _, err = run("report", f"{net}:Net", *SMALL)
    assert "Traceback" in err
    assert "in fails" in err


def test_interruption_has_status_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fxopt.pipeline.available_passes", interrupted)
    assert run("passes")[0] == 130


def test_works_in_a_pipe(net: str) -> None:
    done = fxopt("report", f"{net}:Net", *SMALL, "--json", shell="| python3 -m json.tool")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["model"] == "Net"


def test_a_reader_that_stops_early_is_no_error(net: str) -> None:
    done = fxopt("report", f"{net}:Net", *SMALL, shell="| true", NO_COLOR="1")
    assert done.returncode in (0, BROKEN_PIPE)
    assert done.stderr == ""
