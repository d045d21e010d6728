"""How well fused blocks reproduce what the original computed, on calibration data."""

from __future__ import annotations

from collections.abc import Sequence
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
    """
    names = [_compared(block).name for block in blocks]
    outputs = [node.name for node in before.output_node().all_input_nodes]
    pair = [_observer(program, names, outputs) for program in (before, after)]
    errors = {name: _Error() for name in (*names, *outputs)}
    agreeing: dict[str, list[torch.Tensor]] = {}
    for inputs in data.batches(before):
        found = [dict(zip(errors, observe(inputs), strict=False)) for observe in pair]
        for name, error in errors.items():
            was, now = (values[name] for values in found)
            error.add(was, now)
            if name in outputs and _classifies(before, name):
                agreeing.setdefault(name, []).append(was.argmax(1) == now.argmax(1))
    titles = dict(zip(outputs, before.interface.output_names, strict=False))
    agreement = {titles[node]: _share(agreeing[node]) for node in agreeing}
    return {
        "block_errors": {b.path: errors[n].relative() for b, n in zip(blocks, names, strict=True)},
        "output_errors": {titles[node]: errors[node].relative() for node in outputs},
        **({"top1_agreement": agreement} if agreement else {}),
    }


def _compared(block: InvertedResidual) -> fx.Node:
    return block.spatial.last if block.expand is not None else block.end


def _observer(program: Program, names: Sequence[str], outputs: Sequence[str]) -> Observer:
    nodes = {node.name: node for node in program.nodes}
    results = program.output_node().all_input_nodes
    return Observer([*(nodes[name] for name in names), *results], program.graph_module)


def _classifies(program: Program, name: str) -> bool:
    kind = program.types[name]
    return isinstance(kind, TensorType) and len(kind.shape) == 2 and kind.shape[1] > 1


def _share(agreeing: list[torch.Tensor]) -> float:
    return float(torch.cat(agreeing).double().mean())


class _Error:
    """Squared differences and deviations, summed over batches in float64."""

    def __init__(self) -> None:
        self.difference = 0.0
        self.count = 0
        self.sums: torch.Tensor | float = 0.0
        self.squares: torch.Tensor | float = 0.0

    def add(self, was: torch.Tensor, now: torch.Tensor) -> None:
        """Two tensors with channels on axis 1."""
        reference = was.double().movedim(1, 0).flatten(1) if was.dim() > 1 else was.double()[None]
        self.difference += float((now.double() - was.double()).square().sum())
        self.count += reference.shape[1]
        self.sums = self.sums + reference.sum(1)
        self.squares = self.squares + reference.square().sum(1)

    def relative(self) -> float:
        variation = self.squares - self.sums**2 / max(self.count, 1)
        total = float(torch.as_tensor(variation).sum())
        if total <= 0:
            return 0.0 if self.difference == 0 else float("inf")
        return float((self.difference / total) ** 0.5)
