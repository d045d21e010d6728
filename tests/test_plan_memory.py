"""Memory plans of models: published figures, what every plan must satisfy, and refusals."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from seeded import image, seeded
from torch import Tensor, nn

import fxopt
from fxopt import MemoryModel, MemoryPlan, plan_memory
from fxopt.analysis.memory_model import PRESETS, MemoryModelError


class Inverted(nn.Module):
    """An inverted residual with its shortcut."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        hidden = channels * ratio
        self.expand = nn.Sequential(
            nn.Conv2d(channels, hidden, 1), nn.BatchNorm2d(hidden), nn.ReLU6()
        )
        self.depthwise = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
        )
        self.project = nn.Sequential(nn.Conv2d(hidden, channels, 1), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.project(self.depthwise(self.expand(x)))
        return result


class Net(nn.Module):
    """A stem, an inverted residual, a concatenation, a view and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.block = Inverted(4, 6)
        self.left = nn.Conv2d(4, 2, 1)
        self.right = nn.Conv2d(4, 5, 3, padding=1)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(torch.relu(self.stem(x)))
        x = torch.cat([self.left(x), self.right(x)], 1)
        result: Tensor = self.head(x.mean((2, 3)).view(x.shape[0], -1))
        return result


@pytest.fixture(scope="module")
def program() -> fxopt.Program:
    return fxopt.capture(seeded(Net()), image(1, 3, 16, 24))


@pytest.mark.parametrize("order", ["optimal", "program"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("bytes_per_element", [None, 1])
def test_a_plan_is_consistent(
    program: fxopt.Program, preset: str, bytes_per_element: int | None, order: Any
) -> None:
    model = MemoryModel.preset(preset, bytes_per_element=bytes_per_element)
    plan = plan_memory(program, memory_model=model, order=order)
    assert plan.preset == preset
    assert sum(tensor.bytes for tensor in plan.live_at_peak) == plan.peak_bytes
    assert plan.steps[plan.peak_step].bytes == plan.peak_bytes == max(s.bytes for s in plan.steps)
    assert plan.lower_bound_bytes <= plan.peak_bytes <= plan.program_order_bytes
    assert plan.peak_bytes <= plan.arena.size_bytes
    assert tuple(step.id for step in plan.steps) == plan.order
    assert set(plan.order) <= set(plan.arena.offsets)
    assert all(offset % 16 == 0 for offset in plan.arena.offsets.values())
    if order == "program":
        assert plan.peak_bytes == plan.program_order_bytes


def test_the_residual_block_by_hand(program: fxopt.Program) -> None:
    """Maps of 8 x 12 in int8: the block's input, the expansion, in place and into the input."""
    maps = 8 * 12
    expected = {
        "tflm": (24 + 24 + 4) * maps,  # depthwise: its input, its result, the shortcut
        "tinyengine": (24 + 4) * maps,
        "tinyengine_exact": (24 + 1 + 4) * maps,
    }
    for preset, peak in expected.items():
        plan = plan_memory(program, memory_model=MemoryModel.preset(preset, bytes_per_element=1))
        assert (plan.peak_bytes, plan.optimal) == (peak, True), preset


def test_views_lie_where_what_they_view_lies(program: fxopt.Program) -> None:
    plan = plan_memory(program, preset="tflm")
    view = next(step.id for step in plan.steps if "view" in step.id)
    mean = next(step.id for step in plan.steps if "mean" in step.id)
    assert plan.arena.offsets[view] == plan.arena.offsets[mean]


def test_float32_is_four_times_int8(program: fxopt.Program) -> None:
    for preset in PRESETS:
        one = plan_memory(program, memory_model=MemoryModel.preset(preset, bytes_per_element=1))
        assert plan_memory(program, preset=preset).peak_bytes == 4 * one.peak_bytes


def test_a_streamed_input_takes_nothing(program: fxopt.Program) -> None:
    streamed = MemoryModel.preset("tflm", input_resident=False)
    plan = plan_memory(program, memory_model=streamed)
    resident = plan_memory(program, preset="tflm")
    assert plan.steps[0].bytes == 0
    assert resident.steps[0].bytes == 3 * 16 * 24 * 4
    assert plan.peak_bytes <= resident.peak_bytes


def test_weights_are_counted_apart(program: fxopt.Program) -> None:
    parameters = sum(p.numel() for p in Net().parameters())
    statistics = 2 * (24 + 24 + 4)
    counters = 3 * 8  # num_batches_tracked
    plan = plan_memory(program)
    assert plan.weight_bytes == 4 * (parameters + statistics) + counters


def test_modules_and_programs_plan_alike(program: fxopt.Program) -> None:
    assert (
        plan_memory(seeded(Net()), image(1, 3, 16, 24)).peak_bytes
        == plan_memory(program).peak_bytes
    )


def test_a_transformed_module_is_planned() -> None:
    folded = fxopt.transform(seeded(Net()), ["fold_conv_bn"], image(1, 3, 16, 24))
    assert plan_memory(folded, preset="pytorch").peak_bytes > 0


def test_the_user_s_model_is_as_before() -> None:
    net = seeded(Net()).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    state = torch.random.get_rng_state()
    plan_memory(net, image(2, 3, 16, 24))
    assert net.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_an_input_returned_and_an_add_of_one_tensor() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            z = y + y
            return x, z, z * 2

    plan = plan_memory(Odd().eval(), (image(1, 4), image(1, 6)))
    # x to the end; y is overwritten by z, which is returned, beside twice z
    assert plan.peak_bytes == 4 * (4 + 6 + 6)
    assert plan.optimal


def test_opaque_operators_make_it_at_least() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(4, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.rnn(x)[0]
            return result

    plan = plan_memory(Recurrent().eval(), image(1, 5, 4))
    assert plan.at_least
    assert any("rnn" in name for name in plan.opaque)
    assert "at least" in plan.text()
    assert "rnn" in plan.text().split("at least: ")[1].splitlines()[0]


class TestFit:
    @pytest.fixture
    def plan(self, program: fxopt.Program) -> MemoryPlan:
        return plan_memory(program, memory_model=MemoryModel.preset("tflm", bytes_per_element=1))

    def test_fits(self, plan: MemoryPlan) -> None:
        fit = plan.fit(plan.arena.size_bytes)
        assert (fit.fits, fit.spare_bytes, fit.reason) == (True, 0, "")

    def test_an_operator_forbids_it(self, plan: MemoryPlan) -> None:
        fit = plan.fit(plan.peak_bytes - 1)
        assert not fit.fits
        assert fit.spare_bytes == plan.peak_bytes - 1 - plan.arena.size_bytes
        assert fit.reason == (
            f"no order can meet it: 'block.depthwise.0' needs {plan.peak_bytes:,} bytes in any order"
        )

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"lower_bound_bytes": 60}, "no order can meet it: each needs at least 60 bytes"),
            ({"peak_bytes": 60}, "whether another one would do is not known"),
            ({"arena": (64, 64)}, "at an alignment of 16 the tensors need more"),
            ({"arena": (64, 40)}, "no packing was found that does it"),
        ],
    )
    def test_other_reasons(self, plan: MemoryPlan, changes: dict[str, Any], reason: str) -> None:
        assert plan.forbidding is not None
        size, bound = changes.pop("arena", (60, 60))
        small = replace(
            plan,
            forbidding=replace(plan.forbidding, bytes=40),
            **{"peak_bytes": 40, "lower_bound_bytes": 40, **changes},
            arena=replace(plan.arena, size_bytes=size, lower_bound_bytes=bound),
        )
        assert reason in small.fit(50).reason


