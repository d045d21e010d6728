"""Programs run as a user runs them in evaluation, with nothing of it left behind in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxopt.captured import apply_flags
from fxopt.graphs import assemble, copy_tree
from fxopt.program import Program
from fxopt.proof.evidence import SEED


def evaluation_module(program: Program) -> fx.GraphModule:
    """The program's module in evaluation mode; what a run writes goes to copies of its buffers.

    A dropout or norm that acts in evaluation too (``F.dropout(x)`` without ``training``) does.
    """
    module = program.graph_module
    acting = {path: True for path, flags in program.modes.fixed.items() if flags[0]}
    if not acting and all(node.target != "copy_" for node in program.nodes):
        return module
    written = {str(node.args[0]) for node in program.nodes if node.target == "copy_"}
    names = {str(node.target) for node in program.nodes if node.name in written}
    memo: dict[int, Any] = {id(p): p for n, p in module.named_parameters() if n not in names}
    twin = assemble(copy_tree(module, memo), module.graph, fx.GraphModule)
    twin.eval()
    apply_flags(twin, acting)
    return twin


def run(program: Program, inputs: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """The flat outputs of ``program`` in evaluation mode, under the one seed."""
    torch.manual_seed(SEED)
    with torch.no_grad():
        return tuple(evaluation_module(program)(*inputs))


def last_run_drew() -> bool:
    """Whether the last run, which began at the one seed, drew random numbers."""
    states = _random_states()
    torch.manual_seed(SEED)
    return any(not a.equal(b) for a, b in zip(states, _random_states(), strict=True))


def _random_states() -> list[torch.Tensor]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *cuda]
