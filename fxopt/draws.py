"""Weights drawn anew, the same for the same name whatever else is drawn."""

from __future__ import annotations

import zlib

import torch


def normal(
    like: torch.Tensor, shape: tuple[int, ...], variance: float, name: str, seed: int = 0
) -> torch.Tensor:
    """A normal tensor in the dtype and on the device of ``like``; name and seed say which."""
    tensor = torch.empty(shape, dtype=like.dtype, device=like.device)
    if tensor.is_meta:
        return tensor
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode(), seed))
    return tensor.copy_(torch.randn(shape, generator=generator) * variance**0.5)
