"""A place for every tensor in one buffer, so that no two that are live together share a byte.

Tensors that take over one another's storage lie at one offset: a chain of them is one block, and
the search of ``packing_search`` moves blocks. What two blocks keep between them comes from those of
their tensors that are live together, so what a chain frees as it shrinks is used again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import lcm

from fxopt.analysis.packing_search import Apart, Block, extent, pack
from fxopt.analysis.plan import ArenaPlan, Lifetime, NodeId
from fxopt.errors import InvalidPlanError


def plan_arena(lifetimes: Sequence[Lifetime], alignment: int = 16) -> ArenaPlan:
    """Offsets in bytes for tensors of the given lifetimes; the same every time.

    An offset is a multiple of ``alignment`` and of the ``item_bytes`` of all tensors of its chain.
    A tensor lies at the offset of what it takes over; one of no bytes takes no place. The search
    ends where the arena is as small as the lower bound, which convolutional networks mostly are, or
    after a fixed effort: some seconds where hundreds of tensors fit together badly.

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
    blocks = _blocks(chains, alignment)
    bound = _lower_bound(tensors, alignment)
    places = pack(blocks, bound)
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


def _blocks(chains: Sequence[Sequence[Lifetime]], alignment: int) -> list[Block]:
    return [
        Block(
            size_bytes=max(tensor.size_bytes for tensor in chain),
            alignment=lcm(alignment, *(tensor.item_bytes for tensor in chain)),
            start=chain[0].start,
            steps=chain[-1].end - chain[0].start,
            area=sum(tensor.size_bytes * (tensor.end - tensor.start) for tensor in chain),
            apart=tuple(Apart(other, *between) for other, between in apart.items()),
        )
        for chain, apart in zip(chains, _apart(chains), strict=True)
    ]


def _apart(chains: Sequence[Sequence[Lifetime]]) -> list[dict[int, tuple[int, int]]]:
    """For each chain those that it meets: the most of its own bytes there, and of the other's."""
    apart: list[dict[int, tuple[int, int]]] = [{} for _ in chains]
    tensors = [(tensor, index) for index, chain in enumerate(chains) for tensor in chain]
    live: list[tuple[Lifetime, int]] = []
    for tensor, index in sorted(tensors, key=lambda pair: pair[0].start):
        if tensor.size_bytes == 0:
            continue
        live = [(other, at) for other, at in live if other.end > tensor.start]
        for other, at in live:
            if at != index:
                own, others = apart[index].get(at, (0, 0))
                own, others = max(own, tensor.size_bytes), max(others, other.size_bytes)
                apart[index][at], apart[at][index] = (own, others), (others, own)
        live.append((tensor, index))
    return apart


def _lower_bound(tensors: Mapping[NodeId, Lifetime], alignment: int) -> int:
    """The largest live set, at aligned offsets: only the last of a set may end off alignment."""
    bound = 0
    live: list[tuple[int, int]] = []  # end, size
    for start, end, size in sorted(_counted(tensors)):
        live = [(until, other) for until, other in live if until > start]
        live.append((end, size))
        rest = [-other % alignment for _, other in live]
        bound = max(bound, sum(other for _, other in live) + sum(rest) - max(rest))
    return bound


def _counted(tensors: Mapping[NodeId, Lifetime]) -> list[tuple[int, int, int]]:
    """Start, end and size of what has bytes; the smaller of two in place not where they meet."""
    spans = {tensor.id: [tensor.start, tensor.end] for tensor in tensors.values()}
    for tensor in tensors.values():
        if tensor.takes_over is not None:
            if tensor.size_bytes <= tensors[tensor.takes_over].size_bytes:
                spans[tensor.id][0] += 1
            else:
                spans[tensor.takes_over][1] -= 1
    sized = [(*spans[each.id], each.size_bytes) for each in tensors.values() if each.size_bytes]
    return [(start, end, size) for start, end, size in sized if start < end]
