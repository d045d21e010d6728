"""The variances that normaliser-free networks are built on (Brock et al., ICLR 2021, section 4)."""

from __future__ import annotations

import torch
from torch import fx

from fxopt.analysis.expectation import Expectation
from fxopt.analysis.filters import is_fixed_filter
from fxopt.analysis.gaussian import MeanVariance


class Bookkeeping(Expectation):
    """The variances that normaliser-free networks are built on.

    Neither pools, fixed filters nor borders count. After a residual block it is β² of the next.
    """

    def layer(self, node: fx.Node, operand: fx.Node) -> MeanVariance | None:
        """A fixed filter is taken for a pool."""
        if is_fixed_filter(self.program.module(node)):
            return self._known[operand]
        return super().layer(node, operand)

    def resized(self, node: fx.Node, operand: fx.Node) -> MeanVariance | None:
        """As it was."""
        return self._known[operand]

    def pooled(self, node: fx.Node, operand: fx.Node) -> MeanVariance | None:
        """As it was: neighbours in images are alike."""
        name = getattr(node.target, "__name__", str(node.target))
        pools = self.flow.kind(node) == "pool" or name in ("mean", "amax")
        return self._known[operand] if pools else None

    def left_by_border(self, node: fx.Node, operand: fx.Node, weight: torch.Tensor) -> float:
        """As if the map had no border."""
        return 1.0
