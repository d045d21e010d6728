"""``tools/zoo_sweep.py``: it finishes, resumes, stops what takes too long, and tells."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("timm")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from sweep import compare, page  # noqa: E402
from sweep.selection import choose  # noqa: E402


def sweep(directory: Path, *arguments: str) -> tuple[str, list[dict[str, Any]]]:
    out = directory / "records.jsonl"
    command = [sys.executable, str(ROOT / "tools" / "zoo_sweep.py"), *arguments, "--out", str(out)]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [json.loads(line) for line in out.read_text().splitlines()]


def test_sweep_of_one_model_resumes_and_writes_the_page(tmp_path: Path) -> None:
    models = (
        "torchvision:shufflenet_v2_x0_5",
        "torchvision:ssdlite320_mobilenet_v3_large",
        "--onnx",
    )
    text, records = sweep(tmp_path, *models, "--markdown", "coverage.md")
    by_model = {record["model"]: record for record in records}
    found = by_model["torchvision:shufflenet_v2_x0_5"]
    assert found["stage"] == "done"
    assert found["input"] == [[1, 3, 32, 32]]
    assert [found[key] for key in ("eval", "batch", "train", "export_eval", "fx_eval")] == [0.0] * 5
    assert found["norms_left"] == 0
    assert found["passes"][0]["error"] < 1e-12
    assert found["onnx"] < 1e-5
    refused = by_model["torchvision:ssdlite320_mobilenet_v3_large"]
    assert refused["refused"].startswith("CaptureError: SSD cannot be captured: ")
    assert re.search(r"captured +1/2", text)
    assert "| torchvision classification |" in (tmp_path / "coverage.md").read_text()

    _, again = sweep(tmp_path, *models)
    assert again == records


def test_model_over_the_limit_is_stopped_and_told(tmp_path: Path) -> None:
    text, records = sweep(tmp_path, "torchvision:shufflenet_v2_x0_5", "--limit", "0.01")
    assert records[0]["timeout"] == 0.01
    assert "torchvision:shufflenet_v2_x0_5: stopped after 0 s" in text


def test_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(SystemExit, match="no model matches 'torchvision:nosuch\\*'"):
        choose(["torchvision:nosuch*"])


def test_failures_are_told_by_name_with_their_reason() -> None:
    wrong = {"model": "a", "family": "f", "stage": "done", "capture_s": 1.0, "eval_only": "",
             "eval": 0.5, "batch": "fails: RuntimeError: no"}  # fmt: skip
    crashed = {"model": "b", "family": "f", "stage": "capture", "crashed": "KeyError: 'x'"}
    text = page.summary([wrong, crashed])
    assert "a: eval: 0.5" in text
    assert "a: other batch: fails: RuntimeError: no" in text
    assert "b: crashed in capture: KeyError: 'x'" in text


def test_no_evidence_is_not_an_error_of_zero() -> None:
    import torch

    zero, one = torch.zeros(3), torch.ones(3)
    assert compare.tensor_error(zero, zero) != compare.tensor_error(zero, zero)  # NaN
    assert compare.tensor_error(one, zero) == 1.0
    assert compare.tensor_error(zero, one) == float("inf")
    assert compare.tensor_error(one, one * float("nan")) == float("inf")
    assert compare.error([one, 2], (one, 2)) == float("inf")
    assert compare.named_error({"a": one}, {}) == float("inf")
