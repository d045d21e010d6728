"""Operators that overwrite tensors, and views: what they leave, computed by pure operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxopt import layers
from fxopt.shapes import ShapeInt
from fxopt.tracing.canonical import Call, base_name, spell


def overwritten(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The tensor that a call of ``name`` writes into, or None."""
    writes = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    writes = writes or (name.startswith("__i") and name.endswith("__") and name in _IN_PLACE)
    if name not in _NOT_WRITES and (writes or kwargs.get("inplace") is True):
        return args[0] if args else kwargs.get("input", kwargs.get("tensor"))
    position = _INPLACE_POSITION.get(name)
    if position is not None and len(args) > position and args[position] is True:
        return args[0]
    return None


_IN_PLACE = frozenset(f"__i{name}__" for name in (
    "add", "sub", "mul", "truediv", "div", "floordiv", "mod", "pow", "and", "or", "xor",
    "lshift", "rshift",
))  # fmt: skip
_NOT_WRITES = frozenset({"requires_grad_", "retain_grad"})
_INPLACE_POSITION = {
    "relu": 1, "relu6": 1, "silu": 1, "hardswish": 1, "hardsigmoid": 1, "mish": 1, "selu": 1,
    "leaky_relu": 2, "elu": 2, "celu": 2, "hardtanh": 3, "dropout": 3, "dropout2d": 3,
}  # fmt: skip
RESHAPING = frozenset({
    "squeeze_", "unsqueeze_", "t_", "transpose_", "swapaxes_", "swapdims_", "resize_",
    "resize_as_", "set_", "as_strided_",
})  # fmt: skip
"""Methods that make a tensor another view of memory, which is no write."""


def initialises(function: Any) -> bool:
    """Whether ``function`` is one of ``torch.nn.init``."""
    return getattr(function, "__module__", "") == "torch.nn.init"


def pure(
    func: Any,
    name: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    node_name: Callable[[torch.Tensor], str],
) -> Call:
    """The call that computes what an in-place call of ``name`` leaves in its first argument."""
    base = base_name(name)
    if initialises(func):
        tensor, *others = args or (kwargs["tensor"],)
        given = {key: value for key, value in kwargs.items() if key != "tensor"}
        return Call("call_function", layers.initialised, (tensor, name, *others), given)
    if name == "__setitem__":
        return Call("call_function", layers.assign_item, tuple(args), {})
    if name in _IN_PLACE:
        base = {"truediv": "div"}.get(name[3:-2], name[3:-2])
    if base == "copy":
        return Call("call_function", layers.applied, (args[0], "copy_", *args[1:]), {})
    if base == "fill" and not any(isinstance(a, torch.Tensor) for a in args[1:]):
        return Call("call_function", torch.full_like, tuple(args), {})
    if base == "zero":
        return Call("call_function", torch.zeros_like, tuple(args), {})
    if (hasattr(torch, base) or hasattr(F, base)) and base not in _ONLY_IN_PLACE:
        function = getattr(torch, base) if name.startswith("__i") else func
        return spell(function, base, args, kwargs, node_name)
    return Call("call_function", layers.applied, (args[0], name, *args[1:]), kwargs)


_ONLY_IN_PLACE = frozenset({"bernoulli", "normal", "fill"})
"""Methods whose namesake without the underscore is another operator."""


def inverse_of_view(
    call: Call, index: Any, base: fx.Node, new: fx.Node, parent: torch.Tensor, view: torch.Tensor
) -> Any:
    """How ``base`` follows from ``new``, the overwritten view that ``call`` made of it.

    ``(op, target, args)`` of a node, ``new`` where it is that itself, None where fxopt does not
    know.
    """
    name = call.target if isinstance(call.target, str) else getattr(call.target, "__name__", "")
    if name in _ASSIGNED or (name == "view" and view.dtype != parent.dtype):
        arguments = (base, new, name, index, tuple(call.args[1:]), dict(call.kwargs))
        return "call_function", layers.assign_view, arguments
    if view.dtype != parent.dtype:
        return None
    if call.op == "call_module" or name in _IDENTITIES:
        return new if _same_memory(parent, view) else None
    if name == "getitem":
        plain = _is_plain(call.args[1])
        return ("call_function", layers.assign_item, (base, call.args[1], new)) if plain else None
    if name in _RESHAPES:
        return "call_method", "reshape_as", (new, base)
    if name == "transpose":
        return "call_function", torch.transpose, (new, *call.args[1:])
    if name == "t":
        return "call_function", torch.t, (new,)
    if name == "permute":
        dims = [d % parent.dim() for d in call.args[1]]
        return "call_function", torch.permute, (new, tuple(map(dims.index, range(len(dims)))))
    piece = _piece(name, call, index, parent, view)
    return piece and ("call_function", layers.assign_item, (base, piece, new))


def may_copy(call: Call) -> bool:
    """Whether the result shares its operand's memory or not as layout and dtype would have it."""
    name = call.target if isinstance(call.target, str) else getattr(call.target, "__name__", "")
    return call.op != "call_module" and name in _MAY_COPY


_MAY_COPY = frozenset({"reshape", "flatten", "ravel", "reshape_as", "contiguous", "to", "type_as",
                       "float", "half", "double", "bfloat16", "type", "int", "long"})  # fmt: skip
_IDENTITIES = frozenset({
    "contiguous", "to", "view_as", "float", "half", "double", "type_as", "type", "positive",
    "as_tensor", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout",
    "feature_alpha_dropout", "feature_dropout",
})  # fmt: skip
_ASSIGNED = frozenset({
    "movedim", "moveaxis", "hsplit", "vsplit", "dsplit", "diagonal", "expand", "expand_as",
    "broadcast_to", "atleast_1d", "atleast_2d", "atleast_3d", "real", "imag", "view_as_real",
    "view_as_complex",
})  # fmt: skip
"""Views that are written by making them again of a copy of their base."""
_RESHAPES = frozenset({"view", "reshape", "flatten", "unsqueeze", "squeeze", "unflatten", "ravel",
                       "view_as", "reshape_as"})  # fmt: skip


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    strides = zip(a.shape, a.stride(), b.stride(), strict=False)
    return (
        (a.shape, a.storage_offset()) == (b.shape, b.storage_offset())
        and all(one == other for size, one, other in strides if size > 1)
    )  # fmt: skip


def _is_plain(index: Any) -> bool:
    def plain(item: Any) -> bool:
        if isinstance(item, slice):
            return not any(isinstance(i, torch.Tensor) for i in (item.start, item.stop, item.step))
        return isinstance(item, (int, ShapeInt)) or item is None or item is Ellipsis

    return all(map(plain, index if isinstance(index, tuple) else (index,)))


def _piece(name: str, call: Call, index: Any, parent: torch.Tensor, view: torch.Tensor) -> Any:
    """The index of one piece of a ``chunk``, ``split``, ``unbind``, ``select`` or ``narrow``."""
    positions = {"chunk": 2, "split": 2, "tensor_split": 2, "unbind": 1, "select": 1, "narrow": 1}
    if name not in positions:
        return None
    default = 0 if name != "select" else call.args[1]
    position = positions[name]
    dim = call.kwargs.get("dim", call.args[position] if len(call.args) > position else default)
    lead = (slice(None),) * (dim % parent.dim())
    if name in ("unbind", "select"):
        return (*lead, index if name == "unbind" else call.args[2])
    stride = parent.stride(dim)
    start = (view.storage_offset() - parent.storage_offset()) // stride if stride else 0
    return (*lead, slice(start, start + view.shape[dim]))
