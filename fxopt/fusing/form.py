"""What a block is to become, as a value."""

from __future__ import annotations

import enum
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from fxopt.blocks import InvertedResidual
from fxopt.calibration import Calibration
from fxopt.program import Program


class Weights(enum.Enum):
    """Where the weights of the fused convolution come from."""

    FIT = "fit"
    LINEARIZE = "linearize"
    COMPOSE = "compose"
    RANDOM = "random"


@dataclass(frozen=True)
class Form:
    """What a block is to become.

    Attributes:
        block: as it is in the program.
        whole: rows and columns of the depthwise kernel.
        kernel: rows and columns of the fused kernel.
        keeps_gate: whether its squeeze-excite stays.
        weights: how its weights are found; ``FIT`` needs ``calibration``.
        crops_pad: whether the pad before it shrinks with its kernel, not its own padding.
        carried: whether what is drawn at random has the layers of carried weights: of ratio 1 no
            activation, and a scale and shift on what the gate pools.
    """

    block: InvertedResidual
    whole: tuple[int, int]
    kernel: tuple[int, int]
    keeps_gate: bool
    weights: Weights
    calibration: Calibration | None = None
    crops_pad: bool = False
    carried: bool = False

    @staticmethod
    def of(
        program: Program, block: InvertedResidual, largest: int | None, keeps_gate: bool,
        weights: Weights, calibration: Calibration | None,
    ) -> Form:  # fmt: skip
        """The form of ``block`` with a kernel of ``largest`` rows and columns at most."""
        conv: Any = program.module(block.spatial.conv)
        rows, cols = whole = tuple(conv.kernel_size)
        kernel = whole if largest is None else (min(rows, largest), min(cols, largest))
        form = Form(block, whole, kernel, keeps_gate, weights, calibration)
        own = own_padding(conv, form.crop)
        short = any(have < crop for have, crop in zip(own, form.crop, strict=True))
        return replace(form, crops_pad=short and block.pad is not None)

    @property
    def drops_activation(self) -> bool:
        """Whether what stands between the convolutions that become one is left out."""
        between = self.block.inner if self.block.expand else self.block.activation
        return self.weights is Weights.COMPOSE and bool(between)

    @property
    def is_exact(self) -> bool:
        """Whether the fused block computes what the block does."""
        moved = self.block.gate and (not self.keeps_gate or self.block.expand is None)
        lossy = self.drops_activation or moved or any(self.crop)
        return self.weights is Weights.COMPOSE and not lossy

    @property
    def gate_becomes_a_constant(self) -> bool:
        """Whether it is dropped and its mean goes into the projection.

        A fit of ratio 1 sees what the gate did in what it is fitted to.
        """
        fits_projection = self.weights is Weights.FIT and self.block.expand is None
        carried = self.weights is not Weights.RANDOM and not fits_projection
        return carried and self.block.gate is not None and not self.keeps_gate

    @property
    def gate_moves(self) -> bool:
        """Whether it stays and its place is the block's input."""
        return self.block.gate is not None and self.keeps_gate and self.block.expand is None

    @property
    def crop(self) -> tuple[int, int]:
        """Rows and columns that are cut off on each side of the depthwise kernel."""
        rows, cols = self.whole
        return (rows - self.kernel[0]) // 2, (cols - self.kernel[1]) // 2

    def key(self, what: str, program: Program) -> Hashable:
        """Of calls of one block that become the same: data may differ from call to call."""
        if self.weights is Weights.FIT:
            return what, self.block.spatial.conv.name
        return what, *(_call(node, program.module(node)) for node in self.block.nodes)


def _call(node: fx.Node, module: nn.Module | None) -> Hashable:
    """What ``node`` does to its operands, whichever they are."""
    if module is not None:
        return str(node.target) if list(module.parameters()) else repr(module)
    arguments: Any = fx.node.map_arg((node.args, node.kwargs), lambda operand: "operand")
    return node.target, repr(arguments)


def own_padding(conv: Any, crop: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns that ``conv`` pads; ``same`` gives as much as is cropped, and more."""
    found: tuple[int, int] = {"valid": (0, 0), "same": crop}.get(conv.padding, conv.padding)
    return found
