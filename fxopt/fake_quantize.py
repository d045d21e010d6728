"""Fake quantisation: numbers rounded to an integer grid and scaled back, with a gradient.

    q = clamp(round(x/s) + z, low, high)        x̂ = s·(q - z)

(Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only
inference", CVPR 2018, sections 2.1 and 3.1), halves rounded to even as ONNX's QuantizeLinear does.
The gradient passes unchanged where ``x`` lies on the grid, and is zero where it was clamped
(straight-through; the mask is all that backward keeps, as in MCUNetV3).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from fxopt.quantizing.grid import AffineGrid

BITS = range(2, 9)
"""Widths of quantised numbers."""


def check_bits(name: str, bits: int) -> None:
    """Refuse a width that is not from 2 to 8.

    Raises:
        ValueError: naming ``name``.
    """
    if type(bits) is not int or bits not in BITS:
        raise ValueError(f"{name} is from {BITS[0]} to {BITS[-1]}, not {bits}")


_identity: ContextVar[bool] = ContextVar("identity", default=False)


@contextmanager
def identity_mode() -> Iterator[None]:
    """Inside, nothing is rounded or clamped: a quantised network computes what it does in float.

    Scales stay, so that weights in quantised units train in these: for tests of what they do.

    >>> with identity_mode():
    ...     FakeQuantize(0.5)(torch.tensor([0.3, 1e6])).tolist()
    [0.30000001192092896, 1000000.0]
    """
    token = _identity.set(True)
    try:
        yield
    finally:
        _identity.reset(token)


def is_identity_mode() -> bool:
    """Whether the caller is inside of :func:`identity_mode`."""
    return _identity.get()


def integers(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | int, low: int, high: int
) -> torch.Tensor:
    """``q`` of each element of ``x``, in its own dtype; ``scale`` broadcasts to its shape."""
    return _steps(x, scale, zero_point).clamp_(low, high)


def _steps(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | int) -> torch.Tensor:
    return torch.div(x, scale).round_().add_(zero_point)


class _FakeQuantized(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | int,
        low: int, high: int,
    ) -> torch.Tensor:  # fmt: skip
        steps = _steps(x, scale, zero_point)
        ctx.save_for_backward((steps >= low) & (steps <= high))
        return steps.clamp_(low, high).sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        passed = torch.where(inside, gradients[0], 0.0)
        return passed, None, None, None, None


def fake_quantize(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | int, low: int, high: int
) -> torch.Tensor:
    """``x̂``: ``x`` as it is after quantisation.

    Args:
        x: any shape.
        scale: s, of a shape that broadcasts to that of ``x``.
        zero_point: z, a whole number.
        low, high: the least and the greatest ``q``.

    >>> fake_quantize(torch.tensor([0.26, 9.0]), torch.tensor(0.5), 0, -8, 7).tolist()
    [0.5, 3.5]
    """
    if is_identity_mode():
        return x
    if torch.is_grad_enabled() and x.requires_grad:
        result: torch.Tensor = _FakeQuantized.apply(x, scale, zero_point, low, high)
        return result
    return integers(x, scale, zero_point, low, high).sub_(zero_point).mul_(scale)


class FakeQuantize(AffineGrid, nn.Module):
    """Rounds its input to an affine integer grid, one for the whole tensor: ``(*)`` to ``(*)``.

    Scale and zero point are buffers: they stay as they were calibrated, in training too.

    Args:
        scale: s, positive and finite.
        zero_point: z, on the grid, so that 0 is a number of it.
        bits: the grid's width, from 2 to 8: ``q`` is from ``-2^(bits-1)`` to ``2^(bits-1) - 1``.
        settled: its input lies on the grid already (it is a max-pool of a quantised map, say), and
            is given back as it is.

    Raises:
        ValueError: an argument is none of the above.

    >>> FakeQuantize(0.5, zero_point=-8, bits=4)(torch.tensor([-1.0, 2.2, 9.0])).tolist()
    [0.0, 2.0, 7.5]
    """

    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(
        self, scale: float, zero_point: int = 0, bits: int = 8, settled: bool = False
    ) -> None:
        super().__init__()
        check_bits("bits", bits)
        self.bits, self.settled = bits, settled
        kept = torch.tensor(float(scale), dtype=torch.float32)
        if not (0 < kept < math.inf):
            raise ValueError(f"scale is positive and finite in float32, not {scale}")
        if not self.low <= zero_point <= self.high:
            raise ValueError(f"zero_point is from {self.low} to {self.high}, not {zero_point}")
        self.register_buffer("scale", kept)
        self.register_buffer("zero_point", torch.tensor(zero_point, dtype=torch.int32))

    def integers(self, x: torch.Tensor) -> torch.Tensor:
        """``q`` of each element, int32."""
        with torch.no_grad():
            return integers(x, self.scale, self.zero_point, self.low, self.high).int()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.settled:
            return input
        return fake_quantize(input, self.scale, self.zero_point, self.low, self.high)

    def extra_repr(self) -> str:
        values = "" if self.scale.is_meta else f"scale={float(self.scale):.6g}, "
        zero = "" if self.scale.is_meta else f"zero_point={int(self.zero_point)}, "
        return f"{values}{zero}bits={self.bits}{', settled' if self.settled else ''}"
