"""Compute standardised weights once and for all, for inference and for the passes that need it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from fxopt.edit import Edit
from fxopt.normfree.folding import fold_call, standardising
from fxopt.program import Program
from fxopt.results import Declined
from fxopt.rewrite import Preserves, Site, site


@dataclass(frozen=True)
class FoldScaledWS:
    """Turn layers with scaled weight standardisation into plain ones (for inference)."""

    name: ClassVar[str] = "fold_scaled_ws"
    preserves: ClassVar[Preserves] = Preserves.VALUES

    def sites(self, program: Program) -> Iterator[Site | Declined]:
        yield from map(site, standardising(program))

    def rewrite(self, site: Site, edit: Edit) -> None:
        fold_call(edit, site.node)


__all__ = ["FoldScaledWS"]
