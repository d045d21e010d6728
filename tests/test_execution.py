"""Programs run in the buffer that was planned: equal, in place, and wrong if the plan is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_nets import SHAPE, RandomNet
from seeded import image, seeded
from torch import Tensor, nn

import fxopt
from fxopt import ExecutionError, InvalidPlanError, MemoryModel, plan_memory
from fxopt.analysis.arena import plan_arena
from fxopt.analysis.dataflow import dataflow
from fxopt.analysis.memory_model import PRESETS
from fxopt.analysis.plan import ArenaPlan
from fxopt.analysis.validate import validate_plan
from fxopt.execution.compare import compare_in_arena
from fxopt.execution.run import Run, execute_in_arena


class Function(nn.Module):
    """A function of an image; some of its parts are modules."""

    def __init__(self, function: Callable[..., Any], *parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.parts)


def depthwise(channels: int = 3, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel, groups=channels, **options)


def item_set(x: Tensor) -> Tensor:
    y = torch.exp(x)
    y[:, :1] = 0.5
    y[:, 1].mul_(2.0)
    return y.sum(1)


NETS: dict[str, nn.Module] = {
    "depthwise": nn.Sequential(nn.Conv2d(3, 6, 1), depthwise(6, padding=1), nn.ReLU6()),
    "strided depthwise": nn.Sequential(depthwise(stride=2), depthwise(stride=2, padding=1)),
    "growing depthwise": nn.Sequential(depthwise(kernel=2, padding=1), depthwise(padding=3, dilation=2)),
    "mirrored depthwise": nn.Sequential(depthwise(padding=1, padding_mode="reflect"), nn.Hardswish()),
    "functional depthwise": Function(lambda x, c: F.conv2d(x, c.weight, stride=(2, 1), groups=3), depthwise()),
    "inverted residual": Function(
        lambda x, *c: torch.relu(x + c[2](c[1](c[0](x)))),
        nn.Conv2d(3, 8, 1), nn.Sequential(depthwise(8, padding=1, bias=False), nn.BatchNorm2d(8)), nn.Conv2d(8, 3, 1),
    ),
    "sums": Function(lambda x, a, b: (a(x) + b(x)) + x, nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1)),
    "twice": Function(lambda x, a: a(x) + a(x) * a(x), nn.Conv2d(3, 4, 1)),
    "same operand": Function(lambda x, a: (lambda y: y + y)(a(x)), nn.Conv2d(3, 4, 1)),
    "gate": Function(lambda x, a: (lambda y: y * torch.sigmoid(y.mean((2, 3), keepdim=True)))(a(x)), nn.Conv2d(3, 4, 1)),
    "elementwise": Function(lambda x: F.gelu(torch.where(x > 0, x.abs().clamp(max=1), x / 3 - 1)).pow(2)),
    "norms": Function(lambda x, n: F.hardswish(n(torch.cos(x))) - 1, nn.BatchNorm2d(3)),
    "casts": Function(lambda x: torch.sin(x).to(torch.float16).to(torch.float64).neg()),
    "written items": Function(item_set),
    "in place as written": nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.ReLU6(inplace=True)),
    "views": Function(lambda x: (lambda y: y.transpose(1, 3).reshape(y.shape[0], -1, 3).flatten(1) + 1)(torch.tanh(x))),
    "permuted": Function(lambda x: (lambda y: torch.relu(y.permute(0, 2, 3, 1)).sum(-1) + y[:, 0])(torch.tanh(x))),
    "concat": Function(lambda x: torch.cat([x.exp(), x.chunk(3, 1)[1], x.flip(1)], 1)[:, 1:5]),
    "several results": Function(lambda x: (lambda v, i: v * 2 + i)(*x.exp().flatten(1).topk(7))),
    "several outputs": Function(lambda x: {"a": (y := x.exp()), "b": [y + 1, x], "c": y.view(-1)[:4]}),
    "padded": Function(lambda x, c: c(F.pad(x.exp(), (1, 0, 2, 1))), nn.Conv2d(3, 4, 3, stride=2)),
    "empty": Function(lambda x: (x.exp()[:, :0].neg(), x.cos())),
    "constants": Function(lambda x: x.exp() + torch.arange(x.shape[-1]).to(x.dtype).cos() * x.shape[1]),
    "dropout that acts": Function(lambda x: F.dropout(x.exp(), 0.5, training=True) + torch.rand_like(x)),
}  # fmt: skip


def captured(model: nn.Module, *shape: int, dtype: torch.dtype = torch.float32) -> fxopt.Program:
    return fxopt.capture(seeded(model).to(dtype), image(*shape, dtype=dtype))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", NETS)
def test_gives_the_same_bits(name: str, preset: str, streamed: bool) -> None:
    program = captured(NETS[name])
    model = MemoryModel.preset(preset, input_resident=not streamed)
    run = compare_in_arena(program, plan_memory(program, memory_model=model))
    assert run.equal
    assert run.exact
    assert run.departs is None
    assert run.error <= run.bound


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("seed", range(12))
def test_random_nets(seed: int, preset: str) -> None:
    program = captured(RandomNet(seed), *SHAPE)
    for order in ("optimal", "program"):
        plan = plan_memory(program, preset=preset, order=order)  # type: ignore[arg-type]
        # Convolutions of operands with other strides may round otherwise: not always exact.
        assert compare_in_arena(program, plan).equal, order


def test_outputs_are_those_of_the_module() -> None:
    program = captured(NETS["inverted residual"])
    x = image()
    found = execute_in_arena(program, plan_memory(program, preset="tflm"), x)
    torch.testing.assert_close(found, tuple(program.graph_module(x)), rtol=0, atol=1e-6)


def test_one_buffer_of_the_planned_size() -> None:
    program = captured(NETS["inverted residual"])
    plan = plan_memory(program)
    run = Run(program, plan, [image()])
    first, last = _bytes(run._buffer._bytes)
    assert last - first == plan.arena.size_bytes
    seen = []

    def inside(name: str, value: Tensor) -> None:
        low, high = _bytes(value)
        assert first <= low <= high <= last
        assert low - first == plan.arena.offsets[name]
        seen.append(name)

    run._observer = inside
    run.outputs()
    assert tuple(seen) == plan.order


def _bytes(tensor: Tensor) -> tuple[int, int]:
    start = tensor.data_ptr()
    return start, start + tensor.numel() * tensor.itemsize


@pytest.mark.parametrize(
    ("name", "steps"), [("depthwise", 1), ("strided depthwise", 2), ("growing depthwise", 2)]
)
def test_depthwise_convolutions_run_in_place(name: str, steps: int) -> None:
    program = captured(NETS[name], 1, 3, 12, 16)
    for preset in ("tinyengine", "tinyengine_exact"):
        run = Run(program, plan_memory(program, preset=preset), [image(1, 3, 12, 16)])
        run.outputs()
        assert len(run.by_planes) == steps


def test_dead_bytes_are_poison() -> None:
    program = captured(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), nn.MaxPool2d(2)))
    plan = plan_memory(program, preset="tflm")
    run = Run(program, plan, [image()])
    outputs = run.outputs()
    poison = run._buffer._bytes == 0xFF
    kept = sum(output.numel() * output.itemsize for output in outputs)
    assert poison.sum() >= plan.arena.size_bytes - kept


class Skip(nn.Module):
    """A tensor that lives across others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.wide = nn.Conv2d(4, 8, 3, padding=1)
        self.deep = nn.Conv2d(8, 8, 3, padding=1)
        self.back = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(x))
        return torch.cat([self.back(self.deep(self.wide(y))), y], 1)


