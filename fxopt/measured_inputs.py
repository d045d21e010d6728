"""Inputs that a measurement is made on: the user's, or seeded ones of the example's size."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from fxopt.calibration import Calibration
from fxopt.program import Program
from fxopt.proof.evidence import input_attempts, verification_shapes


def measured_on(
    program: Program, data: Any, batch: int
) -> tuple[str, Iterable[tuple[list[torch.Tensor], Any]]]:
    """``data`` in words and as labelled batches; without any, seeded inputs of ``program``.

    Args:
        program: whose inputs they are.
        data: as :class:`Calibration` takes it, or None.
        batch: how many are drawn.
    """
    if data is not None:
        calibration = Calibration(data)
        return str(calibration), calibration.labelled_batches(program)
    drawn = next(input_attempts(program, verification_shapes(program, batch), None))
    shapes = ", ".join("x".join(map(str, each.shape)) for each in drawn)
    real = all(each.is_floating_point() for each in drawn)
    return f"{'unit normal' if real else 'seeded'} {shapes}", [(drawn, None)]
