"""Multiply-accumulates of one call, from shapes alone.

One multiply-accumulate (MAC) is ``a += b * c``. Counted are convolutions, linear layers and matrix
products, the batch included; a bias is not, nor is elementwise work. A convolution counts its
padding as if it were data, as the papers and ``torch.utils.flop_counter`` (whose FLOPs are twice
these MACs) do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch.nn.functional as F
from torch import nn

from fxopt.patching import tiles
from fxopt.program import TensorType, ValueType


@dataclass(frozen=True)
class TypedCall:
    """One call as the operator table sees it: a type stands in the place of every value.

    Attributes:
        module: the module that is called, or None for a function or a method.
        args, kwargs: the arguments; a method's first one is the tensor.
        result: the type of what comes back.
    """

    module: nn.Module | None
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: ValueType

    def operand(self, position: int, name: str) -> Any:
        """The argument at ``position`` or called ``name``; None if it is left out."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name)

    def shape_of(self, position: int, name: str) -> tuple[int, ...]:
        """Shape of the module's tensor called ``name``, or of the function's argument."""
        module = self.module
        tensor = self.operand(position, name) if module is None else getattr(module, name)
        return tuple(tensor.shape)


Formula = Callable[[TypedCall], int]


def none(call: TypedCall) -> int:
    """Of an operator that is no convolution, linear layer or matrix product."""
    return 0


def _elements(value: ValueType) -> int:
    return value.elements if isinstance(value, TensorType) else 0


def convolution(call: TypedCall) -> int:
    """Every output element reads one filter: weight ``(C_out, C_in / groups, *kernel)``."""
    return _elements(call.result) * prod(call.shape_of(1, "weight")[1:])


def transposed_convolution(call: TypedCall) -> int:
    """Every input element is spread by one filter: weight ``(C_in, C_out / groups, *kernel)``."""
    return _elements(call.operand(0, "input")) * prod(call.shape_of(1, "weight")[1:])


def linear(call: TypedCall) -> int:
    """Weight ``(out, in)``, or ``(in,)`` where the function is given a vector."""
    return _elements(call.result) * call.shape_of(1, "weight")[-1]


def bilinear(call: TypedCall) -> int:
    """Weight ``(out, in1, in2)``."""
    return _elements(call.result) * prod(call.shape_of(2, "weight")[1:])


def matrix_product(left: int, name: str) -> Formula:
    """The formula where operand ``left`` (called ``name``) has shape ``(..., rows, inner)``."""

    def formula(call: TypedCall) -> int:
        return _elements(call.result) * int(call.operand(left, name).shape[-1])

    return formula


def summed_batch_product(call: TypedCall) -> int:
    """``addbmm``: products of ``(B, n, k)`` with ``(B, k, m)``, summed over B."""
    batch, _, inner = call.operand(1, "batch1").shape
    return _elements(call.result) * int(batch) * int(inner)


def tensordot(call: TypedCall) -> int:
    """``dims`` is a count of trailing axes or a pair of axis lists."""
    left, right, dims = call.operand(0, "a"), call.operand(1, "b"), call.operand(2, "dims")
    dims = 2 if dims is None else dims
    if isinstance(dims, int):
        axes = tuple(range(len(left.shape) - dims, len(left.shape)))
    else:
        axes = tuple(dims[0]) if isinstance(dims[0], (list, tuple)) else (dims[0],)
    inner = prod(left.shape[axis] for axis in axes)
    return _elements(left) * _elements(right) // max(inner, 1) if axes else 0


def einsum(call: TypedCall) -> int:
    """Operands contracted in pairs from left to right, as torch does without ``opt_einsum``.

    A pair costs the product of the sizes of its indices. A pair that sums over nothing is
    elementwise and costs none; an index that only one of the two has, and that nothing later
    reads, is summed away before.
    """
    terms, output, shapes = _einsum_terms(call)
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for index, size in zip(term, shape, strict=True):
            sizes[index] = max(size, sizes.get(index, 1))
    macs = 0
    left = set(terms[0])
    for position, term in enumerate(terms[1:], start=1):
        right = set(term)
        later = set(output).union(*terms[position + 1 :])
        kept = (left | right) & (later | (left & right))
        if (left & right) - later:
            macs += prod(sizes[index] for index in kept)
        left = (left | right) & later
    return macs


