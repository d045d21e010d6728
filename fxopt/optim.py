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
from numbers import Real
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
        ValueError: ``clip`` or ``eps`` is no positive number, ``exclude`` names nothing, or goes
            with tensors that have no names; a gradient is sparse; or the order in which the module
            calls its linear layers cannot be told.
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
    before. A closure's gradients are clipped each time that it has computed them. As with all hooks
    of torch's optimizers, a copy or a pickle of it does not clip.

    Args:
        optimizer: any of ``torch.optim``.
        parameters: what is clipped, as in :func:`adaptive_gradient_clip`, of what ``optimizer`` has
            in each step. Give the model, so that its classifier is left out; by default nothing is.
        clip: λ.
        eps: what a norm of weights counts at least.
        exclude: what is not clipped.

    Raises:
        ValueError: as :func:`adaptive_gradient_clip`; ``optimizer`` has none of ``parameters``, or
            its ``step`` is not one that torch lets hooks run before.
        TypeError: as :func:`adaptive_gradient_clip`; or ``optimizer`` is none.
    """
    _check(clip, eps)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"a {type(optimizer).__name__} is no torch.optim.Optimizer")
    if not getattr(type(optimizer).step, "hooked", False):
        raise ValueError(
            f"{type(optimizer).__name__} has a step that torch runs no hooks before, so that it "
            "cannot clip; give the optimizer that it wraps"
        )
    if exclude is not None:
        exclude = exclude if isinstance(exclude, str) else list(exclude)
    if parameters is not None and not isinstance(parameters, nn.Module):
        parameters = _selected(parameters, exclude)
        exclude = None

    def clipped_tensors() -> list[torch.Tensor]:
        own = [p for group in optimizer.param_groups for p in group["params"]]
        if parameters is None:
            return _selected(own, exclude)
        wanted = {id(tensor) for tensor in _selected(parameters, exclude)}
        return [tensor for tensor in own if id(tensor) in wanted]

    def clip_all() -> None:
        # a scaler that leaves it to the optimizer to scale the gradients back
        scale = getattr(optimizer, "grad_scale", None)
        with torch.no_grad():
            _clip(clipped_tensors(), clip, eps, scale)

    def before_step(
        which: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
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

    if not clipped_tensors():
        raise ValueError(f"{type(optimizer).__name__} has none of these parameters to clip")
    optimizer.register_step_pre_hook(before_step)
    return optimizer


def _check(clip: float, eps: float) -> None:
    for name, value in (("clip", clip), ("eps", eps)):
        if not isinstance(value, Real) or isinstance(value, bool) or not value > 0:
            raise ValueError(f"{name} is a positive number, not {value!r}")


# ---- which tensors -----------------------------------------------------------------------------


def _selected(parameters: Parameters, exclude: Iterable[str] | None) -> list[torch.Tensor]:
    if isinstance(exclude, str):
        raise ValueError(f"exclude takes a list of names, not the text {exclude!r}")
    names = None if exclude is None else list(exclude)
    if isinstance(parameters, nn.Module):
        named = list(parameters.named_parameters(remove_duplicate=False))
        if names is None:
            classifier = {id(tensor) for tensor in classifier_weight(parameters)}
            names = [name for name, tensor in named if id(tensor) in classifier]
        return _without(named, names)
    if isinstance(parameters, torch.Tensor):
        parameters = [parameters]
    if not isinstance(parameters, Iterable):
        raise TypeError(f"{_WHAT}, not a {type(parameters).__name__}")
    given = list(parameters.items() if isinstance(parameters, Mapping) else parameters)
    if all(isinstance(each, torch.Tensor) for each in given):
        if names and given:
            raise ValueError(
                "exclude takes names, and tensors have none: give the module or named_parameters()"
            )
        return given  # type: ignore[return-value]
    for each in given:
        pair = isinstance(each, tuple) and len(each) == 2
        if not (pair and isinstance(each[0], str) and isinstance(each[1], torch.Tensor)):
            raise TypeError(f"{_WHAT}; there is a {type(each).__name__} among them")
    return _without(given, names or ())  # type: ignore[arg-type]


_WHAT = "parameters are a module, tensors, or pairs of a name and a tensor"


def _without(
    named: Iterable[tuple[str, torch.Tensor]], exclude: Iterable[str]
) -> list[torch.Tensor]:
    """Each tensor once, unless a name of it is excluded."""
    found = dict.fromkeys(exclude, False)
    tensors: dict[int, torch.Tensor] = {}
    out: set[int] = set()
    for name, tensor in named:
        tensors[id(tensor)] = tensor
        atoms = name.split(".")
        holders = (".".join(atoms[:depth]) for depth in range(1, len(atoms) + 1))
        held = [each for each in holders if each in found]
        if held:
            found |= dict.fromkeys(held, True)
            out.add(id(tensor))
    for name, is_there in found.items():
        if not is_there:
            raise ValueError(f"exclude: there is no parameter '{name}', nor a module with any")
    return [tensor for key, tensor in tensors.items() if key not in out]


# ---- the clipping ------------------------------------------------------------------------------


def _clip(
    tensors: Iterable[torch.Tensor], clip: float, eps: float, scale: torch.Tensor | None = None
) -> None:
    """Clip what has a gradient, which is ``scale`` times what it is in truth."""
    groups: dict[Any, list[torch.Tensor]] = defaultdict(list)
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
        gradient = tensor.grad
        if gradient is not None:
            if gradient.layout is not torch.strided:
                raise ValueError(
                    f"a gradient of shape {tuple(gradient.shape)} is sparse, which is not clipped; "
                    "leave its parameter out"
                )
            groups[tensor.device, tensor.dtype, gradient.dtype].append(tensor)
    for group in groups.values():
        _clip_alike(group, clip, eps, scale)


def _clip_alike(
    tensors: list[torch.Tensor], clip: float, eps: float, scale: torch.Tensor | None
) -> None:
    """Clip tensors of one device and dtype: all units in one vector."""
    gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
    norms = [_unit_norms(tensor) for tensor in gradients]
    found = torch.cat([each.flatten() for each in norms])
    if scale is not None:
        found = found / scale.to(found.device, found.dtype)
    limit = torch.cat([_unit_norms(tensor).flatten() for tensor in tensors])
    limit = limit.clamp_min(eps).mul(float(clip))
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
