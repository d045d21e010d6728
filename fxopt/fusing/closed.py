"""The weights of a fused block that need no data: composed, linearised, or drawn at random."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxopt.analysis.padding import known_sizes
from fxopt.blocks import Gate, InvertedResidual
from fxopt.draws import normal
from fxopt.edit import Edit
from fxopt.fusing import algebra
from fxopt.fusing.algebra import Affine, Fused
from fxopt.fusing.evaluate import evaluated
from fxopt.layers import remade


@dataclass(frozen=True)
class Closed:
    """The closed forms for ``block`` as ``edit`` has it, before it is rewired.

    ``composed`` leaves the inner activation out; else it is linearised.
    """

    edit: Edit
    block: InvertedResidual
    kernel: tuple[int, int]
    composed: bool

    def fused(self) -> Fused:
        """The convolution that is to give the depthwise's sums, or of ratio 1 the projection's."""
        block, conv = self.block, self._conv()
        depthwise = algebra.cropped(conv, self.kernel)
        if block.expand is None:
            assert block.project is not None
            activation = self._linear(block.spatial.last, block.activation)
            project = self.edit.module(block.project.conv)
            return algebra.single(project, depthwise, self._separable(), activation)
        expand = self.edit.module(block.expand.conv)
        expansion = algebra.normed(expand, self._norm(block.expand.norm))
        activation = self._linear(block.expand.last, block.inner)
        bias = algebra.normed(conv, None).shift
        return algebra.expanded(expand, expansion, activation, depthwise, bias)

    def gate_at_rest(self) -> torch.Tensor:
        """The gate's factors ``(C,)`` where every channel is everywhere at its mean."""
        gate = self.block.gate
        assert gate is not None
        mean = self._mean(gate)
        source, product = self.edit.node(gate.source), self.edit.node(gate.product)
        shape = self.edit.program.types[gate.source.name].shape
        constant = mean[None, :, None, None].expand(shape)
        (factors,) = (each for each in product.all_input_nodes if each is not source)
        sizes = known_sizes(self.edit.program)
        given = {self.edit.node(name): size for name, size in sizes.items()}
        found: torch.Tensor = evaluated(factors, {**given, source: constant}, self.edit.tree)
        return found[0, :, 0, 0]

    def squeeze(self) -> Affine:
        """Ratio 1: from the mean of each input channel to that of the activated depthwise."""
        activation = self._linear(self.block.spatial.last, self.block.activation)
        separable, conv = self._separable(), self._conv()
        total = algebra.cropped(conv, conv.kernel_size).sum((1, 2))
        scale = activation.scale * separable.scale * total
        return Affine(scale, activation.scale * separable.shift + activation.shift)

    def _mean(self, gate: Gate) -> torch.Tensor:
        start = self.edit.node(self.block.spatial.last)
        inputs = algebra.stretch(self.edit.module(start))
        values = evaluated(self.edit.node(gate.source), {start: inputs.grid()}, self.edit.tree)
        return inputs.expected(values)

    def _linear(self, start: fx.Node, nodes: tuple[fx.Node, ...]) -> Affine:
        if not nodes or self.composed:
            channels = self.edit.program.types[start.name].shape[1]
            return algebra.identity(channels, self._conv().weight)
        first, last = self.edit.node(start), self.edit.node(nodes[-1])
        inputs = algebra.stretch(self.edit.module(start))
        return algebra.linearised(lambda z: evaluated(last, {first: z}, self.edit.tree), inputs)

    def _separable(self) -> Affine:
        return algebra.normed(self._conv(), self._norm(self.block.spatial.norm))

    def _conv(self) -> Any:
        return self.edit.module(self.block.spatial.conv)

    def _norm(self, node: fx.Node | None) -> nn.Module | None:
        return None if node is None else self.edit.module(node)


def drawn(like: torch.Tensor, shape: tuple[int, ...], name: str) -> torch.Tensor:
    """A weight ``(C_out, …)`` that is normal by its fan-out, as EfficientNets are initialised.

    The variance is ``2 / (k·k·C_out)`` (He et al., 2015); ``name`` seeds it.
    """
    fan_out = shape[0] * math.prod(shape[2:])
    return normal(like, shape, 2 / fan_out, name)


def redrawn(layer: nn.Module, name: str) -> nn.Module:
    """``layer``, a convolution, linear layer or BatchNorm, as it is before any training."""
    old: Any = layer
    bias = None if old.bias is None else torch.zeros_like(old.bias)
    if not isinstance(old, nn.modules.batchnorm._BatchNorm):
        groups = getattr(old, "groups", 1)
        weight = drawn(old.weight, tuple(old.weight.shape), name) * groups**0.5
        return remade(layer, {"weight": weight, "bias": bias})
    scale = None if old.weight is None else torch.ones_like(old.weight)
    kept: Any = {"running_mean": 0, "running_var": 1, "num_batches_tracked": 0}
    for name, start in kept.items():
        statistic = getattr(layer, name)
        kept[name] = None if statistic is None else torch.full_like(statistic, start)
    return remade(layer, {"weight": scale, "bias": bias}, kept)
