"""A program in float64: the same graph with every floating tensor and dtype widened."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from fxopt.graphs import assemble, copy_tree, share_tensors
from fxopt.program import Program, TensorType, ValueType
from fxopt.proof.evidence import SEED
from fxopt.proof.running import evaluation_module

_WIDE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
_WIDE_CASTS = {
    "half": "double",
    "bfloat16": "double",
    "float": "double",
    "chalf": "cdouble",
    "cfloat": "cdouble",
}


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in float64 (complex128) if it is of a narrower floating (complex) type."""
    return tensor.to(_WIDE.get(tensor.dtype, tensor.dtype))


def to_double(program: Program, only: Collection[str] | None = None) -> Program:
    """A copy of ``program`` that computes in float64; opaque leaves keep their own dtype.

    With ``only``, just the modules that these nodes call are widened, and the rest is shared: such
    a copy is good for computing those nodes.
    """
    module = program.graph_module
    memo = share_tensors(module)
    kept = _tensors_of(program, program.opaque)
    if only is not None:
        kept = set(memo) - _tensors_of(program, only)
    for tensor in (*module.parameters(), *module.buffers()):
        if id(tensor) not in kept:
            wide = widened(tensor.detach()).clone()
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(wide, False) if is_parameter else wide
    graph = copy.deepcopy(module.graph)
    for node in graph.nodes:
        node.args, node.kwargs = _widen_literals(node.args), _widen_literals(node.kwargs)
        if node.op == "call_method":
            node.target = _WIDE_CASTS.get(str(node.target), node.target)
    double = assemble(copy_tree(module, memo), graph, fx.GraphModule)
    types = {name: _widened_type(kind) for name, kind in program.types.items()}
    return replace(program, graph_module=double.eval(), types=types)


def _widened_type(kind: ValueType) -> ValueType:
    if isinstance(kind, TensorType):
        return replace(kind, dtype=_WIDE.get(kind.dtype, kind.dtype))
    return tuple(map(_widened_type, kind)) if isinstance(kind, tuple) else kind


def _tensors_of(program: Program, names: Collection[str]) -> set[int]:
    """Identities of the tensors that these nodes read themselves."""
    found: set[int] = set()
    for node in program.nodes:
        leaf = program.module(node) if node.name in names else None
        if leaf is not None:
            found |= share_tensors(leaf).keys()
    return found


def _widen_literals(arguments: Any) -> Any:
    def widen(leaf: Any) -> Any:
        return _WIDE.get(leaf, leaf) if isinstance(leaf, torch.dtype) else leaf

    return fx.node.map_aggregate(arguments, widen)


@contextlib.contextmanager
def default_double() -> Iterator[None]:
    """Tensors that the graph makes itself (``torch.eye(n)``) are float64 inside."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class DoubleInterpreter(fx.Interpreter):
    """Runs a float64 program; opaque leaves get their inputs in their own dtype."""

    def __init__(self, program: Program) -> None:
        super().__init__(evaluation_module(program))
        self._opaque = program.opaque

    def run_node(self, node: fx.Node) -> Any:
        if node.name not in self._opaque:
            return super().run_node(node)
        leaf = self.fetch_attr(str(node.target))
        tensors = (*leaf.parameters(), *leaf.buffers())
        dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
        arguments = torch.utils._pytree.tree_map_only(
            torch.Tensor,
            lambda t: t.to(dtype) if t.is_floating_point() else t,
            self.fetch_args_kwargs_from_env(node),
        )
        result = self.call_module(node.target, *arguments)
        return torch.utils._pytree.tree_map_only(torch.Tensor, widened, result)


def run_double(program: Program, inputs: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """The flat outputs of a float64 program, under the one seed."""
    torch.manual_seed(SEED)
    with torch.no_grad(), default_double():
        return tuple(DoubleInterpreter(program).run(*map(widened, inputs)))
