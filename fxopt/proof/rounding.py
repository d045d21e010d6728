"""What a network makes of rounding: how far its outputs move if its inputs move by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from fxopt.program import Program
from fxopt.proof.double import run_double, widened
from fxopt.proof.evidence import EXACTLY, output_errors
from fxopt.proof.running import run
from fxopt.results import OutputError

AMPLIFIED_BOUND = 1e-8
"""More than this is no rounding, unless the network makes as much of one at its inputs."""
_ROUNDINGS = 64
"""Right rewrites measure up to 3.4 times what one rounding of the inputs comes to."""
RUNS = 8
"""More runs where one is not enough to tell the distance to float64."""

Errors = tuple[OutputError, ...]


def is_rounding(
    departing: Sequence[OutputError], double: Program, inputs: Sequence[torch.Tensor],
    reference: Sequence[Any],
) -> bool:  # fmt: skip
    """Whether each of these outputs, in float64, departs by what the network makes of rounding.

    A chaotic network makes of one rounding 1e-6 and of another 0.1: several are tried.
    """
    left = [each for each in departing if not _error(each) <= AMPLIFIED_BOUND]
    wide = [widened(tensor) for tensor in inputs]
    for seed in range(RUNS):
        if not left:
            break
        moved = run_double(double, _a_rounding_apart(wide, seed))
        found = output_errors(double.interface.output_names, reference, moved)
        measured = {each.output: each.error or 0.0 for each in found if each.remark != EXACTLY}
        left = [o for o in left if not _error(o) <= _ROUNDINGS * measured.get(o.output, 0.0)]
    return not left


def worst_of_runs(
    before: Program, after: Program, double: Program, inputs: Sequence[torch.Tensor],
    first: tuple[Sequence[OutputError], Sequence[OutputError]],
) -> tuple[Errors, Errors]:  # fmt: skip
    """The largest errors of both programs against ``double``, the original, in several runs.

    Args:
        inputs: what the first run was on; the others are on inputs a rounding apart from them.
        first: the errors of that run.
    """
    names = before.interface.output_names
    runs = [first]
    for seed in range(RUNS):
        moved = _a_rounding_apart(inputs, seed)
        reference = run_double(double, moved)
        was, now = (output_errors(names, reference, run(each, moved)) for each in (before, after))
        runs.append((was, now))
    own, shipped = zip(*runs, strict=True)
    return _worst(own), _worst(shipped)


def _worst(runs: Sequence[Sequence[OutputError]]) -> Errors:
    """The largest error of each output; one that is not a number is the largest."""
    return tuple(max(errors, key=_rank) for errors in zip(*runs, strict=True))


def _rank(output: OutputError) -> float:
    error = -1.0 if output.error is None else output.error
    return math.inf if math.isnan(error) else error


def _error(output: OutputError) -> float:
    return math.inf if output.error is None else output.error


def _a_rounding_apart(inputs: Sequence[torch.Tensor], seed: int) -> list[torch.Tensor]:
    """Each element moved to the floating number above or below it."""
    generator = torch.Generator().manual_seed(seed)

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        up = torch.rand(tensor.shape, generator=generator).to(tensor.device) < 0.5
        return torch.nextafter(tensor, torch.where(up, math.inf, -math.inf).to(tensor.dtype))

    return list(map(moved, inputs))
