"""Traced tensors that the user's code keeps beyond the trace, in a cache of its own.

A function under ``lru_cache``, a dictionary of a module or a class attribute may keep a tensor
that was made while tracing. It has no values, and the user's own model would find it there. Such a
tensor is made into what it stands for: the graph computes it from the example.
"""

from __future__ import annotations

import gc
import traceback
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import swap_tensors

from fxopt.errors import CaptureError
from fxopt.graphs import call_node, member
from fxopt.interface import Call
from fxopt.tracing.trace import Trace
from fxopt.tracing.writer import Writer


@dataclass(frozen=True)
class Kept:
    """A tensor that outlived its trace, and the node that computes it."""

    tensor: torch.Tensor
    node: fx.Node


class Watch:
    """Remembers the tensors of a writer's trace without keeping them alive; ends its work."""

    def __init__(self, writer: Writer) -> None:
        self._seen = [
            (weakref.ref(value.tensor), value.current)
            for value in writer.values()
            if value.tensor.is_meta and value.current.op != "get_attr"
        ]
        writer.forget()

    def survivors(self) -> list[Kept]:
        """The tensors that somebody holds still, first made first."""
        alive = [pair for pair in self._seen if pair[0]() is not None]
        if alive:
            gc.collect()
        kept = [(ref(), node) for ref, node in alive]
        self._seen = []
        return [Kept(tensor, node) for tensor, node in kept if tensor is not None]


def forget_frames(error: BaseException | None) -> None:
    """Drop what the frames that ``error`` went through hold."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def make_real(kept: Sequence[Kept], trace: Trace, model: nn.Module, call: Call) -> None:
    """Give each tensor of ``kept`` the values that it would have if ``model`` had run on ``call``.

    Raises:
        CaptureError: one cannot be given values; the user's code is left with a tensor without.
    """
    values = _values([k.node for k in kept], trace, model, call)
    for item in reversed(kept):  # a view holds on to what it is a view of, which was made before
        try:
            swap_tensors(item.tensor, values[item.node].detach().clone())  # type: ignore[no-untyped-call]
        except (RuntimeError, KeyError) as error:
            origin = trace.origins.get(item.node.name)
            raise CaptureError(
                f"the model keeps a tensor made at {origin.line if origin else 'its forward'} "
                "outside of itself (in a global, a class or a cached function), where it cannot "
                "be replaced; clear that cache, call the model once and capture it then"
            ) from error


def _values(
    wanted: Sequence[fx.Node], trace: Trace, model: nn.Module, call: Call
) -> Mapping[fx.Node, torch.Tensor]:
    """What the nodes compute from the tensors of ``call``."""
    needed = set(wanted)
    env: dict[fx.Node, Any] = {}
    inputs = iter([tensor.detach().clone() for tensor in call.tensors])
    for node in reversed(trace.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    with torch.no_grad():
        for node in trace.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(inputs)
            elif node in needed:
                env[node] = _computed(node, env, trace, model)
    return env


def _computed(node: fx.Node, env: Mapping[fx.Node, Any], trace: Trace, model: nn.Module) -> Any:
    target = str(node.target)
    if node.op == "get_attr":
        return trace.constants[target] if target in trace.constants else member(model, target)

    def module_at(path: str) -> nn.Module:
        made = trace.modules.get(path)
        return model.get_submodule(path) if made is None else made

    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), env.__getitem__)
    return call_node(node, args, kwargs, module_at)


def depends_on_values(node: fx.Node, fixed: Collection[str] = ()) -> bool:
    """Whether what ``node`` computes may differ between two calls: inputs, weights, chance.

    Tensors of the model whose names are ``fixed`` are taken for the same in both.
    """
    waiting, seen = [node], set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        name = str(getattr(node.target, "__name__", node.target))
        if name in _BY_SHAPE:
            continue
        constant = node.op == "get_attr" and name.startswith("_constant_")
        if node.op == "get_attr" and not constant and str(node.target) not in fixed:
            return True
        if node.op in ("placeholder", "call_module") or name.rstrip("_") in _CHANCE:
            return True
        operands = node.all_input_nodes
        waiting += operands[:1] if name in _LIKE_SECOND else operands
    return False


_BY_SHAPE = frozenset({
    "size", "getattr", "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros",
    "new_ones",
    "new_full", "new_empty", "new_tensor",
})  # fmt: skip
_LIKE_SECOND = frozenset({"to", "type_as", "view_as", "expand_as", "reshape_as"})
_CHANCE = frozenset({
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal",
    "bernoulli", "multinomial", "uniform", "exponential", "poisson", "applied", "dropout",
})  # fmt: skip
