"""The last linear layer of a model, in the order of execution: its classifier."""

from __future__ import annotations

import copy
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

from fxopt.graphs import member
from fxopt.isolation import isolated

_FUNCTIONS = (F.linear, torch.ops.aten.linear.default)

_LAST: WeakKeyDictionary[nn.Module, tuple[object, str]] = WeakKeyDictionary()
"""The path of what a module called last, with what it was like then."""


def classifier_weight(module: nn.Module) -> list[torch.Tensor]:
    """The weight of the linear layer that ``module`` calls last, or what it is computed from.

    Raises:
        ValueError: the order in which ``module`` calls its linear layers cannot be told.
    """
    module = _unwrapped(module)
    path = _last_path(module)
    if not path:
        return []
    found: Any = member(module, path)
    return _weights(found) if isinstance(found, nn.Module) else [found]


def _unwrapped(module: nn.Module) -> nn.Module:
    """The model that a wrapper for training or compilation holds."""
    while True:
        if isinstance(module, (DataParallel, DistributedDataParallel, AveragedModel)):
            module = module.module
        elif "_orig_mod" in module._modules:
            module = module._orig_mod  # type: ignore[assignment]
        else:
            return module


def _weights(linear: nn.Module) -> list[torch.Tensor]:
    """Also where it is parametrized, in torch's older ways (``weight_orig``) too."""
    if parametrize.is_parametrized(linear, "weight"):
        parametrized: Any = linear.parametrizations
        return list(parametrized.weight.parameters())
    own = linear.named_parameters(recurse=False)
    older: list[Any] = [tensor for name, tensor in own if name.startswith("weight_")]
    return older or [linear.weight]


def _last_path(module: nn.Module) -> str:
    """Where the linear layer that is called last is, or its weight; empty if there is none."""
    if isinstance(module, torch.jit.ScriptModule):
        raise _unknown(module, "it is TorchScript")
    if isinstance(module, fx.GraphModule):
        return _last_called(module, module.graph)
    every = dict(module.named_modules(remove_duplicate=False))
    layers = {name: id(layer) for name, layer in every.items() if isinstance(layer, nn.Linear)}
    if len(set(layers.values())) < 2:
        return next(iter(layers), "")
    state = layers, [each.training for each in every.values()]
    if module not in _LAST or _LAST[module][0] != state:
        _LAST[module] = state, _last_called(module, _traced(module))
    return _LAST[module][1]


def _last_called(module: nn.Module, graph: fx.Graph) -> str:
    for node in reversed(graph.nodes):
        if node.op == "call_module":
            called = module.get_submodule(str(node.target))
            if isinstance(called, nn.Linear):
                return str(node.target)
            if _holds_linear(called):
                raise _unknown(module, f"'{node.target}' runs as it is, and holds linear layers")
        elif node.target in _FUNCTIONS:
            weight: Any = node.args[1] if len(node.args) > 1 else node.kwargs["weight"]
            if weight.op != "get_attr":
                raise _unknown(module, "its last linear function has a computed weight")
            return str(weight.target)
    return ""


def _traced(module: nn.Module) -> fx.Graph:
    """The graph of a copy of ``module``, whose forward may write to what is its own."""
    every = list(module.modules())
    # a weight that torch's older parametrizations keep as an attribute cannot be copied
    members = (v for each in every for v in (*each._parameters.values(), *vars(each).values()))
    shared = [value for value in members if isinstance(value, torch.Tensor)]
    try:
        with isolated():
            return _Tracer().trace(copy.deepcopy(module, {id(t): t for t in shared}))
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _unknown(module, f"torch.fx: {text}") from error


class _Tracer(fx.Tracer):
    """Looks only into modules that hold a linear layer."""

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        is_linear = isinstance(module, nn.Linear)
        return is_linear or not _holds_linear(module) or super().is_leaf_module(module, path)


def _holds_linear(module: nn.Module) -> bool:
    return any(isinstance(each, nn.Linear) for each in module.modules())


def _unknown(module: nn.Module, reason: str) -> ValueError:
    return ValueError(
        f"which linear layer {type(module).__name__} calls last cannot be told ({reason}); name "
        "the classifier's weight, exclude=['head.weight'], or give what fxopt.transform(model, []) "
        "returns"
    )
