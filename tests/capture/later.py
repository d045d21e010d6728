"""What a captured module does on calls that its example was not."""

from __future__ import annotations

from typing import Any

import torch
from capture.checks import captured, restored
from torch import nn
from torch.utils import _pytree as pytree

from fxopt.errors import GuardError


def run(module: nn.Module, *args: Any) -> list[Any]:
    """Leaves of the result, under a seed and with copies of the arguments."""
    copies = pytree.tree_map_only(torch.Tensor, torch.clone, args)
    torch.manual_seed(3)
    return pytree.tree_leaves(module(*copies))  # type: ignore[no-any-return]


def assert_same_later(model: nn.Module, example: Any, *others: Any) -> None:
    """Each call gives what the model gives, or raises ``GuardError``; the example's is no guard."""
    module = captured(model, example)
    for index, call in enumerate((example, *others)):
        with restored(model), restored(module):
            theirs = run(model, call)
            try:
                ours = run(module, call)
            except GuardError:
                assert index, "the example itself is guarded against"
                continue
        assert len(theirs) == len(ours)
        for a, b in zip(theirs, ours, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype), f"call {index}"
            assert torch.allclose(a, b, rtol=0, atol=1e-6, equal_nan=True), f"call {index}"
