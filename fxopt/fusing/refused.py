"""Why a block cannot be fused into a form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from fxopt.blocks import MBCONV, Gate
from fxopt.fusing.form import Form, Weights, own_padding
from fxopt.pads import pad_of
from fxopt.program import Program, TensorType


def why_not(program: Program, form: Form) -> str:
    """Why ``form`` cannot be had, or nothing."""
    block = form.block
    if block.kind != MBCONV:
        return "it is fused already"
    if block.obstacle:
        return block.obstacle
    if any((have - want) % 2 for have, want in zip(form.whole, form.kernel, strict=True)):
        return f"the middle of a kernel of {form.whole} is not 3x3"
    padding = _cropped(program, form)
    if any(isinstance(have, int) and have < crop for have, crop in padding):
        shown = tuple(have for have, _ in padding)
        return f"its padding {shown} cannot be cropped to that of a 3x3 kernel"
    return "" if form.weights is Weights.RANDOM else _not_carried(program, form)


def _cropped(program: Program, form: Form) -> list[tuple[Any, int]]:
    """Each width that shrinks with the kernel, and by how much."""
    conv: Any = program.module(form.block.spatial.conv)
    rows, cols = form.crop
    node = form.block.pad
    pad = pad_of(node, program.module(node)) if node is not None and form.crops_pad else None
    if pad is not None:
        return list(zip(pad.widths, (cols, cols, rows, rows), strict=True))
    return list(zip(own_padding(conv, form.crop), form.crop, strict=True))


def _not_carried(program: Program, form: Form) -> str:
    """Why the weights of ``form`` cannot be carried over from the block, or nothing."""
    block = form.block
    start, activation = (
        (block.spatial, block.activation) if block.expand is None else (block.expand, block.inner)
    )
    remedy = "use weights=fit with calibration data"
    if form.weights is Weights.COMPOSE and _has_parameters(program, start.last, activation):
        return f"what follows '{start.last.name}' has parameters that are no BatchNorm's; {remedy}"
    if form.weights is Weights.LINEARIZE and _varies(program, start.last, activation):
        return f"what follows '{start.last.name}' differs from place to place; {remedy}"
    if form.weights is Weights.LINEARIZE and activation and start.norm is None:
        return f"'{start.conv.name}' has no BatchNorm to tell what its activation sees; {remedy}"
    if not form.gate_becomes_a_constant and not form.gate_moves:
        return ""
    if block.final:
        return f"an activation, '{block.final[0].name}', follows the gate that goes from its place"
    if form.weights is not Weights.FIT and _varies(program, block.spatial.last, block.activation):
        return f"what follows '{block.spatial.last.name}' differs from place to place; {remedy}"
    if form.weights is not Weights.FIT and block.spatial.norm is None:
        return f"'{block.spatial.conv.name}' has no BatchNorm to tell what its gate sees; {remedy}"
    if block.gate and form.gate_moves and not _pools_the_mean(program, block.gate):
        return "its gate pools more than the mean, and cannot pool the block's input instead"
    return ""


def _pools_the_mean(program: Program, gate: Gate) -> bool:
    kinds = [(node.target, program.module(node)) for node in gate.squeeze]
    names = [
        getattr(target, "__name__", str(target)) if layer is None else type(layer).__name__
        for target, layer in kinds
    ]
    plain = ("flatten", "view", "reshape")
    means = [name == "mean" or "avg" in name.lower() for name in names if name not in plain]
    return len(gate.pools) == 1 and all(means)


def _varies(program: Program, start: fx.Node, activation: Sequence[fx.Node]) -> bool:
    """Whether ``activation`` reads anything that is not one value for each channel."""
    inside = {start, *activation}
    others = {operand for node in activation for operand in node.all_input_nodes} - inside
    types = (program.types[each.name] for each in others)
    shapes = [kind.shape for kind in types if isinstance(kind, TensorType)]
    return any(set(shape[-2:]) - {1} for shape in shapes)


def _has_parameters(program: Program, start: fx.Node, activation: Sequence[fx.Node]) -> bool:
    """Whether ``activation`` reads more than what ``start`` gives; a PReLU is an activation."""
    inside = {start, *activation}
    modules = [program.module(node) for node in activation]
    tensors = [m for m in modules if m is not None and not isinstance(m, nn.PReLU)]
    read = {operand for node in activation for operand in node.all_input_nodes}
    return bool(read - inside) or any(list(module.parameters()) for module in tensors)
