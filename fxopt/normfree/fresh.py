"""What is done to a network that is to be trained from scratch without a norm, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxopt.residuals import ResidualBlock


@dataclass(frozen=True)
class Swap:
    """An activation that is to come after pools that read it, because a stream begins there.

    Attributes:
        source: what is activated.
        activation: its nodes, in order.
        carried: the pools and the like, in order.
        shortcuts: the readers of the last of them that go on reading it.
    """

    source: fx.Node
    activation: tuple[fx.Node, ...]
    carried: tuple[fx.Node, ...]
    shortcuts: tuple[fx.Node, ...]

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return self.carried

    @property
    def note(self) -> str:
        return "before the activation: a residual stream begins here"


@dataclass(frozen=True)
class Residual:
    """A residual block whose branch is scaled.

    Attributes:
        block: as it was found.
        scale: what the branch is multiplied by beside the gain: α over the branch's deviation.
        before: β of what it reads.
        after: β of its sum.
        reads: what the shortcut reads instead of the entry: an identity what was activated, a
            shortcut with a layer what is.
        rewired: that first operator of the shortcut, if no other change names it.
    """

    block: ResidualBlock
    scale: float
    before: float
    after: float
    reads: fx.Node | None
    rewired: tuple[fx.Node, ...] = ()

    @property
    def start(self) -> fx.Node:
        """The first operator of the shortcut; of an identity it is the sum."""
        return self.block.chain[0] if self.block.chain else self.block.total

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return (self.block.total, *self.rewired)

    @property
    def note(self) -> str:
        text = f"residual block: branch times {self.scale:.4g}, variance "
        return f"{text}{self.before**2:.4g} to {self.after**2:.4g}"


@dataclass(frozen=True)
class Gated:
    """A gate's product, and what it is multiplied by."""

    product: fx.Node
    factor: float

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return (self.product,)

    @property
    def note(self) -> str:
        return f"gate: times {self.factor:.4g}"


@dataclass(frozen=True)
class Standardised:
    """A layer that gets scaled weight standardisation.

    Attributes:
        call: of the layer.
        norms: what follows it and goes.
        gamma: γ, the same at all calls of the layer.
        divisor: what its operand is divided by, β in a residual stream.
    """

    call: fx.Node
    norms: tuple[fx.Node, ...]
    gamma: float
    divisor: float

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return (self.call, *self.norms)

    @property
    def note(self) -> str:
        divided = f", reads a value divided by {self.divisor:.5g}" if self.divisor != 1 else ""
        return f"gamma {self.gamma:.5g}{divided}"


@dataclass(frozen=True)
class _Alone:
    """A change of one node, which it names."""

    node: fx.Node
    note: ClassVar[str]

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return (self.node,)


class Redrawn(_Alone):
    """A layer that stays plain and gets new weights."""

    note = "plain, drawn anew"


class Dropped(_Alone):
    """A norm that goes and is in no layer."""

    note = "no norm: what reads it is scaled"


class Fixed(_Alone):
    """A norm of an input of the model, which becomes a fixed scale and shift."""

    note = "on the raw input: a fixed scale and shift"


Change = Swap | Residual | Gated | Standardised | Redrawn | Dropped | Fixed


@dataclass(frozen=True)
class Fresh:
    """The changes, in the order in which they are made, and what stays, with the reasons."""

    changes: tuple[Change, ...]
    declined: Mapping[fx.Node, str]
