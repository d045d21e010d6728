"""Functional layers become modules, and the user's module tree becomes the program's.

The tree keeps every name of the user's ``state_dict``: containers are plain modules with the same
members, standard layers stay themselves, and a layer that the user applied as a function stands at
the path of the module that owns its tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxopt import layers
from fxopt.tracing import canonical
from fxopt.tracing.modes import TRAINING_ARGUMENT, flags_of
from fxopt.tracing.trace import Trace


@dataclass
class Lifting:
    """Work on one trace: modules by path that the graph calls, and their flags in each mode."""

    model: nn.Module
    trace: Trace
    training: Trace | None
    placed: dict[str, nn.Module] = field(default_factory=dict)
    borrowed: dict[str, tuple[nn.Module, dict[str, str]]] = field(default_factory=dict)
    flags: dict[str, tuple[bool, bool]] = field(default_factory=dict)


def lift(model: nn.Module, trace: Trace, training: Trace | None) -> Lifting:
    """Turn the functional layers of ``trace`` whose tensors are plain members into modules.

    The graph of ``trace`` is changed in place.
    """
    lifting = Lifting(model, trace, training)
    flags = training.flags if training else {}
    for path, flag in trace.flags.items():
        lifting.flags[path] = (flag, flags.get(path, True))
    from_input = _depends_on_input(trace.graph)
    for node in list(trace.graph.nodes):
        if node.op == "call_function" and node.args and node.args[0] in from_input:
            _lift_node(lifting, node)
    return lifting


def _depends_on_input(graph: fx.Graph) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(operand in found for operand in node.all_input_nodes):
            found.add(node)
    return found


def _lift_node(lifting: Lifting, node: fx.Node) -> None:
    if node.target in _DROPOUTS:
        _lift_dropout(lifting, node)
        return
    made = _layer_for(lifting, node)
    if made is None:
        return
    layer, tensors = made
    path = _own_place(lifting, layer, tensors) or _borrowing_place(lifting, node, layer, tensors)
    if path is None:
        return
    if node.target is F.batch_norm:
        flags = flags_of(lifting.trace, lifting.training, node)
        if not layer.track_running_stats:
            flags = (False, True)
        if lifting.flags.setdefault(path, flags) != flags:
            return
    _call(node, path)


def _call(node: fx.Node, path: str) -> None:
    node.op, node.target = "call_module", path
    node.args, node.kwargs = (node.args[0],), {}


_DROPOUTS: dict[Any, type[nn.Module]] = {
    F.dropout: nn.Dropout, F.dropout1d: nn.Dropout1d, F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d, F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
}  # fmt: skip


def _lift_dropout(lifting: Lifting, node: fx.Node) -> None:
    kind: Any = _DROPOUTS[node.target]
    flags = flags_of(lifting.trace, lifting.training, node)
    path = _fresh_path(lifting, node, canonical.short_name(kind()))
    lifting.trace.modules[path] = kind(p=node.args[1])
    lifting.flags[path] = flags
    _call(node, path)


Tensors = dict[str, str]
"""Member of the layer to the dotted name of the user's tensor."""


def _layer_for(lifting: Lifting, node: fx.Node) -> tuple[nn.Module, Tensors] | None:
    """The layer that ``node`` applies, on the meta device, or None if it is no plain layer."""
    maker = _MAKERS.get(node.target)  # type: ignore[arg-type]
    if maker is None:
        return None
    names, make = maker
    tensors: Tensors = {}
    literals: list[Any] = []
    for name, argument in zip(names, node.args[1:], strict=True):
        if isinstance(argument, fx.Node):
            if argument.op != "get_attr" or not name.startswith(":"):
                return None
            tensors[name[1:]] = str(argument.target)
        elif not name.startswith(":"):
            literals.append(argument)
    if any(isinstance(a, fx.Node) for literal in literals for a in _flat(literal)):
        return None
    shapes = {k: _tensor(lifting, name).shape for k, name in tensors.items()}
    with torch.device("meta"):
        layer = make(_rank(lifting, node), shapes, literals)
    return None if layer is None else (layer, tensors)


