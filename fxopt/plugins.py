"""Passes of other packages, announced by the entry-point group ``fxopt.passes``.

An entry point names a pass class. What cannot be used (it does not import, is no pass, bears a name
that is taken) is kept with its reason, so that a broken package is no hindrance to the others.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from fxopt.options import option_types, type_text
from fxopt.passes import BUILT_IN
from fxopt.rewrite import Pass

GROUP = "fxopt.passes"


@dataclass(frozen=True)
class BrokenPass:
    """A pass that cannot be used: its name, the package that announces it, and why."""

    name: str
    source: str
    reason: str

    def __str__(self) -> str:
        return f"pass '{self.name}' of {self.source} cannot be used: {self.reason}"


@dataclass(frozen=True)
class FoundPasses:
    """Every pass class by name, and those that cannot be used."""

    usable: Mapping[str, type[Pass]]
    broken: tuple[BrokenPass, ...]


def found_passes() -> FoundPasses:
    """fxopt's own passes, and those of the packages installed now.

    fxopt's own names cannot be taken. Of two packages that announce the same name neither has it:
    which of them came first would depend on the installation.
    """
    usable: dict[str, type[Pass]] = {kind.name: kind for kind in BUILT_IN}
    own = frozenset(usable)
    announced: dict[str, dict[str, EntryPoint]] = defaultdict(dict)
    for point in entry_points(group=GROUP):
        # A package seen twice (a source tree beside its installed self) announces the same thing.
        announced[point.name].setdefault(f"{_source(point)} {point.value}", point)
    broken = []
    for name, points in sorted(announced.items()):
        reason = _clash(name, list(points.values()), own)
        if not reason:
            (point,) = points.values()
            found = _loaded(point)
            if not isinstance(found, str):
                usable[name] = found
                continue
            reason = found
        broken += [BrokenPass(name, _source(point), reason) for point in points.values()]
    return FoundPasses(usable, tuple(broken))


def _source(point: EntryPoint) -> str:
    return f"'{point.dist.name}'" if point.dist is not None else "an unknown package"


def _clash(name: str, points: list[EntryPoint], own: frozenset[str]) -> str:
    sources = " and ".join(sorted(_source(point) for point in points))
    if name in own:
        return f"'fxopt' itself and {sources} have a pass of that name; rename the latter's"
    if len(points) > 1:
        return f"{sources} announce it both; uninstall one, or give transform() an instance"
    return ""


def _loaded(point: EntryPoint) -> type[Pass] | str:
    """The pass class, or why there is none."""
    try:
        found = point.load()
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split())
        return f"'{point.value}' does not load ({type(error).__name__}: {reason})"
    wrong = _fault(found, point.name)
    return f"'{point.value}' {wrong}" if wrong else found  # type: ignore[no-any-return]


def _fault(found: Any, name: str) -> str:
    """Why ``found`` cannot be the pass ``name``, or empty."""
    is_value: bool = inspect.isclass(found) and dataclasses.is_dataclass(found)
    if not is_value:
        return "is no pass: a pass is a frozen dataclass"
    for member in ("name", "preserves", "sites", "rewrite"):
        if not hasattr(found, member):
            return f"is no pass: it has no '{member}'"
    if found.name != name:
        return f"calls itself '{found.name}'; give the entry point that name"
    try:
        for kind in option_types(found).values():
            type_text(kind)
    except Exception as error:
        return f"has an option of a type that has no text form ({error})"
    return ""
