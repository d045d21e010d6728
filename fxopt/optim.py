"""Adaptive gradient clipping: a gradient stays small beside the weights that it changes.

Brock et al., "High-performance large-scale image recognition without normalization", ICML 2021,
section 4, equation 3. With ``‖·‖`` unit-wise (one filter, one row), a unit's gradient ``G`` whose
norm is above ``λ·max(‖W‖, ε)`` becomes

    G · λ·max(‖W‖, ε) / max(‖G‖, 1e-6)

It is what lets networks without normalisation train at large batches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fxopt.classifier import classifier_weight

CLIP = 0.01
"""λ of the paper, for batches of 4,096: smaller ones on short schedules need more."""
EPS = 1e-3
"""What a norm of weights counts at least, so that weights that are zero can move."""
_LEAST_NORM = 1e-6

Parameters = (
    nn.Module
    | torch.Tensor
    | Iterable[torch.Tensor]
    | Iterable[tuple[str, torch.Tensor]]
    | Mapping[str, torch.Tensor]
)
"""A module, its ``named_parameters()``, or tensors."""


@torch.no_grad()
def adaptive_gradient_clip(
    parameters: Parameters, clip: float = CLIP, eps: float = EPS,
    exclude: Iterable[str] | None = None,
) -> None:  # fmt: skip
    """Clip the gradients of ``parameters``, unit by unit, in place; call it before the step.

    A unit is a filter or a row: all of a tensor but its first axis. A tensor with at most one axis
    that is longer than 1 (a gain, a bias, a scalar) is one unit.

    Args:
        parameters: a module, named parameters, or tensors. Those without a gradient are left out.
        clip: λ, the largest ratio of a gradient's norm to its weights'.
        eps: what a norm of weights counts at least.
        exclude: names of parameters, or of modules with all below them, that are not clipped. Of a
            module it is by default the weight of the last ``nn.Linear`` in the order of execution,
            which is the classifier, as in the paper; ``()`` clips all. **Of named parameters and of
            bare tensors nothing is excluded by default**: which one is last is not known there.

    Raises:
        ValueError: ``clip`` or ``eps`` is not positive, ``exclude`` names nothing, or goes with
            tensors that have no names; a gradient is sparse; or the order in which the module calls
            its linear layers cannot be told.
        TypeError: ``parameters`` is nothing of the above.

    >>> weight = nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.6, 0.8]]))
    >>> weight.grad = torch.tensor([[0.03, 0.04], [1.0, 0.0], [0.003, 0.004]])
    >>> adaptive_gradient_clip(weight)
    >>> [[round(value, 6) for value in row] for row in weight.grad.tolist()]
    [[0.03, 0.04], [1e-05, 0.0], [0.003, 0.004]]
    """
    _check(clip, eps)
    _clip(_selected(parameters, exclude), clip, eps)


def with_adaptive_gradient_clip(
    optimizer: Optimizer, parameters: Parameters | None = None, clip: float = CLIP,
    eps: float = EPS, exclude: Iterable[str] | None = None,
) -> Optimizer:  # fmt: skip
    """``optimizer``, which from now on clips before each of its steps (before momentum).

    It stays the optimizer that it is: schedulers, ``state_dict`` and gradient scalers take it as
    before. A closure's gradients are clipped each time that it has computed them.

    Args:
        optimizer: any of ``torch.optim``.
        parameters: what is clipped, as in :func:`adaptive_gradient_clip`; give the model, so that
            its classifier is left out. By default the tensors that ``optimizer`` has in each step.
        clip: λ.
        eps: what a norm of weights counts at least.
        exclude: what is not clipped.

    Raises:
        ValueError: as :func:`adaptive_gradient_clip`, now; in a step, if a gradient scaler leaves
            it to the optimizer to scale the gradients back (``fused=True``): they have to be
            scaled back first, by ``scaler.unscale_(optimizer)``.
    """
    _check(clip, eps)
    chosen = None if parameters is None else _selected(parameters, exclude)
    if chosen is None and exclude is not None:
        raise ValueError(_NAMELESS)

    def clip_all() -> None:
        given = (p for group in optimizer.param_groups for p in group["params"])
        with torch.no_grad():
            _clip(list(given) if chosen is None else chosen, clip, eps)

    def before_step(
        which: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if getattr(which, "grad_scale", None) is not None:
            raise ValueError(
                f"{type(which).__name__} is to scale its gradients back itself, after they are "
                "clipped; call scaler.unscale_(optimizer) before scaler.step(optimizer)"
            )
        # torch hands the optimizer itself over as the first argument
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            clip_all()
            return None

        def clipped() -> Any:
            loss = closure()
            clip_all()
            return loss

        if len(args) > 1:
            return (args[0], clipped, *args[2:]), kwargs
        return args, {**kwargs, "closure": clipped}

    optimizer.register_step_pre_hook(before_step)
    return optimizer


def _check(clip: float, eps: float) -> None:
    for name, value in (("clip", clip), ("eps", eps)):
        if not value > 0:
            raise ValueError(f"{name} is to be positive, not {value}")


# ---- which tensors -----------------------------------------------------------------------------

_NAMELESS = "exclude takes names, and tensors have none: give the module or named_parameters()"


def _selected(parameters: Parameters, exclude: Iterable[str] | None) -> list[torch.Tensor]:
    if isinstance(exclude, str):
        raise ValueError(f"exclude takes a list of names, not the text {exclude!r}")
    if isinstance(parameters, nn.Module):
        named = parameters.named_parameters(remove_duplicate=False)
        if exclude is None:
            classifier = classifier_weight(parameters)
            exclude = [name for name, tensor in named if any(tensor is c for c in classifier)]
            named = parameters.named_parameters(remove_duplicate=False)
        return _without(named, exclude)
    if isinstance(parameters, torch.Tensor):
        parameters = [parameters]
    given = list(parameters.items() if isinstance(parameters, Mapping) else parameters)
    if all(isinstance(each, torch.Tensor) for each in given):
        if exclude is not None and given:
            raise ValueError(_NAMELESS)
        return given  # type: ignore[return-value]
    for each in given:
        pair = isinstance(each, tuple) and len(each) == 2
        if not (pair and isinstance(each[0], str) and isinstance(each[1], torch.Tensor)):
            raise TypeError(
                "parameters are a module, tensors, or pairs of a name and a tensor; there is "
                f"a {type(each).__name__}"
            )
    return _without(given, exclude)  # type: ignore[arg-type]


def _without(
    named: Iterable[tuple[str, torch.Tensor]], exclude: Iterable[str] | None
) -> list[torch.Tensor]:
    """Each tensor once, unless a name of it is excluded."""
    names = dict.fromkeys(exclude or (), False)
    tensors: dict[int, torch.Tensor] = {}
    out: set[int] = set()
    for name, tensor in named:
        tensors[id(tensor)] = tensor
        held = [each for each in names if name == each or name.startswith(f"{each}.")]
        names |= dict.fromkeys(held, True)
        out |= {id(tensor)} if held else set()
    for name, found in names.items():
        if not found:
            raise ValueError(f"exclude: there is no parameter '{name}', nor a module with any")
    return [tensor for key, tensor in tensors.items() if key not in out]


# ---- the clipping ------------------------------------------------------------------------------


def _clip(tensors: Iterable[torch.Tensor], clip: float, eps: float) -> None:
    groups: dict[Any, list[torch.Tensor]] = defaultdict(list)
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
        gradient = tensor.grad
        if gradient is not None:
            if gradient.layout is not torch.strided:
                raise ValueError(
                    f"a gradient of shape {tuple(gradient.shape)} is sparse, which is not clipped; "
                    "exclude its parameter"
                )
            groups[tensor.device, tensor.dtype, gradient.dtype].append(tensor)
    for group in groups.values():
        _clip_alike(group, clip, eps)


def _clip_alike(tensors: list[torch.Tensor], clip: float, eps: float) -> None:
    """Clip tensors of one device and dtype: all units in one vector."""
    gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
    norms = [_unit_norms(tensor) for tensor in gradients]
    found = torch.cat([each.flatten() for each in norms])
    limit = torch.cat([_unit_norms(tensor).flatten() for tensor in tensors])
    limit = limit.clamp_min(eps).mul(clip)
    factors = torch.where(found > limit, limit / found.clamp_min(_LEAST_NORM), 1.0)
    pieces = torch.split(factors, [each.numel() for each in norms])
    scales = [f.view(n.shape) for f, n in zip(pieces, norms, strict=True)]
    torch._foreach_mul_(gradients, scales)


def _unit_norms(tensor: torch.Tensor) -> torch.Tensor:
    """The norm of each unit, with as many axes as ``tensor``, in float32 at least."""
    lengthy = sum(size != 1 for size in tensor.shape) > 1
    axes = tuple(range(1 if lengthy else 0, tensor.dim()))
    kind = torch.promote_types(tensor.dtype, torch.float32)
    found: torch.Tensor = torch.linalg.vector_norm(tensor.to(kind), dim=axes or None, keepdim=True)
    return found
