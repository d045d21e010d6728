"""Distributions made in forward are not validated while it is traced.

``torch.distributions`` checks its parameters by their values, which would be a decision on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributions import Distribution


@contextmanager
def unvalidated() -> Iterator[None]:
    """In this context distributions check their parameters only where they are told to."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)
