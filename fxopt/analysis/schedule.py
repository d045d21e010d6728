"""The order of a dataflow graph that needs the least memory, or the best that a search finds.

The graph is split where every order passes, and each part is searched under limits that close in on
its optimum: a limit within which there is provably no order raises the lower bound, an order that
is found lowers the peak. A part matters only as far as its peak lies above what the worst part
cannot do without.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import networkx as nx

from fxopt.analysis.frontier import OutOfTime, sweep
from fxopt.analysis.graph import normalised
from fxopt.analysis.plan import NodeId, Schedule
from fxopt.analysis.problem import Problem, between, least_needs, problem_of, segments
from fxopt.analysis.validate import validate_schedule

WIDTHS = (100, 1_000, 10_000, 100_000, 400_000)
"""States that a level of a search may hold: first all parts are searched narrowly."""

TIME_LIMIT = 25.0
"""Seconds; few graphs need more than one."""

Progress = Callable[[int, int], None]
"""Is told the peak that was found and the lower bound, in bytes, after each step of the search."""


def schedule(
    graph: nx.DiGraph, time_limit: float = TIME_LIMIT, progress: Progress | None = None
) -> Schedule:
    """A topological order of ``graph`` with the least peak, in bytes.

    Where the search ends before that is proved, ``optimal`` is false and the lower bound says how
    much better another order might be. Ctrl-C ends it too. The same graph gives the same order, as
    long as the time limit does not interfere.

    Args:
        time_limit: seconds after which the best order so far is taken.
        progress: is told where the search stands.

    Raises:
        InvalidGraphError: the graph is malformed; see :mod:`fxopt.analysis.graph`.

    >>> graph = nx.DiGraph(["ib", "ia", "as", "bo", "so"])
    >>> sizes = {"i": 1, "b": 8, "a": 64, "s": 1, "o": 1}
    >>> nx.set_node_attributes(graph, sizes, "output_bytes")
    >>> found = schedule(graph)
    >>> found.order, found.peak_bytes, found.optimal
    (('i', 'a', 's', 'b', 'o'), 66, True)
    """
    graph = normalised(graph)
    start = program_order(graph)
    search = _Search(problem_of(graph, start))
    with suppress(OutOfTime, KeyboardInterrupt):
        for _ in search.steps(time.monotonic() + time_limit):
            if progress is not None:
                progress(search.peak, search.bound)
    order = tuple(start[number] for number in search.order())
    found = Schedule(order, search.peak, search.bound, search.peak == search.bound)
    validate_schedule(graph, found)
    return found


def program_order(graph: nx.DiGraph) -> list[NodeId]:
    """The nodes as the graph lists them, if that is an order of it; else a topological order."""
    seen: set[NodeId] = set()
    for node in graph:
        if not seen.issuperset(graph.pred[node]):
            return list(nx.topological_sort(graph))
        seen.add(node)
    return list(graph)


@dataclass
class _Part:
    """What lies between two points that every order passes.

    Attributes:
        problem: its operators alone.
        numbers: of these operators, in the whole problem.
        order: the best that was found, in numbers of the part.
        peak: bytes that it needs.
        bound: bytes that every order of it needs.
        backwards: the direction that gave the last answer; the next search takes it first.
    """

    problem: Problem
    numbers: Sequence[int]
    order: list[int]
    peak: int
    bound: int
    backwards: bool = True


def _parts(problem: Problem) -> Iterator[_Part]:
    needs = least_needs(problem)
    done, live = 0, problem.live
    for goal in segments(problem):
        part, numbers = between(problem, done, live, goal)
        order = list(part.operators)
        yield _Part(part, numbers, order, part.peak(order), max(needs[n] for n in numbers))
        for number in numbers:
            _, live = problem.run(done, live, number)
            done |= 1 << number


class _Search:
    """The parts of a problem and how far they are known.

    Attributes:
        parts: in the order in which they run.
        bound: bytes that every order of the problem needs: the largest bound of a part.
    """

    def __init__(self, problem: Problem) -> None:
        self.parts = list(_parts(problem))
        self.bound = max((part.bound for part in self.parts), default=0)

    @property
    def peak(self) -> int:
        return max((part.peak for part in self.parts), default=0)

    def order(self) -> Iterator[int]:
        """The operators' numbers, in the best order so far."""
        for part in self.parts:
            yield from (part.numbers[number] for number in part.order)

    def steps(self, deadline: float) -> Iterator[None]:
        """Search on, until it is known what is best or the widest search does not tell."""
        for width in WIDTHS:
            left = [part for part in self.parts if part.peak > self.bound]
            for part in sorted(left, key=lambda part: -part.peak):
                yield from self._narrow(part, width, deadline)

    def _narrow(self, part: _Part, width: int, deadline: float) -> Iterator[None]:
        """Bring a bound and the peak of ``part`` together, as far as searches of a width can tell.

        Limits are halved between the two. Where neither direction answers, the limits above and
        below are tried until little is left beside those without an answer.
        """
        unknown: list[int] = []
        limit: int | None = self.bound
        while limit is not None and part.peak > self.bound:
            if not _tried(part, limit, width, deadline):
                unknown.append(limit)
            self.bound = max(self.bound, part.bound)
            unknown = [each for each in unknown if self.bound <= each < part.peak]
            limit = _next_limit(self.bound, part.peak, unknown)
            yield


def _next_limit(low: int, high: int, unknown: Sequence[int]) -> int | None:
    """A limit in ``[low, high)`` that is worth a search, if there is one."""
    little = (high - low) // 8 + 1
    if not unknown:
        return (low + high) // 2
    if high - max(unknown) > little:
        return (max(unknown) + high) // 2
    if min(unknown) - low > little:
        return (low + min(unknown)) // 2
    return None


def _tried(part: _Part, limit: int, width: int, deadline: float) -> bool:
    """Whether the part is now known to have an order within the limit, or to have none."""
    for backwards in (part.backwards, not part.backwards):
        found = sweep(part.problem, limit, width, backwards=backwards, deadline=deadline)
        if found.order is not None:
            part.order, part.peak = found.order, part.problem.peak(found.order)
        elif found.complete:
            part.bound = min(found.refused, part.peak)
        else:
            continue
        part.backwards = backwards
        return True
    return False
