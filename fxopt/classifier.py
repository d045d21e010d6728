"""The last linear layer of a model, in the order of execution: its classifier."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from fxopt.infer import module_to_meta
from fxopt.isolation import isolated

_LAST: WeakKeyDictionary[nn.Module, tuple[dict[str, int], nn.Linear | None]] = WeakKeyDictionary()
"""What a module called last when it had these linear layers."""


def classifier_weight(module: nn.Module) -> list[torch.Tensor]:
    """The weight of the ``nn.Linear`` that ``module`` calls last, or what it is computed from.

    Raises:
        ValueError: the order in which ``module`` calls its linear layers cannot be told.
    """
    last = _last_linear(module)
    if last is None:
        return []
    if parametrize.is_parametrized(last, "weight"):
        return list(last.parametrizations.weight.parameters())  # type: ignore[union-attr]
    return [last.weight]


def _last_linear(module: nn.Module) -> nn.Linear | None:
    every = module.named_modules(remove_duplicate=False)
    layers = {name: m for name, m in every if isinstance(m, nn.Linear)}
    if len(set(layers.values())) < 2:
        return next(iter(layers.values()), None)
    known = {name: id(layer) for name, layer in layers.items()}
    if _LAST.get(module, ({}, None))[0] != known:
        _LAST[module] = known, _last_called(module)
    return _LAST[module][1]


def _last_called(module: nn.Module) -> nn.Linear | None:
    calls = [str(node.target) for node in _graph(module).nodes if node.op == "call_module"]
    for path in reversed(calls):
        called = module.get_submodule(path)
        if isinstance(called, nn.Linear):
            return called
        if _holds_linear(called):
            raise _unknown(module, f"'{path}' runs as it is, and holds linear layers")
    return None


def _graph(module: nn.Module) -> fx.Graph:
    if isinstance(module, fx.GraphModule):
        return module.graph
    try:
        with isolated():
            return _Tracer().trace(module_to_meta(module))
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
        f"which nn.Linear {type(module).__name__} calls last cannot be told ({reason}); name the "
        "classifier's weight, exclude=['head.weight'], or give a module that fxopt captured"
    )
