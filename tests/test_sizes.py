"""Sizes as people write them."""

from __future__ import annotations

import pytest

from fxopt.sizes import SizeError, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("262144", 262_144),
        ("262_144", 262_144),
        ("1 B", 1),
        ("256kB", 256_000),
        ("256KB", 262_144),
        (" 256 KiB ", 262_144),
        ("1372K", 1_404_928),
        ("1.5 MiB", 1_572_864),
        ("0.1MB", 100_000),
        ("2G", 2**31),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "kB", "-1", "1e6", "12potato", "256kb", "0", "1.5", "0.1K", "1 2"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(SizeError, match=f"^'{text}' is no "):
        parse_size(text)
