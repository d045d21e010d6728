"""Modules that the user names by path, as an option of a pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar


class Paths(str):
    """Modules by path, with commas between them; a module stands for all that it holds.

    >>> Paths(["stem", "stages.0"]).holding("stages.0.conv")
    'stages.0'
    """

    form: ClassVar[str] = "PATH,..."
    listed: ClassVar[bool] = True

    def __new__(cls, paths: str | Iterable[str]) -> Paths:
        return super().__new__(cls, paths if isinstance(paths, str) else ",".join(paths))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.split(","))

    def holding(self, path: str) -> str:
        """The first of the names that is ``path`` or holds it; empty if none does."""
        found = (name for name in self.names if path == name or path.startswith(f"{name}."))
        return next(found, "")
