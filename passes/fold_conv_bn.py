"""Fold a BatchNorm into the convolution or linear layer that it alone reads.

In evaluation a BatchNorm is the per-channel map ``y = (x - μ)·γ/√(σ² + ε) + β`` with the running
mean ``μ`` and variance ``σ²``. After ``x = W*z + b`` it is the convolution with

    W' = W·γ/√(σ² + ε)        b' = (b - μ)·γ/√(σ² + ε) + β

(Jacob et al., CVPR 2018, section 3.2, equation 14, without the quantisation.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxopt.edit import Edit
from fxopt.program import Program
from fxopt.results import Declined
from fxopt.rewrite import Preserves, Site, declined, site

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_PRODUCERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_FUNCTIONS = (F.conv1d, F.conv2d, F.conv3d, F.linear)
"""A layer that is a function in a captured graph has a tensor that the forward computes."""


@dataclass(frozen=True)
class FoldConvBn:
    """Fold BatchNorms into the convolutions and linear layers before them (for inference)."""

    name: ClassVar[str] = "fold_conv_bn"
    preserves: ClassVar[Preserves] = Preserves.VALUES

    def sites(self, program: Program) -> Iterator[Site | Declined]:
        for norm in _norms(program):
            reason = _obstacle(program, norm)
            if reason:
                yield declined(program, norm, reason)
            else:
                yield site(norm, norm.all_input_nodes[0])

    def rewrite(self, site: Site, edit: Edit) -> None:
        norm = edit.node(site.node)
        producer = norm.all_input_nodes[0]
        layer, batch_norm = edit.module(producer), edit.module(norm)
        key = (str(producer.target), str(norm.target))
        edit.replace_module(producer, lambda: folded(layer, batch_norm), key=key)
        edit.replace_uses(norm, producer)

    def evidence(self, before: Program, after: Program) -> Mapping[str, Any]:
        had, left = len(_norms(before)), len(_norms(after))
        gone = {"training": "folded norms have no batch statistics any more"} if left < had else {}
        return {"batch_norms_before": had, "batch_norms_left": left, **gone}


def _norms(program: Program) -> list[fx.Node]:
    """The BatchNorms of activations; one over weights alone (standardisation) is none."""
    from_input: set[fx.Node] = set()
    for node in program.nodes:
        if node.op == "placeholder" or not from_input.isdisjoint(node.all_input_nodes):
            from_input.add(node)
    return [
        node
        for node in program.nodes
        if isinstance(program.module(node), _NORMS)
        or (node.target is F.batch_norm and node.args[0] in from_input)
    ]


def _obstacle(program: Program, norm: fx.Node) -> str:
    """Why ``norm`` cannot be folded, or nothing."""
    batch_norm: Any = program.module(norm)
    producer = norm.all_input_nodes[0]
    layer: Any = program.module(producer)
    fixed = program.modes.fixed.get(str(norm.target), (False, True))
    if batch_norm is None:
        return "the forward computes its statistics or parameters, or it has none"
    if batch_norm.running_mean is None or batch_norm.running_var is None:
        return "it has no running statistics; train it with track_running_stats=True"
    if fixed[0]:
        return "it normalises by batch statistics in evaluation too"
    if producer.name in program.opaque:
        return f"its input comes from '{producer.target}', which could not be traced"
    if producer.target in _FUNCTIONS:
        return f"the forward computes the weight or bias of '{producer.name}' before it"
    if not isinstance(layer, _PRODUCERS):
        source = _described(program, producer)
        return f"its input comes from {source}, not from a convolution or a linear layer"
    if len(producer.users) > 1:
        others = sorted(user.name for user in producer.users if user is not norm)
        return f"the result of '{producer.target}' is also read by '{others[0]}'"
    rank = len(program.types[producer.name].shape)
    if rank != layer.weight.dim():
        return (
            f"it normalises axis 1 of the {rank}-dimensional result of '{producer.target}', which "
            "has its channels on another axis"
        )
    return ""


def _described(program: Program, node: fx.Node) -> str:
    if node.op == "placeholder":
        return f"the input '{node.name}'"
    module = program.module(node)
    if module is not None:
        return f"'{node.target}' ({type(module).__name__})"
    return f"'{node.name}' ({getattr(node.target, '__name__', node.target)})"


def folded(layer: nn.Module, norm: nn.Module) -> nn.Module:
    """A new layer that computes ``norm(layer(x))``; float64 inside, the layer's dtype outside.

    Args:
        layer: a convolution or linear layer with ``C`` outputs.
        norm: a BatchNorm over ``C`` channels with running statistics.
    """
    tensors: Any = layer
    statistics: Any = norm
    weight = tensors.weight.detach().double()
    scale = (statistics.running_var.double() + statistics.eps).rsqrt()
    if statistics.weight is not None:
        scale = scale * statistics.weight.detach().double()
    shift = -statistics.running_mean.double() * scale
    if statistics.bias is not None:
        shift = shift + statistics.bias.detach().double()
    if tensors.bias is not None:
        shift = shift + tensors.bias.detach().double() * scale
    scaled = weight * scale.reshape(-1, *(1,) * (weight.dim() - 1))
    return _with_tensors(layer, scaled, shift)


def _with_tensors(layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor) -> nn.Module:
    standard = next(kind for kind in _PRODUCERS if isinstance(layer, kind))
    old: Any = layer
    result = standard.__new__(standard)
    nn.Module.__init__(result)
    inner = {*vars(result), "_borrowed"}
    vars(result).update({name: value for name, value in vars(layer).items() if name not in inner})
    for name, tensor in (("weight", weight), ("bias", bias)):
        parameter = nn.Parameter(tensor.to(old.weight.dtype), old.weight.requires_grad)
        result.register_parameter(name, parameter)
    return result


__all__ = ["FoldConvBn", "folded"]
