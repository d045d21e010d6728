"""The norms of a program, and whether a layer stands right before or right after one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch.nn.functional as F
from torch import fx, nn

from fxopt.obstacles import writes_tensors_of
from fxopt.program import Program
from fxopt.scaled_ws import FOLD_FIRST, ScaledWS

_COMPUTED = (F.conv1d, F.conv2d, F.conv3d, F.linear)
"""A layer that is a function in a captured graph has a tensor that the forward computes."""
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
"""Functions that capture makes no layers of."""

Takes = Callable[[nn.Module], bool]
"""Whether a layer can take in the norm beside it."""


def batch_norms(program: Program) -> list[fx.Node]:
    """The BatchNorms of activations; one over weights alone (standardisation) is none."""
    from_input: set[fx.Node] = set()
    for node in program.nodes:
        if node.op == "placeholder" or not from_input.isdisjoint(node.all_input_nodes):
            from_input.add(node)
    return [
        node
        for node in program.nodes
        if isinstance(program.module(node), nn.modules.batchnorm._BatchNorm)
        or (node.target is F.batch_norm and node.args[0] in from_input)
    ]


def why_not_behind(program: Program, norm: fx.Node, takes: Takes) -> str:
    """Why the layer before ``norm`` cannot take it in, or nothing."""
    producer = norm.all_input_nodes[0]
    if producer.name in program.opaque:
        return f"its input comes from '{producer.target}', which could not be traced"
    if _called(producer):
        return f"{_called(producer)} before it"
    module = program.module(producer)
    if isinstance(module, ScaledWS) and not takes(module):
        return f"'{producer.target}' {FOLD_FIRST}"
    if not _is_taken(program, producer, takes):
        source = _described(program, producer)
        return f"its input comes from {source}, not from a convolution or a linear layer"
    if len(producer.users) > 1:
        other = next(user for user in producer.users if user is not norm)
        return f"the result of '{producer.target}' is also read by '{other.name}'"
    assert module is not None
    if writes_tensors_of(program, module):
        return f"the forward writes the weight or bias of '{producer.target}'"
    return other_axis(program, producer, producer)


def why_not_before(program: Program, norm: fx.Node, takes: Takes) -> str:
    """Why no layer stands right after ``norm`` that alone reads it, or nothing."""
    if len(norm.users) != 1:
        names = " and ".join(f"'{user.name}'" for user in list(norm.users)[:2])
        return f"its result is read by {names}" if names else "nothing reads its result"
    (reader,) = norm.users
    if reader.name in program.opaque:
        return f"its result goes to '{reader.target}', which could not be traced"
    if reader.op == "output":
        return "its result is an output"
    if _called(reader):
        return f"{_called(reader)} after it"
    if not _is_taken(program, reader, takes):
        return f"its result goes to {_described(program, reader)}, which is no such layer"
    module = program.module(reader)
    assert module is not None
    if writes_tensors_of(program, module):
        return f"the forward writes the weight or bias of '{reader.target}'"
    return other_axis(program, norm, reader)


def _is_taken(program: Program, node: fx.Node, takes: Takes) -> bool:
    module = program.module(node)
    return module is not None and takes(module)


def _called(node: fx.Node) -> str:
    """What the forward does if ``node`` is a layer's function, or nothing."""
    if node.target in _COMPUTED:
        return f"the forward computes the weight or bias of '{node.name}'"
    if node.target in _TRANSPOSED:
        return f"the forward calls the function '{node.name}'"
    return ""


def other_axis(program: Program, value: fx.Node, layer: fx.Node) -> str:
    """Why the norm's axis 1 of ``value`` does not hold the channels of ``layer``, or nothing."""
    rank = len(program.types[value.name].shape)
    if rank == cast(Any, program.module(layer)).weight.dim():
        return ""
    return f"it normalises axis 1 of {rank} and '{layer.target}' has its channels on another"


def _described(program: Program, node: fx.Node) -> str:
    if node.op == "placeholder":
        return f"the input '{node.name}'"
    module = program.module(node)
    if module is not None:
        return f"'{node.target}' ({type(module).__name__})"
    return f"'{node.name}' ({getattr(node.target, '__name__', node.target)})"
