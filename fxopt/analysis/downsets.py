"""Is there an order that never needs more than a limit? An exact search over downsets.

The bytes that are live after a downset are a submodular function ``f`` of it. Hence (ours; the idea
is that of hill-valley segments, Liu 1987, on any graph): if from a downset P some Q ⊋ P can be
reached within the limit, and f(Q) ≤ f(Z) for all P ⊆ Z ⊆ Q, then whatever can be reached from P can
be reached by way of Q: run Q first and every later step has no more live than it had, and as many
operands to overwrite. So the search forgets P and all that it meant to try there, and goes on at Q.
It climbs only where it must, and where a climb leads nowhere no state below it need be left
another way.

The search also runs backwards, from the end, on the same function; often one of the two directions
is short where the other is hopeless. There an operator that is moved to the end may read the buffer
that another one would have overwritten; such a step is never taken for granted (``contested``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fxopt.analysis.problem import Problem, bits

DEPTH = 40
"""Searches within searches; one that would go deeper is left out, which costs time alone."""


class Forward:
    """From the first operator to the last."""

    def __init__(self, problem: Problem) -> None:
        self.waits_for, self.leads_to = problem.reads, _transposed(problem.reads)
        self.far = problem.after
        self.live = problem.live
        self.run = problem.run

    def dominates(self, state: int, later: int) -> bool:
        return True


class Backward:
    """From the last operator to the first: a state holds those that run at the end."""

    def __init__(self, problem: Problem) -> None:
        self.waits_for, self.leads_to = _transposed(problem.reads), problem.reads
        self.far = problem.before
        self.problem = problem
        self.contested = _contested(problem)
        live, done = problem.live, 0
        for operator in problem.operators:
            _, live = problem.run(done, live, operator)
            done |= 1 << operator
        self.live = live

    def run(self, state: int, live: int, operator: int) -> tuple[int, int]:
        problem = self.problem
        done = problem.everything & ~(state | 1 << operator)
        # Before the operator ran, its result was not there and what it freed was.
        needed, after = problem.run(done, 0, operator)
        return needed + live - after, live - after

    def dominates(self, state: int, later: int) -> bool:
        if not self.contested:
            return True
        return not any(self.contested.get(op, 0) & ~later for op in bits(later & ~state))


def _transposed(masks: tuple[int, ...]) -> tuple[int, ...]:
    result = [0] * len(masks)
    for index, mask in enumerate(masks):
        for other in bits(mask):
            result[other] |= 1 << index
    return tuple(result)


def _contested(problem: Problem) -> dict[int, int]:
    """By operator, those that could overwrite what it reads if it has run before them."""
    contested: dict[int, int] = {}
    for operator in problem.operators:
        for tensor in problem.inplace[operator]:
            readers = problem.users[tensor] & ~(1 << operator)
            if problem.kept[tensor] or readers & problem.after[operator]:
                continue
            for reader in bits(readers & ~problem.before[operator]):
                contested[reader] = contested.get(reader, 0) | 1 << operator
    return contested


class Exhausted(Exception):
    """The search has looked at as many states as it was allowed."""


@dataclass(frozen=True)
class State:
    """The operators that were passed, those that can be next, and the bytes that are live."""

    passed: int
    ready: int
    live: int


@dataclass
class Climb:
    """A state that the search leaves upwards, by each of ``choices`` in turn.

    Attributes:
        choices: operators left to try, the last one next.
        taken: the one under way.
        failed: mask of those that lead nowhere.
        length: of the path to the state.
    """

    state: State
    choices: list[int]
    length: int
    taken: int = -1
    failed: int = 0


@dataclass
class Search:
    """Orders of which no step needs more than ``limit`` bytes.

    Attributes:
        states: how many states it may still climb from.
        refused: the least that a step beyond the limit needed; if there is no order within the
            limit, no order needs less than this.
        dead: operators passed in states from which nothing leads on.
    """

    direction: Forward | Backward
    limit: int
    states: int
    refused: float = math.inf
    dead: set[int] = field(default_factory=set)

    def order(self, everything: int) -> list[int] | None:
        """All operators as they are passed, or None if the limit is too low.

        Raises:
            Exhausted: there is no saying within the allowed number of states.
        """
        waits_for = self.direction.waits_for
        ready = sum(1 << operator for operator in bits(everything) if not waits_for[operator])
        found = self._lower(State(0, ready, self.direction.live), everything, True, 0)
        return None if found is None else found[1]

    def _lower(
        self, state: State, allowed: int, whole: bool, depth: int
    ) -> tuple[State, list[int]] | None:
        """The first state past this one without more live bytes, by ``allowed`` operators alone.

        If the ``whole`` is wanted the search goes on from there, until all operators are passed.
        """
        path: list[int] = []
        climbs: list[Climb] = []
        while True:
            while climbs and state.live <= climbs[-1].state.live:
                climb = climbs[-1]
                below = self._below(climb, state, path, depth)
                if below is None:
                    break
                state, path[climb.length :] = below
                climbs.pop()
                if not climbs and not whole:
                    return state, path
            if whole and state.passed == allowed:
                return state, path
            if state.passed not in self.dead:
                downhill, choices = self._steps(state, allowed)
                if downhill is not None:
                    state = downhill[1]
                    path.append(downhill[0])
                    continue
                if not self.states:
                    raise Exhausted
                self.states -= 1
                climbs.append(Climb(state, choices, len(path)))
            upward = self._next_choice(climbs, path, whole)
            if upward is None:
                return None
            state = upward

    def _steps(self, state: State, allowed: int) -> tuple[tuple[int, State] | None, list[int]]:
        """A step after which no more is live, if there is one; else all within the limit."""
        direction, limit = self.direction, self.limit
        upward = []
        for operator in bits(state.ready & allowed):
            needed, live = direction.run(state.passed, state.live, operator)
            if needed > limit:
                self.refused = min(self.refused, needed)
            elif live <= state.live and direction.dominates(
                state.passed, state.passed | 1 << operator
            ):
                return (operator, self._after(state, operator, live)), []
            elif state.passed | 1 << operator not in self.dead:
                upward.append((-live, -operator))
        upward.sort()
        return None, [-operator for _, operator in upward]

    def _after(self, state: State, operator: int, live: int) -> State:
        passed = state.passed | 1 << operator
        ready = state.ready & ~(1 << operator)
        waits_for = self.direction.waits_for
        for other in bits(self.direction.leads_to[operator]):
            if not waits_for[other] & ~passed:
                ready |= 1 << other
        return State(passed, ready, live)

    def _next_choice(self, climbs: list[Climb], path: list[int], whole: bool) -> State | None:
        """The state by the next choice that is left, the last climb's first."""
        while climbs:
            climb = climbs[-1]
            if climb.taken >= 0:
                climb.failed |= 1 << climb.taken
            del path[climb.length :]
            if climb.choices:
                climb.taken = climb.choices.pop()
                path.append(climb.taken)
                _, live = self.direction.run(climb.state.passed, climb.state.live, climb.taken)
                return self._after(climb.state, climb.taken, live)
            if whole:
                self.dead.add(climb.state.passed)
            climbs.pop()
        return None

    def _below(
        self, climb: Climb, state: State, path: list[int], depth: int
    ) -> tuple[State, list[int]] | None:
        """A state that stands for the climb's, by way of which all that it can reach is reached.

        That is ``state``, unless one in between has even less live. Such a one can only be reached
        by another choice, so where all others failed there is none.
        """
        start = climb.state
        if not self.direction.dominates(start.passed, state.passed):
            return None
        others = start.ready & state.passed & ~climb.failed & ~(1 << climb.taken)
        within = state.passed & ~(self.direction.far[climb.taken] | 1 << climb.taken)
        if others and within != start.passed:
            if depth == DEPTH:
                return None
            between = self._lower(start, within, False, depth + 1)
            if between is not None and self.direction.dominates(start.passed, between[0].passed):
                return between
        return state, path[climb.length :]
