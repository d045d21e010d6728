"""The grids of a program's quantisers, from what its tensors are on calibration data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fxopt.errors import PreconditionError
from fxopt.observe import Observer
from fxopt.program import Program
from fxopt.proof.running import evaluation_module
from fxopt.quantizing.grid import Grid
from fxopt.quantizing.observers import OBSERVERS, ObserverName, Range
from fxopt.quantizing.placement import Group, Placement


def calibrated(
    program: Program, placement: Placement, batches: Iterable[Sequence[torch.Tensor]],
    observer: ObserverName, bits: int,
) -> dict[Group, Grid]:  # fmt: skip
    """The grid of each group of tensors, in one pass over ``batches``.

    Raises:
        PreconditionError: a tensor is not finite; the first is named.
    """
    groups = list(dict.fromkeys(placement.groups.values()))
    ranges: Mapping[Group, Range] = {group: OBSERVERS[observer]() for group in groups}
    watched = {
        node: ranges[group]
        for node, group in placement.groups.items()
        if node not in placement.settled
    }
    observe = Observer(list(watched), evaluation_module(program))
    for inputs in batches:
        for node, (value,) in observe.in_lockstep([inputs]):
            if node in watched and value.numel():
                low, high = _ends(program, node, value)
                watched[node].add(value, low, high)
    for group, seen in ranges.items():
        for constant in group.constants:
            seen.add(torch.tensor([constant]), constant, constant)
    return {group: seen.grid(bits, group.limits) for group, seen in ranges.items()}


def _ends(program: Program, node: fx.Node, value: torch.Tensor) -> tuple[float, float]:
    low, high = (float(end) for end in torch.aminmax(value.detach()))
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        raise PreconditionError(
            f"on the calibration data '{node.name}' ({program.where(node)}) is not finite: "
            "give inputs as the model is used on, normalised, and weights that are finite"
        )
    return low, high
