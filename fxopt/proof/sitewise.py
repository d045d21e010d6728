"""Verification of programs whose float64 twin does not fit in memory: site by site.

The original runs once in its own dtype and the values that each site reads are recorded. From them
the site is computed in float64, as it was and as it became; the values that others read of it are
compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from torch import fx

from fxopt.errors import VerificationError
from fxopt.program import Program
from fxopt.proof.double import default_double, to_double, widened
from fxopt.proof.evidence import SEED, has_evidence, input_attempts, largest_error, output_errors
from fxopt.proof.running import evaluation_module
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

    ``apply(copy, chosen)`` rewrites these sites, by index, of a copy of ``program``.
    """

    program: Program
    sites: tuple[frozenset[str], ...]
    apply: Callable[[Program, Sequence[int]], Rewriting]

    def only(self, indices: Sequence[int]) -> Round:
        """The round with no other sites than these."""
        sites = tuple(self.sites[index] for index in indices)
        return replace(
            self,
            sites=sites,
            apply=lambda copy, chosen: self.apply(copy, [indices[index] for index in chosen]),
        )


def too_large_for_double(program: Program) -> bool:
    """Whether two float64 copies of ``program`` would take over half of the free memory."""
    module = program.graph_module
    return _wide_bytes((*module.parameters(), *module.buffers())) > _free_bytes() / 2


def _wide_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return 2 * 8 * sum(tensor.numel() for tensor in tensors)


def _free_bytes() -> int:
    return int(psutil.virtual_memory().available)


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
            f"pass '{pass_name}' cannot be verified: every rewritten value is all zero or not "
            "finite on seeded inputs; give the model other weights or example inputs, or "
            "verify=False"
        )
    dtype = str(inputs[0].dtype).removeprefix("torch.")
    return Verification(
        "float64", largest_error(errors), BOUND, tuple(errors), dtype, 0.0, 0.0, 0.0,
        int(inputs[0].shape[0]) if inputs[0].dim() else 1, time.perf_counter() - started,
        method=f"site by site on recorded inputs: {why}",
        remarks=("the program as it ships was not run as a whole",),
    )  # fmt: skip


def _round_errors(pass_name: str, one: Round, inputs: list[torch.Tensor]) -> Iterator[OutputError]:
    before = one.program
    operands = {n.name: [o.name for o in n.all_input_nodes] for n in before.nodes}
    recorded = _record(before, inputs, {o for site in one.sites for n in site for o in operands[n]})
    for chosen in _groups(one):
        sites = [one.sites[index] for index in chosen]
        nodes = frozenset[str]().union(*sites)
        wide = to_double(before, only=nodes)
        rewriting = one.apply(wide, chosen)
        after = rewriting.program
        alive = {node.name for node in after.nodes}
        pairs = [
            [(old, _twin(pass_name, rewriting, old, alive)) for old in _read_outside(before, site)]
            for site in sites
        ]
        # what a name of the rewritten program means in the original: outside of the sites, itself
        meaning = {new: old for site_pairs in pairs for old, new in site_pairs}
        meaning |= {name: name for name in before.types.keys() - nodes}
        for site, site_pairs in zip(sites, pairs, strict=True):
            given = {new: old for new, old in meaning.items() if old not in site}
            missing = _given(after, [new for _, new in site_pairs], given) - recorded.keys()
            if missing:  # the new nodes read what the site did not
                recorded |= _record(before, inputs, missing)
            known = {name: value for name, value in recorded.items() if name not in site}
            known_after = {new: known[old] for new, old in given.items() if old in known}
            for old, new in site_pairs:
                with torch.no_grad(), default_double():
                    reference = _compute(wide, old, known)
                    found = _compute(after, new, known_after)
                for error in output_errors([old], [reference], [found]):
                    if error.error is not None and not error.error <= BOUND:
                        where = before.where(before.node(old))
                        raise VerificationError(
                            f"pass '{pass_name}' changed the function: '{old}' ({where}) departs "
                            f"by {error.error:.1e} in float64"
                        )
                    yield error


def _groups(one: Round) -> Iterator[list[int]]:
    """Indices of sites in groups that an eighth of the free memory holds in float64."""
    budget = _free_bytes() / 8
    group: list[int] = []
    taken = 0
    for index, site in enumerate(one.sites):
        modules = [one.program.module(node) for node in one.program.nodes if node.name in site]
        size = _wide_bytes(t for m in modules if m is not None for t in m.parameters())
        if group and taken + size > budget:
            yield group
            group, taken = [], 0
        group.append(index)
        taken += size
    yield group


def _twin(pass_name: str, rewriting: Rewriting, old: str, alive: set[str]) -> str:
    """The node that has the value of ``old`` now."""
    new = rewriting.stands_for.get(old, old)
    if new not in alive:
        raise VerificationError(f"pass '{pass_name}' removed '{old}', and no value stands for it")
    return new


def _read_outside(program: Program, site: frozenset[str]) -> list[str]:
    """The nodes of ``site`` that others read, in topological order."""
    return [
        node.name
        for node in program.nodes
        if node.name in site and any(user.name not in site for user in node.users)
    ]


def _given(after: Program, wanted: Iterable[str], given: Mapping[str, str]) -> set[str]:
    """The values of the original that ``wanted`` nodes of ``after`` are computed from."""
    found: set[str] = set()
    seen: set[str] = set()
    todo = list(wanted)
    while todo:
        name = todo.pop()
        if name in given:
            found.add(given[name])
        elif name not in seen:
            seen.add(name)
            todo += [operand.name for operand in after.node(name).all_input_nodes]
    return found


def _record(program: Program, inputs: list[torch.Tensor], wanted: set[str]) -> dict[str, Any]:
    recorded: dict[str, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            value = super().run_node(node)
            if node.name in wanted:
                recorded[node.name] = value
            return value

    torch.manual_seed(SEED)
    with torch.no_grad():
        Recorder(evaluation_module(program)).run(*inputs)
    return recorded


def _compute(program: Program, name: str, known: Mapping[str, Any]) -> Any:
    """The value of node ``name``, from the recorded values widened to float64."""
    interpreter = fx.Interpreter(evaluation_module(program))
    values: dict[fx.Node, Any] = {}

    def value_of(node: fx.Node) -> Any:
        if node.name in known:
            return torch.utils._pytree.tree_map_only(torch.Tensor, widened, known[node.name])
        if node not in values:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
            values[node] = getattr(interpreter, node.op)(node.target, args, kwargs)
        return values[node]

    torch.manual_seed(SEED)
    return value_of(program.node(name))
