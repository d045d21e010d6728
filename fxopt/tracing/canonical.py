"""The many spellings of one operator made one.

``x.relu()``, ``torch.relu(x)``, ``F.relu(x)`` and ``nn.ReLU()(x)`` mean the same: in a program they
are a call of an ``nn.ReLU``. Activations and poolings become modules here; convolutions, linear
layers, norms and dropout, which have tensors or a mode, stay functions with all arguments spelled
out until :mod:`fxopt.tracing.lift` has seen both modes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxopt import layers, quantized_layers, scaled_ws
from fxopt.fake_quantize import FakeQuantize
from fxopt.shapes import Dimension, ShapeInt


@dataclass(frozen=True)
class Call:
    """An operator and its arguments, which are still the user's tensors and shape numbers.

    ``target`` is a function, a Tensor method's name, the path of a module, or a fresh module.
    """

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def leaves(tree: Any) -> Iterator[Any]:
    """What is in the tuples, lists and dicts of an operator's arguments."""
    if isinstance(tree, (tuple, list)):
        for item in tree:
            yield from leaves(item)
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from leaves(item)
    else:
        yield tree


def rebuilt(result: Any, items: list[Any]) -> Any:
    """``items`` in the kind of sequence that ``result`` is (``torch.return_types.max``, …)."""
    if isinstance(result, list):
        return items
    if hasattr(result, "_fields"):
        return type(result)(*items)
    return type(result)(items)


class ShapeTuple(tuple[Any, ...]):
    """What ``x.shape`` is while a model is captured: a tuple with ``torch.Size``'s methods."""

    __class__ = property(lambda self: torch.Size)  # type: ignore[assignment]

    def numel(self) -> Any:
        return product(self)

    def __getitem__(self, index: Any) -> Any:
        item = super().__getitem__(index)
        return ShapeTuple(item) if isinstance(index, slice) else item

    def __add__(self, other: Any) -> ShapeTuple:
        return ShapeTuple((*self, *other))


def product(numbers: Sequence[Any]) -> Any:
    """The product of plain or shape numbers."""
    return math.prod(numbers[1:], start=numbers[0]) if numbers else 1


LEAVES: frozenset[type[nn.Module]] = frozenset(
    getattr(nn, name)
    for name in """
        Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d Linear Bilinear
        BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm InstanceNorm1d InstanceNorm2d
        InstanceNorm3d GroupNorm LayerNorm RMSNorm LocalResponseNorm Embedding EmbeddingBag ReLU
        ReLU6 SiLU GELU Hardswish Hardsigmoid Hardtanh Sigmoid Tanh LeakyReLU ELU SELU CELU
        Softplus Softsign Softshrink Hardshrink Tanhshrink Mish PReLU RReLU LogSigmoid Threshold
        GLU Softmax LogSoftmax Softmin Softmax2d MaxPool1d MaxPool2d MaxPool3d AvgPool1d AvgPool2d
        AvgPool3d AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d
        AdaptiveMaxPool2d AdaptiveMaxPool3d LPPool1d LPPool2d Dropout Dropout1d Dropout2d
        Dropout3d AlphaDropout FeatureAlphaDropout LSTM GRU RNN MultiheadAttention
    """.split()
) | frozenset(
    (*scaled_ws.KINDS.values(), *quantized_layers.KINDS.values(), layers.SkipInit, FakeQuantize)
)
"""The layers that a program calls as modules: torch's standard ones and fxopt's own."""

_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)  # fmt: skip


def is_leaf(module: nn.Module) -> bool:
    """Whether ``module`` is a plain standard layer: its class, and nothing hung onto it."""
    return (
        type(module) in LEAVES
        and not any(getattr(module, hooks) for hooks in _HOOKS)
        and "forward" not in module.__dict__
        and (not module._modules or type(module) is nn.MultiheadAttention)
    )


def writes_input(module: nn.Module) -> bool:
    """Whether calling the layer overwrites its input (these two have the flag and ignore it)."""
    ignored = isinstance(module, (nn.AlphaDropout, nn.FeatureAlphaDropout))
    return bool(getattr(module, "inplace", False)) and not ignored


