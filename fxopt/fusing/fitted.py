"""The fit of a block: what its fused convolution reads, and what the original's sums are."""

from __future__ import annotations

import torch
from torch import nn

from fxopt.edit import Edit
from fxopt.errors import PreconditionError
from fxopt.fusing.algebra import Fused
from fxopt.fusing.form import Form
from fxopt.fusing.layers import Settings, padding_of
from fxopt.fusing.regression import Regression
from fxopt.observe import Observer


def fitted(form: Form, edit: Edit, settings: Settings) -> Fused:
    """Least squares: from what the fused convolution reads to what the original's sums are."""
    block, program = form.block, edit.program
    assert form.calibration is not None
    assert block.project is not None
    target = block.spatial.conv if block.expand is not None else block.project.conv
    conv = edit.node(block.spatial.conv)
    reads = Observer([conv.all_input_nodes[0]], edit.tree)
    wanted = Observer([program.node(target.name)], program.graph_module)
    regression = Regression(form.kernel, settings.stride)
    for inputs in form.calibration.batches(program):
        (maps,), (sums,) = reads(inputs), wanted(inputs)
        regression.add(_padded(form, settings, maps), sums)
    if regression.samples < regression.unknowns:
        needed = f"{regression.unknowns:,} unknowns of each output channel"
        raise PreconditionError(
            f"weights=fit has {regression.samples:,} samples for the {needed} in '{block.path}'; "
            f"give at least {regression.images_needed:,} calibration images like these"
        )
    return regression.solution(program.types[block.entry.name].shape[1])


def _padded(form: Form, settings: Settings, maps: torch.Tensor) -> torch.Tensor:
    """``maps`` with the convolution's own padding around them."""
    padding = padding_of(form, settings)
    if padding == "valid":
        return maps
    if padding == "same":
        total = [each - 1 for each in form.kernel]
        rows, cols = ((each // 2, each - each // 2) for each in total)
    else:
        rows, cols = ((each, each) for each in padding)
    mode = "constant" if settings.padding_mode == "zeros" else settings.padding_mode
    return nn.functional.pad(maps, (*cols, *rows), mode=mode)
