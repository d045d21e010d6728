"""How well fused blocks reproduce what the original computed, on calibration data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.blocks import InvertedResidual
from fxopt.calibration import Calibration
from fxopt.fusing.evaluate import Observer
from fxopt.program import Program, TensorType


def reconstruction(
    before: Program, after: Program, blocks: Sequence[InvertedResidual], data: Calibration
) -> dict[str, Any]:
    """The relative error of each block, in place, and of every output.

    A block's error is that of what its fused convolution and norm give: the norm of the difference
    over the norm of the original's deviation from its channels' means. An output ``(N, classes)``
    also has the share of samples whose largest class stays.

    Raises:
        PreconditionError: the data does not fit the program, or there is none.
    """
    inside = list(_blocks(after, blocks))
    outputs = list(_outputs(before, after))
    compared = [*inside, *outputs]
    was = Observer([each.before for each in compared], before.graph_module)
    now = Observer([each.after for each in compared], after.graph_module)
    sums = [_Sums() for _ in compared]
    for inputs in data.batches(before):
        for each, original, fused in zip(sums, was(inputs), now(inputs), strict=True):
            each.add(original, fused)
    errors = [each.relative_error() for each in sums]
    agreement = {
        each.title: total.agreement()
        for each, total in zip(outputs, sums[len(inside) :], strict=True)
        if _classifies(before.types[each.before.name])
    }
    return {
        "block_errors": {e.title: error for e, error in zip(inside, errors, strict=False)},
        "output_errors": {
            e.title: error for e, error in zip(outputs, errors[len(inside) :], strict=True)
        },
        **({"top1_agreement": agreement} if agreement else {}),
    }


@dataclass(frozen=True)
class _Compared:
    """A value of the original and what stands for it in the rewritten program."""

    title: str
    before: fx.Node
    after: fx.Node


def _blocks(after: Program, blocks: Sequence[InvertedResidual]) -> Iterator[_Compared]:
    calls = Counter(block.path for block in blocks)
    for block in blocks:
        original, fused = _sums_of(block)
        title = block.path if calls[block.path] == 1 else block.spatial.conv.name
        yield _Compared(title, original, after.node(fused))


def _sums_of(block: InvertedResidual) -> tuple[fx.Node, str]:
    """What the fused convolution and norm are to give, and the name of what gives it.

    The fused convolution has the depthwise's name, its norm keeps its own.
    """
    layer = block.spatial if block.expand is not None else block.project
    assert layer is not None
    return layer.last, (layer.norm or block.spatial.conv).name


def _outputs(before: Program, after: Program) -> Iterator[_Compared]:
    results: Any = (program.output_node().args[0] for program in (before, after))
    for title, was, now in zip(before.interface.output_names, *results, strict=True):
        kind = before.types[was.name] if isinstance(was, fx.Node) else None
        if isinstance(kind, TensorType) and not kind.dtype.is_complex:
            yield _Compared(title, was, now)


def _classifies(kind: object) -> bool:
    """Whether it is ``(N, classes)``: scores, not indices."""
    is_table = isinstance(kind, TensorType) and len(kind.shape) == 2 and kind.shape[1] > 1
    return is_table and kind.dtype.is_floating_point  # type: ignore[attr-defined]


class _Sums:
    """Squared differences and deviations, and classes that stay, in float64 over batches."""

    def __init__(self) -> None:
        self.difference = 0.0
        self.samples = 0
        self.agreeing = 0
        self._moments: dict[int, tuple[int, Any, Any]] = {}
        """Count, sums and squares of each channel, by the number of channels: it may vary."""

    def add(self, was: torch.Tensor, now: torch.Tensor) -> None:
        """Two tensors with channels on axis 1."""
        original, fused = was.double(), now.double()
        self.difference += float((fused - original).square().sum())
        flat = original.movedim(1, 0).flatten(1) if original.dim() > 1 else original.reshape(1, -1)
        count, total, squares = self._moments.get(len(flat), (0, 0.0, 0.0))
        sums = total + flat.sum(1), squares + flat.square().sum(1)
        self._moments[len(flat)] = (count + flat.shape[1], *sums)
        if original.dim() == 2:
            self.samples += len(original)
            self.agreeing += int((original.argmax(1) == fused.argmax(1)).sum())

    def relative_error(self) -> float:
        deviation = sum(
            float((squares - total**2 / count).sum())
            for count, total, squares in self._moments.values()
        )
        if deviation <= 0:
            return 0.0 if self.difference == 0 else float("inf")
        return float((self.difference / deviation) ** 0.5)

    def agreement(self) -> float:
        return self.agreeing / self.samples
