"""Weights and biases that live in quantised units while they train.

A weight is ``W = s_W·W̄`` and a bias ``b = s_x·s_W·b̄``, with ``W̄`` and ``b̄`` rounded in each call.
In these units gradients are off by the square of the scale: ``G_W̄ = s_W·G_W`` for weights that are
``1/s_W`` times as large. Quantisation-aware scaling gives it back, per channel,

    G̃_W̄ = G_W̄·s_W⁻²        G̃_b̄ = G_b̄·(s_x·s_W)⁻²

so that ``‖W̄‖/‖G̃_W̄‖ = ‖W‖/‖G_W‖`` (Lin et al., "On-device training under 256KB memory", NeurIPS
2022, section 2.1, equations 3 to 5). Autograd does it, so that any optimizer works as it is.

A master beyond its grid takes only gradients that lead back, so that it can return;
``cast_int8(W̄ - lr·G)`` would also cut it off at the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Protocol
from weakref import WeakSet

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from fxopt.fake_quantize import is_identity_mode

UpdateRounding = Literal["nearest", "stochastic"]


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, master: torch.Tensor, scale: torch.Tensor, ends: tuple[int, int] | None, qas: bool
    ) -> torch.Tensor:
        ctx.qas = qas
        if ends is None:
            ctx.save_for_backward(scale, None)
            return master * scale
        rounded = master.round()
        inside = rounded.clamp(*ends)
        beyond = rounded.sub_(inside).sign_().to(torch.int8)
        ctx.save_for_backward(scale, beyond)
        return inside.mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scale, beyond = ctx.saved_tensors
        passed = _in_units(gradients[0], scale, ctx.qas)
        if beyond is not None:  # a step goes against its gradient
            passed = passed.masked_fill_(passed * beyond < 0, 0.0)
        return passed, None, None, None


def _in_units(gradient: torch.Tensor, scale: torch.Tensor, qas: bool) -> torch.Tensor:
    """``s·G``, and with QAS s⁻² times that."""
    return gradient / scale if qas else gradient * scale


def scaled(
    master: torch.Tensor, scale: torch.Tensor, low: int, high: int, qas: bool
) -> torch.Tensor:
    """``scale·clamp(round(master))``, with the gradient in the units of ``master``.

    Args:
        master: a weight or bias in quantised units.
        scale: of a shape that broadcasts to that of ``master``.
        low, high: the least and the greatest whole number.
        qas: whether the gradient is multiplied by ``scale⁻²``.

    >>> master = torch.tensor([0.6, 126.9], requires_grad=True)
    >>> scaled(master, torch.tensor(0.5), -127, 127, qas=True).sum().backward()
    >>> master.grad.tolist()
    [2.0, 2.0]
    """
    ends = None if is_identity_mode() else (low, high)
    if torch.is_grad_enabled() and master.requires_grad:
        result: torch.Tensor = _Scaled.apply(master, scale, ends, qas)
        return result
    return master * scale if ends is None else cast(master, *ends, "nearest").mul_(scale)


def cast(values: torch.Tensor, low: int, high: int, rounding: UpdateRounding) -> torch.Tensor:
    """Whole numbers from ``low`` to ``high``: the nearest, or one of both by how near it is.

    Stochastic rounding (Gupta et al., "Deep learning with limited numerical precision", ICML 2015,
    section 3.1) is right on the mean, and draws from torch's global generator.
    """
    if rounding == "nearest":
        return values.round().clamp_(low, high)
    below = values.floor()  # the fraction is exact, where `values + rand` rounds
    return below.add_(torch.rand_like(values) < values - below).clamp_(low, high)


class Castable(Protocol):
    """A layer whose weight and bias are cast after each update."""

    def cast_tensors(self) -> Iterable[tuple[torch.Tensor, int, int, UpdateRounding]]: ...


_TO_CAST: WeakSet[Castable] = WeakSet()


def cast_after_steps(layer: Castable) -> None:
    """Have what any optimizer of torch's makes of the tensors of ``layer`` cast, in each step."""
    _TO_CAST.add(layer)


@torch.no_grad()
def _cast_all(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not _TO_CAST or is_identity_mode():
        return
    given = {
        id(tensor): (low, high, rounding)
        for layer in list(_TO_CAST)
        for tensor, low, high, rounding in layer.cast_tensors()
    }
    # in the optimizer's order: that of a set is another in each process, and some rounding draws
    for tensor in (t for group in optimizer.param_groups for t in group["params"]):
        if id(tensor) in given:
            tensor.copy_(cast(tensor, *given[id(tensor)]))


register_optimizer_step_post_hook(_cast_all)
