"""The pass: what it chooses, what that costs, and what it refuses."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from itertools import product
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from random_regions import RandomRegion
from seeded import image, seeded
from torch import nn
from torch.overrides import TorchFunctionMode

import fxopt
from fxopt import PipelineSpecError, PreconditionError, Program, plan_memory
from fxopt.analysis.memory_model import PRESETS
from fxopt.execution.compare import compare_in_arena
from fxopt.passes.patch_execution import PatchExecution
from fxopt.proof.evidence import input_attempts, verification_shapes


def small(*layers: nn.Module) -> Program:
    """The layers, then a head that pools: nothing after them runs tile by tile."""
    head = () if isinstance(layers[-1], TwoPaths) else (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = nn.Sequential(*layers, *head)
    return fxopt.capture(seeded(net), image(1, 3, 7, 9), verify=False)


def block(inputs: int, hidden: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """An inverted residual's branch."""
    return nn.Sequential(
        nn.Conv2d(inputs, hidden, 1), nn.ReLU6(),
        nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden), nn.ReLU6(),
        nn.Conv2d(hidden, outputs, 1),
    )  # fmt: skip


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = block(channels, 6, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.branch(x)
        return result


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.one(x).relu() + self.other(y)


class TwoPaths(nn.Module):
    """The image is read by two paths; which of them is first matters."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(3, 9, 3, padding=1), nn.ReLU(), nn.Conv2d(9, 2, 3, 2))
        self.other = nn.Sequential(
            nn.AdaptiveAvgPool2d((6, 6)), nn.Conv2d(3, 6, 1), nn.MaxPool2d(2)
        )

    def forward(self, x: torch.Tensor) -> Any:
        return self.wide(x).mean((2, 3)), self.other(x).flatten(1)


SMALL: dict[str, list[nn.Module]] = {
    "mobile": [nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU6(), block(4, 12, 6, 2), nn.Conv2d(6, 4, 1)],
    "residual": [nn.Conv2d(3, 4, 3, 2, 1), Residual(4), nn.MaxPool2d(2), block(4, 5, 4)],
    "two paths": [TwoPaths()],
    "wide": [nn.Conv2d(3, 12, 5, padding=2), nn.Hardswish(), nn.Conv2d(12, 2, 3, 3), nn.ReLU()],
}


class Macs(TorchFunctionMode):
    """Multiply-accumulates of the convolutions that are run, from the shapes that they have."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.conv2d:
            self.count += result.numel() * prod(args[1].shape[1:])
        return result


def macs_run(program: Program) -> int:
    with Macs() as counted, torch.no_grad():
        program.graph_module(*(image(*kind.shape) for kind in program.inputs().values()))
    return counted.count


def made(program: Program, **options: Any) -> Program:
    return fxopt.run_pass(PatchExecution(**options), program, verify=False).after


def front_by_brute_force(program: Program, **conventions: Any) -> set[tuple[int, int]]:
    """Peak and MACs of every end and grid, from whole patched programs, that nothing is better than."""
    model = PatchExecution(**conventions).memory_model()
    least = plan_memory(program, memory_model=model).peak_bytes
    costs = []
    for node in program.nodes[1:-1]:
        if len(program.types[node.name].shape) < 4:
            continue
        height, width = program.types[node.name].shape[2:]
        for rows, cols in product(range(1, min(8, height) + 1), range(1, min(8, width) + 1)):
            if rows * cols == 1:
                continue
            with suppress(PreconditionError):  # no part ends there
                after = made(program, until=node.name, grid=f"{rows}x{cols}", **conventions)
                costs.append((macs_run(after), plan_memory(after, memory_model=model).peak_bytes))
    found = set()
    for macs, peak in sorted(costs):
        if peak < least:
            least = peak
            found.add((peak, macs))
    return found


@pytest.mark.parametrize(("preset", "input_resident"), [("tinyengine", False), ("tflm", True)])
@pytest.mark.parametrize("name", SMALL)
def test_the_front_is_that_of_all_ends_and_grids(
    name: str, preset: str, input_resident: bool
) -> None:
    program = small(*SMALL[name])
    conventions = {"preset": preset, "input_resident": input_resident, "bytes_per_element": 1}
    front = PatchExecution(**conventions).choices(program).front
    before = macs_run(program)
    found = {(each.peak_bytes, round(before * (1 + each.overhead))) for each in front}
    assert found == front_by_brute_force(program, **conventions)


def is_alive(program: Program) -> bool:
    """Whether what the proof looks at is not zero everywhere, as behind a ReLU it can be."""
    inputs = next(input_attempts(program, verification_shapes(program), None))
    return bool(program.graph_module(*inputs)[0].any())


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10**6), st.data())
def test_random_regions(seed: int, data: st.DataObject) -> None:
    """Equal in float64, of the planned peak, and executed in the planned arena."""
    net = RandomRegion(seed)
    program = fxopt.capture(seeded(net), image(*net.shape), verify=False)
    assume(is_alive(program))
    called = [node for node in program.nodes if node.op.startswith("call")]
    maps = [n.name for n in called if len(getattr(program.types[n.name], "shape", ())) == 4]
    end = data.draw(st.sampled_from(maps))
    height, width = program.types[end].shape[2:]
    rows = data.draw(st.integers(1, min(5, height)), "rows")
    cols = data.draw(st.integers(1, min(5, width)), "cols")
    assume(rows * cols > 1)
    which = PatchExecution(
        until=end, grid=f"{rows}x{cols}", preset=data.draw(st.sampled_from(sorted(PRESETS))),
        input_resident=data.draw(st.booleans()),
    )  # fmt: skip
    try:
        result = fxopt.run_pass(which, program)
    except PreconditionError as error:
        assert "cannot reach" in str(error)
        assume(False)
    plan = plan_memory(result.after, memory_model=which.memory_model())
    assert plan.peak_bytes == result.evidence["choice"]["peak_bytes"]
    assert compare_in_arena(result.after, plan).equal


