"""A dataflow graph in integers: operators are bits, sets of operators are masks.

An order passes through *downsets*, the sets of operators that have run; what is live after one does
not depend on the order in which it was run, so neither does what the rest can reach.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import networkx as nx

from fxopt.analysis.graph import normalised
from fxopt.analysis.liveness import storages


def bits(mask: int) -> Iterator[int]:
    """Positions of the ones of ``mask``, lowest first."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


@dataclass(frozen=True)
class Problem:
    """Operators ``0 … n - 1`` in a topological order, and the tensors that they write and read.

    Attributes:
        before, after: mask of all predecessors and successors of each operator, near and far.
        reads: mask of the direct predecessors.
        sizes: bytes of each tensor.
        users: mask of the operators that must have run before a tensor can go: its writer, its
            views and all readers.
        kept: tensors that outlive the problem.
        touched: tensors of which an operator is a user.
        added: bytes that an operator writes; 0 for a view.
        scratch: bytes that it needs beside.
        inplace: tensors whose storage its result may take over.
        live: bytes that are live before the first operator.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    reads: tuple[int, ...]
    sizes: tuple[int, ...]
    users: tuple[int, ...]
    kept: tuple[bool, ...]
    touched: tuple[tuple[int, ...], ...]
    added: tuple[int, ...]
    scratch: tuple[int, ...]
    inplace: tuple[tuple[int, ...], ...]
    live: int

    @property
    def operators(self) -> range:
        return range(len(self.reads))

    @property
    def everything(self) -> int:
        """The mask of all operators."""
        return (1 << len(self.reads)) - 1

    def run(self, done: int, live: int, operator: int) -> tuple[int, int]:
        """Bytes that ``operator`` needs after ``done`` has run, and bytes that are live then."""
        left = ~(done | 1 << operator)
        freed = buffer = 0
        for tensor in self.touched[operator]:
            if not self.users[tensor] & left and not self.kept[tensor]:
                freed += self.sizes[tensor]
                if tensor in self.inplace[operator] and self.sizes[tensor] > buffer:
                    buffer = self.sizes[tensor]
        added = self.added[operator]
        needed = live + self.scratch[operator] + (added - buffer if added > buffer else 0)
        return needed, live + added - freed

    def peak(self, order: Sequence[int]) -> int:
        """The most bytes that a step of ``order`` needs."""
        done, live, peak = 0, self.live, 0
        for operator in order:
            needed, live = self.run(done, live, operator)
            done |= 1 << operator
            peak = max(peak, needed)
        return peak


def problem_of(graph: nx.DiGraph, order: Sequence[object]) -> Problem:
    """``graph`` with its nodes numbered as in the topological ``order``."""
    graph = normalised(graph)
    number = {node: index for index, node in enumerate(order)}
    storage = storages(graph, order)
    users = [0] * len(number)
    kept = [False] * len(number)
    touched: list[set[int]] = [set() for _ in number]
    for node, index in number.items():
        tensor = number[storage[node]]
        kept[tensor] |= graph.nodes[node]["output"]
        for user in (index, *(number[reader] for reader in graph.succ[node])):
            users[tensor] |= 1 << user
            touched[user].add(tensor)
    fields = [graph.nodes[node] for node in order]
    own = [each["alias_of"] is None for each in fields]
    sizes = [each["output_bytes"] if o else 0 for each, o in zip(fields, own, strict=True)]
    written = [0 if each["resident"] else size for each, size in zip(fields, sizes, strict=True)]
    reads = [_mask(number[other] for other in graph.pred[node]) for node in order]
    before, after = _closures(reads)
    return Problem(
        before,
        after,
        tuple(reads),
        tuple(sizes),
        tuple(users),
        tuple(kept),
        tuple(map(tuple, map(sorted, touched))),
        tuple(written),
        tuple(each["scratch_bytes"] if o else 0 for each, o in zip(fields, own, strict=True)),
        tuple(
            () if each["resident"] or not o else tuple(number[storage[c]] for c in each["inplace"])
            for each, o in zip(fields, own, strict=True)
        ),
        sum(size for each, size in zip(fields, sizes, strict=True) if each["resident"]),
    )


def _mask(numbers: Iterator[int]) -> int:
    mask = 0
    for number in numbers:
        mask |= 1 << number
    return mask


def _closures(reads: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """All predecessors and all successors, near and far, of every operator."""
    before = list(reads)
    for operator, direct in enumerate(reads):
        for other in bits(direct):
            before[operator] |= before[other]
    after = [0] * len(reads)
    for operator in reversed(range(len(reads))):
        for other in bits(reads[operator]):
            after[other] |= after[operator] | 1 << operator
    return tuple(before), tuple(after)


def least_needs(problem: Problem) -> list[int]:
    """Bytes that each operator needs in every order of a problem made by :func:`problem_of`.

    A tensor is live at an operator in every order if it is written before it, or is live from the
    start, and is used at or after it.
    """
    needs = []
    for operator in problem.operators:
        offered = (
            problem.sizes[tensor]
            for tensor in problem.inplace[operator]
            if not problem.kept[tensor] and not problem.users[tensor] & problem.after[operator]
        )
        written = max(problem.added[operator] - max(offered, default=0), 0)
        needs.append(written + problem.scratch[operator])
    for tensor, size in enumerate(problem.sizes):
        resident = size and not problem.added[tensor]
        written_before = problem.everything if resident else problem.after[tensor]
        used_later = problem.everything if problem.kept[tensor] else 0
        for user in bits(problem.users[tensor]):
            used_later |= problem.before[user] | 1 << user
        if size:
            for operator in bits(written_before & used_later):
                needs[operator] += size
    return needs


def segments(problem: Problem) -> list[int]:
    """Downsets through which every order passes, smallest first; the last is everything.

    They end at the operators that come before or after each other one (single-tensor cuts, and
    others), so that what lies between two of them is a problem of its own.
    """
    count = len(problem.reads)
    cuts = [
        problem.before[operator] | 1 << operator
        for operator in problem.operators
        if problem.before[operator].bit_count() + problem.after[operator].bit_count() == count - 1
    ]
    return cuts if not count or cuts[-1:] == [problem.everything] else [*cuts, problem.everything]


def between(problem: Problem, done: int, live: int, goal: int) -> tuple[Problem, tuple[int, ...]]:
    """The problem of running ``goal`` after ``done``, and its operators' numbers in the whole."""
    inside = goal & ~done
    numbers = tuple(bits(inside))
    local = {number: index for index, number in enumerate(numbers)}

    def narrowed(mask: int) -> int:
        return _mask(local[number] for number in bits(mask & inside))

    tensors = sorted({tensor for number in numbers for tensor in problem.touched[number]})
    place = {tensor: index for index, tensor in enumerate(tensors)}
    return (
        Problem(
            tuple(narrowed(problem.before[number]) for number in numbers),
            tuple(narrowed(problem.after[number]) for number in numbers),
            tuple(narrowed(problem.reads[number]) for number in numbers),
            tuple(problem.sizes[tensor] for tensor in tensors),
            tuple(narrowed(problem.users[tensor]) for tensor in tensors),
            tuple(problem.kept[t] or bool(problem.users[t] & ~goal) for t in tensors),
            tuple(tuple(place[t] for t in problem.touched[number]) for number in numbers),
            tuple(problem.added[number] for number in numbers),
            tuple(problem.scratch[number] for number in numbers),
            tuple(tuple(place[t] for t in problem.inplace[number]) for number in numbers),
            live,
        ),
        numbers,
    )
