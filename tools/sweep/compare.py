"""Are two modules the same function? Errors of outputs, gradients and buffers, as numbers.

An error is relative to the largest value of the reference tensor. A tensor that is zero or not
finite everywhere is no evidence: the comparison says so instead of giving 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

SEED = 23


@dataclass
class Step:
    """What one training step shows of a module."""

    outputs: Any
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def outputs(module: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """The result, without gradients, under a fixed seed."""
    torch.manual_seed(SEED)
    with torch.no_grad():
        return module(*arguments)


def training_step(module: nn.Module, arguments: tuple[Any, ...], *, gradients: bool = True) -> Step:
    """Forward in train mode under a fixed seed, and backward of a seeded sum of the outputs."""
    module.train()
    torch.manual_seed(SEED)
    with torch.set_grad_enabled(gradients):
        result = module(*arguments)
    found: dict[str, Tensor] = {}
    if gradients:
        module.zero_grad()
        _loss(result).backward()  # type: ignore[no-untyped-call]
        found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        module.zero_grad()  # the gradients stay here
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    detached = pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, result)
    return Step(detached, found, buffers)


def _loss(result: Any) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    leaves = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor) and x.requires_grad]
    terms = [(x * torch.randn(x.shape, generator=generator).to(x)).sum() for x in leaves]
    return torch.stack(terms).sum()


def error(reference: Any, value: Any) -> float:
    """The largest error of any tensor in two equal structures; infinite where they differ."""
    theirs, spec = pytree.tree_flatten(reference)
    ours, other = pytree.tree_flatten(value)
    if spec != other:
        return math.inf
    return _worst(tensor_error(a, b) for a, b in zip(theirs, ours, strict=True))


def named_error(reference: dict[str, Tensor], value: dict[str, Tensor]) -> float:
    """The largest error by name; infinite where a name is missing."""
    if not reference.keys() <= value.keys():
        return math.inf
    return _worst(tensor_error(tensor, value[name]) for name, tensor in reference.items())


def _worst(errors: Iterable[float]) -> float:
    return max((e for e in errors if not math.isnan(e)), default=math.nan)


def tensor_error(a: Any, b: Any) -> float:
    """NaN stands for no evidence: nothing finite, or all zero, in both."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return 0.0 if type(a) is type(b) and a == b else math.inf
    if a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    if torch.equal(a, b):
        return 0.0 if a.any() else math.nan
    a, b = a.double(), b.double()
    if not torch.isfinite(a).any() and not torch.isfinite(b).any():
        return math.nan
    scale = a.abs().max().item()
    distance = (a - b).abs().max().item()
    return distance / scale if scale and math.isfinite(distance) else math.inf
