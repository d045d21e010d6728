"""The options of ``fuse_mbconv`` that are more than a word or a number."""

from __future__ import annotations

import math
import re
from typing import ClassVar

_RANGE = r"\s*\d{1,4}(-\d{1,4})?\s*"


class Stages(str):
    """Stages by number as a text: ``1-3``, or ``1,4-6``.

    >>> sorted(Stages("1,4-6").numbers)
    [1, 4, 5, 6]
    """

    form: ClassVar[str] = "1-3"
    listed: ClassVar[bool] = True

    def __new__(cls, text: str | int) -> Stages:
        found = super().__new__(cls, text)
        if not re.fullmatch(rf"{_RANGE}(,{_RANGE})*", found) or not found.numbers:
            raise ValueError(f"'{text}' names no stages; write 1-3, or 1,4-6")
        return found

    @property
    def numbers(self) -> frozenset[int]:
        pairs = (part.partition("-") for part in self.split(","))
        ranges = (range(int(first), int(last or first) + 1) for first, _, last in pairs)
        return frozenset(number for each in ranges for number in each)


class Count(int):
    """A number as ``45M`` or ``2.5G``, in powers of a thousand."""

    form: ClassVar[str] = "COUNT"

    def __new__(cls, count: str | int) -> Count:
        if not isinstance(count, str):
            if not math.isfinite(count):
                raise ValueError(f"{count} is no count")
            return super().__new__(cls, count)
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMG]?)\s*", count.replace("_", ""))
        if match is None:
            raise ValueError(f"'{count}' is no count; write 45000000, 45M or 2.5G")
        return super().__new__(cls, round(float(match[1]) * 1000 ** " kMG".index(match[2] or " ")))
