"""Will it fit? An order, an address for every tensor, and what they need, of any model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import networkx as nx
from torch import nn

from fxopt.analysis.arena import plan_arena
from fxopt.analysis.cost import weights_of
from fxopt.analysis.dataflow import dataflow
from fxopt.analysis.joint import packed
from fxopt.analysis.liveness import Timeline, storages, timeline
from fxopt.analysis.memory_model import MemoryModel, MemoryModelError
from fxopt.analysis.plan import ArenaPlan, NodeId, Schedule, Scratch
from fxopt.analysis.problem import least_needs, problem_of
from fxopt.analysis.schedule import TIME_LIMIT, Progress, schedule
from fxopt.analysis.sizes import value_bytes
from fxopt.analysis.validate import validate_plan, validate_schedule
from fxopt.captured import as_program
from fxopt.memory_plan import LiveTensor, MemoryPlan, Step
from fxopt.patching.unroll import unrolled
from fxopt.program import Program, TensorType, type_of

Order = Literal["optimal", "program"]
"""The order with the least peak that is found, or that of the user's own forward."""


def plan_memory(
    model: nn.Module | Program,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    preset: str | None = None,
    memory_model: MemoryModel | None = None,
    order: Order = "optimal",
    time_limit: float = TIME_LIMIT,
    progress: Progress | None = None,
) -> MemoryPlan:
    """The memory plan of a model, of a program, or of a module that :func:`fxopt.transform` gave.

    Args:
        preset: a memory model by name; ``tinyengine`` if there is no ``memory_model`` either.
        order: the best that is found, or the program's own; the lower bound is of all orders.
        time_limit: seconds that the search of an order may take.
        progress: is told the best peak so far and the lower bound.

    Raises:
        CaptureError: the model cannot be captured.
        MemoryModelError: there is no such preset, or it is given beside a memory model.
        TypeError: example inputs are given with a program, which has its own.
        ValueError: the order is none of the two.

    >>> import torch
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)).eval()
    >>> plan = plan_memory(net, torch.zeros(1, 3, 8, 8), preset="tflm")
    >>> plan.peak_bytes  # 3 x 8 x 8 and 8 x 8 x 8 floats
    2816
    """
    if order not in ("optimal", "program"):
        raise ValueError(f"the order is {order!r}; it is 'optimal' or 'program'")
    if preset is not None and memory_model is not None:
        raise MemoryModelError("give a preset or a memory model, not both")
    conventions = memory_model or MemoryModel.preset(preset or "tinyengine")
    program = unrolled(as_program(model, example_inputs, example_kwargs))
    graph = dataflow(program, conventions)
    own = timeline(graph, list(graph))
    found = schedule(graph, time_limit, progress)
    if order == "program":
        bound = found.lower_bound_bytes
        found = Schedule(tuple(graph), own.peak_bytes, bound, own.peak_bytes == bound)
        validate_schedule(graph, found)
        arena = plan_arena(own.lifetimes, conventions.alignment)
        return _plan(program, conventions, graph, found, own, arena, own.peak_bytes)
    found, line, arena = packed(graph, found, conventions.alignment)
    return _plan(program, conventions, graph, found, line, arena, own.peak_bytes)


def _plan(
    program: Program,
    model: MemoryModel,
    graph: nx.DiGraph,
    found: Schedule,
    line: Timeline,
    arena: ArenaPlan,
    own_peak: int,
) -> MemoryPlan:
    validate_plan(graph, found.order, arena, model.alignment)
    return MemoryPlan(
        model=program.name,
        inputs=program.inputs(),
        preset=model.describe(),
        memory_model=model,
        order=tuple(map(str, found.order)),
        peak_bytes=found.peak_bytes,
        lower_bound_bytes=found.lower_bound_bytes,
        optimal=found.optimal,
        program_order_bytes=own_peak,
        arena=replace(arena, offsets=_offsets(graph, found.order, arena)),
        lifetimes=line.lifetimes,
        peak_step=line.peak_step,
        live_at_peak=tuple(_live(program, graph, line)),
        steps=tuple(_steps(graph, found.order, line.step_bytes)),
        forbidding=_forbidding(graph, found.order),
        weight_bytes=_weight_bytes(program, model),
        constant_bytes=graph.graph["constant_bytes"],
        opaque=tuple(graph.graph["opaque"]),
        notes=(*program.notes, *graph.graph["notes"]),
    )


def _steps(graph: nx.DiGraph, order: Sequence[NodeId], sizes: Sequence[int]) -> Iterator[Step]:
    for node, size in zip(order, sizes, strict=True):
        fields = graph.nodes[node]
        yield Step(str(node), fields["path"], fields["kind"], size)


def _forbidding(graph: nx.DiGraph, order: Sequence[NodeId]) -> Step | None:
    """The operator that needs most in every order."""
    needs = least_needs(problem_of(graph, order))
    return max(_steps(graph, order, needs), key=lambda step: step.bytes, default=None)


def _offsets(graph: nx.DiGraph, order: Sequence[NodeId], arena: ArenaPlan) -> dict[NodeId, int]:
    """Those of the arena, and of every view that of what it views."""
    offsets: dict[NodeId, int] = {str(node): place for node, place in arena.offsets.items()}
    viewed = storages(graph, order)
    return offsets | {str(node): arena.offsets[viewed[node]] for node in order}


def _live(program: Program, graph: nx.DiGraph, line: Timeline) -> Iterator[LiveTensor]:
    """What is live at the peak, with the bytes that it adds there."""
    step = line.peak_step
    size = {tensor.id: tensor.size_bytes for tensor in line.lifetimes}
    for tensor in line.lifetimes:
        if not tensor.start <= step < tensor.end or not tensor.size_bytes:
            continue
        node = tensor.id.node if isinstance(tensor.id, Scratch) else tensor.id
        over = tensor.takes_over if tensor.start == step else None
        type = None if isinstance(tensor.id, Scratch) else program.types[str(node)]
        yield LiveTensor(
            str(tensor.id),
            graph.nodes[node]["path"],
            max(0, tensor.size_bytes - (0 if over is None else size[over])),
            None if over is None else str(over),
            type if isinstance(type, TensorType) else None,
        )


def _weight_bytes(program: Program, model: MemoryModel) -> int:
    """Of what the operators read, each tensor once, in elements as the model counts them."""
    used = {key: t for each in weights_of(program).values() for key, t in each.tensors.items()}
    return sum(value_bytes(type_of(t), model) for t in used.values())
