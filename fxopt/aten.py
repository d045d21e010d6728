"""Operators of exported programs, back as the functions that people write.

``torch.export`` writes ``torch.ops.aten.conv2d.default`` where the user wrote ``F.conv2d``. Most
operators of aten have a function or a method of that very name with the same arguments; those that
have not are in the tables here. What is in no table and has no name is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch._ops import OpOverload


class Unspelled(Exception):
    """An operator, or this use of it, has no function here; the text says why."""


def spelled(
    target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]] | None:
    """``(function, args, kwargs)`` for a call in an exported graph; None if it is but an assertion.

    Arguments may be anything, nodes of a graph among them; only options are looked at.

    Raises:
        Unspelled: there is no function for it.
    """
    if not isinstance(target, OpOverload):
        if target is operator.getitem or getattr(target, "__module__", "") in _ARITHMETIC:
            return target, tuple(args), dict(kwargs)
        raise Unspelled("it is no operator of torch's")
    name = target.overloadpacket.__name__
    if name in _ASSERTIONS:
        return None
    if target.namespace != "aten" or name in _STATEFUL:
        raise Unspelled("it has no counterpart among torch's functions")
    given = _by_name(target, args, kwargs)
    _check_mode(name, given)
    special = _SPECIAL.get(name) or _SPECIAL.get(f"{name}.{target._overloadname}")
    if special is not None:
        return special, (), given
    if name.rstrip("_") in _DROPOUTS:
        # In evaluation it gives its own input, in place or not.
        name, given["input"] = name.rstrip("_"), args[0]
        given.pop("self", None)
    if name in _BOUND:
        return _bound(_BOUND[name], given)
    if name.rstrip("_") == "hardtanh" and tuple(args[1:]) == (0, 6):  # what F.relu6 becomes
        return F.relu6, (args[0],), {"inplace": name.endswith("_")}
    in_place = name.endswith("_") and not name.startswith("_")
    if in_place and hasattr(F, name[:-1]) and not hasattr(torch.Tensor, name):
        return getattr(F, name[:-1]), _tuples(args), {**_tuples(kwargs), "inplace": True}
    function = _namesake(name)
    if function is None:
        raise Unspelled("it has no counterpart among torch's functions")
    return function, _tuples(args), {k: v for k, v in _tuples(kwargs).items() if v is not None}


_ARITHMETIC = frozenset({"_operator", "math", "builtins", "torch"})
_ASSERTIONS = frozenset({
    "_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range",
    "sym_constrain_range_for_size",
})  # fmt: skip
# A call of one of these is a whole layer, whose parameters fxopt would not see as one.
_STATEFUL = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu", "_native_multi_head_attention"})


def _by_name(target: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that differ from the schema's defaults, by the schema's names."""
    parameters = target._schema.arguments
    given = dict(zip((p.name for p in parameters), args, strict=False)) | dict(kwargs)
    defaults = {p.name: p.default_value for p in parameters if p.has_default_value()}
    return {
        name: _tuples(value)
        for name, value in given.items()
        if name not in defaults or value != defaults[name]
    }


def _tuples(tree: Any) -> Any:
    """Lists as tuples: as options of layers they are values."""
    if isinstance(tree, (list, tuple)):
        return tuple(map(_tuples, tree))
    if isinstance(tree, dict):
        return {key: _tuples(value) for key, value in tree.items()}
    return tree


def _check_mode(name: str, given: Mapping[str, Any]) -> None:
    of_a_norm = name == "batch_norm" and given["training"] and given.get("running_mean") is not None
    of_a_dropout = name.rstrip("_") in _DROPOUTS and given["train"] and given["p"] != 0
    if of_a_norm or of_a_dropout:
        raise Unspelled("it runs in training mode; call .eval() before torch.export.export")


_DROPOUTS = frozenset({
    "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout",
})  # fmt: skip


