"""Which end and which grid of a stage: every pair, costed, and the best trades of them.

A choice costs memory (the peak of the patched program) and work (multiply-accumulates of halos that
are computed again).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, product

from torch import fx

from fxopt.analysis.memory_model import MemoryModel
from fxopt.patching.cost import Candidate, Choice, Search
from fxopt.program import Program

MOST = 8
"""Rows and columns of tiles that are tried."""


@dataclass(frozen=True)
class Choices:
    """What can be chosen from.

    Attributes:
        front: by rising overhead, each with a smaller peak than all before it; the program as it
            is, which has no overhead, is not one of them.
        before_bytes: the peak of the program as it is.
        tried: how many ways there are.
        largest_map: height and width of the largest result of a part; None if there is no part.
        blocked: why no part reaches further, with the node; empty if nothing stands in the way.
    """

    front: tuple[Choice, ...]
    before_bytes: int
    blocked: str
    tried: int = 0
    largest_map: tuple[int, int] | None = None

    def within(self, max_overhead: float) -> Choice | None:
        """The least peak at no more overhead than that."""
        return next((c for c in reversed(self.front) if c.overhead <= max_overhead), None)

    def fitting(self, sram: int) -> Iterator[Choice]:
        """Those with no larger peak than that, by rising overhead."""
        return (c for c in self.front if c.peak_bytes <= sram)


def choices(
    program: Program,
    model: MemoryModel,
    until: fx.Node | None = None,
    grid: tuple[int, int] | None = None,
) -> Choices:
    """The best trades of peak and overhead, of stages that begin at the program's first input.

    Args:
        until: the end; all are tried if None.
        grid: rows and columns of tiles; all up to eight of each if None.

    With both, the front is that one choice, whatever its peak.

    Raises:
        NotLocal: the given end cannot be reached, with the node that blocks.
    """
    entry = next(node for node in program.nodes if node.op == "placeholder")
    search = Search(program, model, entry)
    regions, blocked = search.regions(until)
    largest = max([(each.height, each.width) for each in regions], default=None)
    grids = [grid] if grid else list(product(range(1, MOST + 1), repeat=2))
    pairs = [(each, r, c) for each in regions for r, c in grids if each.can_cut(r, c)]
    if until is not None and grid is not None:
        front = [Candidate(*pair).choice() for pair in pairs]
    else:
        limit = search.before_bytes
        candidates = [Candidate(*pair) for pair in pairs if pair[0].may_be_below(limit)]
        front = list(_front(candidates, limit))
    return Choices(tuple(front), search.before_bytes, blocked, len(pairs), largest)


def _front(candidates: Sequence[Candidate], before_bytes: int) -> Iterator[Choice]:
    """Those with a smaller peak than all of no more overhead."""
    least = before_bytes
    for _, tied in groupby(sorted(candidates, key=_overhead), key=_overhead):
        best: Choice | None = None
        for candidate in tied:
            if candidate.is_below(least):
                best = candidate.choice()
                least = best.peak_bytes
        if best is not None:
            yield best


def _overhead(candidate: Candidate) -> float:
    return candidate.overhead
