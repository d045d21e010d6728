"""Biases that give converted layers the means, per channel, that the original's norms gave.

What a filter's dropped mean contributed has a mean of its own over the data, and that can go into
the bias (empirical bias correction: Nagel et al., "Data-free quantization through weight
equalization and bias correction", ICCV 2019, section 4.2 and appendix D, there for quantised
weights). Layer after layer: each is measured on what the corrected layers before it give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from fxopt.calibration import Calibration
from fxopt.moments import Moments
from fxopt.normfree.folding import folded_program
from fxopt.observe import Observer
from fxopt.program import Program
from fxopt.proof.running import evaluation_module


def calibrated_shifts(
    before: Program, after: Program, layers: Mapping[fx.Node, fx.Node], data: Calibration
) -> dict[str, torch.Tensor]:
    """What to add to the bias of each converted layer, ``(C_out,)``, by the layer's path.

    All the data goes through one operator after the other, so what is live of it must fit into
    memory. Calls of one layer share what its first call needs.

    Args:
        before: the original.
        after: the program with its layers converted, under the names that they had.
        layers: of each norm of ``before``, the layer that takes it in.
        data: what the means are of.

    Raises:
        PreconditionError: the data does not fit the program, or there is none.
    """
    targets = _means_of(before, list(layers), data)
    wanted = {layers[norm].name: mean for norm, mean in targets.items()}
    shifts: dict[str, torch.Tensor] = {}
    batches, plain = list(data.batches(after)), folded_program(after)
    calls = [node for node in plain.nodes if node.name in wanted]
    for node, values in Observer(calls, evaluation_module(plain)).in_lockstep(batches):
        if node.name in wanted:
            path = str(node.target)
            if path not in shifts:
                shifts[path] = wanted[node.name] - _mean(values)
            for value in values:
                value += _along_channels(shifts[path], value)
    return shifts


def _means_of(
    program: Program, nodes: Sequence[fx.Node], data: Calibration
) -> dict[fx.Node, torch.Tensor]:
    observe = Observer(nodes, evaluation_module(program))
    moments = {node: Moments() for node in nodes}
    for inputs in data.batches(program):
        for each, value in zip(moments.values(), observe(inputs), strict=True):
            each.add(value)
    return {node: each.mean for node, each in moments.items()}


def _mean(values: Sequence[torch.Tensor]) -> torch.Tensor:
    moments = Moments()
    for value in values:
        moments.add(value)
    return moments.mean


def _along_channels(shift: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return shift.to(value.dtype).reshape(-1, *(1,) * (value.dim() - 2))
