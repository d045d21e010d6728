"""The memory plan of a model, as a frozen value: it answers whether the model fits, and why not.

The schema of ``to_dict()`` and ``json()`` is in ``docs/memory.md``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fxopt import schema
from fxopt.analysis.memory_model import MemoryModel
from fxopt.analysis.plan import ArenaPlan, Lifetime
from fxopt.program import TensorType

if TYPE_CHECKING:
    from fxopt.execution.compare import Execution

MANY_BLOCKS, FEW_BLOCKS = 40, 12
"""How many blocks are shown at most, and from how many on a deeper view is not needed."""


@dataclass(frozen=True)
class Step:
    """One operator as a kernel runs it, and what is needed meanwhile.

    Attributes:
        id: the node of the program whose value it writes.
        path: the user's module that it is of; empty for the model's own forward.
        kind: as in :mod:`fxopt.operators`; ``input`` for an input.
        bytes: live at this step, its result and its scratch memory included.
    """

    id: str
    path: str
    kind: str
    bytes: int


@dataclass(frozen=True)
class LiveTensor:
    """What takes bytes at a step.

    Attributes:
        id: the node that writes it, or ``"node (scratch)"``.
        path: the user's module that the node is of.
        bytes: what it adds to the others: a result written over another tensor only adds what it
            is larger.
        over: the tensor that it is written over at this very step, or None.
        type: of the value in the program; None for scratch memory and for several values at once.
    """

    id: str
    path: str
    bytes: int
    over: str | None
    type: TensorType | None


@dataclass(frozen=True)
class Fit:
    """Whether a plan fits a memory.

    Attributes:
        sram_bytes: what there is.
        fits: whether the arena is no larger.
        spare_bytes: what is left; negative: what is missing.
        reason: why it does not fit, and whether another order or packing could; empty if it fits.
    """

    sram_bytes: int
    fits: bool
    spare_bytes: int
    reason: str


@dataclass(frozen=True)
class MemoryPlan:
    """An order of a model's operators, a place for every tensor, and what they need, in bytes.

    All is for the example inputs as given (the batch included), and validated.

    Attributes:
        model: the class of the user's model.
        inputs: type of each tensor input by name.
        preset: name of the preset whose kernels ``memory_model`` has, or "custom" and what they do.
        memory_model: what the kernels can do.
        order: ids of the operators, first to last.
        peak_bytes: the most that is needed at any step.
        lower_bound_bytes: no order of these operators has a smaller peak.
        optimal: the two are equal.
        program_order_bytes: the peak in the order of the user's forward.
        arena: offsets of all tensors, views and scratch memory in one buffer.
        lifetimes: of every tensor that takes bytes of its own, and of scratch memory.
        peak_step: the first step that needs ``peak_bytes``, counted from 0.
        live_at_peak: the tensors live there; their bytes add up to ``peak_bytes``.
        steps: every operator in order, with the bytes that are needed while it runs.
        forbidding: the operator that needs most in every order, with these bytes; None if there
            is no operator.
        weight_bytes: of parameters and persistent buffers, in flash.
        constant_bytes: of other tensors in flash, computed from weights and shapes alone.
        opaque: operators that keep tensors inside of which nothing is known.
        notes: sentences on what the plan takes for granted.
    """

    model: str
    inputs: Mapping[str, TensorType]
    preset: str
    memory_model: MemoryModel
    order: tuple[str, ...]
    peak_bytes: int
    lower_bound_bytes: int
    optimal: bool
    program_order_bytes: int
    arena: ArenaPlan
    lifetimes: tuple[Lifetime, ...]
    peak_step: int
    live_at_peak: tuple[LiveTensor, ...]
    steps: tuple[Step, ...]
    forbidding: Step | None
    weight_bytes: int
    constant_bytes: int
    opaque: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def at_least(self) -> bool:
        """Opaque operators need more than is counted here."""
        return bool(self.opaque)

    def blocks(self, depth: int | None = None) -> dict[str, int]:
        """The peak in bytes of each of the user's modules, by path cut to ``depth`` names.

        Operators of the model's own forward are under their ids; inputs are left out. Without a
        depth it is the least that gives twelve blocks, as long as there are no more than forty.
        """
        steps = [step for step in self.steps if step.kind != "input"]
        if depth is not None:
            return _blocks(steps, depth)
        deepest = max((step.path.count(".") + 1 for step in steps), default=1)
        choices = [_blocks(steps, depth) for depth in range(1, deepest + 1)]
        few = [blocks for blocks in choices if len(blocks) <= MANY_BLOCKS] or choices[:1]
        return next((blocks for blocks in few if len(blocks) >= FEW_BLOCKS), few[-1])

    def fit(self, sram_bytes: int) -> Fit:
        """Whether the arena fits into ``sram_bytes``, and if not, why."""
        needed = self.arena.size_bytes
        fits = needed <= sram_bytes
        reason = "" if fits else self._misfit(sram_bytes)
        return Fit(sram_bytes, fits, sram_bytes - needed, reason)

    def _misfit(self, sram_bytes: int) -> str:
        forbidding = self.forbidding
        if forbidding is not None and forbidding.bytes > sram_bytes:
            where = forbidding.path or forbidding.id
            return f"no order can meet it: '{where}' needs {forbidding.bytes:,} bytes in any order"
        if self.lower_bound_bytes > sram_bytes:
            return f"no order can meet it: each needs at least {self.lower_bound_bytes:,} bytes"
        if self.peak_bytes > sram_bytes:
            return "the order needs more; whether another one would do is not known"
        if self.arena.lower_bound_bytes > sram_bytes:
            return f"at an alignment of {self.memory_model.alignment} the tensors need more"
        return "the tensors that are live together would fit, but no packing was found that does it"

    def to_dict(
        self,
        sram_bytes: int | None = None,
        depth: int | None = None,
        execution: Execution | None = None,
    ) -> dict[str, Any]:
        """The plan in JSON's own types; with ``sram_bytes`` whether it fits."""
        return schema.memory_dict(self, sram_bytes, depth, execution)

    def json(
        self,
        sram_bytes: int | None = None,
        depth: int | None = None,
        execution: Execution | None = None,
    ) -> str:
        """The plan as strict JSON."""
        return schema.to_json(self.to_dict(sram_bytes, depth, execution))

    def text(
        self,
        sram_bytes: int | None = None,
        depth: int | None = None,
        execution: Execution | None = None,
    ) -> str:
        """The plan as plain text: totals, the peak, a bar for every block, what would help.

        With an ``execution`` what that has shown.
        """
        from fxopt import render

        return render.to_text(render.memory_document(self, sram_bytes, depth, execution))

    def markdown(
        self,
        sram_bytes: int | None = None,
        depth: int | None = None,
        execution: Execution | None = None,
    ) -> str:
        """What :meth:`text` says, as GitHub's Markdown."""
        from fxopt import render

        return render.to_markdown(render.memory_document(self, sram_bytes, depth, execution))


def _blocks(steps: Sequence[Step], depth: int) -> dict[str, int]:
    peaks: dict[str, int] = {}
    for step in steps:
        block = ".".join(step.path.split(".")[:depth]) or step.id
        peaks[block] = max(peaks.get(block, 0), step.bytes)
    return peaks
