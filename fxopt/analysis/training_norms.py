"""A program's module in evaluation, but for its BatchNorms."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import fx, nn

from fxopt.graphs import assemble, copy_tree, share_tensors
from fxopt.norms import batch_norms
from fxopt.program import Program
from fxopt.proof.running import evaluation_module

Norms = Literal["batch", "deleted"]
"""Whether BatchNorms normalise by the batch, as in training, or are left out."""


def as_in_training(program: Program, norms: Norms) -> fx.GraphModule:
    """The program's module whose BatchNorms take the batch's statistics and write nothing."""
    module = evaluation_module(program)
    twin = assemble(copy_tree(module, share_tensors(module)), module.graph, fx.GraphModule)
    for norm in batch_norms(program):
        if norm.op != "call_module":
            continue
        path, _, name = str(norm.target).rpartition(".")
        holder = twin.get_submodule(path)
        own = holder._modules[name]
        made = nn.Identity() if norms == "deleted" else _ByBatch(own)
        made._modules.update({} if own is None else own._modules)
        holder._modules[name] = made
    return twin


class _ByBatch(nn.Module):
    """A BatchNorm that normalises by its batch and keeps nothing of it."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() == x.shape[1]:  # one value in each channel, which torch refuses
            x = torch.cat((x, x))
            return nn.functional.batch_norm(
                x, None, None, self.weight, self.bias, True, eps=self.eps
            )[:1]
        return nn.functional.batch_norm(x, None, None, self.weight, self.bias, True, eps=self.eps)