def with_offsets(plan: fxopt.MemoryPlan, offsets: Any) -> fxopt.MemoryPlan:
    """The plan with other offsets in an arena that is large enough, and no claim."""
    size = max(offsets[each.id] + each.size_bytes for each in plan.lifetimes)
    return replace(plan, arena=ArenaPlan(offsets, size, 0, optimal=False))


def broken_plans(plan: fxopt.MemoryPlan) -> Iterator[fxopt.MemoryPlan]:
    """Two offsets swapped, of every pair; one size halved, of every tensor."""
    for one, other in combinations(plan.arena.offsets, 2):
        offsets = dict(plan.arena.offsets)
        offsets[one], offsets[other] = offsets[other], offsets[one]
        yield with_offsets(plan, offsets)
    for tensor in plan.lifetimes:
        half = replace(tensor, size_bytes=tensor.size_bytes // 2)
        others = [half if each is tensor else each for each in plan.lifetimes]
        yield with_offsets(plan, plan_arena(others).offsets)


def test_broken_plans_are_caught_and_give_other_outputs() -> None:
    program = captured(Skip())
    plan = plan_memory(program, preset="tflm")
    graph = dataflow(program, plan.memory_model)
    verdicts = []
    for broken in broken_plans(plan):
        run = compare_in_arena(program, broken)
        if run.equal:
            validate_plan(graph, broken.order, broken.arena, 16)
        else:
            with pytest.raises(InvalidPlanError, match="overlaps"):
                validate_plan(graph, broken.order, broken.arena, 16)
            assert run.departs in broken.order
            assert "DIFFER" in run.sentence()
        verdicts.append(run.equal)
    assert verdicts.count(False) > 12
    assert verdicts.count(True) >= 3  # tensors that are never live together may be swapped


def test_a_result_over_an_operand_of_a_dense_convolution_is_destroyed() -> None:
    program = captured(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)))
    plan = plan_memory(program, preset="tflm")
    offsets = dict.fromkeys(plan.arena.offsets, 0)
    broken = replace(plan, arena=replace(plan.arena, offsets=offsets))
    assert not torch.isfinite(execute_in_arena(program, broken, image())[0]).all()


