"""Inverted residual blocks and their parts as values; :mod:`fxopt.patterns` finds them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

MBCONV, FUSED_MBCONV = "MBConv", "Fused-MBConv"


@dataclass(frozen=True)
class Layer:
    """A convolution and the norm that alone reads it, if one does."""

    conv: fx.Node
    norm: fx.Node | None

    @property
    def last(self) -> fx.Node:
        return self.conv if self.norm is None else self.norm

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return (self.conv,) if self.norm is None else (self.conv, self.norm)


@dataclass(frozen=True)
class Gate:
    """Factors per channel from the global mean (or another pooling) of what they multiply.

    Attributes:
        source: the value that is pooled and multiplied.
        squeeze: what leads from there to the poolings, with them.
        pools: the poolings, whose results have one value for each channel.
        nodes: ``squeeze`` and all that is made of it.
        product: the multiplication.
    """

    source: fx.Node
    squeeze: tuple[fx.Node, ...]
    pools: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    product: fx.Node


@dataclass(frozen=True)
class InvertedResidual:
    """An inverted residual block.

    Attributes:
        kind: MBConv, or Fused-MBConv.
        stage: counted from 1; a block whose stride or width leaves no residual begins a new one,
            as does one that reads another shape than the block before it gives.
        path: the innermost of the user's modules that holds it.
        entry: the value that it reads.
        expand: the expansion; None for ratio 1, and for a fused block.
        inner: the activation between expansion and depthwise, as nodes; empty if there is none.
        pad: a pad of its own before the depthwise.
        spatial: the depthwise, or the full convolution of a fused block.
        activation: what follows that, as nodes; may be empty.
        gate: the squeeze-excite.
        final: an activation that comes after the gate, as nodes.
        project: the projection; None for a fused block of ratio 1.
        residual: the sum with the block's input.
        obstacle: why no pass can rewrite it, or nothing.
    """

    kind: str
    entry: fx.Node
    expand: Layer | None
    inner: tuple[fx.Node, ...]
    pad: fx.Node | None
    spatial: Layer
    activation: tuple[fx.Node, ...]
    gate: Gate | None
    final: tuple[fx.Node, ...]
    project: Layer | None
    residual: fx.Node | None = None
    obstacle: str = ""
    stage: int = 0
    path: str = ""

    @property
    def end(self) -> fx.Node:
        """The block's result before the residual sum."""
        return self.spatial.last if self.project is None else self.project.last

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """Its operators from the expansion to the projection, pads included."""
        expand = () if self.expand is None else self.expand.nodes
        pad = () if self.pad is None else (self.pad,)
        gate = () if self.gate is None else (*self.gate.nodes, self.gate.product)
        project = () if self.project is None else self.project.nodes
        middle = (*self.spatial.nodes, *self.activation, *gate, *self.final)
        return (*expand, *self.inner, *pad, *middle, *project)


@dataclass(frozen=True)
class NearMiss:
    """A depthwise convolution that is in no inverted residual block, and why."""

    node: fx.Node
    reason: str
