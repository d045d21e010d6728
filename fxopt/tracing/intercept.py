"""Torch's Python functions whose effect no graph has: a forward that calls one is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fxopt.tracing.trace import Untraceable


@contextmanager
def random_state_left_alone() -> Iterator[None]:
    """Setting the state of torch's random numbers (``fork_rng`` does) raises in here."""
    original = torch.set_rng_state

    def refuse(new_state: torch.Tensor) -> None:
        raise Untraceable("it sets the state of torch's random numbers")

    torch.set_rng_state = torch.random.set_rng_state = refuse
    try:
        yield
    finally:
        torch.set_rng_state = torch.random.set_rng_state = original