# ---- the published net ------------------------------------------------------------------------

STREAMED = {"bytes_per_element": 1, "input_resident": False}


@cache
def mobilenet() -> Program:
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    return fxopt.capture(models.mobilenet_v2().eval(), torch.randn(1, 3, 224, 224), verify=False)


def chosen(**options: Any) -> tuple[float, float, list[int]]:
    """Peak in KiB, overhead in per cent, and the grid."""
    result = fxopt.run_pass(PatchExecution(**options), mobilenet(), verify=False)
    choice = result.evidence["choice"]
    assert choice["regions"][0]["until"] == "features.4"
    grid = choice["regions"][0]["grid"]
    return round(choice["peak_bytes"] / 1024, 2), round(100 * choice["overhead"], 2), grid


@pytest.mark.parametrize(
    ("grid", "peak", "overhead"),
    [("2x2", 431.48, 2.93), ("3x3", 226.73, 6.02), ("4x4", 171.5, 9.28), ("3x5", 171.5, 9.20)],
)
def test_figures_of_mobilenet_v2(grid: str, peak: float, overhead: float) -> None:
    found = chosen(until="features.4", grid=grid, **STREAMED)
    assert found[:2] == (pytest.approx(peak, abs=0.011), overhead)


def test_choices_of_mobilenet_v2() -> None:
    assert chosen(**STREAMED)[1:] == (9.20, [3, 5])
    assert chosen(sram="256KiB", **STREAMED)[1:] == (6.02, [3, 3])
    assert chosen(max_overhead=0.05, **STREAMED)[1:] == (4.43, [2, 3])
    resident = chosen(until="features.4", grid="4x4", bytes_per_element=1)
    assert resident[0] == pytest.approx(305.48, abs=0.011)


def test_a_budget_out_of_reach_is_refused_with_the_least_reached() -> None:
    with pytest.raises(PreconditionError, match=r"262,144 bytes: .* 702,464 \(686.0 KiB\)"):
        chosen(sram="256KiB", input_resident=False)


# ---- choices and refusals ---------------------------------------------------------------------


def refused(program: Program, **options: Any) -> str:
    with pytest.raises(PreconditionError) as caught:
        fxopt.run_pass(PatchExecution(**options), program)
    return str(caught.value)


def declined(program: Program, **options: Any) -> str:
    result = fxopt.run_pass(PatchExecution(**options), program)
    assert not result.rewritten
    (reason,) = (each.reason for each in result.declined)
    return reason


