"""The pass contract, and the driver that does all that passes have in common."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import fx

from fxopt.edit import Edit, Untied
from fxopt.errors import InvalidProgramError, PassError
from fxopt.isolation import isolated
from fxopt.program import Program
from fxopt.proof.sitewise import Rewriting, Round
from fxopt.proof.verify import verify_interface, verify_values
from fxopt.results import Declined, PassRecord, PassResult, Rewritten, Verification

MAX_ROUNDS = 100


class Preserves(enum.Enum):
    """What a pass promises of the function: the same VALUES, or only the same INTERFACE."""

    VALUES = "values"
    INTERFACE = "interface"


@dataclass(frozen=True)
class Site:
    """A place that will be rewritten.

    ``node`` is the one that reports name, ``nodes`` all that the rewrite changes or removes (their
    other readers apart), ``facts`` what the check found out (plain values and node names; the
    rewrite runs on more than one copy). ``preserves`` is what is promised of this site, where
    that is more than the pass promises of all.
    """

    node: str
    nodes: frozenset[str]
    facts: Any = None
    preserves: Preserves | None = None


def site(*nodes: fx.Node, facts: Any = None, preserves: Preserves | None = None) -> Site:
    """A site over ``nodes``, named after the first."""
    return Site(nodes[0].name, frozenset(node.name for node in nodes), facts, preserves)


def declined(program: Program, node: fx.Node, reason: str) -> Declined:
    """``node`` is a candidate that stays as it is because of ``reason``."""
    return Declined(node.name, program.where(node), reason)


@runtime_checkable
class Pass(Protocol):
    """A rewrite as a value: a frozen dataclass whose fields are its options.

    ``sites`` finds every candidate and says of each that it will be rewritten, or why not; it
    changes nothing. ``rewrite`` edits one site and may return a note for the user. A pass may also
    have ``evidence(before, after)``: figures by name for the record; and ``once = True``, if what
    it has rewritten is not to be looked at again.
    """

    name: ClassVar[str]

    @property
    def preserves(self) -> Preserves:
        """What this pass, as configured, promises."""

    def sites(self, program: Program) -> Iterator[Site | Declined]:
        """Every candidate in ``program``."""

    def rewrite(self, site: Site, edit: Edit) -> str | None:
        """Rewrite ``site`` in the copy that ``edit`` holds."""


def options_of(which: Pass) -> dict[str, Any]:
    """The options of a pass by name; one that holds data (a calibration set) as its text."""
    if not is_dataclass(which) or isinstance(which, type):
        return {}
    given = {field.name: getattr(which, field.name) for field in fields(which)}
    return {n: str(v) if getattr(v, "holds_data", False) else v for n, v in given.items()}


def run_pass(
    which: Pass, program: Program, *, example: Sequence[Any] | None = None, verify: bool = True
) -> PassResult:
    """Run one pass: find sites, rewrite a copy, check its form, and prove what the pass promises.

    Args:
        which: the pass.
        program: stays as it is.
        example: tensors to verify with, flat, instead of seeded ones (integer inputs, say).
        verify: False leaves the proof out, for very large models; the record says so.

    Raises:
        VerificationError: the rewritten program departs; the first node that does is named.
        PassError: the pass finds new sites without end, changes a tensor in place, or rewrites
            nodes that its sites do not name.
    """
    with isolated():
        after, rounds, record = _rewrite(which, program)
        unverified = "" if verify else "switched off"
        if program.is_on_meta:
            unverified = "meta"
        verification = None
        if not unverified:
            verification = _verify(record.preserves, which.name, program, after, rounds, example)
        evidence = dict(getattr(which, "evidence", lambda *_: {})(program, after))
        if record.exact and not unverified:
            evidence["exact_sites"] = _prove(which.name, record.exact, example)
    if record.untied:
        evidence["untied"] = [asdict(untied) for untied in record.untied]
    return PassResult(
        program,
        after,
        PassRecord(which.name, options_of(which), record.preserves.value, record.rewritten,
                   record.declined, evidence, verification, unverified),
    )  # fmt: skip


@dataclass(frozen=True)
class _Found:
    rewritten: tuple[Rewritten, ...]
    declined: tuple[Declined, ...]
    untied: tuple[Untied, ...]
    preserves: Preserves
    exact: tuple[Round, ...]
    """What was promised to keep values though not all was."""


def _rewrite(which: Pass, program: Program) -> tuple[Program, list[Round], _Found]:
    rounds: list[Round] = []
    exact: list[Round] = []
    promises: set[Preserves] = set()
    rewritten: list[Rewritten] = []
    untied: list[Untied] = []
    current = program
    for _ in range(MAX_ROUNDS):
        sites, refused = _disjoint(which, current)
        promises |= {found.preserves or which.preserves for found in sites}
        if not sites:
            break
        rounds.append(_round(which, current, sites))
        keeping = [i for i, one in enumerate(sites) if one.preserves is Preserves.VALUES]
        exact += [rounds[-1].only(keeping)] if keeping else []
        edit, current, notes = _apply(which, current, sites)
        origins = program.origins
        rewritten += [
            Rewritten(s.node, str(origins[s.node]) if s.node in origins else s.node, note or "")
            for s, note in zip(sites, notes, strict=True)
        ]
        untied += edit.untied()
        if getattr(which, "once", False):
            break
    else:
        raise PassError(
            f"pass '{which.name}' still finds sites after {MAX_ROUNDS} rounds; its rewrite does "
            "not remove what its sites() looks for"
        )
    # the least that was promised of any site
    least = Preserves.VALUES if promises == {Preserves.VALUES} else which.preserves
    mixed = () if least is Preserves.VALUES else tuple(exact)
    return current, rounds, _Found(tuple(rewritten), refused, tuple(untied), least, mixed)


def _apply(
    which: Pass, program: Program, sites: Sequence[Site]
) -> tuple[Edit, Program, list[str | None]]:
    edit = Edit(program)
    versions = _versions(program)
    notes = [which.rewrite(found, edit) for found in sites]
    after = edit.commit()
    written = [name for name, version in _versions(program).items() if version != versions[name]]
    if written:
        raise PassError(
            f"pass '{which.name}' changes '{written[0]}' in place; modules are values: give a new "
            "one to edit.replace_module"
        )
    named = frozenset[str]().union(*(found.nodes for found in sites))
    touched = (edit.changed | edit.stands_for.keys()) & program.types.keys()
    for name in sorted(touched - named):
        raise PassError(
            f"pass '{which.name}' rewrites '{name}' ({program.where(program.node(name))}), which "
            "is in none of its sites; a site names every node that its rewrite changes or removes"
        )
    return edit, after, notes


def _versions(program: Program) -> dict[str, int]:
    """How often each tensor was written; torch counts it."""
    module = program.graph_module
    named = (*module.named_parameters(), *module.named_buffers())
    return {name: tensor._version for name, tensor in named}


def _round(which: Pass, program: Program, sites: list[Site]) -> Round:
    def apply(copy: Program, chosen: Sequence[int]) -> Rewriting:
        try:
            edit, after, _ = _apply(which, copy, [sites[index] for index in chosen])
        except InvalidProgramError as error:
            raise PassError(
                f"pass '{which.name}' cannot be repeated in float64, which is its proof: {error}; "
                "make new tensors in the dtype of those that they replace"
            ) from error
        return Rewriting(after, edit.stands_for, frozenset(edit.changed))

    return Round(program, tuple(found.nodes for found in sites), apply)


def _disjoint(which: Pass, program: Program) -> tuple[list[Site], tuple[Declined, ...]]:
    sites: list[Site] = []
    refused: list[Declined] = []
    taken: dict[str, str] = {}
    for found in which.sites(program):
        if isinstance(found, Declined):
            refused.append(found)
            continue
        shared = sorted(found.nodes & taken.keys())
        if shared:
            where = program.where(program.node(found.node))
            reason = f"it shares '{shared[0]}' with the site at '{taken[shared[0]]}'"
            refused.append(Declined(found.node, where, reason))
            continue
        sites.append(found)
        taken |= dict.fromkeys(found.nodes, found.node)
    return sites, tuple(refused)


def _prove(name: str, exact: Sequence[Round], example: Sequence[Any] | None) -> dict[str, Any]:
    """Sites that keep values among others that do not, proved by themselves."""
    proofs = [
        verify_values(name, one.program, one.apply(one.program, range(len(one.sites))).program,
                      [one], example)
        for one in exact
    ]  # fmt: skip
    return {
        "proved": sum(len(one.sites) for one in exact),
        "max_error": max(proof.max_error for proof in proofs),
        "bound": max(proof.bound for proof in proofs),
    }


def _verify(
    promised: Preserves, name: str, before: Program, after: Program, rounds: list[Round],
    example: Sequence[Any] | None,
) -> Verification:  # fmt: skip
    if promised is Preserves.INTERFACE:
        return verify_interface(name, before, after, example)
    return verify_values(name, before, after, rounds, example)


__all__ = [
    "Declined", "Pass", "Preserves", "Site", "declined", "options_of", "run_pass", "site",
]  # fmt: skip
