"""Activations that only cut values off: a quantiser behind one does the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxopt.program import Program
from fxopt.quantizing.grid import Limits

_RELU, _RELU6 = Limits(0.0), Limits(0.0, 6.0)


def _of_layer(layer: Any) -> Limits:
    return Limits(float(layer.min_val), float(layer.max_val))


_MODULES: Mapping[type[nn.Module], Callable[[Any], Limits]] = {
    nn.ReLU: lambda layer: _RELU,
    nn.ReLU6: lambda layer: _RELU6,
    nn.Hardtanh: _of_layer,
}
_FUNCTIONS: Mapping[Any, tuple[str, ...]] = {
    **dict.fromkeys((torch.clamp, torch.clip, "clamp", "clip"), ("min", "max")),
    **dict.fromkeys((torch.clamp_min, "clamp_min"), ("min",)),
    **dict.fromkeys((torch.clamp_max, "clamp_max"), ("max",)),
    F.hardtanh: ("min_val", "max_val"),
}
"""Functions and methods, with the names of their bounds."""


def limits_of(program: Program, node: fx.Node) -> Limits | None:
    """Where ``node`` cuts off its operand; None if it does another thing, or 0 does not stay."""
    limits = _limits(program, node)
    return limits if limits is not None and limits.low <= 0 <= limits.high else None


def _limits(program: Program, node: fx.Node) -> Limits | None:
    module = program.module(node)
    if module is not None:
        found = _MODULES.get(type(module))
        return found(module) if found is not None else None
    if node.target in (torch.relu, F.relu, "relu"):
        return _RELU
    if node.target is F.relu6:
        return _RELU6
    names = _FUNCTIONS.get(node.target) if node.op.startswith("call") else None
    if names is None:
        return None
    given: dict[str, Any] = dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
    bounds = {name.removesuffix("_val"): given.get(name) for name in names}
    if node.target is F.hardtanh:
        bounds = {"min": given.get("min_val", -1.0), "max": given.get("max_val", 1.0)}
    if not all(bound is None or isinstance(bound, (int, float)) for bound in bounds.values()):
        return None
    low, high = bounds.get("min"), bounds.get("max")
    return Limits(-math.inf if low is None else low, math.inf if high is None else high)
