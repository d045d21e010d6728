"""How far a rewritten program's values are from the original's, on batches of inputs.

The relative error of a value is the norm of the difference over the norm of the original's
deviation from its channels' means; over that of the original where a channel has one value.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.moments import Moments
from fxopt.observe import Observer
from fxopt.program import Program, TensorType
from fxopt.proof.evidence import SEED
from fxopt.proof.running import evaluation_module


@dataclass(frozen=True)
class Compared:
    """A value of the original and what stands for it in the rewritten program."""

    title: str
    before: fx.Node
    after: fx.Node


def fidelity(
    before: Program, after: Program, inside: Sequence[Compared],
    batches: Iterable[Sequence[torch.Tensor]],
) -> tuple[list[float], dict[str, Any]]:  # fmt: skip
    """The relative errors of the values ``inside``, and those of all outputs as evidence.

    An output ``(N, classes)`` also has the share of samples whose largest class stays.
    """
    outputs = list(_outputs(before, after))
    compared = [*inside, *outputs]
    was = Observer([each.before for each in compared], evaluation_module(before))
    now = Observer([each.after for each in compared], evaluation_module(after))
    sums = [Deviation() for _ in compared]
    for inputs in batches:
        pairs = zip(sums, _seeded(was, inputs), _seeded(now, inputs), strict=True)
        for each, original, found in pairs:
            each.add(original, found)
    errors = [each.relative_error() for each in sums]
    of_outputs = list(zip(outputs, sums[len(inside) :], strict=True))
    agreement = {
        each.title: total.agreement()
        for each, total in of_outputs
        if _classifies(before.types[each.before.name])
    }
    evidence: dict[str, Any] = {
        "output_errors": {each.title: total.relative_error() for each, total in of_outputs}
    }
    return errors[: len(inside)], evidence | ({"top1_agreement": agreement} if agreement else {})


def _seeded(observe: Observer, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The values, with the same random numbers each time where the network draws some."""
    torch.manual_seed(SEED)
    return observe(inputs)


def _outputs(before: Program, after: Program) -> Iterator[Compared]:
    results: Any = (program.output_node().args[0] for program in (before, after))
    for title, was, now in zip(before.interface.output_names, *results, strict=True):
        kind = before.types[was.name] if isinstance(was, fx.Node) else None
        if isinstance(kind, TensorType) and not kind.dtype.is_complex:
            yield Compared(title, was, now)


def _classifies(kind: object) -> bool:
    """Whether it is ``(N, classes)``: scores, not indices."""
    is_table = isinstance(kind, TensorType) and len(kind.shape) == 2 and kind.shape[1] > 1
    return is_table and kind.dtype.is_floating_point  # type: ignore[attr-defined]


class Deviation:
    """Squared differences and deviations, and classes that stay, in float64 over batches."""

    def __init__(self) -> None:
        self.difference = 0.0
        self.samples = 0
        self.agreeing = 0
        self._moments: dict[int, Moments] = defaultdict(Moments)
        """By the number of channels, which may vary."""

    def add(self, was: torch.Tensor, now: torch.Tensor) -> None:
        """Two tensors with channels on axis 1."""
        kind = torch.promote_types(was.dtype, torch.float32)
        original, found = was.to(kind), now.to(kind)
        apart = torch.linalg.vector_norm(found - original, dtype=torch.float64)
        self.difference += float(apart) ** 2
        self._moments[original.shape[1] if original.dim() > 1 else 1].add(original)
        if original.dim() == 2:
            self.samples += len(original)
            self.agreeing += int((original.argmax(1) == found.argmax(1)).sum())

    def relative_error(self) -> float:
        moments = self._moments.values()
        single = all(each.count < 2 for each in moments)
        size = sum(float((m.squares if single else m.deviation).sum()) for m in moments)
        if size <= 0:
            return 0.0 if self.difference == 0 else float("inf")
        return float((self.difference / size) ** 0.5)

    def agreement(self) -> float:
        return self.agreeing / self.samples
