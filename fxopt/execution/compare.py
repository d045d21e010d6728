"""A run in the arena beside an ordinary run: equal, or the first operator that departs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import fx

from fxopt.errors import ExecutionError
from fxopt.execution.buffer import tensors_of
from fxopt.execution.inplace import Call, plane_by_plane
from fxopt.execution.run import Run, call_at, execute_in_arena
from fxopt.memory_plan import MemoryPlan
from fxopt.operators import describe
from fxopt.patching.unroll import unrolled
from fxopt.program import Program, TensorType, tensor_types
from fxopt.proof.evidence import has_evidence, input_attempts, largest_error, output_errors
from fxopt.proof.running import evaluation_module

Result = TypeVar("Result")


@dataclass(frozen=True)
class Execution:
    """What running a plan has shown.

    Attributes:
        equal: the outputs are bit for bit those of the same kernels with every tensor in memory of
            its own, or the ordinary run's within ``bound``.
        exact: the former.
        error: largest difference from the ordinary run, relative to the output's own largest
            value. A depthwise convolution that runs in place, plane by plane, rounds otherwise.
        bound: one rounding of the largest value for each operator on the longest path, as many as
            it sums terms for a depthwise convolution.
        departs: the first operator whose value is another than out of the arena; None if equal.
        path: the user's module that it is of.
        size_bytes: of the buffer.
        seconds, ordinary_seconds: of the two runs.
    """

    equal: bool
    exact: bool
    error: float
    bound: float
    departs: str | None
    path: str
    size_bytes: int
    seconds: float
    ordinary_seconds: float

    @property
    def ratio(self) -> float:
        """Time in the arena over the ordinary run's."""
        return self.seconds / self.ordinary_seconds

    def sentence(self) -> str:
        """What it shows, for a report."""
        where = f"executed in one buffer of {self.size_bytes:,} B"
        error = f"largest error {self.error:.1e} of the output's size, bound {self.bound:.1e}"
        if not self.equal:
            first = f"'{self.departs}'" + (f" ({self.path})" if self.path else "")
            return f"{where}: outputs DIFFER ({error}); the first that departs is {first}"
        bits = "bit for bit that of the same kernels in memory of their own; " if self.exact else ""
        return f"{where}: outputs equal ({bits}{error}); {self.ratio:.1f} times the ordinary run"


def compare_in_arena(
    program: Program, plan: MemoryPlan, inputs: Sequence[torch.Tensor] | None = None
) -> Execution:
    """Run ``program`` as ``plan`` says and in the ordinary way, on seeded inputs if none are given.

    Raises:
        ExecutionError, InvalidPlanError: as from :func:`execute_in_arena`; or the ordinary run's
            outputs are all zero or not finite, so that nothing can be concluded.
    """
    shapes = [type.shape for type in program.inputs().values()]
    for given in input_attempts(program, shapes, inputs):
        expected, ordinary_seconds = _timed(_Ordinary(program).outputs, given)
        run = Run(program, plan, given)
        found, seconds = _timed(run.outputs)
        errors = output_errors(_names(expected), _flat(expected), _flat(found))
        if has_evidence(errors):
            break
    else:
        raise ExecutionError(
            "nothing can be concluded from a run: the outputs are all zero or not finite on seeded "
            "inputs; give the model other weights"
        )
    error, bound = largest_error(errors), rounding_bound(unrolled(program))
    exact = _same(found, _Ordinary(unrolled(program), run.by_planes).outputs(given))
    equal = exact or error <= bound
    departs = None if equal else _first_departing(program, plan, given, run.by_planes)
    origin = unrolled(program).origins.get(departs or "")
    return Execution(
        equal, exact, error, bound, departs, origin.path if origin else "",
        plan.arena.size_bytes, seconds, ordinary_seconds,
    )  # fmt: skip


def rounding_bound(program: Program) -> float:
    """Roundings on the longest path of operators, in parts of the largest value."""
    depth: dict[fx.Node, int] = {}
    for node in program.nodes:
        own = 0 if node.op in ("placeholder", "get_attr", "output") else _roundings(program, node)
        depth[node] = own + max((depth[other] for other in node.all_input_nodes), default=0)
    floating = (
        type.dtype
        for node in program.nodes[:-1]
        for type in tensor_types(program.types[node.name])
        if type.dtype.is_floating_point
    )
    coarsest = max((torch.finfo(dtype).eps for dtype in set(floating)), default=0.0)
    return coarsest * max(depth.values(), default=0)


def _roundings(program: Program, node: fx.Node) -> int:
    """What may run plane by plane sums in another order than the whole."""
    known = describe(program, node)
    result = program.types[node.name]
    if known.kind != "depthwise" or not isinstance(result, TensorType):
        return 1
    return max(1, known.macs // max(1, result.elements))


class _Ordinary(fx.Interpreter):
    """Every tensor in memory of its own; random numbers are drawn as in the arena.

    What is in ``by_planes`` is computed plane by plane. Values in ``kept`` are kept.
    """

    def __init__(
        self, program: Program, by_planes: Set[str] = frozenset(), kept: Set[str] = frozenset()
    ) -> None:
        super().__init__(evaluation_module(program))
        self._program, self._by_planes, self._kept = program, by_planes, kept
        self._position = {node.name: index for index, node in enumerate(program.nodes)}
        self.values: dict[str, Any] = {}

    def outputs(self, inputs: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        with torch.no_grad(), torch.random.fork_rng():
            return tuple(self.run(*inputs))

    def run_node(self, node: fx.Node) -> Any:
        if node.op.startswith("call"):
            args, kwargs = self.fetch_args_kwargs_from_env(node)
            call = call_at(self.module, self._position[node.name], node, args, kwargs)
            value = self._by_plane(call) if node.name in self._by_planes else call.run()
        else:
            value = super().run_node(node)
        if node.name in self._kept:
            self.values[node.name] = value
        return value

    def _by_plane(self, call: Call) -> torch.Tensor:
        type = self._program.types[call.node.name]
        value = torch.empty(type.shape, dtype=type.dtype, device=call.args[0].device)
        plane_by_plane(call, value)
        return value


def _timed(action: Callable[..., Result], *args: Any) -> tuple[Result, float]:
    started = time.perf_counter()
    return action(*args), time.perf_counter() - started


def _same(one: Any, other: Any) -> bool:
    """Whether all bits are equal; of NaNs it is enough that both are."""
    return all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())
        for a, b in zip(tensors_of(one), tensors_of(other), strict=True)
    )


def _first_departing(
    program: Program, plan: MemoryPlan, inputs: Sequence[torch.Tensor], by_planes: Set[str]
) -> str | None:
    """The first operator of the plan's order whose value is another than out of the arena."""
    ordinary = _Ordinary(unrolled(program), by_planes, frozenset(plan.order))
    ordinary.outputs(inputs)
    departing: list[str] = []

    def compare(name: str, value: Any) -> None:
        if not departing and not _same(value, ordinary.values[name]):
            departing.append(name)

    execute_in_arena(program, plan, inputs, compare)
    return departing[0] if departing else None


def _flat(value: Any) -> list[torch.Tensor]:
    return list(tensors_of(value))


def _names(value: Any) -> list[str]:
    return [str(position) for position, _ in enumerate(tensors_of(value))]