def short_name(module: nn.Module) -> str:
    """The usual member name of a layer: ``relu``, ``max_pool2d``."""
    name = type(module).__name__
    return "".join(
        f"_{c.lower()}" if i and c.isupper() and name[i + 1 : i + 2].islower() else c.lower()
        for i, c in enumerate(name)
    )


# ---- signatures ------------------------------------------------------------------------------


def _signature(text: str) -> dict[str, Any]:
    """Parameter names in order with their defaults; ``...`` for none."""
    parameters: dict[str, Any] = {}
    for word in text.split():
        name, _, default = word.partition("=")
        parameters[name] = eval(default, {}) if default else ...
    return parameters


def _bind(signature: Mapping[str, Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Arguments by name, or None where they do not fit the signature."""
    names = tuple(signature)
    bound = dict(zip(names, args, strict=False))
    if len(args) > len(names) or any(k not in names or k in bound for k in kwargs):
        return None
    bound.update(kwargs)
    for name, default in signature.items():
        if name not in bound:
            if default is ...:
                return None
            bound[name] = default
    return {name: bound[name] for name in names}


_ACTIVATIONS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    name: (kind, _signature(f"input {text}"))
    for name, kind, text in (
        ("relu", nn.ReLU, "inplace=False"),
        ("relu6", nn.ReLU6, "inplace=False"),
        ("silu", nn.SiLU, "inplace=False"),
        ("gelu", nn.GELU, "approximate='none'"),
        ("hardswish", nn.Hardswish, "inplace=False"),
        ("hardsigmoid", nn.Hardsigmoid, "inplace=False"),
        ("hardtanh", nn.Hardtanh, "min_val=-1.0 max_val=1.0 inplace=False"),
        ("sigmoid", nn.Sigmoid, ""),
        ("tanh", nn.Tanh, ""),
        ("leaky_relu", nn.LeakyReLU, "negative_slope=0.01 inplace=False"),
        ("elu", nn.ELU, "alpha=1.0 inplace=False"),
        ("selu", nn.SELU, "inplace=False"),
        ("celu", nn.CELU, "alpha=1.0 inplace=False"),
        ("softplus", nn.Softplus, "beta=1 threshold=20"),
        ("softsign", nn.Softsign, ""),
        ("mish", nn.Mish, "inplace=False"),
        ("logsigmoid", nn.LogSigmoid, ""),
        ("glu", nn.GLU, "dim=-1"),
        ("max_pool2d", nn.MaxPool2d,
         "kernel_size stride=None padding=0 dilation=1 ceil_mode=False return_indices=False"),
        ("max_pool1d", nn.MaxPool1d,
         "kernel_size stride=None padding=0 dilation=1 ceil_mode=False return_indices=False"),
        ("avg_pool2d", nn.AvgPool2d, "kernel_size stride=None padding=0 ceil_mode=False "
         "count_include_pad=True divisor_override=None"),
        ("adaptive_avg_pool1d", nn.AdaptiveAvgPool1d, "output_size"),
        ("adaptive_avg_pool2d", nn.AdaptiveAvgPool2d, "output_size"),
        ("adaptive_avg_pool3d", nn.AdaptiveAvgPool3d, "output_size"),
        ("adaptive_max_pool2d", nn.AdaptiveMaxPool2d, "output_size return_indices=False"),
    )
}  # fmt: skip

FUNCTIONS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    name: (function, _signature(text))
    for name, function, text in (
        ("linear", F.linear, "input weight bias=None"),
        ("conv1d", F.conv1d, "input weight bias=None stride=1 padding=0 dilation=1 groups=1"),
        ("conv2d", F.conv2d, "input weight bias=None stride=1 padding=0 dilation=1 groups=1"),
        ("conv3d", F.conv3d, "input weight bias=None stride=1 padding=0 dilation=1 groups=1"),
        ("layer_norm", F.layer_norm, "input normalized_shape weight=None bias=None eps=1e-05"),
        ("group_norm", F.group_norm, "input num_groups weight=None bias=None eps=1e-05"),
        ("dropout", F.dropout, "input p=0.5 training=True inplace=False"),
        ("dropout1d", F.dropout1d, "input p=0.5 training=True inplace=False"),
        ("dropout2d", F.dropout2d, "input p=0.5 training=True inplace=False"),
        ("dropout3d", F.dropout3d, "input p=0.5 training=True inplace=False"),
        ("alpha_dropout", F.alpha_dropout, "input p=0.5 training=False inplace=False"),
        ("feature_alpha_dropout", F.feature_alpha_dropout,
         "input p=0.5 training=False inplace=False"),
        ("pad", F.pad, "input pad mode='constant' value=None"),
        ("flatten", torch.flatten, "input start_dim=0 end_dim=-1"),
        ("cat", torch.cat, "tensors dim=0"),
        ("softmax", torch.softmax, "input dim dtype=None"),
        ("interpolate", F.interpolate, "input size=None scale_factor=None mode='nearest' "
         "align_corners=None recompute_scale_factor=None antialias=False"),
        ("add", torch.add, "input other"),
        ("sub", torch.sub, "input other"),
        ("mul", torch.mul, "input other"),
        ("div", torch.div, "input other"),
        ("matmul", torch.matmul, "input other"),
        ("permute", torch.permute, "input dims"),
        ("reshape", torch.reshape, "input shape"),
        ("flip", torch.flip, "input dims"),
        ("tile", torch.tile, "input dims"),
    )
}  # fmt: skip
_KEYWORD_ONLY = {
    "interpolate": ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor",
                    "antialias"),
    "softmax": ("dtype",),
    "dropout": (),
}  # fmt: skip
_BATCH_NORM = _signature(
    "input running_mean running_var weight=None bias=None training=False momentum=0.1 eps=1e-05"
)
_TORCH_BATCH_NORM = _signature(
    "input weight bias running_mean running_var training momentum eps cudnn_enabled"
)
_SYNONYMS = {
    "concat": "cat", "concatenate": "cat", "subtract": "sub", "multiply": "mul", "divide": "div",
    "true_divide": "div", "swapaxes": "transpose", "swapdims": "transpose", "clip": "clamp",
    "truediv": "div", "negative": "neg", "absolute": "abs",
    "__matmul__": "matmul", "__rmatmul__": "rmatmul",
}  # fmt: skip
_VARARGS = frozenset({"permute", "reshape", "flip", "tile", "view", "expand", "repeat",
                      "broadcast_to"})  # fmt: skip
_METHOD_ONLY = frozenset({"type", "to", "view", "expand", "repeat", "contiguous", "size"})
_OPERATORS: dict[str, Callable[..., Any]] = {
    "__and__": torch.bitwise_and, "__or__": torch.bitwise_or, "__xor__": torch.bitwise_xor,
    "__invert__": torch.bitwise_not, "__lshift__": torch.bitwise_left_shift,
    "__rshift__": torch.bitwise_right_shift, "__rsub__": torch.rsub, "__eq__": torch.eq,
    "__ne__": torch.ne, "__lt__": torch.lt, "__le__": torch.le, "__gt__": torch.gt,
    "__ge__": torch.ge, "__floordiv__": torch.floor_divide, "__mod__": torch.remainder,
    "__pow__": torch.pow, "__neg__": torch.neg, "__abs__": torch.abs,
}  # fmt: skip
VIEW_PROPERTIES: dict[str, tuple[Any, ...]] = {
    "T": (torch.t,), "mT": (torch.transpose, -2, -1), "H": (torch.adjoint,), "mH": (torch.adjoint,),
    "data": (torch.detach,), "real": (torch.real,), "imag": (torch.imag,),
}  # fmt: skip
"""Tensor properties that are operators: the function and its further arguments."""


def view_property(attribute: str, rank: int) -> tuple[Any, ...]:
    """The operator that a property is, and its further arguments, for a tensor of ``rank``."""
    if attribute == "T" and rank > 2:
        return torch.permute, tuple(reversed(range(rank)))
    return VIEW_PROPERTIES[attribute]


def base_name(name: str) -> str:
    name = name if name.startswith("__") else name.removesuffix("_")
    return _SYNONYMS.get(name, name)


def spell(
    func: Any,
    name: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    node_name: Callable[[torch.Tensor], str],
) -> Call:
    """``func(*args, **kwargs)`` in its one spelling; ``node_name`` says which node a tensor is."""
    base = base_name(name)
    if base == "__getitem__":
        return Call("call_function", operator.getitem, tuple(args), {})
    if base == "batch_norm":
        return _spell_batch_norm(func, args, kwargs)
    if base in _VARARGS and len(args) > 1 and not isinstance(args[1], (tuple, list, torch.dtype)):
        args = (args[0], tuple(args[1:]))
    if base in ("view", "reshape") and len(args) == 2:
        flattened = _as_flatten(args[0], args[1], node_name)
        if flattened is not None:
            return flattened
    if base in _ACTIVATIONS:
        activation = _spell_activation(base, args, kwargs)
        if activation is not None:
            return activation
    if base in FUNCTIONS:
        function, signature = FUNCTIONS[base]
        bound = _bind(signature, args, kwargs)
        if bound is not None:
            return _call(base, function, bound)
    return _generic(func, base, args, kwargs)


def _call(base: str, function: Callable[..., Any], bound: dict[str, Any]) -> Call:
    bound.pop("inplace", None)
    keywords = {k: bound.pop(k) for k in _KEYWORD_ONLY.get(base, ()) if k in bound}
    keywords = {k: v for k, v in keywords.items() if v is not None}
    return Call("call_function", function, tuple(bound.values()), keywords)


def _spell_batch_norm(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    bound = _bind(_TORCH_BATCH_NORM, args, kwargs)
    if func is F.batch_norm or bound is None:
        bound = _bind(_BATCH_NORM, args, kwargs)
    if bound is None:
        return Call("call_function", func, tuple(args), kwargs)
    return Call("call_function", F.batch_norm, tuple(bound[k] for k in _BATCH_NORM), {})


def _spell_activation(base: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
    kind, signature = _ACTIVATIONS[base]
    kwargs = {k: v for k, v in kwargs.items() if k != "_stacklevel"}
    bound = _bind(signature, args, kwargs)
    if bound is None or _symbolic(list(bound.values())[1:]) or bound.get("return_indices"):
        return None
    tensor = bound.pop("input")
    bound.pop("inplace", None)
    return Call("call_module", kind(**bound), (tensor,), {})


def _symbolic(values: Sequence[Any]) -> bool:
    return any(
        isinstance(leaf, (ShapeInt, torch.SymFloat, torch.Tensor)) for leaf in leaves(values)
    )


def _generic(func: Any, base: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    """A function without a spelling of its own: torch's function of that name, else the method."""
    is_method = getattr(torch.Tensor, getattr(func, "__name__", ""), None) is func
    is_method = is_method or getattr(func, "__module__", "") == "torch._tensor"
    if not is_method:
        return Call("call_function", _pure_function(func, base), tuple(args), kwargs)
    function = _OPERATORS.get(base)
    if function is None and not base.startswith("__"):
        function = getattr(torch, base, None)
    if base in _METHOD_ONLY or function is None or not callable(function):
        return Call("call_method", base, tuple(args), kwargs)
    return Call("call_function", function, tuple(args), kwargs)


def _pure_function(func: Any, base: str) -> Any:
    """``func``, or its pure twin (``relu_``), or the usual name of a synonym (``swapaxes``)."""
    if getattr(func, "__name__", base) in (base, "fn"):
        return func
    return getattr(torch, base, None) or getattr(F, base, None) or func


def _as_flatten(
    tensor: torch.Tensor, shape: Any, node_name: Callable[[torch.Tensor], str]
) -> Call | None:
    """``x.view(x.size(0), -1)`` is ``flatten(x, 1)``: leading sizes kept, the rest in one."""
    if not isinstance(shape, (tuple, list)) or len(shape) < 2 or type(shape[-1]) is not int:
        return None
    *lead, last = shape
    expressions = [size.expression for size in lead if isinstance(size, ShapeInt)]
    kept = [Dimension(node_name(tensor), axis) for axis in range(len(lead))]
    if last != -1 or expressions != kept:
        return None
    return Call("call_function", torch.flatten, (tensor, len(lead), -1), {})
