"""Sizes in bytes as people write them: ``256kB``, ``1.5 MiB``, ``1372K``."""

from __future__ import annotations

import re

from fxopt.errors import FxoptError

UNITS = {
    "": 1,
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "K": 2**10,
    "KB": 2**10,
    "KiB": 2**10,
    "M": 2**20,
    "MiB": 2**20,
    "G": 2**30,
    "GiB": 2**30,
}
"""Bytes of a unit. kB, MB and GB are decimal as everywhere else; a capital K never is."""


class SizeError(FxoptError, ValueError):
    """A text that is no size in bytes."""


def parse_size(text: str) -> int:
    """The bytes of a size.

    Raises:
        SizeError: it is no number with a unit of the table, or no whole number of bytes above 0.

    >>> parse_size("256kB"), parse_size("256 KiB"), parse_size("1.5M")
    (256000, 262144, 1572864)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text.replace("_", ""))
    if match is None or match[2] not in UNITS:
        raise SizeError(
            f"'{text}' is no size; write 262144, 256kB (1,000 B each) or 256KiB (1,024)"
        )
    whole, _, fraction = match[1].partition(".")
    parts: int = 10 ** len(fraction)
    size, rest = divmod(int(whole + fraction) * UNITS[match[2]], parts)
    if rest or not size:
        raise SizeError(f"'{text}' is no whole number of bytes above 0")
    return size
