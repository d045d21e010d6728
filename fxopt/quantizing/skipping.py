"""The operators that the user wants to keep in float, by path."""

from __future__ import annotations

from torch import fx

from fxopt.errors import PreconditionError
from fxopt.paths import Paths
from fxopt.program import Origin, Program


def skipped(program: Program, skip: Paths | None, pass_name: str) -> dict[fx.Node, str]:
    """The operators of ``skip`` and below it, and that it says so.

    Raises:
        PreconditionError: it names a path at which no operator is.
    """
    if skip is None or not any(skip.names):
        return {}
    found: dict[fx.Node, str] = {}
    met: set[str] = set()
    for node in program.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        paths = (program.origins.get(node.name, Origin()).path, str(node.target), node.name)
        names = {name for path in paths if (name := skip.holding(path))}
        if names:
            met |= names
            found[node] = f"it is of skip={skip}"
    for name in filter(None, skip.names):
        if name not in met:
            raise PreconditionError(
                f"{pass_name}: no operator is at '{name}'; skip takes paths of modules as in "
                "named_modules()"
            )
    return found
