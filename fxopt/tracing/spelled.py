"""Arguments that eager PyTorch takes and shapes alone do not, written as it understands them.

``x[:, mask]`` with a constant mask is ``x[:, positions]``; ``repeat_interleave`` by constant counts
is given the size of its result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from fxopt.tracing.known import Unknown
from fxopt.tracing.trace import Untraceable
from fxopt.tracing.writer import Writer

Arguments = tuple[Sequence[Any], dict[str, Any]]


def _indexed(writer: Writer, args: Sequence[Any], kwargs: dict[str, Any]) -> Arguments:
    """The arguments of ``__getitem__`` or ``__setitem__``."""
    index = args[1] if len(args) > 1 else None
    items = index if type(index) is tuple else (index,)
    if not any(isinstance(item, (torch.Tensor, range, np.ndarray)) for item in items):
        return args, kwargs
    new = tuple(part for item in items for part in _positions(writer, item))
    return (args[0], new if type(index) is tuple or len(new) != 1 else new[0], *args[2:]), kwargs


def _positions(writer: Writer, item: Any) -> Iterator[Any]:
    """What stands for one item of an index."""
    if isinstance(item, range):
        yield list(item)
        return
    if isinstance(item, np.ndarray) and item.ndim:
        item = writer.constant(torch.from_numpy(item))
    if not isinstance(item, torch.Tensor):
        yield item
        return
    kind, rank = item.dtype, item.dim()
    integral = not (kind.is_floating_point or kind.is_complex)
    if kind not in (torch.bool, torch.uint8) and not (integral and rank == 0):
        yield item
        return
    try:
        values = writer.known_values(item)
    except Unknown:
        yield item
        return
    if rank == 0:
        yield values.item()
    else:
        yield from map(writer.constant, values.nonzero(as_tuple=True))


def _repeated(writer: Writer, args: Sequence[Any], kwargs: dict[str, Any]) -> Arguments:
    """The arguments of ``repeat_interleave``."""
    repeats = kwargs.get("repeats", args[1] if len(args) > 1 else None)
    if not isinstance(repeats, torch.Tensor) or kwargs.get("output_size") is not None:
        return args, kwargs
    try:
        counts = writer.known_values(repeats)
    except Unknown:
        return args, kwargs
    if counts.numel() == 1:
        size = args[0].shape[kwargs.get("dim", args[2] if len(args) > 2 else 0)]
        return args, {**kwargs, "output_size": int(counts) * size}
    return args, {**kwargs, "output_size": int(counts.sum())}


def _embedded(writer: Writer, args: Sequence[Any], kwargs: dict[str, Any]) -> Arguments:
    """The arguments of ``embedding`` or ``embedding_bag``."""
    check_renormalised(kwargs.get("max_norm", args[3] if len(args) > 3 else None))
    return args, kwargs


def check_renormalised(max_norm: float | None) -> None:
    """Refuse an embedding that rewrites its table."""
    if max_norm is not None:
        raise Untraceable(
            "an embedding with max_norm overwrites its weight; normalise the rows that are looked "
            "up, or the weight outside of forward"
        )


PREPARED: dict[str, Callable[[Writer, Sequence[Any], dict[str, Any]], Arguments]] = {
    "__getitem__": _indexed,
    "__setitem__": _indexed,
    "repeat_interleave": _repeated,
    "embedding": _embedded,
    "embedding_bag": _embedded,
}
"""By the name of an operator, what writes its arguments so."""