def _einsum_terms(call: TypedCall) -> tuple[list[list[str]], list[str], list[tuple[int, ...]]]:
    """Index lists of the operands and of the output, and the operands' shapes."""
    if isinstance(call.args[0], str):
        operands = call.args[1:]
        if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
            operands = tuple(operands[0])
        inputs, arrow, result = call.args[0].replace(" ", "").replace("...", "*").partition("->")
        texts = [list(term) for term in inputs.split(",")]
        given = list(result) if arrow else None
    else:  # einsum(a, [0, 1], b, [1, 2], [0, 2])
        operands = call.args[0 : len(call.args) // 2 * 2 : 2]
        lists = [_sublist(term) for term in call.args[1::2]]
        texts = lists[: len(operands)]
        given = _sublist(call.args[-1]) if len(call.args) % 2 else None
    shapes = [tuple(operand.shape) for operand in operands]
    terms = [_spell_out(text, len(shape)) for text, shape in zip(texts, shapes, strict=True)]
    if given is not None:
        broadcast = {index for term in terms for index in term if index[0] == "*"}
        output = [index for index in given if index != "*"] + [*(broadcast if "*" in given else ())]
    else:
        written = [index for term in terms for index in term]
        output = [index for index in written if written.count(index) == 1 or index[0] == "*"]
    return terms, output, shapes


def _sublist(indices: Any) -> list[str]:
    return ["*" if index is Ellipsis else str(index) for index in indices]


def _spell_out(indices: list[str], rank: int) -> list[str]:
    """``indices`` with the ellipsis as ``*2 *1 *0``, numbered from the right as it broadcasts."""
    missing = rank - len(indices) + 1
    spelled: list[str] = []
    for index in indices:
        spelled += [f"*{i}" for i in reversed(range(missing))] if index == "*" else [index]
    return spelled


def attention(call: TypedCall) -> int:
    """Scores ``(..., L, E) x (..., E, S)`` and their product with the values ``(..., S, E_v)``.

    A causal mask saves nothing here: it is counted as if every score were computed.
    """
    query, key = call.operand(0, "query"), call.operand(1, "key")
    rows = prod(call.result.shape[:-1])
    return int(rows * key.shape[-2] * (query.shape[-1] + call.result.shape[-1]))


def multi_head_attention(call: TypedCall) -> int:
    """Four projections and the attention of ``nn.MultiheadAttention``, module or function."""
    query, key, value = (call.operand(i, n) for i, n in enumerate(("query", "key", "value")))
    width = query.shape[-1]
    projections = 2 * query.elements * width + (key.elements + value.elements) * width
    batch_axis = 0 if getattr(call.module, "batch_first", False) else 1
    batch = query.shape[batch_axis] if len(query.shape) == 3 else 1
    queries, keys = query.elements // width, key.elements // key.shape[-1]
    return int(projections + 2 * queries * (keys // batch) * width)


def recurrent(call: TypedCall) -> int:
    """Every step of every sequence reads every weight matrix of a recurrent layer or cell."""
    assert call.module is not None
    steps = call.operand(0, "input")
    matrices = sum(p.numel() for p in call.module.parameters() if p.dim() == 2)
    return _elements(steps) // int(steps.shape[-1]) * matrices


def patched_stage(call: TypedCall) -> int:
    """Every tile's convolutions and linear layers, halos included."""
    stage: Any = call.module
    plan, table = stage.plan, stage.table
    weights = dict(zip(plan.weights, call.args[1:], strict=True))
    batch, total = call.result.shape[0], 0
    for step in plan.steps:
        filters = [weights[name] for name in step.reads[1:2] if name in weights]
        if step.function in (tiles.conv2d, F.linear):
            each = batch * prod(filters[0].shape)
            total += each * sum(prod(tile[step.name].shape) for tile in table)
    return total
