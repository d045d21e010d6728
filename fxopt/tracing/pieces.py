"""Operators that give as many tensors as a size allows: what their number depends on."""

from __future__ import annotations

from typing import Any

COUNTS = ("chunks", "split_size_or_sections", "split_size", "split_sizes", "indices_or_sections")
"""Keywords of what each is asked for."""
DIMENSION = {"unbind": 1, "split": 2, "chunk": 2, "tensor_split": 2, "split_with_sizes": 2}
"""Position of the ``dim`` argument of each."""


def settle_number(name: str, size: Any, count: Any) -> None:
    """Take the decision that Python takes with the number of pieces, as narrowly as it is one.

    ``size`` is that of the axis, ``count`` what the operator was asked for: the size of a piece,
    a number of pieces, or a list. Where ``size`` is a shape number, what is asked is guarded.
    """
    if name == "tensor_split":
        return  # as many pieces as were asked for, of any size
    if name == "chunk":
        _rounded_up(size, _rounded_up(size, count)).__index__()
    elif name == "split" and not isinstance(count, (tuple, list)):
        _rounded_up(size, count).__index__()
    else:
        size.__index__()


def _rounded_up(size: Any, by: Any) -> Any:
    return (size + (by - 1)) // by
