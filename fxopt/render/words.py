"""Figures and types in the words of the reports."""

from __future__ import annotations

from collections.abc import Collection

from fxopt.program import TensorType


def bytes_text(size: int) -> str:
    """``size`` bytes in the largest unit that leaves at least 1: ``97.7 MiB`` (1 KiB = 1,024 B)."""
    if size < 1024:
        return f"{size} B"
    power = min((size.bit_length() - 1) // 10, 4)
    return f"{size / 1024**power:,.1f} {'KMGT'[power - 1]}iB"


def count_text(number: int, noun: str) -> str:
    """``1 site``, ``2 sites``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def share_text(part: int, whole: int) -> str:
    """``part`` in percent of ``whole``; empty where there is nothing to share."""
    return f"{part / whole:.1%}" if whole else ""


def stages_text(numbers: Collection[int]) -> str:
    """``1-3, 5`` for 1, 2, 3 and 5."""
    firsts = [each for each in sorted(numbers) if each - 1 not in numbers]
    lasts = [each for each in sorted(numbers) if each + 1 not in numbers]
    pairs = zip(firsts, lasts, strict=True)
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in pairs)


def type_text(type: TensorType) -> str:
    """``1x3x224x224 float32``."""
    return f"{'x'.join(map(str, type.shape)) or 'scalar'} {str(type.dtype).removeprefix('torch.')}"
