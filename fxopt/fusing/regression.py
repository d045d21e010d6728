"""The k×k convolution that best reproduces given maps: least squares by normal equations.

Every output position is a sample: its receptive field, ``C_in·k·k`` values, is the regressor. The
mean is taken out of both sides, so that the bias follows from the means; what is left is

    (Σ r·rᵀ + λ·I) Kᵀ = Σ r·yᵀ        λ = 1e-6 · mean diagonal of Σ r·rᵀ

summed in float64 over batches. The memory is that of the matrix, ``(C_in·k·k)²``, and of the
receptive fields of one image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fxopt.fusing.algebra import Fused

RIDGE = 1e-6


class Regression:
    """Sums over samples, and the convolution that follows from them."""

    def __init__(self, kernel: tuple[int, int], stride: tuple[int, int]) -> None:
        self.kernel, self.stride = kernel, stride
        self.images = 0
        self.samples = 0
        self.unknowns = 0
        self._squares: torch.Tensor | float = 0.0
        self._products: torch.Tensor | float = 0.0
        self._sums: torch.Tensor | float = 0.0
        self._targets: torch.Tensor | float = 0.0

    def add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """A batch: padded inputs ``(N, C_in, H, W)`` and what is wanted of them, a map as well."""
        for image, target in zip(inputs.double(), targets.double(), strict=True):
            fields = F.unfold(image[None], self.kernel, stride=self.stride)[0]
            wanted = target.flatten(1)
            self.images += 1
            self.samples += fields.shape[1]
            self.unknowns = fields.shape[0] + 1
            self._squares = self._squares + fields @ fields.T
            self._products = self._products + fields @ wanted.T
            self._sums = self._sums + fields.sum(1)
            self._targets = self._targets + wanted.sum(1)

    @property
    def images_needed(self) -> int:
        """How many images like those that were added give as many samples as unknowns."""
        return -(-self.unknowns * self.images // self.samples)

    def solution(self, channels: int) -> Fused:
        """The convolution of ``channels`` inputs with the least squared error."""
        assert isinstance(self._sums, torch.Tensor)
        assert isinstance(self._targets, torch.Tensor)
        mean, wanted = self._sums / self.samples, self._targets / self.samples
        squares = self._squares - self.samples * torch.outer(mean, mean)
        products = self._products - self.samples * torch.outer(mean, wanted)
        diagonal = squares.diagonal()
        diagonal += RIDGE * diagonal.mean().clamp_min(torch.finfo(torch.float64).tiny)
        weight = torch.linalg.solve(squares, products).T
        bias = wanted - weight @ mean
        return Fused(weight.reshape(-1, channels, *self.kernel), bias)