def baked_flag(lifting: Lifting) -> str:
    """The line of a functional norm that follows the mode and is no layer, or empty."""
    if lifting.training is not None:
        for node in lifting.trace.graph.nodes:
            if node.op == "call_function" and node.target in TRAINING_ARGUMENT:
                in_eval, in_training = flags_of(lifting.trace, lifting.training, node)
                if in_eval != in_training:
                    return lifting.trace.origins[node.name].line
    return ""


def _flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _rank(lifting: Lifting, node: fx.Node) -> int:
    return len(lifting.trace.types[node.args[0].name].shape)  # type: ignore[union-attr, index]


def _tensor(lifting: Lifting, name: str) -> torch.Tensor:
    if name in lifting.trace.constants:
        return lifting.trace.constants[name]
    path, _, member = name.rpartition(".")
    return getattr(lifting.model.get_submodule(path), member)  # type: ignore[no-any-return]


def _make_conv(dimensions: int) -> Any:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]

    def make(rank: int, shapes: Mapping[str, Any], literals: list[Any]) -> nn.Module | None:
        if "weight" not in shapes or rank != dimensions + 2:
            return None
        stride, padding, dilation, groups = literals
        out, per_group, *kernel = shapes["weight"]
        return kind(per_group * groups, out, tuple(kernel), stride, padding, dilation, groups,
                    bias="bias" in shapes)  # fmt: skip

    return make


def _make_linear(rank: int, shapes: Mapping[str, Any], literals: list[Any]) -> nn.Module | None:
    if "weight" not in shapes or len(shapes["weight"]) != 2:
        return None
    return nn.Linear(shapes["weight"][1], shapes["weight"][0], bias="bias" in shapes)


def _make_batch_norm(rank: int, shapes: Mapping[str, Any], literals: list[Any]) -> nn.Module | None:
    _, momentum, eps = literals
    if not 2 <= rank <= 5 or not shapes or ("weight" in shapes) != ("bias" in shapes):
        return None
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[rank]
    channels = next(iter(shapes.values()))[0]
    return kind(channels, eps, momentum, affine="weight" in shapes,
                track_running_stats="running_mean" in shapes)  # fmt: skip


def _make_layer_norm(rank: int, shapes: Mapping[str, Any], literals: list[Any]) -> nn.Module | None:
    shape, eps = literals
    if "weight" not in shapes:
        return None if "bias" in shapes else nn.LayerNorm(shape, eps, elementwise_affine=False)
    return nn.LayerNorm(tuple(shape), eps, bias="bias" in shapes)


def _make_group_norm(rank: int, shapes: Mapping[str, Any], literals: list[Any]) -> nn.Module | None:
    groups, eps = literals
    if set(shapes) != {"weight", "bias"}:
        return None
    return nn.GroupNorm(groups, shapes["weight"][0], eps)


_CONV = (":weight", ":bias", "stride", "padding", "dilation", "groups")
_MAKERS: dict[Any, tuple[tuple[str, ...], Any]] = {
    F.conv1d: (_CONV, _make_conv(1)),
    F.conv2d: (_CONV, _make_conv(2)),
    F.conv3d: (_CONV, _make_conv(3)),
    F.linear: ((":weight", ":bias"), _make_linear),
    F.batch_norm: (
        (":running_mean", ":running_var", ":weight", ":bias", "training", "momentum", "eps"),
        _make_batch_norm,
    ),
    F.layer_norm: (("normalized_shape", ":weight", ":bias", "eps"), _make_layer_norm),
    F.group_norm: (("num_groups", ":weight", ":bias", "eps"), _make_group_norm),
}


