"""``fxopt memory`` and ``fxopt schedule``: results, statuses and refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import Run, net, run  # noqa: F401  (fixtures)

GRAPH = {
    "nodes": [
        {"id": "i", "output_bytes": 1},
        {"id": "b", "output_bytes": 8},
        {"id": "a", "output_bytes": 64},
        {"id": "s", "output_bytes": 1},
        {"id": "o", "output_bytes": 1},
    ],
    "edges": [
        {"source": source, "target": target} for source, target in ["ib", "ia", "as", "bo", "so"]
    ],
}
SHAPE = ("--input", "1x3x8x12")


@pytest.fixture
def model(net: str) -> str:  # noqa: F811
    return f"{net}:Net"


@pytest.fixture
def graph(tmp_path: Path) -> str:
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(GRAPH))
    return str(path)


def test_memory_states_its_conventions(run: Run, model: str) -> None:  # noqa: F811
    status, out, _ = run("memory", model, *SHAPE)
    assert status == 0
    header = out.splitlines()[2]
    assert header == "memory model: tinyengine; elements in the model's own dtype; input resident"
    for word in ("peak", "arena", "weights, in flash", "block", "stem", "hint: int8"):
        assert word in out


def test_memory_as_json(run: Run, model: str) -> None:  # noqa: F811
    status, out, _ = run("memory", model, *SHAPE, "--json", "--bytes-per-element", "1")
    document = json.loads(out)
    assert status == 0
    # 3 x 8 x 12 in, 4 x 6 x 10 out
    assert document["peak_bytes"] == document["arena"]["size_bytes"] == 288 + 240
    assert document["optimal"]
    assert document["order"][0] == "x"


def test_memory_options_are_the_model_s_fields(run: Run, model: str) -> None:  # noqa: F811
    def peak(*options: str) -> int:
        result: int = json.loads(run("memory", model, *SHAPE, "--json", *options)[1])["peak_bytes"]
        return result

    resident = 4 * (288 + 240)
    assert peak() == peak("--preset", "tflm") == resident
    assert peak("--input-streamed") == 4 * 240
    assert peak("--preset", "pytorch") == resident
    assert peak("--no-fuse-epilogues", "--no-inplace-elementwise") == resident
    assert peak("--no-fuse-epilogues", "--no-inplace-elementwise", "--input-streamed") == 4 * 480
    assert peak("--preset", "tflm", "--order", "program", "--alignment", "64") == resident


def test_memory_after_passes(run: Run, model: str) -> None:  # noqa: F811
    status, out, _ = run(
        "memory", model, *SHAPE, "-p", "fold_conv_bn", "--preset", "pytorch", "--json"
    )
    assert status == 0
    assert "norm" not in json.loads(out)["order"]


@pytest.mark.parametrize(("size", "status"), [("3KiB", 0), ("2112", 0), ("2111", 1), ("1kB", 1)])
def test_memory_says_whether_it_fits(run: Run, model: str, size: str, status: int) -> None:  # noqa: F811
    found, out, _ = run("memory", model, *SHAPE, "--sram", size)
    assert found == status
    if status:
        assert f"does not fit into {1000 if size == '1kB' else 2111:,} B" in out
        assert "no order can meet it: 'stem' needs 2,112 bytes in any order" in out
    else:
        assert "fits into" in out
    found, out, _ = run("memory", model, *SHAPE, "--sram", size, "--json")
    assert found == status
    assert json.loads(out)["sram"]["fits"] is (status == 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sram", "12potato"), "'12potato' is no size"),
        (("--sram", "0"), "'0' is no whole number of bytes above 0"),
        (("--preset", "esp32"), "'esp32' is not one of 'tflm', 'tinyengine'"),
        (("--bytes-per-element", "0"), "0 is not in the range x>=1"),
        (("--alignment", "0"), "0 is not in the range x>=1"),
        (("--order", "best"), "'best' is not one of 'optimal', 'program'"),
        (("--time-limit", "-1"), "-1.0 is not in the range x>0"),
        (("-p", "no_such_pass"), "no_such_pass"),
        (("--preset", "tflm", "--inplace-depthwise-scratch"), "set both or neither"),
    ],
)
def test_memory_refuses(run: Run, model: str, options: tuple[str, ...], message: str) -> None:  # noqa: F811
    status, out, err = run("memory", model, *SHAPE, *options)
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize("preset", ["tflm", "tinyengine_exact", "pytorch"])
def test_memory_executes(run: Run, model: str, preset: str) -> None:  # noqa: F811
    options = ("--preset", preset, "--execute", "-p", "fold_conv_bn")
    status, out, _ = run("memory", model, *SHAPE, *options)
    assert status == 0
    assert "executed in one buffer of 2,112 B: outputs equal (bit for bit" in out
    document = json.loads(run("memory", model, *SHAPE, *options, "--json")[1])
    assert document["execution"]["equal"] is True
    assert document["execution"]["departs"] is None
    assert document["execution"]["size_bytes"] == document["arena"]["size_bytes"]


def test_memory_says_what_departs(
    run: Run,  # noqa: F811
    model: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fxopt.execution import run as execution

    monkeypatch.setattr(execution.Run, "_offset", lambda self, name: 0)
    status, out, _ = run("memory", model, *SHAPE, "--execute")
    assert status == 1
    assert "outputs DIFFER" in out
    assert "the first that departs is '" in out


def test_memory_refuses_to_execute_what_if_sizes(run: Run, model: str) -> None:  # noqa: F811
    status, out, err = run("memory", model, *SHAPE, "--execute", "--bytes-per-element", "1")
    assert (status, out) == (2, "")
    assert "what-if sizes cannot be executed: leave --bytes-per-element out" in err


def test_schedule_as_text(run: Run, graph: str) -> None:  # noqa: F811
    status, out, err = run("schedule", graph)
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "peak         66 B: no order needs less",
        "lower bound  66 B",
        "order",
        *(f"  {node}" for node in "iasbo"),
    ]


def test_schedule_as_json(run: Run, graph: str) -> None:  # noqa: F811
    status, out, _ = run("schedule", graph, "--json", "--time-limit", "5")
    assert status == 0
    expected = {"peak_bytes": 66, "lower_bound_bytes": 66, "optimal": True, "order": list("iasbo")}
    assert json.loads(out) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"edges": [{"source": "i", "target": "x"}]}, "names 'x', which is no node"),
        ({"edges": [{"source": "i", "target": "i"}]}, "the graph has a cycle"),
        ({"nodes": [{"id": "i", "output_bytes": -4}], "edges": []}, "node 'i' has output_bytes -4"),
    ],
)
def test_schedule_refuses(run: Run, graph: str, change: dict[str, object], message: str) -> None:  # noqa: F811
    Path(graph).write_text(json.dumps({**GRAPH, **change}))
    status, out, err = run("schedule", graph)
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_schedule_refuses_a_file_that_is_not_there(run: Run) -> None:  # noqa: F811
    status, _, err = run("schedule", "nowhere.json")
    assert status == 2
    assert "cannot read 'nowhere.json'" in err


def test_schedule_needs_no_torch(graph: str) -> None:
    code = (
        "import sys; from fxopt.cli import main; status = main(['schedule', sys.argv[1]]); "
        "print(status, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, graph], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 False"
