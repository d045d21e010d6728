"""What stands for a squeeze-excite gate that is dropped or moved, fitted to calibration data."""

from __future__ import annotations

import torch

from fxopt.edit import Edit
from fxopt.fusing.algebra import Affine
from fxopt.fusing.form import Form
from fxopt.observe import Observer


def fitted_gate(form: Form, edit: Edit) -> torch.Tensor:
    """Dropped: the factors ``(C,)`` that do best what the gate does, ``Σ g·x·x / Σ x·x``.

    ``x`` is what the original's gate multiplies and ``g·x`` what it gives.
    """
    gate, data = form.block.gate, form.calibration
    assert gate is not None
    assert data is not None
    gated = Observer([gate.source, gate.product], edit.program.graph_module)
    products = squares = torch.zeros(())
    for inputs in data.batches(edit.program):
        before, after = (maps.double().movedim(1, 0).flatten(1) for maps in gated(inputs))
        products = products + (before * after).sum(1)
        squares = squares + before.square().sum(1)
    return torch.where(squares > 0, products / squares, 1.0)


def fitted_squeeze(form: Form, edit: Edit) -> Affine:
    """Moved to the input (ratio 1): the line of best fit for each channel.

    It goes from the mean of what the block reads, blocks before it fused, to the mean that the
    original's gate pools.
    """
    gate, data = form.block.gate, form.calibration
    assert gate is not None
    assert data is not None
    reads = Observer([edit.node(form.block.spatial.conv).all_input_nodes[0]], edit.tree)
    pools = Observer([gate.source], edit.program.graph_module)
    count = 0
    sums: torch.Tensor | float = 0.0
    for inputs in data.batches(edit.program):
        x, y = (maps.double().mean((2, 3)) for (maps,) in (reads(inputs), pools(inputs)))
        count += len(x)
        sums = sums + torch.stack((x, y, x * x, x * y)).sum(1)
    x, y, xx, xy = torch.as_tensor(sums / count)
    variance = xx - x * x
    slope = torch.where(variance > 1e-12 * xx, (xy - x * y) / variance, 0.0)
    return Affine(slope, y - slope * x)
