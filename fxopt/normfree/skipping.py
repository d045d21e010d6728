"""The norms that the user wants to keep, by path."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain

from torch import fx

from fxopt.errors import PreconditionError
from fxopt.norms import batch_norms
from fxopt.paths import Paths
from fxopt.program import Origin, Program

_SHOWN = 8


def kept(program: Program, skip: Paths | None, pass_name: str) -> dict[fx.Node, str]:
    """The norms of ``skip``, and that it says so.

    Raises:
        PreconditionError: it names a path at which no BatchNorm is.
    """
    if skip is None:
        return {}
    norms = batch_norms(program)
    paths = _paths(program, norms)
    for name in skip.names:
        if not any(map(Paths(name).holding, chain.from_iterable(paths.values()))):
            raise PreconditionError(
                f"{pass_name}: no BatchNorm is at '{name}'; {_there_are(program, norms)}"
            )
    found = [norm for norm in norms if any(map(skip.holding, paths[norm]))]
    return dict.fromkeys(found, f"it is of skip={skip}")


def _paths(program: Program, norms: Sequence[fx.Node]) -> dict[fx.Node, set[str]]:
    """All names that the user has for each of ``norms``."""
    names: dict[int, set[str]] = defaultdict(set)
    for path, module in program.graph_module.named_modules(remove_duplicate=False):
        names[id(module)].add(path)
    return {
        norm: {program.origins.get(norm.name, Origin()).path, *names[id(program.module(norm))]}
        for norm in norms
    }


def _there_are(program: Program, norms: Sequence[fx.Node]) -> str:
    paths = [program.where(norm) for norm in norms]
    more = f", and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return f"there are {', '.join(paths[:_SHOWN])}{more}" if paths else "there is none"