def test_bars_go_by_module(program: fxopt.Program) -> None:
    plan = plan_memory(program)
    blocks = plan.blocks(1)
    assert list(blocks)[:2] == ["stem", "block"]
    assert blocks["block"] == max(s.bytes for s in plan.steps if s.path.startswith("block"))
    assert "block.depthwise" in plan.blocks(2)


def test_json_has_the_documented_keys(program: fxopt.Program) -> None:
    plan = plan_memory(program)
    document = json.loads(plan.json(sram_bytes=10**6))
    for key in ("peak_bytes", "lower_bound_bytes", "optimal", "order", "peak_step"):
        assert document[key] == json.loads(json.dumps(getattr(plan, key)))
    assert document["arena"] == {
        "size_bytes": plan.arena.size_bytes,
        "lower_bound_bytes": plan.arena.lower_bound_bytes,
        "optimal": plan.arena.optimal,
        "offsets": dict(plan.arena.offsets),
    }
    assert sum(tensor["bytes"] for tensor in document["live_at_peak"]) == plan.peak_bytes
    assert document["sram"]["fits"]


def test_markdown_says_what_text_says(program: fxopt.Program) -> None:
    plan = plan_memory(program)
    assert f"{plan.peak_bytes:,}" in plan.markdown()
    assert "| block" in plan.markdown()


def test_plans_are_frozen(program: fxopt.Program) -> None:
    with pytest.raises(FrozenInstanceError):
        plan_memory(program).peak_bytes = 0  # type: ignore[misc]


def test_refusals(program: fxopt.Program) -> None:
    with pytest.raises(MemoryModelError, match="no preset is called 'esp32'; there are tflm, tiny"):
        plan_memory(program, preset="esp32")
    with pytest.raises(MemoryModelError, match="give a preset or a memory model, not both"):
        plan_memory(program, preset="tflm", memory_model=MemoryModel())
    with pytest.raises(ValueError, match="the order is 'best'; it is 'optimal' or 'program'"):
        plan_memory(program, order="best")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        plan_memory(program, image(1, 3, 16, 24))
