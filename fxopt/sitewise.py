"""Verification of programs whose float64 twin does not fit in memory: site by site.

The original runs once in its own dtype and the inputs of each rewritten region are recorded. Each
region is then computed in float64 from those, as it was and as it became.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any

import psutil
import torch
from torch import fx, nn

from fxopt.double import default_double, widened
from fxopt.errors import VerificationError
from fxopt.evidence import has_evidence, input_attempts, largest_error, output_errors
from fxopt.program import Program
from fxopt.results import OutputError, Verification

BOUND = 1e-12


def too_large_for_double(program: Program) -> bool:
    """Whether two float64 copies of ``program`` would take over half of the free memory."""
    module = program.graph_module
    elements = sum(t.numel() for t in (*module.parameters(), *module.buffers()))
    return 2 * 8 * elements > psutil.virtual_memory().available / 2


def verify_sites(
    pass_name: str, before: Program, after: Program, stands_for: Mapping[str, str],
    changed: frozenset[str],
) -> Verification:  # fmt: skip
    """Compare each changed value of ``before`` with the one that stands for it in ``after``.

    Raises:
        VerificationError: a region departs (it is named), or none is evidence.
    """
    started = time.perf_counter()
    pairs = _pairs(before, after, stands_for, changed)
    shared = _shared(before, after, stands_for, changed)
    wanted = {name for pair in pairs for name in _frontier(before, pair[0], shared)}
    shapes = [kind.shape for kind in before.inputs().values()]
    inputs = next(input_attempts(before, shapes, None))
    recorded = _record(before, inputs, wanted)
    errors: list[OutputError] = []
    for old, new in pairs:
        with torch.no_grad(), default_double():
            reference = _compute(before, old, recorded)
            found = _compute(after, new, recorded)
        errors += output_errors([old], [reference], [found])
        if errors and errors[-1].error is not None and not errors[-1].error <= BOUND:
            raise VerificationError(
                f"pass '{pass_name}' changed the function: '{old}' "
                f"({before.where(before.node(old))}) departs by {errors[-1].error:.1e} in float64"
            )
    if not has_evidence(errors):
        raise VerificationError(
            f"pass '{pass_name}' cannot be verified: every rewritten value is all zero or not finite"
        )
    dtype = str(inputs[0].dtype).removeprefix("torch.")
    return Verification(
        "float64", largest_error(errors), BOUND, tuple(errors), dtype, 0.0, 0.0, 0.0,
        int(inputs[0].shape[0]) if inputs[0].dim() else 1, time.perf_counter() - started,
        method="site by site on recorded inputs: the float64 model does not fit in memory",
        remarks=("the program as it ships was not run as a whole",),
    )  # fmt: skip


def _pairs(
    before: Program, after: Program, stands_for: Mapping[str, str], changed: frozenset[str]
) -> list[tuple[str, str]]:
    """Each value that was rewritten, and the one that stands for it."""
    alive = {node.name for node in after.nodes}
    pairs = [(old, new) for old, new in stands_for.items() if new in alive and old in before.types]
    moved = {new for _, new in pairs}
    return pairs + [(n, n) for n in changed if n in before.types and n in alive and n not in moved]


def _shared(
    before: Program, after: Program, stands_for: Mapping[str, str], changed: frozenset[str]
) -> frozenset[str]:
    """Names of values that both programs have and that mean the same."""
    names = {node.name for node in after.nodes} & set(before.types)
    return frozenset(names - changed - set(stands_for))


def _frontier(program: Program, name: str, shared: frozenset[str]) -> set[str]:
    found: set[str] = set()
    pending = list(program.node(name).all_input_nodes)
    while pending:
        node = pending.pop()
        if node.name in shared:
            found.add(node.name)
        else:
            pending += node.all_input_nodes
    return found


def _record(
    program: Program, inputs: list[torch.Tensor], wanted: set[str]
) -> dict[str, Any]:
    recorded: dict[str, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            value = super().run_node(node)
            if node.name in wanted:
                recorded[node.name] = value
            return value

    with torch.no_grad():
        Recorder(program.graph_module).run(*inputs)
    return recorded


def _compute(program: Program, name: str, known: Mapping[str, Any]) -> Any:
    """The value of node ``name`` in float64, from the recorded values."""
    values: dict[fx.Node, Any] = {}
    interpreter = fx.Interpreter(program.graph_module)

    def value_of(node: fx.Node) -> Any:
        if node not in values:
            if node.name in known:
                values[node] = _wide(known[node.name])
            else:
                values[node] = run(node)
        return values[node]

    def run(node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
        if node.op == "call_module":
            return _double_module(program, node)(*args, **kwargs)
        call: Callable[..., Any] = getattr(interpreter, node.op)
        return _wide(call(node.target, args, kwargs))

    return value_of(program.node(name))


def _wide(value: Any) -> Any:
    return torch.utils._pytree.tree_map_only(torch.Tensor, widened, value)


def _double_module(program: Program, node: fx.Node) -> nn.Module:
    module = program.module(node)
    assert module is not None
    return copy.deepcopy(module).double()
