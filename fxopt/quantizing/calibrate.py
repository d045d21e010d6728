"""The grids of a program's quantisers, from what its tensors are on calibration data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxopt.channelwise import TRANSPOSED_KINDS
from fxopt.errors import PreconditionError
from fxopt.observe import Observer
from fxopt.program import Program
from fxopt.proof.running import evaluation_module
from fxopt.quantizing.grid import Grid
from fxopt.quantizing.observers import OBSERVERS, ObserverName, Range
from fxopt.quantizing.placement import Group, Placement, layer_input


@dataclass(frozen=True)
class Calibrated:
    """What calibration data says of a program.

    Attributes:
        grids: of each group of tensors.
        input_means: by path of a layer with a bias, the mean of each input channel, ``(C_in,)``.
    """

    grids: Mapping[Group, Grid]
    input_means: Mapping[str, torch.Tensor]


def calibrated(
    program: Program, placement: Placement, batches: Iterable[Sequence[torch.Tensor]],
    observer: ObserverName, bits: int, means: bool = False,
) -> Calibrated:  # fmt: skip
    """The grid of each group of tensors, in one pass over ``batches``.

    Of a tensor that leaves the network the range is from its least to its greatest value, whatever
    the observer: nothing evens out what is cut off there.

    Args:
        means: whether the means of layers' inputs are wanted too.

    Raises:
        PreconditionError: a tensor is not finite; the first is named.
    """
    returned = set(program.output_node().all_input_nodes)
    ranges: dict[Group, Range] = {}
    for group in dict.fromkeys(placement.groups.values()):
        leaves = not returned.isdisjoint(group.members)
        ranges[group] = OBSERVERS["minmax" if leaves else observer]()
    watched = {
        node: ranges[group]
        for node, group in placement.groups.items()
        if node not in placement.settled
    }
    averaged = _means(program, placement) if means else {}
    observe = Observer([*watched, *averaged], evaluation_module(program))
    for inputs in batches:
        for node, (value,) in observe.in_lockstep([inputs]):
            if node in watched and value.numel():
                low, high = _ends(program, node, value)
                watched[node].add(value, low, high)
            if node in averaged and value.numel():
                means_here = value.mean((0, *range(2, value.dim())))
                count = value.numel() // value.shape[1]
                for each in averaged[node].values():
                    each.add(means_here, count)
    for group, seen in ranges.items():
        for constant in group.constants:
            seen.add(torch.tensor([constant]), constant, constant)
    grids = {group: seen.grid(bits, group.limits) for group, seen in ranges.items()}
    by_layer = {path: each for found in averaged.values() for path, each in found.items()}
    return Calibrated(grids, {path: each.mean for path, each in by_layer.items()})


class _Means:
    """Means of channels over batches ``(N, C, *)``, in float64."""

    def __init__(self) -> None:
        self._count = 0
        self._total: torch.Tensor | float = 0.0

    def add(self, means: torch.Tensor, count: int) -> None:
        """Those of one batch, each over ``count`` values."""
        self._total = self._total + count * means.double()
        self._count += count

    @property
    def mean(self) -> torch.Tensor:
        return torch.as_tensor(self._total) / self._count


def _means(program: Program, placement: Placement) -> dict[fx.Node, dict[str, _Means]]:
    """By value, those of the layers that read it; calls of one layer have theirs together."""
    by_layer: dict[str, _Means] = defaultdict(_Means)
    found: dict[fx.Node, dict[str, _Means]] = defaultdict(dict)
    for node in placement.layers:
        layer: Any = program.module(node)
        operand, path = layer_input(node), str(node.target)
        shape = program.types[operand.name].shape
        last = isinstance(layer, nn.Linear) and len(shape) != 2
        if layer.bias is not None and not isinstance(layer, TRANSPOSED_KINDS) and not last:
            found[operand][path] = by_layer[path]
    return found


def _ends(program: Program, node: fx.Node, value: torch.Tensor) -> tuple[float, float]:
    low, high = (float(end) for end in torch.aminmax(value.detach()))
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        raise PreconditionError(
            f"on the calibration data '{node.name}' ({program.where(node)}) is not finite: "
            "give inputs as the model is used on, normalised, and weights that are finite"
        )
    return low, high