def _bound(
    entry: tuple[Callable[..., Any], str], given: Mapping[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """A table entry's call: its words are aten's names, or ``ours=aten's`` where they differ."""
    function, text = entry
    words = [(theirs or ours, ours) for ours, _, theirs in (w.partition("=") for w in text.split())]
    unknown = {k for k, v in given.items() if v is not False} - dict(words).keys() - _IGNORED
    if unknown:
        raise Unspelled(f"torch's function has no '{min(unknown)}'")
    (first, _), *_ = words
    kwargs: dict[str, Any] = {}
    for theirs, ours in words[1:]:
        if theirs in given:
            kwargs[ours] = given[theirs]
    return function, (given[first],), kwargs


_IGNORED = frozenset({"cudnn_enabled", "cudnn_enable"})


def _namesake(name: str) -> Callable[..., Any] | None:
    """The public function or method called ``name``; a method may exist where F's means another."""
    space, _, rest = name.partition("_")
    if space in ("linalg", "fft", "special"):
        found = getattr(getattr(torch, space), rest, None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    if name.startswith("_") and not name.startswith("__"):
        return None
    places = (torch.Tensor, torch, F) if name in _METHODS else (torch, torch.Tensor, F)
    found = next((getattr(place, name) for place in places if hasattr(place, name)), None)
    return found if callable(found) else None


_METHODS = frozenset({"to", "view", "expand", "contiguous", "type_as", "unfold"})


# ---- what is spelled otherwise ---------------------------------------------------------------

_POOL = "input=self kernel_size stride padding"
_BOUND: Mapping[str, tuple[Callable[..., Any], str]] = {
    "linear": (F.linear, "input weight bias"),
    "batch_norm": (
        F.batch_norm, "input running_mean running_var weight bias training momentum eps",
    ),
    "layer_norm": (F.layer_norm, "input normalized_shape weight bias eps"),
    "group_norm": (F.group_norm, "input num_groups weight bias eps"),
    "instance_norm": (
        F.instance_norm,
        "input running_mean running_var weight bias use_input_stats momentum eps",
    ),
    "dropout": (F.dropout, "input p training=train"),
    "feature_dropout": (F.dropout2d, "input p training=train"),
    "alpha_dropout": (F.alpha_dropout, "input p training=train"),
    "feature_alpha_dropout": (F.feature_alpha_dropout, "input p training=train"),
    "max_pool1d": (F.max_pool1d, f"{_POOL} dilation ceil_mode"),
    "max_pool2d": (F.max_pool2d, f"{_POOL} dilation ceil_mode"),
    "max_pool3d": (F.max_pool3d, f"{_POOL} dilation ceil_mode"),
    "avg_pool1d": (F.avg_pool1d, f"{_POOL} ceil_mode count_include_pad"),
    "avg_pool2d": (F.avg_pool2d, f"{_POOL} ceil_mode count_include_pad divisor_override"),
    "avg_pool3d": (F.avg_pool3d, f"{_POOL} ceil_mode count_include_pad divisor_override"),
    "_adaptive_avg_pool2d": (F.adaptive_avg_pool2d, "input=self output_size"),
    "elu": (F.elu, "input=self alpha"),
    "log_sigmoid": (F.logsigmoid, "input=self"),
    "softplus": (F.softplus, "input=self beta threshold"),
    "_softmax": (torch.softmax, "input=self dim"),
    "_log_softmax": (torch.log_softmax, "input=self dim"),
    "constant_pad_nd": (F.pad, "input=self pad value"),
    "pad": (F.pad, "input=self pad mode value"),
    "_unsafe_view": (torch.reshape, "input=self shape=size"),
    "sym_size": (torch.Tensor.size, "self dim"),
    "lift_fresh": (torch.clone, "input=self"),
    "lift_fresh_copy": (torch.clone, "input=self"),
    "detach_": (torch.detach, "input=self"),
}  # fmt: skip


def _convolution(
    input: Any, weight: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int, bias: Any = None,
) -> Any:  # fmt: skip
    dimensions = len(stride)
    conv: Any = (F.conv1d, F.conv2d, F.conv3d)[dimensions - 1]
    if not transposed:
        return conv(input, weight, bias, stride, padding, dilation, groups)
    conv = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dimensions - 1]
    return conv(input, weight, bias, stride, padding, output_padding, groups, dilation)


def _inference_batch_norm(
    input: Any, running_mean: Any, running_var: Any, momentum: float, eps: float,
    weight: Any = None, bias: Any = None,
) -> tuple[Any, ...]:  # fmt: skip
    return (
        F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps),
    )  # fmt: skip


def _native_layer_norm(
    input: Any, normalized_shape: Any, eps: float, weight: Any = None, bias: Any = None
) -> tuple[Any, ...]:
    return (F.layer_norm(input, normalized_shape, weight, bias, eps),)


def _native_group_norm(
    input: Any, N: Any, C: Any, HxW: Any, group: int, eps: float, weight: Any = None,
    bias: Any = None,
) -> tuple[Any, ...]:  # fmt: skip
    return (F.group_norm(input, group, weight, bias, eps),)


def _max_pool(self: Any, kernel_size: Any, **options: Any) -> tuple[Any, ...]:
    return (F.max_pool2d(self, kernel_size, **options),)


def _adaptive_max_pool(self: Any, output_size: Any) -> tuple[Any, ...]:
    return (F.adaptive_max_pool2d(self, output_size),)


def _slice(self: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    # What export writes for an open end.
    end = None if isinstance(end, int) and end >= 2**63 - 1 else end
    leading = (slice(None),) * (dim if dim >= 0 else dim + self.dim())
    return self[(*leading, slice(start, end, None if step == 1 else step))]


def _index(self: Any, indices: Sequence[Any]) -> Any:
    return self[tuple(slice(None) if index is None else index for index in indices)]


def _fill(self: Any, value: Any) -> Any:
    return self.copy_(value)


def _to_copy(self: Any, **options: Any) -> Any:
    return self.to(**{k: v for k, v in options.items() if k in ("dtype", "device")})


def _upsample(mode: str) -> Callable[..., Any]:
    def upsample(
        input: Any, output_size: Any = None, align_corners: bool | None = None,
        scale_factors: Any = None,
    ) -> Any:  # fmt: skip
        corners = None if mode == "nearest" else bool(align_corners)
        scale = None if output_size is not None else scale_factors
        return F.interpolate(input, output_size, scale, mode, corners)

    return upsample


FIRST_ALONE = (
    _inference_batch_norm, _native_layer_norm, _native_group_norm, _max_pool, _adaptive_max_pool,
)  # fmt: skip
"""Functions that give the first of the several results that aten's operator has."""

_SPECIAL: Mapping[str, Callable[..., Any]] = {
    "convolution": _convolution,
    "_native_batch_norm_legit_no_training": _inference_batch_norm,
    "native_layer_norm": _native_layer_norm,
    "native_group_norm": _native_group_norm,
    "max_pool2d_with_indices": _max_pool,
    "adaptive_max_pool2d": _adaptive_max_pool,
    "slice": _slice,
    "index": _index,
    "fill_.Tensor": _fill,
    "_to_copy": _to_copy,
    "to.dtype_layout": _to_copy,
    "upsample_nearest1d.vec": _upsample("nearest"),
    "upsample_nearest2d.vec": _upsample("nearest"),
    "upsample_nearest3d.vec": _upsample("nearest"),
    "upsample_linear1d.vec": _upsample("linear"),
    "upsample_bilinear2d.vec": _upsample("bilinear"),
    "upsample_bicubic2d.vec": _upsample("bicubic"),
    "upsample_trilinear3d.vec": _upsample("trilinear"),
}
