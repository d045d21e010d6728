"""Mean and variance of each channel, over batches."""

from __future__ import annotations

import torch


class Moments:
    """Of values ``(N, C, *)``, batch by batch; summed up in float64. A value ``(N,)`` is a channel.

    Attributes:
        count: values of each channel so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._total: torch.Tensor | float = 0.0
        self._squares: torch.Tensor | float = 0.0

    def add(self, value: torch.Tensor) -> None:
        """One batch more, of as many channels."""
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        if wide.dim() < 2:
            wide = wide.reshape(1, 1, -1)
        axes = (0, *range(2, wide.dim()))
        mean = wide.mean(axes, keepdim=True)
        # torch's variance on the CPU is several times as slow
        spread = torch.linalg.vector_norm(wide - mean, dim=axes).double() ** 2
        if not bool(spread.isfinite().all()):  # squares beyond float32
            wide, mean = wide.double(), wide.double().mean(axes, keepdim=True)
            spread = torch.linalg.vector_norm(wide - mean, dim=axes) ** 2
        count = wide.numel() // max(1, wide.shape[1])
        own = mean.flatten().double()
        self.count += count
        self._total = self._total + count * own
        self._squares = self._squares + spread + count * own**2

    @property
    def mean(self) -> torch.Tensor:
        """``(C,)``, float64."""
        return torch.as_tensor(self._total) / self.count

    @property
    def squares(self) -> torch.Tensor:
        """The sum of squares, ``(C,)``, float64."""
        return torch.as_tensor(self._squares)

    @property
    def deviation(self) -> torch.Tensor:
        """The sum of squared distances to the mean, ``(C,)``, float64."""
        return self.squares - self.count * self.mean**2
