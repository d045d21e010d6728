"""Stages that run tile by tile, and quantisation: the order of the two passes changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.analysis.memory_model import MemoryModel
from fxopt.execution.compare import compare_in_arena
from fxopt.passes import FakeQuantization, PatchExecution
from fxopt.patching.regions import unpatched
from fxopt.patching.stage import PatchedStage
from fxopt.pipeline import run_pipeline
from fxopt.program import Program

X = torch.randn(4, 3, 22, 30, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Residual, depthwise, pads of one side, a pool, a concatenation; a head beyond the stage."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2)
        self.norm = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.wise = nn.Conv2d(8, 8, 1, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.last = nn.Conv2d(16, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)
        generator = torch.Generator().manual_seed(1)
        self.norm.running_mean.uniform_(-0.3, 0.3, generator=generator)
        self.norm.running_var.uniform_(0.5, 2.0, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu6(self.norm(self.stem(F.pad(x, (0, 1, 0, 1)))))
        x = x + self.wise(F.relu(self.deep(x)))
        x = torch.cat([self.pool(x), F.avg_pool2d(x, 2)], 1)
        return self.head(self.last(x).mean((2, 3)))


def net() -> nn.Module:
    torch.manual_seed(2)
    return Net().eval()


def done(*passes: Any) -> Program:
    return run_pipeline(fxopt.capture(net(), X), list(passes))[-1].after


def quantisation(**options: Any) -> FakeQuantization:
    return FakeQuantization(calibration=X, fold="auto", **options)


PATCHES = (
    PatchExecution(until="last", grid="2x3"),
    PatchExecution(until="stem", grid="3x2"),
    PatchExecution(until="add", grid="2x2"),
)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: str(patch.until))
@pytest.mark.parametrize("options", [{}, {"granularity": "tensor", "activation_bits": 4}], ids=str)
def test_the_order_of_the_passes_changes_nothing(patch: Any, options: Any) -> None:
    both = done(quantisation(**options), patch), done(patch, quantisation(**options))
    whole = done(quantisation(**options))
    for program in both:
        assert any(isinstance(program.module(n), PatchedStage) for n in program.nodes)
    outputs = [p.graph_module(X)[0] for p in (*both, whole)]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.allclose(outputs[0], outputs[2], atol=1e-6)


def test_quantisation_is_in_the_tiles() -> None:
    """A stage that was left in float would give other numbers than the whole network."""
    program = done(PATCHES[0], quantisation(activation_bits=3))
    plain = done("fold_conv_bn", PATCHES[0])
    apart = (program.graph_module(X)[0] - plain.graph_module(X)[0]).abs().max()
    assert apart > 1e-2


def test_a_stage_is_written_out_as_it_was() -> None:
    program = done("fold_conv_bn")
    patched = run_pipeline(program, [PATCHES[0]])[-1].after
    again = unpatched(patched)
    assert not any(isinstance(again.module(n), PatchedStage) for n in again.nodes)
    assert torch.equal(again.graph_module(X)[0], program.graph_module(X)[0])
    kept = dict(again.graph_module.named_parameters())
    assert kept.keys() == dict(program.graph_module.named_parameters()).keys()
    assert unpatched(program) is program


def test_plans_of_quantised_stages_are_those_of_stages_in_float() -> None:
    plain, quantised = done("fold_conv_bn", PATCHES[0]), done(PATCHES[0], quantisation())
    one = MemoryModel.preset("tinyengine", bytes_per_element=1)
    peaks = [fxopt.plan_memory(p, memory_model=one).peak_bytes for p in (plain, quantised)]
    assert peaks[1] <= peaks[0] + X.numel()  # the input and what its quantiser makes of it
    assert compare_in_arena(quantised, fxopt.plan_memory(quantised)).equal


def test_exports_whole_and_says_so(tmp_path: Any) -> None:
    written = fxopt.export_onnx(done(PATCHES[0], quantisation()), tmp_path / "int8.onnx")
    assert any("written whole" in note for note in written.notes)
    assert written.integers is not None
    assert written.integers.agreement is not None
    assert written.integers.agreement.worst <= 1


@pytest.mark.parametrize("qas", [None, True])
def test_skips_and_declines_inside_a_stage(qas: bool | None) -> None:
    patched_first = run_pipeline(
        fxopt.capture(net(), X), [PATCHES[0], quantisation(skip="wise", qas=qas)]
    )[-1]
    reasons = {each.where: each.reason for each in patched_first.record.declined}
    assert reasons == {"'wise'": "it is of skip=wise"}
