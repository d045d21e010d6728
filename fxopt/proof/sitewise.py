"""Verification of programs whose float64 twin does not fit in memory: site by site.

The original runs once in its own dtype and the inputs of each rewritten region are recorded. Each
region is then computed in float64 from those, as it was and as it became.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import fx

from fxopt.proof.double import default_double, to_double, widened
from fxopt.errors import VerificationError
from fxopt.proof.evidence import has_evidence, input_attempts, largest_error, output_errors
from fxopt.program import Program
from fxopt.results import OutputError, Verification

BOUND = 1e-12


@dataclass(frozen=True)
class Rewriting:
    """A rewritten copy, which node stands for each removed one, and the nodes that changed."""

    program: Program
    stands_for: Mapping[str, str]
    changed: frozenset[str]


@dataclass(frozen=True)
class Round:
    """Sites that were rewritten together, by node names, and the program they were found in.

    ``apply(copy, index)`` rewrites site ``index`` (or all, if None) of a copy of ``program``.
    """

    program: Program
    sites: tuple[frozenset[str], ...]
    apply: Callable[[Program, int | None], Rewriting]


def too_large_for_double(program: Program) -> bool:
    """Whether two float64 copies of ``program`` would take over half of the free memory."""
    module = program.graph_module
    elements = sum(t.numel() for t in (*module.parameters(), *module.buffers()))
    return 2 * 8 * elements > psutil.virtual_memory().available / 2


def verify_sites(
    pass_name: str, rounds: Sequence[Round], why: str, example: Sequence[Any] | None
) -> Verification:
    """Compare each value that was rewritten with the one that stands for it now.

    ``why`` says why the whole program is not compared.

    Raises:
        VerificationError: a region departs (it is named), or none is evidence.
    """
    started = time.perf_counter()
    before = rounds[0].program
    shapes = [kind.shape for kind in before.inputs().values()]
    inputs = next(input_attempts(before, shapes, example))
    errors = [error for one in rounds for error in _round_errors(pass_name, one, inputs)]
    if not has_evidence(errors):
        raise VerificationError(
            f"pass '{pass_name}' cannot be verified: every rewritten value is all zero or not finite "
            "on seeded inputs; give the model other weights or example inputs, or verify=False"
        )
    dtype = str(inputs[0].dtype).removeprefix("torch.")
    return Verification(
        "float64", largest_error(errors), BOUND, tuple(errors), dtype, 0.0, 0.0, 0.0,
        int(inputs[0].shape[0]) if inputs[0].dim() else 1, time.perf_counter() - started,
        method=f"site by site on recorded inputs: {why}",
        remarks=("the program as it ships was not run as a whole",),
    )  # fmt: skip


def _round_errors(
    pass_name: str, one: Round, inputs: list[torch.Tensor]
) -> Iterator[OutputError]:
    before = one.program
    wanted = {
        operand.name
        for site in one.sites
        for name in site
        for operand in before.node(name).all_input_nodes
    }
    recorded = _record(before, inputs, wanted)
    for index, site in enumerate(one.sites):
        wide = to_double(before, only=site)
        rewriting = one.apply(wide, index)
        known = {name: recorded[name] for name in _shared(before, rewriting) & set(recorded)}
        for old, new in _pairs(before, rewriting):
            with torch.no_grad(), default_double():
                reference = _compute(wide, old, known)
                found = _compute(rewriting.program, new, known)
            (error,) = output_errors([old], [reference], [found])
            if error.error is not None and not error.error <= BOUND:
                raise VerificationError(
                    f"pass '{pass_name}' changed the function: '{old}' "
                    f"({before.where(before.node(old))}) departs by {error.error:.1e} in float64"
                )
            yield error


def _pairs(before: Program, rewriting: Rewriting) -> list[tuple[str, str]]:
    """Each value that was rewritten, and the one that stands for it."""
    alive = {node.name for node in rewriting.program.nodes}
    replaced = rewriting.stands_for.items()
    pairs = [(old, new) for old, new in replaced if new in alive and old in before.types]
    moved = {new for _, new in pairs}
    in_place = sorted((rewriting.changed & alive & set(before.types)) - moved)
    return pairs + [(name, name) for name in in_place]


def _shared(before: Program, rewriting: Rewriting) -> frozenset[str]:
    """Names of values that both programs have and that mean the same."""
    names = {node.name for node in rewriting.program.nodes} & set(before.types)
    return frozenset(names - rewriting.changed - set(rewriting.stands_for))


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
    """The value of node ``name``, from the recorded values widened to float64."""
    interpreter = fx.Interpreter(program.graph_module)
    values: dict[fx.Node, Any] = {}

    def value_of(node: fx.Node) -> Any:
        if node.name in known:
            return torch.utils._pytree.tree_map_only(torch.Tensor, widened, known[node.name])
        if node not in values:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
            values[node] = getattr(interpreter, node.op)(node.target, args, kwargs)
        return values[node]

    return value_of(program.node(name))