def _own_place(lifting: Lifting, layer: nn.Module, tensors: Tensors) -> str | None:
    """The path of the module that owns exactly these tensors under their usual names."""
    owners = {name.rpartition(".")[0] for name in tensors.values()}
    if len(owners) != 1 or "" in owners:
        return None
    (path,) = owners
    owner = lifting.model.get_submodule(path)
    usual = all(name == f"{path}.{member}" for member, name in tensors.items())
    wanted = {k for k, v in layer._parameters.items() if v is not None}
    had = {k for k, v in owner._parameters.items() if v is not None}
    buffers = {k for k, v in owner._buffers.items() if v is not None}
    if (
        not usual
        or wanted != had
        or not buffers <= set(layer._buffers)
        or path in lifting.trace.flags
    ):
        return None
    placed = lifting.placed.get(path)
    if placed is None:
        lifting.placed[path] = layer
        return path
    return path if _alike(placed, layer) else None


def _alike(a: nn.Module, b: nn.Module) -> bool:
    return type(a) is type(b) and a.extra_repr() == b.extra_repr()


def _borrowing_place(
    lifting: Lifting, node: fx.Node, layer: nn.Module, tensors: Tensors
) -> str | None:
    if type(layer) not in layers.BORROWED or not tensors:
        return None
    statistics = {"running_mean", "running_var"}
    if node.target is F.batch_norm and not statistics <= set(tensors):
        return None
    for path, (other, names) in lifting.borrowed.items():
        if names == tensors and _alike(other, layer):
            return path
    path = _fresh_path(lifting, node, canonical.short_name(layer))
    lifting.borrowed[path] = (layer, tensors)
    return path


def _fresh_path(lifting: Lifting, node: fx.Node, name: str) -> str:
    scope = lifting.trace.origins[node.name].path
    base = f"{scope}.{name}" if scope else name
    path, count = base, 1
    while path in lifting.trace.modules or path in lifting.borrowed or _exists(lifting.model, path):
        path, count = f"{base}_{count}", count + 1
    return path


def _exists(model: nn.Module, path: str) -> bool:
    parent, _, member = path.rpartition(".")
    return hasattr(model.get_submodule(parent), member)


# ---- the tree --------------------------------------------------------------------------------


def build_tree(lifting: Lifting, leaves: Mapping[str, str]) -> nn.Module:
    """The program's module tree: the user's names, with the layers that the graph calls."""
    made: dict[int, nn.Module] = {}
    tree = _skeleton(lifting, lifting.model, "", leaves, made)
    for path, module in lifting.trace.modules.items():
        _insert(tree, path, module)
    for path, (layer, tensors) in lifting.borrowed.items():
        owners = {}
        for member, name in tensors.items():
            owner, _, attribute = name.rpartition(".")
            owners[member] = (tree.get_submodule(owner), attribute)
        _insert(tree, path, layers.borrow(layer, owners))
    for name, tensor in lifting.trace.constants.items():
        tree.register_buffer(name, tensor, persistent=False)
    return tree


def _insert(tree: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, member = path.rpartition(".")
    tree.get_submodule(parent).add_module(member, module)


def _skeleton(
    lifting: Lifting, module: nn.Module, path: str, leaves: Mapping[str, str],
    made: dict[int, nn.Module],
) -> nn.Module:  # fmt: skip
    if id(module) in made:
        return made[id(module)]
    if path in leaves or (path and path not in lifting.placed and canonical.is_leaf(module)):
        result = module
        if getattr(module, "inplace", False) and path not in leaves:
            result = copy.copy(module)
            result.inplace = False  # type: ignore[assignment]
        made[id(module)] = result
        return result
    result = lifting.placed.get(path, nn.Module())
    made[id(module)] = result
    for members in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
        setattr(result, members, copy.copy(getattr(module, members)))
    if isinstance(result, nn.modules.batchnorm._NormBase):
        result._buffers.setdefault("num_batches_tracked", None)
    result.training = module.training
    for name, child in module._modules.items():
        if child is not None:
            below = f"{path}.{name}" if path else name
            result.add_module(name, _skeleton(lifting, child, below, leaves, made))
    return result
