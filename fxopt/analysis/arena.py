"""A place for every tensor in one buffer, so that no two that are live together share a byte.

Tensors that take over one another's storage lie at one offset: a chain of them is one block, and
the search of ``packing_search`` moves blocks. What two blocks keep between them comes from those of
their tensors that are live together, so what a chain frees as it shrinks is used again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from math import lcm

from fxopt.analysis.packing_search import Apart, Block, extent, pack
from fxopt.analysis.plan import ArenaPlan, Lifetime, NodeId
from fxopt.errors import InvalidPlanError


def plan_arena(
    lifetimes: Sequence[Lifetime], alignment: int = 16, time_limit: float | None = None
) -> ArenaPlan:
    """Offsets in bytes for tensors of the given lifetimes; the same every time.

    An offset is a multiple of ``alignment`` and of the ``item_bytes`` of all tensors of its chain.
    A tensor lies at the offset of what it takes over; one of no bytes takes no place. The search
    ends where the arena is as small as the lower bound, which convolutional networks mostly are, or
    after a fixed effort: some seconds where hundreds of tensors fit together badly. A time limit in
    seconds stands for an effort, too, and ends the search besides, should the machine be slow.
    Ctrl-C takes the best packing so far.

    Raises:
        InvalidPlanError: naming the tensor that is malformed, or takes over what it cannot; or the
            alignment is below 1.

    >>> a, b = Lifetime("a", 64, start=0, end=2), Lifetime("b", 32, start=1, end=3)
    >>> plan_arena([a, b, Lifetime("c", 48, start=2, end=4)]).offsets
    {'a': 0, 'b': 64, 'c': 0}
    """
    if alignment < 1:
        raise InvalidPlanError(f"the alignment is {alignment} bytes; the least is 1")
    tensors = _checked(lifetimes)
    chains = _chains(tensors)
    spans = _spans(chains)
    live_sets = _live_sets(spans)
    blocks = _blocks(chains, spans, alignment)
    places, bound = pack(blocks, live_sets, _largest(live_sets, alignment), time_limit)
    size = extent(blocks, places)
    chain_of = {tensor.id: index for index, chain in enumerate(chains) for tensor in chain}
    offsets = {node: places[chain_of[node]] for node in tensors}
    return ArenaPlan(offsets, size, bound, optimal=size == bound)


def _checked(lifetimes: Sequence[Lifetime]) -> Mapping[NodeId, Lifetime]:
    """The tensors by their ids."""
    tensors: dict[NodeId, Lifetime] = {}
    for tensor in lifetimes:
        name = repr(tensor.id)
        if tensor.id in tensors:
            raise InvalidPlanError(f"{name} has two lifetimes")
        if tensor.size_bytes < 0 or tensor.item_bytes < 1:
            size = f"{tensor.size_bytes} bytes in elements of {tensor.item_bytes}"
            raise InvalidPlanError(f"{name} has {size}; the least are 0 and 1")
        if tensor.end <= tensor.start:
            raise InvalidPlanError(f"{name} is live at no step: [{tensor.start}, {tensor.end})")
        tensors[tensor.id] = tensor
    takers: dict[NodeId, NodeId] = {}
    for tensor in lifetimes:
        if tensor.takes_over is not None:
            _check_taken(tensor, tensors)
            if tensor.takes_over in takers:
                both = f"{takers[tensor.takes_over]!r} and {tensor.id!r}"
                raise InvalidPlanError(f"{both} both take over {tensor.takes_over!r}")
            takers[tensor.takes_over] = tensor.id
    return tensors


def _check_taken(tensor: Lifetime, tensors: Mapping[NodeId, Lifetime]) -> None:
    what = f"{tensor.id!r} takes over {tensor.takes_over!r}"
    taken = tensors.get(tensor.takes_over)
    if taken is None:
        raise InvalidPlanError(f"{what}, which has no lifetime")
    if tensor.start != taken.end - 1:
        steps = f"at step {tensor.start}, but that one's last step is {taken.end - 1}"
        raise InvalidPlanError(f"{what} {steps}")
    before = tensors.get(taken.takes_over)
    # This is the case wherever tensors take over one another in a circle.
    if before is not None and before.end > tensor.start:
        same = f"at step {tensor.start}, at which that one takes over {before.id!r}"
        raise InvalidPlanError(f"{what} {same}; a step can join two of them only")


def _chains(tensors: Mapping[NodeId, Lifetime]) -> list[list[Lifetime]]:
    """The tensors, each with all that take over its storage, in the order of time."""
    taker = {each.takes_over: each for each in tensors.values() if each.takes_over is not None}
    chains = []
    for tensor in tensors.values():
        if tensor.takes_over is None:
            chain = [tensor]
            while chain[-1].id in taker:
                chain.append(taker[chain[-1].id])
            chains.append(chain)
    return chains


@dataclass(frozen=True)
class _Span:
    """Bytes of the block at position ``block``, at the steps ``[start, end)``."""

    start: int
    end: int
    size_bytes: int
    block: int


def _spans(chains: Sequence[Sequence[Lifetime]]) -> list[_Span]:
    """What takes bytes, in the order of time; of two in place the larger where they meet."""
    spans = []
    for block, chain in enumerate(chains):
        meets = [before.size_bytes > after.size_bytes for before, after in pairwise(chain)]
        for tensor, late, early in zip(chain, [False, *meets], [*meets, True], strict=True):
            start, end = tensor.start + late, tensor.end - (not early)
            if tensor.size_bytes > 0 and start < end:
                spans.append(_Span(start, end, tensor.size_bytes, block))
    return sorted(spans, key=lambda span: span.start)


def _live_sets(spans: Sequence[_Span]) -> list[dict[int, int]]:
    """Bytes of each block wherever some are added; without sets that the one beside covers."""
    live_sets: list[dict[int, int]] = []
    live: list[_Span] = []
    for start, added in groupby(spans, key=lambda span: span.start):
        live = [span for span in live if span.end > start] + list(added)
        sizes = {span.block: span.size_bytes for span in live}
        while live_sets and _covers(sizes, live_sets[-1]):
            live_sets.pop()
        if not (live_sets and _covers(live_sets[-1], sizes)):
            live_sets.append(sizes)
    return live_sets


def _covers(larger: Mapping[int, int], smaller: Mapping[int, int]) -> bool:
    return all(larger.get(block, 0) >= size for block, size in smaller.items())


def _largest(live_sets: Sequence[Mapping[int, int]], alignment: int) -> int:
    """Bytes of the largest set, at aligned offsets: only the last tensor may end off alignment."""
    bound = 0
    for sizes in live_sets:
        rests = [-size % alignment for size in sizes.values()]
        bound = max(bound, sum(sizes.values()) + sum(rests) - max(rests))
    return bound


def _apart(spans: Sequence[_Span], count: int) -> list[dict[int, tuple[int, int]]]:
    """For each block those that it meets: the most of its own bytes there, and of the other's."""
    apart: list[dict[int, tuple[int, int]]] = [{} for _ in range(count)]
    live: list[_Span] = []
    for span in spans:
        live = [other for other in live if other.end > span.start]
        for other in live:
            own, others = apart[span.block].get(other.block, (0, 0))
            own, others = max(own, span.size_bytes), max(others, other.size_bytes)
            apart[span.block][other.block] = own, others
            apart[other.block][span.block] = others, own
        live.append(span)
    return apart


def _blocks(
    chains: Sequence[Sequence[Lifetime]], spans: Sequence[_Span], alignment: int
) -> list[Block]:
    return [
        Block(
            size_bytes=max(tensor.size_bytes for tensor in chain),
            alignment=lcm(alignment, *(tensor.item_bytes for tensor in chain)),
            start=chain[0].start,
            steps=chain[-1].end - chain[0].start,
            area=sum(tensor.size_bytes * (tensor.end - tensor.start) for tensor in chain),
            apart=tuple(Apart(other, *between) for other, between in apart.items()),
        )
        for chain, apart in zip(chains, _apart(spans, len(chains)), strict=True)
    ]
