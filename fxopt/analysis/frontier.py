"""Is there an order that never needs more than a limit? A search over downsets, level by level.

Level ``k`` holds the sets of ``k`` operators that can have run without any step needing more than
the limit. Two rules keep it small, neither of which loses an order within the limit if one exists:

- *Dominance.* The bytes that are live after a downset are a submodular function of it. So an
  operator that can run now and leaves no more live than before may as well run now: every later
  step has no more live than it had, and as many operands to overwrite. Of a state with such an
  operator no other successor is kept.
- *Direction.* The search can as well run from the end, on the same function: a state then holds
  what has yet to run. Often one direction is short where the other is hopeless. Going backwards, an
  operator that is moved to the end may read what another one would have overwritten; such a step is
  not taken for granted (:func:`_contested`).

Where a level has more than ``width`` states those with the fewest live bytes are kept: a beam
search, which still finds orders but proves nothing any more.

Memory-aware scheduling as a search over downsets: Ahn et al., "Ordering Chaos" (SERENITY), MLSys
2020, section 3.1; the downhill rule, for trees and chains: Liu, "An application of generalized tree
pebbling to sparse matrix factorization", SIAM J. Algebraic Discrete Methods 8, 1987.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fxopt.analysis.problem import Problem, bits

WORD = 64
"""Operators to a word of a mask."""

NEVER = 1 << 62
"""More bytes than any step needs."""

Masks = npt.NDArray[np.uint64]
"""Sets of operators, ``words × states``."""

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Outcome:
    """What a search found.

    Attributes:
        order: one within the limit, or None.
        refused: if ``complete`` and there is no order: no order needs less than this.
        complete: nothing was left out for the sake of the width.
    """

    order: list[int] | None
    refused: int
    complete: bool


class OutOfTime(Exception):
    """The deadline has passed."""


def sweep(problem: Problem, limit: int, width: int, *, backwards: bool, deadline: float) -> Outcome:
    """Search an order of ``problem`` of which no step needs more than ``limit`` bytes.

    Args:
        width: states that a level may hold.
        backwards: from the last operator to the first.
        deadline: by ``time.monotonic``.

    Raises:
        OutOfTime: the deadline has passed.
    """
    search = _Backwards(problem, limit) if backwards else _Forwards(problem, limit)
    states = search.first()
    history: list[tuple[Numbers, Numbers]] = []
    refused, complete = NEVER, True
    for _ in problem.operators:
        if time.monotonic() > deadline:
            raise OutOfTime
        steps = list(search.steps(states))
        refused = min([refused, *(step.refused for step in steps)])
        states, parents, operators = _merged(states, steps)
        if states.live.size > width:
            kept = np.sort(np.argsort(states.live, kind="stable")[:width])
            states = _States(states.masks[:, kept], states.live[kept])
            parents, operators, complete = parents[kept], operators[kept], False
        history.append((parents, operators))
        if not states.live.size:
            return Outcome(None, refused, complete)
    path, state = [], 0
    for parents, operators in reversed(history):
        path.append(int(operators[state]))
        state = int(parents[state])
    return Outcome(path if backwards else path[::-1], refused, complete)


@dataclass(frozen=True)
class _States:
    """The states of a level: their operators, and the bytes that are live in each."""

    masks: Masks
    live: Numbers


@dataclass(frozen=True)
class _Step:
    """One operator, run in all states in which it can run within the limit.

    Attributes:
        operator: which one.
        parents: positions of these states.
        states: what they become.
        downhill: where no more is live than before, and nothing is lost.
        refused: the least that it needs in a state where that is beyond the limit.
    """

    operator: int
    parents: Numbers
    states: _States
    downhill: npt.NDArray[np.bool_]
    refused: int


def _merged(states: _States, steps: list[_Step]) -> tuple[_States, Numbers, Numbers]:
    """The next level, and of each of its states a parent and the operator that led from it."""
    if not steps:
        return _States(states.masks[:, :0], states.live[:0]), states.live[:0], states.live[:0]
    masks = np.concatenate([step.states.masks for step in steps], axis=1)
    live = np.concatenate([step.states.live for step in steps])
    parents = np.concatenate([step.parents for step in steps])
    operators = np.repeat([step.operator for step in steps], [step.parents.size for step in steps])
    downhill = np.flatnonzero(np.concatenate([step.downhill for step in steps]))
    # Of the downhill steps of a state the first counts; of a state that has one, no other step.
    chosen = np.full(states.live.size, -1)
    chosen[parents[downhill[::-1]]] = downhill[::-1]
    choice = chosen[parents]
    kept = np.flatnonzero((choice < 0) | (choice == np.arange(parents.size)))
    kept = kept[_distinct(masks[:, kept])]
    return _States(masks[:, kept], live[kept]), parents[kept], operators[kept]


def _distinct(masks: Masks) -> Numbers:
    """Positions of the first of each of the different columns."""
    if len(masks) == 1:
        return np.unique(masks[0], return_index=True)[1]
    order = np.lexsort(masks)
    columns = masks[:, order]
    new = np.ones(order.size, dtype=bool)
    new[1:] = (columns[:, 1:] != columns[:, :-1]).any(axis=0)
    return order[new]


class _Set:
    """A fixed set of operators, to be compared with the sets of many states."""

    def __init__(self, mask: int) -> None:
        self._words = [
            (word, np.uint64(part))
            for word in range(-(-mask.bit_length() // WORD))
            if (part := mask >> word * WORD & (1 << WORD) - 1)
        ]

    def inside(self, masks: Masks) -> Any:
        """Of which states it is a subset."""
        tests = [masks[word] & part == part for word, part in self._words]
        return np.logical_and.reduce(tests) if tests else np.ones(masks.shape[1], dtype=bool)

    def outside(self, masks: Masks) -> Any:
        """With which states it has nothing in common."""
        tests = [masks[word] & part == 0 for word, part in self._words]
        return np.logical_and.reduce(tests) if tests else np.ones(masks.shape[1], dtype=bool)


def _column(mask: int, words: int) -> Masks:
    ones = (1 << WORD) - 1
    return np.array([[mask >> word * WORD & ones] for word in range(words)], dtype=np.uint64)


def _mask(column: Masks) -> int:
    return sum(int(word) << index * WORD for index, word in enumerate(column))


class _Forwards:
    """States hold what has run."""

    def __init__(self, problem: Problem, limit: int) -> None:
        self.problem = problem
        self.limit = limit
        self.words = max(1, -(-len(problem.reads) // WORD))
        self._reads = [_Set(mask) for mask in problem.reads]
        self._users = [_Set(mask) for mask in problem.users]

    def first(self) -> _States:
        return _States(_column(0, self.words), np.array([self.problem.live]))

    def steps(self, states: _States) -> Iterator[_Step]:
        some = _mask(np.bitwise_or.reduce(states.masks, axis=1))
        all_ = _mask(np.bitwise_and.reduce(states.masks, axis=1))
        for operator in bits(self.problem.everything & ~all_):
            if self.problem.reads[operator] & ~some:
                continue
            word, bit = divmod(operator, WORD)
            one = np.uint64(1 << bit)
            ready = (states.masks[word] & one == 0) & self._reads[operator].inside(states.masks)
            parents = np.flatnonzero(ready)
            if parents.size:
                after = states.masks[:, parents]
                after[word] |= one
                yield self._step(operator, parents, after, states.live[parents])

    def _step(self, operator: int, parents: Numbers, after: Masks, live: Numbers) -> _Step:
        freed, buffer = self.freed(operator, after)
        added = self.problem.added[operator]
        later = live + added - freed
        needed = live + self.problem.scratch[operator] + np.maximum(added - buffer, 0)
        return self.within(operator, parents, _States(after, later), needed, later <= live)

    def freed(self, operator: int, done: Masks) -> tuple[Any, Any]:
        """Bytes that go after ``operator`` has run, the last of ``done``, and the largest buffer
        that it may overwrite."""
        problem = self.problem
        freed, buffer = np.zeros((2, done.shape[1]), dtype=np.int64)
        for tensor in problem.touched[operator]:
            if not problem.kept[tensor] and problem.sizes[tensor]:
                gone = self._users[tensor].inside(done) * np.int64(problem.sizes[tensor])
                freed = freed + gone
                if tensor in problem.inplace[operator]:
                    buffer = np.maximum(buffer, gone)
        return freed, buffer

    def within(
        self, operator: int, parents: Numbers, states: _States, needed: Any, downhill: Any
    ) -> _Step:
        """The step, where it needs no more than the limit."""
        good = needed <= self.limit
        refused = NEVER if good.all() else int(needed[~good].min())
        kept = _States(states.masks[:, good], states.live[good])
        return _Step(operator, parents[good], kept, downhill[good], refused)


class _Backwards(_Forwards):
    """States hold what has yet to run; the operator of a step is the last of those."""

    def __init__(self, problem: Problem, limit: int) -> None:
        super().__init__(problem, limit)
        readers = [0] * len(problem.reads)
        for operator, reads in enumerate(problem.reads):
            for other in bits(reads):
                readers[other] |= 1 << operator
        self._readers = [_Set(mask) for mask in readers]
        self._contested = [_Set(mask) for mask in _contested(problem)]
        live, done = problem.live, 0
        for operator in problem.operators:
            _, live = problem.run(done, live, operator)
            done |= 1 << operator
        self._last = live

    def first(self) -> _States:
        return _States(_column(self.problem.everything, self.words), np.array([self._last]))

    def steps(self, states: _States) -> Iterator[_Step]:
        some = _mask(np.bitwise_or.reduce(states.masks, axis=1))
        for operator in bits(some):
            word, bit = divmod(operator, WORD)
            one = np.uint64(1 << bit)
            ready = states.masks[word] & one != 0
            parents = np.flatnonzero(ready & self._readers[operator].outside(states.masks))
            if parents.size:
                done = states.masks[:, parents]
                before = done.copy()
                before[word] &= ~one
                yield self._back(operator, parents, done, before, states.live[parents])

    def _back(
        self, operator: int, parents: Numbers, done: Masks, before: Masks, live: Numbers
    ) -> _Step:
        freed, buffer = self.freed(operator, done)
        added = self.problem.added[operator]
        earlier = live - added + freed
        needed = earlier + self.problem.scratch[operator] + np.maximum(added - buffer, 0)
        downhill = (earlier <= live) & self._contested[operator].outside(before)
        return self.within(operator, parents, _States(before, earlier), needed, downhill)


def _contested(problem: Problem) -> list[int]:
    """By operator, those that could overwrite what it reads if it has run before them."""
    contested = [0] * len(problem.reads)
    for operator in problem.operators:
        for tensor in problem.inplace[operator]:
            readers = problem.users[tensor] & ~(1 << operator)
            if problem.kept[tensor] or readers & problem.after[operator]:
                continue
            for reader in bits(readers & ~problem.before[operator]):
                contested[reader] |= 1 << operator
    return contested