def test_what_if_sizes_are_refused() -> None:
    program = captured(NETS["sums"])
    plan = plan_memory(program, memory_model=MemoryModel.preset("tflm", bytes_per_element=1))
    with pytest.raises(ExecutionError, match="leave bytes_per_element out"):
        execute_in_arena(program, plan, image())
    real = plan_memory(program, memory_model=MemoryModel.preset("tflm", bytes_per_element=4))
    assert compare_in_arena(program, real).exact


def test_refusals() -> None:
    program = captured(NETS["sums"])
    plan = plan_memory(program)
    with pytest.raises(
        ExecutionError, match=r"inputs float32\[2, 3, 9, 13\]; these are float32\[1, 3"
    ):
        execute_in_arena(program, plan, image(1, 3, 9, 13))
    with pytest.raises(ExecutionError, match="these are $"):
        execute_in_arena(program, plan, ())
    with pytest.raises(InvalidPlanError, match="is in one of them only"):
        execute_in_arena(captured(NETS["gate"]), plan, image())
    small = replace(plan, arena=replace(plan.arena, size_bytes=plan.arena.size_bytes // 2))
    with pytest.raises(InvalidPlanError, match="does not lie in the arena"):
        execute_in_arena(program, small, image())
    with pytest.raises(InvalidPlanError, match="no offset for 'x'"):
        execute_in_arena(program, replace(plan, arena=replace(plan.arena, offsets={})), image())
    backwards = replace(plan, order=tuple(reversed(plan.order)))
    with pytest.raises(InvalidPlanError, match="read before it is written"):
        execute_in_arena(program, backwards, image())
    nothing = captured(Function(lambda x: x * 0))
    with pytest.raises(ExecutionError, match="nothing can be concluded"):
        compare_in_arena(nothing, plan_memory(nothing))


def test_nothing_of_the_user_s_changes() -> None:
    program = captured(NETS["inverted residual"])
    before = {key: value.clone() for key, value in program.graph_module.state_dict().items()}
    x, state = image(), torch.get_rng_state()
    execute_in_arena(program, plan_memory(program), x)
    assert torch.equal(x, image())
    assert torch.equal(state, torch.get_rng_state())
    for key, value in program.graph_module.state_dict().items():
        assert torch.equal(value, before[key])


class Counter(nn.Module):
    """It writes buffers: one of the value of a tensor, one counted on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.tensor(3.0))
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.exp(x)
        self.count += 1
        self.mean.copy_(y.mean((0, 2, 3)) * 0.1 + self.mean)
        return y * self.count + self.mean.view(1, -1, 1, 1)


@pytest.mark.parametrize("preset", PRESETS)
def test_buffers_that_are_written(preset: str) -> None:
    program = captured(Counter())
    assert compare_in_arena(program, plan_memory(program, preset=preset)).exact


def test_other_dtypes() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        program = captured(NETS["inverted residual"], dtype=dtype)
        assert compare_in_arena(program, plan_memory(program, preset="tinyengine_exact")).exact


def test_after_passes() -> None:
    model = seeded(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), depthwise(8)))
    program = fxopt.capture(fxopt.transform(model, ["fold_conv_bn"], image()), image())
    assert compare_in_arena(program, plan_memory(program)).exact
