"""One block of a program becomes its fused form: its gate, its graph, its layers."""

from __future__ import annotations

import torch
from torch import fx

from fxopt.channelwise import with_scale_before
from fxopt.edit import Edit
from fxopt.fusing import algebra, rewire
from fxopt.fusing.algebra import Affine
from fxopt.fusing.closed import Closed
from fxopt.fusing.fitted import fitted
from fxopt.fusing.form import Form, Weights
from fxopt.fusing.gates import fitted_gate, fitted_squeeze
from fxopt.fusing.layers import Settings, place, randomise
from fxopt.layers import ScaleShift


def fuse(form: Form, edit: Edit) -> None:
    """Rewrite the block of ``form`` in ``edit``, in which the blocks before it are fused already.

    Raises:
        PreconditionError: there is too little calibration data.
    """
    block = form.block
    settings = Settings.of(edit.module(block.spatial.conv))
    closed = Closed(edit, block, form.kernel, form.weights is Weights.COMPOSE)
    random = form.weights is Weights.RANDOM
    fits = form.weights is Weights.FIT
    if form.gate_becomes_a_constant:
        factors = fitted_gate(form, edit) if fits else closed.gate_at_rest()
        _scale_projection(form, edit, factors)
    fused = None if fits or random else closed.fused()
    _gate(form, edit, closed, settings)
    if block.expand is not None:
        rewire.without_expansion(edit, block)
    else:
        rewire.without_projection(edit, block, activated=random and not form.carried)
    if form.crops_pad:
        rewire.cropped_pad(edit, block, form.crop)
    if random:
        randomise(form, edit, settings)
        return
    place(form, edit, settings, fused or fitted(form, edit, settings))


def _gate(form: Form, edit: Edit, closed: Closed, settings: Settings) -> None:
    """Drop the gate, keep it, or (ratio 1) move it to the input, where it pools something else."""
    block = form.block
    if block.gate is None or (form.keeps_gate and block.expand is not None):
        return
    if not form.keeps_gate:
        rewire.without_gate(edit, block.gate)
        return
    squeeze = _squeeze(form, edit, closed, settings)
    for pooled in rewire.with_gate_on_input(edit, block):
        if squeeze is not None:
            _stretch(edit, pooled, squeeze, settings)


def _squeeze(form: Form, edit: Edit, closed: Closed, settings: Settings) -> Affine | None:
    """What a gate that moves to the input makes of what it pools there."""
    if form.weights is Weights.RANDOM:
        channels = edit.program.types[form.block.entry.name].shape[1]
        return algebra.identity(channels, settings.weight) if form.carried else None
    return fitted_squeeze(form, edit) if form.weights is Weights.FIT else closed.squeeze()


def _scale_projection(form: Form, edit: Edit, factors: torch.Tensor) -> None:
    """What the gate is on average goes into the weights that read what it multiplied."""
    project_node = form.block.project
    assert project_node is not None
    project = edit.module(project_node.conv)
    key = form.key("project", edit.program)
    edit.replace_module(project_node.conv, lambda: with_scale_before(project, factors), key=key)


def _stretch(edit: Edit, pooled: fx.Node, squeeze: Affine, settings: Settings) -> None:
    dtype = settings.weight.dtype
    layer = ScaleShift(squeeze.scale.to(dtype), squeeze.shift.to(dtype))
    layer.requires_grad_(settings.weight.requires_grad).eval()
    readers = list(pooled.users)
    node = edit.call_module(layer, (pooled,), after=pooled, name="squeeze")
    for reader in readers:
        reader.replace_input_with(pooled, node)
