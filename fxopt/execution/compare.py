"""A run in the arena beside an ordinary run: equal, or the first operator that departs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.errors import ExecutionError
from fxopt.execution.buffer import tensors_of
from fxopt.execution.run import execute_in_arena, seed_of
from fxopt.memory_plan import MemoryPlan
from fxopt.program import Program, tensor_types
from fxopt.proof.evidence import has_evidence, input_attempts, largest_error, output_errors
from fxopt.proof.running import evaluation_module


@dataclass(frozen=True)
class Execution:
    """What running a plan has shown.

    Attributes:
        equal: the outputs are the ordinary run's, within ``bound``.
        error: largest difference, relative to the output's own largest value.
        bound: one rounding of the largest value for each operator on the longest path. Kernels
            that run in place add up in another order; all others give the same bits.
        departs: the first operator whose value is not the ordinary run's; None if equal.
        path: the user's module that it is of.
        size_bytes: of the buffer.
        seconds, ordinary_seconds: of the two runs.
    """

    equal: bool
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
        if self.equal:
            return f"{where}: outputs equal ({error}); {self.ratio:.1f} times the ordinary run"
        first = f"'{self.departs}'" + (f" ({self.path})" if self.path else "")
        return f"{where}: outputs DIFFER ({error}); the first that departs is {first}"


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
        expected, ordinary_seconds = _ordinary(program, given)
        started = time.perf_counter()
        found = execute_in_arena(program, plan, given)
        seconds = time.perf_counter() - started
        errors = output_errors(_names(expected), _flat(expected), _flat(found))
        if has_evidence(errors):
            break
    else:
        raise ExecutionError(
            "nothing can be concluded from a run: the outputs are all zero or not finite on seeded "
            "inputs; give the model other weights"
        )
    error, bound = largest_error(errors), rounding_bound(program)
    equal = error <= bound
    departs = None if equal else _first_departing(program, plan, given, bound)
    origin = program.origins.get(departs or "")
    return Execution(
        equal, error, bound, departs, origin.path if origin else "",
        plan.arena.size_bytes, seconds, ordinary_seconds,
    )  # fmt: skip


def rounding_bound(program: Program) -> float:
    """Roundings on the longest path of operators, in parts of the largest value."""
    depth: dict[fx.Node, int] = {}
    for node in program.nodes:
        own = node.op not in ("placeholder", "get_attr", "output")
        depth[node] = own + max((depth[other] for other in node.all_input_nodes), default=0)
    floating = (
        type.dtype
        for node in program.nodes[:-1]
        for type in tensor_types(program.types[node.name])
        if type.dtype.is_floating_point
    )
    coarsest = max((torch.finfo(dtype).eps for dtype in set(floating)), default=0.0)
    return coarsest * max(depth.values(), default=0)


class _Ordinary(fx.Interpreter):
    """Every tensor a new one; random numbers are drawn as in the arena."""

    def __init__(self, program: Program, kept: frozenset[str]) -> None:
        super().__init__(evaluation_module(program))
        self._position = {node.name: index for index, node in enumerate(program.nodes)}
        self._kept = kept
        self.values: dict[str, Any] = {}

    def run_node(self, node: fx.Node) -> Any:
        torch.manual_seed(seed_of(self._position[node.name]))
        value = super().run_node(node)
        if node.name in self._kept:
            self.values[node.name] = value
        return value


def _ordinary(program: Program, inputs: Sequence[torch.Tensor]) -> tuple[Any, float]:
    with torch.no_grad(), torch.random.fork_rng():
        interpreter = _Ordinary(program, frozenset())
        started = time.perf_counter()
        outputs = interpreter.run(*inputs)
        return outputs, time.perf_counter() - started


def _first_departing(
    program: Program, plan: MemoryPlan, inputs: Sequence[torch.Tensor], bound: float
) -> str | None:
    """The first operator of the plan's order whose value is not the ordinary run's."""
    with torch.no_grad(), torch.random.fork_rng():
        interpreter = _Ordinary(program, frozenset(plan.order))
        interpreter.run(*inputs)
    departing: list[str] = []

    def compare(name: str, value: Any) -> None:
        if not departing:
            expected = interpreter.values[name]
            errors = output_errors(_names(expected), _flat(expected), _flat(value))
            if not largest_error(errors) <= bound:
                departing.append(name)

    execute_in_arena(program, plan, inputs, compare)
    return departing[0] if departing else None


def _flat(value: Any) -> list[torch.Tensor]:
    return list(tensors_of(value))


def _names(value: Any) -> list[str]:
    return [str(position) for position, _ in enumerate(tensors_of(value))]
