"""How large weights are beside their gradients: in float, in int8, and with QAS.

In quantised units ``‖W̄‖/‖G_W̄‖`` is ``s_W⁻²·‖W‖/‖G_W‖``, and of a bias ``(s_x·s_W)⁻²`` times as
large: from weight to bias to weight a zigzag over decades, which no one learning rate fits (Lin et
al., "On-device training under 256KB memory", NeurIPS 2022, section 2.1 and figure 2). Three
networks with the same weights are differentiated here, each by autograd as it would train.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from fxopt.calibration import Calibration
from fxopt.errors import PreconditionError
from fxopt.isolation import isolated
from fxopt.measured_inputs import measured_on
from fxopt.objective import Objective
from fxopt.passes import FakeQuantization
from fxopt.patching.regions import unpatched
from fxopt.program import Program
from fxopt.proof.running import evaluation_module
from fxopt.quantized_layers import Granularity, QuantizedLayer
from fxopt.quantizing.evidence import quantized_layers
from fxopt.quantizing.fidelity import in_float, quantisers
from fxopt.quantizing.units import bound_to_float, with_units
from fxopt.rewrite import run_pass

BATCH = 32
"""Inputs that are drawn where none are given."""

Network = Literal["fp32", "int8", "qas"]


@dataclass(frozen=True)
class RatioRow:
    """A weight or bias: ``‖W‖/‖G‖`` of each network, None where one of both is zero.

    Where each channel has a scale of its own, all figures are medians over channels.

    Attributes:
        tensor: its name in the ``state_dict``.
        shape: of it.
        per: whether its scale is that of the ``tensor``, or of a ``channel``.
        fp32, int8, qas: the ratios; ``int8`` and ``qas`` are those of quantised units.
        int8_over_fp32: by how much the ratio of plain int8 is off.
        qas_over_fp32: by how much that with QAS is off: by what rounding does to the gradient.
        channels: that have a scale of their own; 1 of a tensor.
        compared: those of them that have a ratio in all three networks.
    """

    tensor: str
    shape: tuple[int, ...]
    per: Granularity
    fp32: float | None
    int8: float | None
    qas: float | None
    int8_over_fp32: float | None
    qas_over_fp32: float | None
    channels: int
    compared: int


@dataclass(frozen=True)
class QasRatio:
    """What was measured, in the order of execution.

    Attributes:
        model: the class of the user's model.
        inputs: what it was measured on, in words.
        loss: what was differentiated.
        rows: weights and biases of the quantised layers.
        in_float_units: layers that stay in float units, with the reason; they have no rows.
    """

    model: str
    inputs: str
    loss: str
    rows: tuple[RatioRow, ...]
    in_float_units: tuple[tuple[str, str], ...]


def qas_ratio(
    program: Program, data: Any = None, *, granularity: Granularity | None = None,
    batch: int = BATCH, verify: bool = True,
) -> QasRatio:  # fmt: skip
    """Measure ``‖W‖/‖G‖`` of each weight and bias of a quantised program.

    A program in float is quantised first, on the same data and without bias correction.

    Args:
        program: stays as it is. Quantised, its weights may be in any units.
        data: inputs, as :class:`fxopt.calibration.Calibration` takes them, also with labels behind
            them; by default seeded unit normal ones of the example's size.
        granularity: of the scales of a program in float, by default ``channel``.
        batch: how many inputs are drawn.
        verify: whether the quantised program is compared in its interface.

    Raises:
        PreconditionError: nothing in the program can be quantised, it has no floating output, it
            is quantised already and ``granularity`` given, or the data does not fit it.
        ValueError: ``batch`` is not positive.
    """
    if batch < 1:
        raise ValueError(f"batch is at least 1, not {batch}")
    data = None if data is None else Calibration(data)
    with isolated():
        whole = unpatched(_quantised(program, data, granularity, batch, verify))
        bound = bound_to_float(whole)
        found = quantized_layers(whole)
        layers = {path: layer for path, layer in found.items() if path not in bound}
        if not layers:
            reasons = (f"'{path}': {why}" for path, why in bound.items())
            raise PreconditionError(
                f"{program.name} has no layer in quantised units; "
                f"{next(reasons, 'it has none to quantise')}"
            )
        inputs, batches = measured_on(whole, data, batch)
        objective = Objective(whole)
        networks: dict[Network, _Network] = {
            "fp32": _Network(in_float(whole, shifted=True), layers),
            "int8": _Network(evaluation_module(with_units(whole, qas=False)), layers),
            "qas": _Network(evaluation_module(with_units(whole, qas=True)), layers),
        }
        for flat, labels in batches:
            drawn = objective.targets(flat, labels)
            for network in networks.values():
                network.add(flat, objective, drawn)
    rows = [
        _row(f"{path}.{name}", layer, name, networks)
        for path, layer in layers.items()
        for name in ("weight", "bias")
        if getattr(layer, name) is not None
    ]
    return QasRatio(program.name, inputs, objective.described(), tuple(rows), tuple(bound.items()))


def _quantised(
    program: Program, data: Any, granularity: Granularity | None, batch: int, verify: bool
) -> Program:
    if not quantisers(unpatched(program)):
        if data is None:
            _, drawn = measured_on(program, None, batch)
            data = [flat for flat, _ in drawn]
        which = FakeQuantization(
            calibration=data, fold="auto", granularity=granularity or "channel",
            bias_correction=False,
        )  # fmt: skip
        return run_pass(which, program, verify=verify).after
    if granularity is not None:
        raise PreconditionError(
            f"{program.name} is quantised already; leave granularity out, which is for a model in "
            "float"
        )
    return program


class _Network:
    """A network of its own tensors, of which the layers' gradients are summed up."""

    def __init__(self, module: fx.GraphModule, layers: Iterable[str]) -> None:
        self._module = copy.deepcopy(module).requires_grad_(False)
        self.tensors: dict[str, torch.Tensor] = {}
        for path in layers:
            layer = self._module.get_submodule(path)
            for name in ("weight", "bias"):
                tensor = getattr(layer, name)
                if tensor is not None:
                    self.tensors[f"{path}.{name}"] = tensor.requires_grad_()
        self.gradients = {name: torch.zeros_like(each) for name, each in self.tensors.items()}

    def add(self, flat: Sequence[torch.Tensor], objective: Objective, targets: Any) -> None:
        """The gradients of one more batch."""
        with torch.enable_grad():
            loss = objective(self._module(*flat), targets)
            if not loss.requires_grad:
                return
            found = torch.autograd.grad(loss, list(self.tensors.values()), allow_unused=True)
        for name, gradient in zip(self.tensors, found, strict=True):
            if gradient is not None:
                self.gradients[name] += gradient

    def norms(self, tensor: str, axis: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a tensor and its gradient, float64: one each, or one for each channel of ``axis``."""
        pair = (self.tensors[tensor].detach(), self.gradients[tensor])
        rows = [each.double() if axis is None else each.double().movedim(axis, 0) for each in pair]
        count = 1 if axis is None else len(rows[0])
        weight, gradient = (each.reshape(count, -1).norm(dim=1) for each in rows)
        return weight, gradient


def _row(
    tensor: str, layer: QuantizedLayer, name: str, networks: Mapping[Network, _Network]
) -> RatioRow:
    by_channel = layer.weight_scale.dim() > 0
    axis = (layer.axis if name == "weight" else 0) if by_channel else None
    norms = {which: network.norms(tensor, axis) for which, network in networks.items()}
    each = {which: weight / gradient for which, (weight, gradient) in norms.items()}
    known = {
        which: (weight > 0) & (gradient > 0) & gradient.isfinite()
        for which, (weight, gradient) in norms.items()
    }

    def over_fp32(which: Network) -> float | None:
        return _median(each[which] / each["fp32"], known[which] & known["fp32"])

    per: Granularity = "channel" if by_channel else "tensor"
    return RatioRow(
        tensor, tuple(getattr(layer, name).shape), per,
        **{which: _median(ratio, known[which]) for which, ratio in each.items()},
        int8_over_fp32=over_fp32("int8"), qas_over_fp32=over_fp32("qas"),
        channels=len(each["fp32"]), compared=int(torch.stack(list(known.values())).all(0).sum()),
    )  # fmt: skip


def _median(values: torch.Tensor, known: torch.Tensor) -> float | None:
    return values[known].median().item() if bool(known.any()) else None
