"""Gradient checkpointing, followed as the plain call that it stands for.

Values and gradients are those of the call; what a checkpoint saves in memory, and that a norm
inside updates its statistics once more when it is recomputed, is left out, and a note says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import CheckpointFunction

from fxopt.tracing.trace import Trace, Untraceable, user_line
from fxopt.tracing.writer import Writer

NOTE = (
    "gradient checkpointing is left out: values and gradients are the same, training takes more "
    "memory, and norms inside update their statistics once a step, not twice"
)


@contextlib.contextmanager
def noticed(trace: Trace) -> Iterator[None]:
    """Note in ``trace`` where the forward changes what autograd saves."""
    hooks = torch.autograd.graph.saved_tensors_hooks
    enter = hooks.__enter__

    def entered(self: Any) -> Any:
        trace.notes.setdefault(NOTE, user_line())
        return enter(self)

    hooks.__enter__ = entered  # type: ignore[method-assign]
    try:
        yield
    finally:
        hooks.__enter__ = enter  # type: ignore[method-assign]


def is_checkpoint(function: type) -> bool:
    """Whether a custom autograd function is the checkpoint that ``use_reentrant=True`` makes."""
    return function is CheckpointFunction


def called(writer: Writer, run: Any, preserve_random_state: bool, *args: Any) -> Any:
    """The call that a checkpoint with ``use_reentrant=True`` stands for.

    Raises:
        Untraceable: none of its inputs is known to need a gradient. Its parameters then get one
            only if the caller's input needs one.
    """
    inputs = [writer.value_of(a).read() for a in args if isinstance(a, torch.Tensor)]
    if not _need_gradients(inputs, writer.model):
        raise Untraceable(
            "it checkpoints with use_reentrant=True a part whose input may need no gradient, and "
            "whose parameters then get none",
            "use use_reentrant=False",
        )
    writer.trace.notes.setdefault(NOTE, user_line())
    return run(*args)


def _need_gradients(nodes: list[fx.Node], model: nn.Module) -> bool:
    """Whether a trainable parameter is upstream of any of ``nodes``, whatever the inputs need."""
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if _trains(node, model):
            return True
        sources = () if node.target is torch.detach else node.all_input_nodes
        nodes += [source for source in sources if source not in seen]
        seen.update(sources)
    return False


def _trains(node: fx.Node, model: nn.Module) -> bool:
    if node.op == "call_module":
        return any(p.requires_grad for p in model.get_submodule(str(node.target)).parameters())
    if node.op != "get_attr":
        return False
    owner, _, name = str(node.target).rpartition(".")
    tensor = getattr(model.get_submodule(owner), name, None)
    return isinstance(tensor, torch.Tensor) and tensor.requires_grad
