"""``tools/train_qas.py``: each run once, all methods from the same weights, judged on unseen images."""

from __future__ import annotations

import gzip
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import fashion
import qas_base
import qas_plot
import qas_trials
import qas_tuning
import train_qas
from qas_base import Base
from qas_trials import Cell, Method, Outcome, Run, carry_out, model_of, new_classes
from train_qas import RUNS

from fxopt.quantized_layers import QuantizedLayer

TRAINING, TEST, BASE_STEPS = 120, 20, 2


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random images in the files of Fashion-MNIST, of each class as many."""
    folder = tmp_path_factory.mktemp("fashion")
    generator = np.random.default_rng(0)
    for part, count in (("train", TRAINING), ("t10k", TEST)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        _write(folder / f"{part}-images-idx3-ubyte.gz", 16, images)
        _write(folder / f"{part}-labels-idx1-ubyte.gz", 8, labels)
    return folder


def _write(file: Path, header: int, values: np.ndarray[Any, Any]) -> None:
    file.write_bytes(gzip.compress(b"\xff" * header + values.tobytes()))


@pytest.fixture(scope="module")
def base(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Base:
    made = Base(folder, tmp_path_factory.mktemp("base") / "net.pt", BASE_STEPS)
    made.make()
    return made


def cell(method: Method = "qas") -> Cell:
    granularity: qas_trials.Granularity = "" if method == "fp32" else "channel"
    return Cell("momentum", granularity, method, 2, 4, BASE_STEPS)


def run(method: Method = "qas", **changes: Any) -> Run:
    return replace(Run(**asdict(cell(method)), role="search", lr=0.01, seed=0), **changes)


def invoked(*arguments: str | Path) -> Result:
    return CliRunner().invoke(train_qas.main, [str(each) for each in arguments])


def cells_of(line: str) -> list[str]:
    return [each.strip() for each in line.split("|")[1:-1]]


# ---- the base net ------------------------------------------------------------------------------


def test_classes_that_are_new_are_none_that_the_base_net_knows(folder: Path) -> None:
    assert sorted(qas_base.OLD_CLASSES + qas_base.NEW_CLASSES) == list(range(10))
    data = fashion.fashion(folder).test
    new = new_classes(folder).test
    assert len(new.labels) == TEST // 2
    assert sorted(set(new.labels.tolist())) == [0, 1, 2, 3, 4]
    place = data.labels.tolist().index(qas_base.NEW_CLASSES[3])
    assert torch.equal(new.images[new.labels == 3][0], data.images[place])


def test_base_net_is_made_once(base: Base) -> None:
    before = base.file.stat().st_mtime_ns
    base.make()
    assert base.file.stat().st_mtime_ns == before
    assert sum(each.numel() for each in base.load().parameters()) <= 50_000


def test_base_net_of_other_steps_is_refused(base: Base) -> None:
    with pytest.raises(click.UsageError, match="is another one; move it away"):
        replace(base, steps=3).make()


def test_base_net_of_other_images_is_refused(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fashion.fashion(base.folder)
    inverted = fashion.Labelled(255 - whole.training.images, whole.training.labels)
    monkeypatch.setattr(qas_base, "fashion", lambda _: replace(whole, training=inverted))
    with pytest.raises(click.UsageError, match="is another one; move it away"):
        base.load()


# ---- a run -------------------------------------------------------------------------------------


def test_all_methods_begin_from_the_same_weights_and_head(base: Base) -> None:
    training = new_classes(base.folder).training
    models = {
        method: model_of(run(method, seed=3), base.load(), training) for method in train_qas.METHODS
    }
    plain = dict(models["fp32"].named_modules())
    for method in ("int8", "qas", "real_nearest", "real_stochastic"):
        layers = [
            (path, layer)
            for path, layer in models[method].named_modules()
            if isinstance(layer, QuantizedLayer)
        ]
        assert len(layers) == 20
        for path, layer in layers:
            known: Any = plain[path]
            off = (layer.quantized_weight() - known.weight).abs().amax((1, 2, 3))
            assert bool((off <= 0.51 * layer.weight_scale).all())
        head: Any = models[method].get_submodule("14")
        plain_head: Any = plain["14"]
        assert torch.equal(head.weight, plain_head.weight)
        assert torch.equal(head.bias, plain_head.bias)


def test_head_is_drawn_from_the_seed(base: Base) -> None:
    layers: list[Any] = [qas_base.with_new_head(base.load(), seed)[-1] for seed in (1, 1, 2)]
    heads = [layer.weight for layer in layers]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize("method", ["fp32", "qas", "real_stochastic"])
def test_run_is_decided_by_its_fields(method: Method, base: Base) -> None:
    first = carry_out(run(method), base)
    torch.rand(3)
    again = carry_out(run(method), base)
    assert replace(again, seconds=first.seconds) == first
    assert first.steps_done == 2
    assert first.onnx_accuracy is None


def test_search_is_judged_on_held_out_images_and_the_final_on_test_images(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[int] = []
    monkeypatch.setattr(qas_trials, "accuracy", lambda _, data: judged.append(len(data.labels)))
    for role in ("search", "final"):
        carry_out(run("fp32", role=role), base)
    data = new_classes(base.folder)
    assert judged == [len(data.held_out.labels), len(data.test.labels)] == [5, 10]


def test_final_is_judged_in_onnxruntime_too(base: Base) -> None:
    outcome = carry_out(run(role="final"), base)
    assert outcome.onnx_accuracy is not None
    assert abs(outcome.onnx_accuracy - outcome.accuracy) <= 0.2  # an image or two of ten


def test_loss_that_is_not_finite_counts_as_nothing_right(base: Base) -> None:
    diverged = carry_out(run("fp32", lr=1e38, steps=9), base)
    assert diverged.accuracy == 0
    assert 0 < diverged.steps_done < 9


def test_weights_that_are_not_finite_after_the_last_step_count_as_nothing_right(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ruined(model: torch.nn.Module, *rest: Any) -> int:
        next(model.parameters()).data.fill_(torch.inf)
        return 2

    monkeypatch.setattr(qas_trials, "fit", ruined)
    assert carry_out(run("fp32"), base).accuracy == 0


@pytest.mark.parametrize("name", train_qas.OPTIMIZERS)
def test_every_optimizer_moves_all_tensors(name: qas_trials.OptimizerName, base: Base) -> None:
    pytest.importorskip("timm")
    model = model_of(run("fp32"), base.load(), new_classes(base.folder).training)
    before = [each.detach().clone() for each in model.parameters()]
    optimizer = qas_trials.optimizer_of(name, model, 0.1)
    for each in model.parameters():
        each.grad = torch.ones_like(each)
    optimizer.step()
    assert not any(map(torch.equal, before, model.parameters()))


def test_lars_steps_are_as_long_as_the_tensors(base: Base) -> None:
    pytest.importorskip("timm")
    model = torch.nn.ParameterList(torch.tensor([value]) for value in (1.0, 4.0))
    optimizer = qas_trials.optimizer_of("lars", model, 1.0)
    for each in model.parameters():
        each.grad = torch.full_like(each, 1e3)
    optimizer.step()
    values = [each.item() for each in model.parameters()]
    assert values == pytest.approx([0.999, 3.996], abs=1e-6)  # timm's trust coefficient is 0.001


# ---- which run is next -------------------------------------------------------------------------


def test_winner_is_trained_anew_with_seeds_of_its_own() -> None:
    outcomes: dict[Run, Outcome] = {}
    assert qas_tuning.runs_left(cell(), outcomes, 3) == len(qas_tuning.LEARNING_RATES) + 3
    while (following := qas_tuning.next_run(cell(), outcomes, 3)) is not None:
        outcomes[following] = Outcome(-abs(following.lr - 0.1), 2, 1.0, None)
    finals = [each for each in outcomes if each.role == "final"]
    assert [(each.lr, each.seed) for each in finals] == [(0.1, 1), (0.1, 2), (0.1, 3)]
    assert [each.lr for each in outcomes if each.role == "search"] == [*qas_tuning.LEARNING_RATES]
    assert qas_tuning.runs_left(cell(), outcomes, 3) == 0


def test_outside_of_the_main_comparison_the_winner_has_one_seed() -> None:
    others: list[dict[str, Any]] = [
        {"optimizer": "adam"},
        {"granularity": "tensor"},
        {"method": "real_nearest"},
    ]
    for changes in others:
        assert len(qas_tuning.finals(run(**changes), 3)) == 1
    for method in ("fp32", "int8", "qas"):
        assert len(qas_tuning.finals(run(method), 3)) == 3


# ---- the command -------------------------------------------------------------------------------


def test_stopped_comparison_goes_on_and_does_nothing_twice(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qas_tuning, "LEARNING_RATES", (0.01, 0.1))
    monkeypatch.setattr(qas_trials, "onnx_accuracy", lambda *_: 0.5)
    results = tmp_path / "made" / "runs.jsonl"
    cells = [cell("fp32"), cell("qas")]

    def compared() -> dict[Run, Outcome]:
        outcomes = RUNS.read(results)
        with ThreadPoolExecutor(1) as pool:
            train_qas.compare(cells, 1, outcomes, results, base, pool, jobs=1)
        return outcomes

    outcomes = compared()
    lines = results.read_text().splitlines()
    assert len(lines) == len(outcomes) == 2 * 3
    roles = [(each.method, each.role, each.seed) for each in outcomes]
    assert roles[:3] == [("fp32", "search", 0), ("fp32", "search", 0), ("fp32", "final", 1)]
    onnx = {
        (each.method, each.role) for each in outcomes if outcomes[each].onnx_accuracy is not None
    }
    assert onnx == {("qas", "final")}

    results.write_text("\n".join([*lines[:-1], lines[-1][:40]]))  # killed while it wrote
    assert compared().keys() == outcomes.keys()
    assert len(results.read_text().splitlines()) == len(lines)
    compared()
    assert len(results.read_text().splitlines()) == len(lines)


def test_command_makes_the_net_trains_in_processes_and_prints_the_table(
    folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "made" / "runs.jsonl"
    chosen = ("--optimizer", "sgd", "--method", "fp32", "--steps", "1", "--batch", "4",
              "--base-steps", "1", "--results", file)  # fmt: skip
    trained = invoked(*chosen, "--data", folder)
    assert trained.exit_code == 0, trained.output
    trials = len(qas_tuning.LEARNING_RATES)
    assert len(file.read_text().splitlines()) == trials + 1
    assert file.with_suffix(".pt").exists()
    row = next(line for line in trained.stdout.splitlines() if line.startswith("sgd"))
    assert row.split()[:5] == ["sgd", "fp32", str(trials), "of", str(trials)]


@pytest.fixture
def searched(tmp_path: Path) -> Path:
    """A file with a search for fp32 and its finals, and one for int8 that goes on."""
    file = tmp_path / "runs.jsonl"
    whole, begun = run("fp32"), run("int8")
    trials = [replace(whole, lr=lr) for lr in qas_tuning.LEARNING_RATES]
    won = trials[2]
    scores = {each: Outcome(0.875 if each == won else 0.5, 2, 0.04, None) for each in trials}
    scores[replace(begun, lr=qas_tuning.LEARNING_RATES[0])] = Outcome(0.5, 2, 0.04, None)
    for each, accuracy in zip(qas_tuning.finals(won, 2), (0.75, 0.25), strict=True):
        scores[each] = Outcome(accuracy, 2, 0.04, accuracy + 0.125)
    file.write_text("".join(RUNS.line(each, scores[each]) + "\n" for each in scores))
    return file


COMMON = ("--table", "--optimizer", "momentum", "--granularity", "channel", "--steps", "2",
          "--batch", "4", "--base-steps", str(BASE_STEPS), "--seeds", "2")  # fmt: skip


def test_table_of_a_winner_and_of_a_search_that_goes_on(searched: Path) -> None:
    printed = invoked(
        *COMMON, "--method", "fp32", "--method", "int8", "--markdown", "--results", searched
    )
    trials, lr = len(qas_tuning.LEARNING_RATES), qas_tuning.LEARNING_RATES[2]
    rows = [cells_of(line) for line in printed.stdout.splitlines()[2:]]
    assert rows[0] == [
        "momentum",
        "",
        "fp32",
        f"{trials} of {trials}",
        f"{lr:g}",
        "0.8750",
        "0.5000",
        "0.7500 0.2500",
        "0.6250",
        "20.0",
    ]
    assert rows[1][:4] == ["momentum", "channel", "int8", f"1 of {trials}"]
    assert set(rows[1][4:]) == {""}


def test_real_int8_is_compared_in_one_way_only(tmp_path: Path) -> None:
    printed = invoked("--table", "--markdown", "--results", tmp_path / "none.jsonl")
    ways = [tuple(cells_of(line)[:3]) for line in printed.stdout.splitlines()[2:]]
    assert len(ways) == len(set(ways)) == 4 * (1 + 2 * 2) + 2
    assert ways[:3] == [
        ("momentum", "", "fp32"),
        *(("momentum", "channel", m) for m in ("int8", "qas")),
    ]
    real = [way for way in ways if way[2].startswith("real")]
    assert {way[:2] for way in real} == {("momentum", "channel")}


@pytest.mark.parametrize("ending", [".svg", ".png"])
def test_searches_are_drawn(searched: Path, tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / f"picture{ending}"
    drawn = invoked(*COMMON, "--results", searched, "--plot", picture)
    assert drawn.exit_code == 0, drawn.output
    assert picture.stat().st_size > 1000


def test_panels_have_a_line_a_method_with_the_accuracies_by_learning_rate(
    searched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    figures: list[Any] = []
    monkeypatch.setattr(qas_plot, "save_figure", lambda figure, _: figures.append(figure))
    cells = [cell("fp32"), cell("int8"), replace(cell("int8"), granularity="tensor")]
    qas_plot.plot_searches(searched.with_suffix(".svg"), cells, RUNS.read(searched))
    upper, lower = figures[0].axes
    assert [axes.get_title() for axes in (upper, lower)] == [
        "momentum, per channel",
        "momentum, per tensor",
    ]
    lines = {line.get_label(): line for line in upper.lines}
    assert list(lines) == ["fp32", "int8"]
    assert list(lines["fp32"].get_xdata()) == [*qas_tuning.LEARNING_RATES]
    assert max(lines["fp32"].get_ydata()) == 0.875
    assert len(lines["int8"].get_xdata()) == 1
    assert upper.get_xscale() == "log"


# ---- refusals ----------------------------------------------------------------------------------


def test_refuses_a_folder_without_the_images(tmp_path: Path) -> None:
    refused = invoked("--data", tmp_path / "nowhere", "--results", tmp_path / "runs.jsonl")
    assert refused.exit_code == 2
    assert "has no train-images-idx3-ubyte.gz" in refused.stderr
    assert list(tmp_path.iterdir()) == []


def test_refuses_a_plot_of_another_format_before_training(tmp_path: Path) -> None:
    refused = invoked("--plot", tmp_path / "picture.txt", "--results", tmp_path / "runs.jsonl")
    assert refused.exit_code == 1
    assert "the name ends in .svg or .png" in refused.stderr
    assert list(tmp_path.iterdir()) == []


def test_refuses_a_file_of_something_else(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    file.write_text('{"accuracy": 1}\n')
    refused = invoked("--table", "--results", file)
    assert refused.exit_code == 2
    assert "is no run" in refused.stderr


def test_missing_timm_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.optim.lars", None)
    with pytest.raises(click.UsageError, match="pip install timm"):
        qas_trials.require_lars()