def test_refusals_name_thing_place_and_remedy() -> None:
    program = small(*SMALL["mobile"])
    assert "until 'nowhere' names no module that runs" in refused(program, until="nowhere")
    text = refused(program, until="2.2", grid="4x9")
    assert text == (
        "grid 4x9 does not cut a map of 2x3 at '2.2' into tiles; give fewer, and more than one"
    )
    assert "does not cut a map of 4x5 into tiles" in refused(program, grid="20x1")
    assert "grid 1x1 does not cut" in refused(program, until="2", grid="1x1")
    text = refused(program, until="4", grid="2x2")
    assert "'AdaptiveAvgPool2d' is not known to work on a neighbourhood" in text
    assert "let until name an operator before it" in text
    text = refused(program, sram=100)
    assert text.startswith("no patching fits into 100 bytes: the least that is reached is ")
    assert "no part reaches further: '_4' ('4')" in text


def test_a_part_that_is_read_in_its_midst_is_refused() -> None:
    program = small(*SMALL["residual"])
    text = refused(program, until="1.branch.2", grid="2x2")
    assert "'_0' ('0') is read by 'add', which comes after the end" in text


def test_an_end_that_the_image_does_not_reach_is_refused() -> None:
    net = TwoInputs()
    program = fxopt.capture(seeded(net), (image(1, 3, 7, 9), image(1, 3, 7, 9)), verify=False)
    text = refused(program, until="other", grid="2x2")
    assert "'other' ('other') is not computed from 'x'" in text
    text = refused(program, until="add", grid="2x2")
    assert "'add' (" in text
    assert "reads 'other', which comes from elsewhere" in text
    assert made(program, until="one", grid="2x2").node("patched_stage")


def test_the_user_s_own_limits() -> None:
    program = small(*SMALL["mobile"])
    text = refused(program, until="2", grid="2x2", sram=64)
    assert "grid 2x2 until '2' needs" in text
    assert "more than 64" in text
    text = refused(program, until="2", grid="2x2", max_overhead=0.0)
    assert "of MACs, more than 0.00%" in text


def test_what_needs_no_patching_is_left_alone() -> None:
    program = small(*SMALL["mobile"])
    assert "the network fits as it is" in declined(program, sram="1MB")
    assert "each patching adds more MACs; the least" in declined(
        small(nn.Conv2d(3, 9, 5, padding=2), nn.Conv2d(9, 2, 5, 1)), max_overhead=0.0
    )
    program = small(nn.AdaptiveAvgPool2d(3), nn.Conv2d(3, 40, 1))
    assert "no patching has a smaller peak" in declined(program)


def test_a_patched_program_is_not_patched_again() -> None:
    program = made(small(*SMALL["mobile"]), until="2", grid="2x2")
    reason = declined(program, until="2", grid="3x3")
    assert "runs tile by tile already" in reason


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("grid=0x2", r"takes ROWSxCOLUMNS\|none, not '0x2'"),
        ("grid=4", r"takes ROWSxCOLUMNS\|none, not '4'"),
        ("sram=lots", r"takes SIZE\|none, not 'lots'"),
        ("sram=1kB,max_overhead=0.1", "not both"),
        ("max_overhead=-1", "the least is 0"),
        ("preset=nope", "there are tflm"),
        ("tiles=4", "has no option 'tiles'"),
    ],
)
def test_options_are_checked(spec: str, said: str) -> None:
    with pytest.raises(PipelineSpecError, match=said):
        fxopt.transform(nn.ReLU(), f"patch_execution{{{spec}}}", image())


def test_the_end_is_named_as_the_user_names_it() -> None:
    program = small(*SMALL["residual"])
    for until, named in (("1", "1"), ("add", "1"), ("2", "2"), ("3.4", "3")):
        evidence = fxopt.run_pass(PatchExecution(until=until, grid="1x2"), program).evidence
        assert evidence["choice"]["regions"][0]["until"] == named


def test_rows_and_columns_are_listed() -> None:
    evidence = fxopt.run_pass(
        PatchExecution(until="1", grid="3x4"), small(*SMALL["wide"])
    ).evidence  # a map of 7 x 9
    (region,) = evidence["choice"]["regions"]
    assert region == {
        "start": "input_1", "until": "1", "grid": [3, 4], "halo": "recompute",
        "rows": [[0, 3], [3, 5], [5, 7]], "cols": [[0, 3], [3, 5], [5, 7], [7, 9]],
    }  # fmt: skip
