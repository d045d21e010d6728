"""How far a file's output is from torch's, as a value."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Deviation:
    """How far the file's output is from torch's, at one batch size.

    ``error`` is the largest absolute difference relative to the output's own largest absolute
    value; of an output of integers, the fraction of elements that differ. It is None where there
    is nothing to compare with (an output that is all zero or not finite): ``remark`` says so.
    """

    output: str
    batch: int
    error: float | None
    bound: float
    remark: str = ""
