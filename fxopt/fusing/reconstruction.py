"""How well fused blocks reproduce what the original computed, on calibration data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from torch import fx

from fxopt.blocks import InvertedResidual
from fxopt.calibration import Calibration
from fxopt.fidelity import Compared, fidelity
from fxopt.program import Program


def reconstruction(
    before: Program, after: Program, blocks: Sequence[InvertedResidual], data: Calibration
) -> dict[str, Any]:
    """The relative error of each block, in place, and of every output.

    A block's error is that of what its fused convolution and norm give.

    Raises:
        PreconditionError: the data does not fit the program, or there is none.
    """
    inside = list(_blocks(after, blocks))
    errors, outputs = fidelity(before, after, inside, data.batches(before))
    return {"block_errors": {e.title: x for e, x in zip(inside, errors, strict=True)}, **outputs}


def _blocks(after: Program, blocks: Sequence[InvertedResidual]) -> Iterator[Compared]:
    calls = Counter(block.path for block in blocks)
    for block in blocks:
        original, fused = _sums_of(block)
        title = block.path if calls[block.path] == 1 else block.spatial.conv.name
        yield Compared(title, original, after.node(fused))


def _sums_of(block: InvertedResidual) -> tuple[fx.Node, str]:
    """What the fused convolution and norm are to give, and the name of what gives it.

    The fused convolution has the depthwise's name, its norm keeps its own.
    """
    layer = block.spatial if block.expand is not None else block.project
    assert layer is not None
    return layer.last, (layer.norm or block.spatial.conv).name
