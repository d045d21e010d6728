"""Where a captured graph departs from its model, for the message of the refusal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from fxopt.program import Program

Eager = Callable[[], tuple[nn.Module, Callable[[], Any]]]
"""Gives a fresh copy of the model, and how to run it."""


def describe(
    program: Program,
    eager: Eager,
    graph: Callable[[], Mapping[fx.Node, Any]],
    same: Callable[[Any, Any], bool],
) -> str:
    """The end of the sentence: the model's own fault, or the first layer that departs."""
    try:
        first, second = eager()[1](), eager()[1]()
        if not all(map(same, first, second)):
            return (
                ". The model itself gives two results for one input: something that it keeps (a "
                "global, an attribute, random numbers of another library) changes from call to "
                "call; make it an argument or a buffer"
            )
        where = _first_layer(program, eager, graph, same)
    except Exception:  # it is only for the message
        where = ""
    return (
        f"{where}. Something in its forward is lost on fxopt: rewrite it in plain torch "
        "operators, or move that part into a small submodule of its own; and please report it"
    )


def _first_layer(
    program: Program,
    eager: Eager,
    graph: Callable[[], Mapping[fx.Node, Any]],
    same: Callable[[Any, Any], bool],
) -> str:
    model, run = eager()
    theirs: dict[str, list[torch.Tensor]] = defaultdict(list)
    members = dict(model.named_modules(remove_duplicate=False))
    targets = {str(n.target) for n in program.nodes if n.op == "call_module"}
    for path in targets & set(members):
        members[path].register_forward_hook(
            lambda module, args, output, path=path: theirs[path].append(output)  # type: ignore[misc]
        )
    run()
    by_name = {node.name: value for node, value in graph().items()}
    before = "the input"
    for node in program.nodes:
        outputs = theirs.get(str(node.target)) if node.op == "call_module" else None
        if not outputs:
            continue
        value = outputs.pop(0)
        if isinstance(value, torch.Tensor) and not same(value, by_name[node.name]):
            return f"; the first layer to depart is {program.where(node)}, after {before}"
        before = program.where(node)
    return f"; it departs after {before}"
