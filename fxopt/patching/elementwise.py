"""Steps of operators that work element by element, in evaluation: activations, norms, casts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxopt import operators
from fxopt.fake_quantize import fake_quantize
from fxopt.graphs import Operand
from fxopt.kernels import InPlace
from fxopt.patching import tiles
from fxopt.patching.channels import channelwise
from fxopt.patching.context import Context, NotLocal, arguments, operand_of, step
from fxopt.patching.stage import Step
from fxopt.program import Program, TensorType

_STATISTICS = "whose statistics over a tile are not the batch's: fold first (fold_conv_bn)"


def pointwise(program: Program, node: fx.Node, module: nn.Module | None, context: Context) -> Step:
    """Element by element: the same call on a part of the operands."""
    known = operators.describe(program, node)
    if known.kind == "dropout" and module is not None:
        return _dropout(program, node, module, context)
    if known.kind == "cast":
        return _cast(program, node)
    if known.inplace is not InPlace.ELEMENTWISE:
        what = type(module).__name__ if module else getattr(node.target, "__name__", node.target)
        raise NotLocal(f"'{what}' is not known to work on a neighbourhood of each position")
    if isinstance(module, nn.RReLU):
        raise NotLocal("draws random numbers in training")
    if module is not None and next(iter(module.state_dict()), None):
        raise NotLocal(f"'{type(module).__name__}' has tensors of its own")
    axes = context.axes_of(node)
    own = _sizes(program, node, axes)
    for operand in node.all_input_nodes:
        sizes = _sizes(program, operand, axes)
        if sizes != (1, 1) and (operand in context.weights or sizes != own):
            raise NotLocal(f"reads '{operand.name}' at every position of the map")
    return channelwise(program, node, module, context)


def _sizes(program: Program, node: fx.Node, axes: tuple[int, int]) -> tuple[int, ...]:
    """Rows and columns of a value; 1 where it is repeated along them."""
    type = program.types[node.name]
    shape = type.shape if isinstance(type, TensorType) else ()
    return tuple(shape[axis] if len(shape) >= -axis else 1 for axis in axes)


def _cast(program: Program, node: fx.Node) -> Step:
    type = program.types[node.name]
    given = (*node.args[1:], *node.kwargs.values())
    if not isinstance(type, TensorType) or not all(isinstance(g, torch.dtype) for g in given):
        raise NotLocal("may give a tensor on another device")
    return step(program, node, tiles.cast, (operand_of(node),), {"dtype": type.dtype})


def prelu(program: Program, node: fx.Node, layer: Any, context: Context) -> Step:
    return step(program, node, F.prelu, (operand_of(node), context.operand(layer.weight)))


def scale_shift(program: Program, node: fx.Node, layer: Any, context: Context) -> Step:
    args = (operand_of(node), context.operand(layer.weight), context.operand(layer.bias))
    return step(program, node, tiles.scale_shift, args)


def quantizer(program: Program, node: fx.Node, grid: Any, context: Context) -> Step:
    if grid.settled:
        return step(program, node, tiles.same, (operand_of(node),))
    tensors = (context.operand(grid.scale), context.operand(grid.zero_point))
    return step(program, node, fake_quantize, (operand_of(node), *tensors, grid.low, grid.high))


def linear(program: Program, node: fx.Node, layer: Any, context: Context) -> Step:
    """Of each position, where channels come last."""
    if -1 in context.axes_of(node):
        raise NotLocal("joins the columns of the map")
    bias = None if layer.bias is None else context.operand(layer.bias)
    args = (operand_of(node), context.operand(layer.weight), bias)
    return step(program, node, F.linear, args)


def layer_norm(program: Program, node: fx.Node, norm: Any, context: Context) -> Step:
    """Of each position, where channels come last."""
    if max(context.axes_of(node)) >= -len(norm.normalized_shape):
        raise NotLocal("normalises by the statistics of the whole map")
    tensors = (norm.weight, norm.bias)
    weights = [None if tensor is None else context.operand(tensor) for tensor in tensors]
    args = (operand_of(node), norm.normalized_shape, *weights, norm.eps)
    return step(program, node, F.layer_norm, args)


def _dropout(program: Program, node: fx.Node, layer: Any, context: Context) -> Step:
    """In evaluation it is its operand."""
    probability = getattr(layer, "p", getattr(layer, "drop_prob", 0.0))
    acts = bool(probability) and _follows_mode(program, node)
    if program.modes.fixed.get(str(node.target), (False,))[0] or (acts and program.modes.training):
        raise NotLocal("drops out at random")
    untrained = "drops out at random in training, over a tile otherwise" if acts else ""
    return step(program, node, tiles.same, (operand_of(node),), untrained=untrained)


def batch_norm(program: Program, node: fx.Node, norm: Any, context: Context) -> Step:
    tensors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    operands = [None if tensor is None else context.operand(tensor) for tensor in tensors]
    if program.modes.training and _follows_mode(program, node):
        raise NotLocal(f"is in training mode, {_STATISTICS}")
    return _normalised(program, node, operands, norm.eps, _follows_mode(program, node))


def functional_batch_norm(program: Program, node: fx.Node, _: Any, context: Context) -> Step:
    names = ("running_mean", "running_var", "weight", "bias")
    given = arguments(node, "input", *names, "training", "momentum", "eps")
    operands = [Operand(given[n].name) if given.get(n) is not None else None for n in names]
    if given.get("training", False) is not False:
        raise NotLocal(f"may be in training mode, {_STATISTICS}")
    return _normalised(program, node, operands, given.get("eps", 1e-5), False)


def _normalised(
    program: Program, node: fx.Node, operands: Sequence[Operand | None], eps: float, trains: bool
) -> Step:
    if operands[0] is None:
        raise NotLocal("normalises by the statistics of the whole map")
    args = (operand_of(node), *operands, False, 0.0, eps)
    untrained = f"holds BatchNorms, {_STATISTICS}" if trains else ""
    return step(program, node, F.batch_norm, args, untrained=untrained)


def _follows_mode(program: Program, node: fx.Node) -> bool:
    """Whether a layer does another thing in training."""
    return program.modes.fixed.get(str(node.target), (False, True))[1]
