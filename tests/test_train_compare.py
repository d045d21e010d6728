"""``tools/train_compare.py``: equal budgets, each run once, judged on images it has not seen."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import fashion
import train_compare
import tuning
from small_nets import NETS, drop_norms, seeded_net
from train_compare import RUNS
from trials import Cell, Method, Outcome, Run, carry_out
from tuning import Budget

TRAINING, TEST = 48, 20


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random images in the files of Fashion-MNIST; the first pixel of an image is its number."""
    folder = tmp_path_factory.mktemp("fashion")
    generator = np.random.default_rng(0)
    for part, count in (("train", TRAINING), ("t10k", TEST)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        images[:, 0, 0] = range(count)
        labels = generator.integers(0, 10, count, dtype=np.uint8)
        _write(folder / f"{part}-images-idx3-ubyte.gz", 16, images)
        _write(folder / f"{part}-labels-idx1-ubyte.gz", 8, labels)
    return folder


def _write(file: Path, header: int, values: np.ndarray[Any, Any]) -> None:
    file.write_bytes(gzip.compress(b"\xff" * header + values.tobytes()))


def run(method: Method = "bn", **changes: Any) -> Run:
    gain = 0.0 if method in ("nf", "published") else None
    given = Run("mobile", 4, method, 3, "final", lr=0.01, clip=None, skip_gain=gain, seed=1)
    return replace(given, **changes)


def compared(folder: Path, results: Path, cells: list[Cell], budget: Budget) -> dict[Run, Outcome]:
    outcomes = RUNS.read(results)
    with ThreadPoolExecutor(1) as pool:
        train_compare.compare(cells, budget, outcomes, results, folder, pool, jobs=1)
    return outcomes


def invoked(*arguments: str | Path) -> Result:
    return CliRunner().invoke(train_compare.main, [str(each) for each in arguments])


# ---- a run -------------------------------------------------------------------------------------


def test_held_out_images_are_none_that_are_trained_on(folder: Path) -> None:
    data = fashion.fashion(folder)
    training, held_out = (
        set(part.images[:, 0, 0, 0].tolist()) for part in (data.training, data.held_out)
    )
    assert held_out == set(range(44, 48))
    assert training == set(range(44))
    assert data.test.images.shape == (TEST, 1, 28, 28)
    assert len(data.test.labels) == TEST


@pytest.mark.parametrize(("net", "method"), [("preact", "nf"), ("mobile", "bn")])
def test_run_is_decided_by_its_fields(net: str, method: Method, folder: Path) -> None:
    first = carry_out(run(method, net=net), folder)
    torch.rand(3)
    again = carry_out(run(method, net=net), folder)
    assert replace(again, seconds=first.seconds) == first
    assert first.steps_done == 3


def test_loss_that_is_not_finite_ends_the_run(folder: Path) -> None:
    diverged = carry_out(run("none", net="preact", lr=1e30, steps=9), folder)
    assert 0 < diverged.steps_done < 9
    assert 0 <= diverged.accuracy <= 1


@pytest.mark.parametrize("net", NETS)
def test_net_without_norms_has_biases_for_them(net: str) -> None:
    bare = seeded_net(net, 0)
    drop_norms(bare)
    kinds = {type(module) for module in bare.modules()}
    assert torch.nn.Identity in kinds
    assert torch.nn.BatchNorm2d not in kinds
    convs = [module for module in bare.modules() if isinstance(module, torch.nn.Conv2d)]
    assert all(conv.bias is not None for conv in convs)
    assert bare(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


# ---- which run is next -------------------------------------------------------------------------


def test_search_goes_on_as_if_it_had_not_been_stopped() -> None:
    pytest.importorskip("optuna")
    cell, budget = run("nf").cell, Budget(trials=6, seeds=1)
    outcomes: dict[Run, Outcome] = {}
    while tuning.winner(cell, outcomes, budget) is None:
        following = tuning.next_run(cell, outcomes, budget)
        assert following is not None
        assert following == tuning.next_run(cell, dict(outcomes), budget)
        outcomes[following] = Outcome(-abs(following.lr - 0.01), 3, 1.0, 100)
    low, high = tuning.LEARNING_RATES[4]
    assert len(outcomes) == 6
    assert all(low <= each.lr <= high for each in outcomes)
    assert all(each.skip_gain in tuning.SKIP_GAINS for each in outcomes)
    assert tuning.winner(cell, outcomes, budget) == max(
        outcomes, key=lambda r: outcomes[r].accuracy
    )


def test_published_waits_for_the_learning_rate_of_bn() -> None:
    cell, budget = run("published").cell, Budget(trials=2, seeds=2)
    trials = [run("bn", role="search", lr=lr, seed=0) for lr in (0.01, 0.02)]
    outcomes = {trials[0]: Outcome(0.5, 3, 1.0, 100)}
    assert tuning.next_run(cell, outcomes, budget) is None
    assert tuning.runs_left(cell, outcomes, budget) == 2
    outcomes[trials[1]] = Outcome(0.6, 3, 1.0, 100)
    assert tuning.next_run(cell, outcomes, budget) == run("published", lr=0.02, clip=0.01)


# ---- the command -------------------------------------------------------------------------------


def test_stopped_comparison_goes_on_and_does_nothing_twice(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    results, budget = tmp_path / "made" / "runs.jsonl", Budget(trials=1, seeds=1)
    cells = [replace(run(method).cell, steps=2) for method in train_compare.METHODS]
    outcomes = compared(folder, results, cells, budget)
    lines = results.read_text().splitlines()
    assert len(lines) == len(outcomes) == 3 + 4
    roles = [(each.method, each.role, each.seed) for each in outcomes]
    assert roles[:2] == [("bn", "search", 0), ("bn", "final", 1)]
    lrs = {each.method: each.lr for each in outcomes}
    assert lrs["published"] == lrs["bn"]

    results.write_text("\n".join([*lines[:-1], lines[-1][:40]]))  # killed while it wrote
    assert compared(folder, results, cells, budget).keys() == outcomes.keys()
    assert len(results.read_text().splitlines()) == len(lines)
    compared(folder, results, cells, budget)
    assert len(results.read_text().splitlines()) == len(lines)


def test_command_trains_in_processes_and_prints_the_table(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    file = tmp_path / "runs.jsonl"
    chosen = ("--net", "mobile", "--batch", "4", "--method", "bn", "--steps", "2", "--trials", "1",
              "--seeds", "2", "--results", file)  # fmt: skip
    trained = invoked(*chosen, "--data", folder)
    assert trained.exit_code == 0, trained.output
    assert len(file.read_text().splitlines()) == 3
    row = next(line for line in trained.stdout.splitlines() if line.startswith("mobile"))
    assert row.split()[:5] == ["mobile", "4", "bn", "1", "of"]
    printed = invoked(*chosen, "--table", "--markdown")
    assert [cell.strip() for cell in printed.stdout.splitlines()[2].split("|")][1:4] == [
        "mobile",
        "4",
        "bn",
    ]
    assert "35,826" in printed.stdout


def test_table_of_a_winner_and_of_a_search_that_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    won = run("nf", role="search", seed=0)
    begun = replace(won, method="none", skip_gain=None)
    lines = [
        RUNS.line(won, Outcome(0.875, 3, 0.06, 1234)),
        RUNS.line(begun, Outcome(0.5, 3, 0.06, 1234)),
        *(RUNS.line(each, Outcome(accuracy, 3, 0.06, 1234))
          for each, accuracy in zip(tuning.finals(won, Budget(1, 2)), (0.75, 0.25), strict=True)),
    ]  # fmt: skip
    file.write_text("\n".join([*lines, ""]))
    common = (
        "--table",
        "--markdown",
        "--net",
        "mobile",
        "--batch",
        "4",
        "--steps",
        "3",
        "--results",
        file,
    )
    finished = invoked(*common, "--method", "nf", "--trials", "1", "--seeds", "2")
    cells = [cell.strip() for cell in finished.stdout.splitlines()[2].split("|")[1:-1]]
    assert cells == [
        "mobile",
        "4",
        "nf",
        "1 of 1",
        "0.01",
        "off",
        "0.0",
        "0.8750",
        "0.5000",
        "0.7500 0.2500",
        "1,234",
        "20.0",
    ]
    unfinished = invoked(*common, "--method", "none")
    cells = [cell.strip() for cell in unfinished.stdout.splitlines()[2].split("|")[1:-1]]
    assert cells == ["mobile", "4", "none", "1 of 12"]


def test_lines_of_another_recipe_count_for_nothing(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    line = RUNS.line(run(), Outcome(0.5, 3, 1.0, 100))
    file.write_text(
        line + "\n" + json.dumps(json.loads(line) | {"recipe": "another", "seed": 2}) + "\n"
    )
    assert list(RUNS.read(file)) == [run()]


@pytest.mark.parametrize("content", [b'{"important": 1}', b"\xff\xfe\n", b"text\n"])
def test_files_of_others_stay(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "other.json"
    file.write_bytes(content)
    for use in (RUNS.read, RUNS.opened):
        if use == RUNS.opened and content.endswith(b"\n"):
            continue
        with pytest.raises(click.UsageError, match="no run"):
            use(file)
    assert file.read_bytes() == content


# ---- refusals ----------------------------------------------------------------------------------


def test_refuses_a_folder_without_the_images(tmp_path: Path) -> None:
    refused = invoked("--data", tmp_path / "nowhere", "--results", tmp_path / "runs.jsonl")
    assert refused.exit_code == 2
    assert (
        "has no train-images-idx3-ubyte.gz; Debian's package dataset-fashion-mnist"
        in refused.stderr
    )
    assert not (tmp_path / "runs.jsonl").exists()


def test_refuses_published_without_bn(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    refused = invoked(
        "--data", folder, "--results", tmp_path / "runs.jsonl", "--method", "published"
    )
    assert refused.exit_code == 2
    assert "published takes the learning rate of bn: add --method bn" in refused.stderr


def test_refuses_a_file_of_something_else(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    file.write_text('{"accuracy": 1}\n')
    refused = invoked("--table", "--results", file)
    assert refused.exit_code == 2
    assert "line 1 of" in refused.stderr
    assert "is no run" in refused.stderr


def test_missing_optuna_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(click.UsageError, match="pip install optuna"):
        tuning.require_optuna()
