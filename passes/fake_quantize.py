"""Insert fake quantisation where integer kernels round (Jacob et al., CVPR 2018; MCUNetV3, 2022).

Tensors that operators hand on get an affine 8-bit grid, weights a symmetric one for each output
channel, biases int32 at the scale of the products. Where the quantisers stand is
:mod:`fxopt.quantizing.placement`, what their grids are :mod:`fxopt.quantizing.calibrate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import fx, nn

from fxopt.calibration import Calibration
from fxopt.edit import Edit
from fxopt.errors import PreconditionError
from fxopt.fake_quantize import FakeQuantize, check_bits
from fxopt.integer_training import UpdateRounding
from fxopt.patching.regions import unpatched
from fxopt.paths import Paths
from fxopt.program import Program, tensor_types
from fxopt.quantized_layers import Granularity, QuantizedLayer
from fxopt.quantizing.bias import bias_shift
from fxopt.quantizing.calibrate import calibrated
from fxopt.quantizing.evidence import quantisation_evidence
from fxopt.quantizing.fidelity import quantisers
from fxopt.quantizing.grid import Grid
from fxopt.quantizing.layers import quantized, with_bias
from fxopt.quantizing.observers import NAMES, ObserverName
from fxopt.quantizing.placement import layer_input, placed
from fxopt.quantizing.preparation import FOLDS, Prepared, finishing, last_input, preparing
from fxopt.quantizing.skipping import skipped
from fxopt.quantizing.units import ToUnits
from fxopt.results import Declined
from fxopt.rewrite import Preserves, Site, declined, run_pass, site

MEASURED = 64
"""Samples of the calibration data on which the losses are measured."""


@dataclass(frozen=True)
class _Facts:
    """The grid of what a node gives, and the scale of what its layer reads, where there are."""

    grid: Grid | None
    settled: bool
    input_scale: float | None
    input_mean: torch.Tensor | None


@dataclass(frozen=True)
class FakeQuantization:
    """Insert int8 fake quantisation, calibrated on data: what integer kernels would compute.

    ``calibration`` is a file of inputs (in Python also a tensor, batches or a DataLoader).
    ``fold=auto`` folds BatchNorms first. ``observer`` finds the ranges of activations,
    ``granularity`` is that of the weights' scales. With ``bias_correction`` biases make up for what
    the rounding of weights does to a layer's mean: by default so, but not with ``qas``, where
    training begins from the biases as they are. ``skip`` names layers that stay in float, by path
    or by the path of what holds them.

    For training, ``qas=true`` keeps weights and biases in quantised units and scales their
    gradients back (quantisation-aware scaling); ``qas=false`` keeps the same units and does not.
    With ``real_int8`` they are whole numbers again after each step of an optimizer, by
    ``update_rounding``.
    """

    name: ClassVar[str] = "fake_quantize"
    preserves: ClassVar[Preserves] = Preserves.INTERFACE
    calibration: Calibration | None = None
    fold: Literal["auto", "require"] = "require"
    observer: ObserverName = "percentile"
    granularity: Granularity = "channel"
    weight_bits: int = 8
    activation_bits: int = 8
    bias_correction: bool | None = None
    skip: Paths | None = None
    qas: bool | None = None
    real_int8: bool = False
    update_rounding: UpdateRounding = "nearest"

    def __post_init__(self) -> None:
        scales = get_args(Granularity)
        choices = {
            "fold": ("auto", "require"), "observer": NAMES, "granularity": scales,
            "update_rounding": get_args(UpdateRounding),
        }  # fmt: skip
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {' or '.join(known)}, not {getattr(self, name)!r}")
        check_bits("weight_bits", self.weight_bits)
        check_bits("activation_bits", self.activation_bits)
        if self.bias_correction is None:
            object.__setattr__(self, "bias_correction", self.qas is None)
        if self.real_int8 and self.qas is None:
            raise ValueError("real_int8 is about quantised units: give qas=true or qas=false too")
        if self.update_rounding != "nearest" and not self.real_int8:
            raise ValueError("update_rounding is for real_int8=true; leave it out, or give both")
        if self.calibration is not None:
            object.__setattr__(self, "calibration", Calibration(self.calibration))
        if self.skip is not None:
            object.__setattr__(self, "skip", Paths(self.skip))

    def sites(self, program: Program) -> Iterator[Site | Declined]:
        whole = unpatched(program)
        is_quantised = bool(quantisers(whole))
        self._check(program, is_quantised)
        left = skipped(whole, self.skip, self.name)
        if is_quantised:
            in_units = [] if self._units is None else list(self._units.sites(program))
            yield from in_units
            if not any(isinstance(found, Site) for found in in_units):
                yield from finishing(program)
            for node, reason in placed(whole, left).in_float.items():
                yield declined(whole, node, reason)
            return
        prepared = list(preparing(program, left, self.fold == "auto"))
        if prepared:
            yield from prepared
            return
        yield from self._quantised(program, left)

    @property
    def _units(self) -> ToUnits | None:
        rounding = self.update_rounding if self.real_int8 else None
        return None if self.qas is None else ToUnits(self.qas, rounding)

    def _check(self, program: Program, is_quantised: bool) -> None:
        if self.calibration is None and not is_quantised:
            raise PreconditionError(
                f"{self.name} has no calibration data, which the ranges of activations come from; "
                "give calibration=FILE.pt, a tensor of inputs that torch.save wrote, or in Python "
                "a tensor or a DataLoader"
            )
        if program.is_on_meta:
            raise PreconditionError(
                f"{self.name} cannot calibrate {program.name}, which is on the meta device"
            )
        _check_tensors(program)
        if self.real_int8 and unpatched(program) is not program:
            raise PreconditionError(
                f"{self.name}: real_int8 casts the weights of layers, and a patched stage of "
                f"{program.name} has none; leave real_int8 out, or patch_execution"
            )
        if self.fold == "require":
            for found in (each for step in FOLDS for each in step.sites(program)):
                if isinstance(found, Site):
                    where = program.where(program.node(found.node))
                    raise PreconditionError(
                        f"{self.name}: the norm or standardisation at {where} is not folded, and "
                        "integer kernels have none; run fold_conv_bn (fold_scaled_ws) first, or "
                        "give fold=auto"
                    )

    def _quantised(
        self, program: Program, left: Mapping[fx.Node, str]
    ) -> Iterator[Site | Declined]:
        assert self.calibration is not None
        placement = placed(program, left)
        batches = self.calibration.batches(program)
        corrects = bool(self.bias_correction)
        found = calibrated(
            program, placement, batches, self.observer, self.activation_bits, corrects
        )
        grids = found.grids
        layers = set(placement.layers)
        for node in program.nodes:
            group = placement.groups.get(node)
            scale = None
            if node in layers:
                scale = grids[placement.groups[layer_input(node)]].scale
            if group is not None or scale is not None:
                grid = grids[group] if group is not None else None
                mean = found.input_means.get(str(node.target)) if node in layers else None
                yield site(node, facts=_Facts(grid, node in placement.settled, scale, mean))
        for node, reason in placement.in_float.items():
            yield declined(program, node, reason)

    def rewrite(self, site: Site, edit: Edit) -> str | None:
        if isinstance(site.facts, Prepared):
            return site.facts.rewrite(edit)
        facts: _Facts = site.facts
        node = edit.node(site.node)
        if facts.input_scale is not None:
            layer, scale, mean = edit.module(node), facts.input_scale, facts.input_mean
            make = partial(self._layer, layer, scale, mean)
            edit.replace_module(node, make, key=("quantized", node.target))
        if facts.grid is not None:
            _insert(edit, node, facts.grid, facts.settled)
        return None

    def _layer(self, layer: nn.Module, scale: float, mean: torch.Tensor | None) -> QuantizedLayer:
        made = quantized(layer, scale, self.granularity, self.weight_bits)
        return made if mean is None else with_bias(made, bias_shift(made, mean))

    def evidence(self, before: Program, after: Program) -> Mapping[str, Any]:
        """Each tensor's grid, clipped share and SQNR; the outputs'; weights; bytes."""
        if quantisers(unpatched(before)):
            kept = "nothing in it" if self.qas is None else "nothing but its units"
            return {"already_quantized": f"the program was, and {kept} has changed"}
        if self.real_int8:  # whole numbers do not tell any more what they were in float
            masters = replace(self, real_int8=False, update_rounding="nearest")
            return run_pass(masters, before, verify=False).record.evidence
        assert self.calibration is not None
        batches = _first(self.calibration.batches(after), MEASURED)
        return quantisation_evidence(after, batches, str(self.calibration))


def _insert(edit: Edit, node: fx.Node, grid: Grid, settled: bool) -> None:
    """A quantiser behind ``node``, for all that read it."""
    layer = FakeQuantize(grid.scale, grid.zero_point, grid.bits, settled).eval()
    reference = next(edit.tree.parameters(), None)
    if reference is not None:
        layer = layer.to(reference.device)
    own = str(node.target).rpartition(".")[2] if node.op == "call_module" else node.name
    after = last_input(node)
    called = edit.call_module(layer, (node,), after=after, name=f"{own}_quantizer")
    edit.replace_uses(node, called)


def _first(
    batches: Iterable[Sequence[torch.Tensor]], samples: int
) -> Iterator[Sequence[torch.Tensor]]:
    """As many of the batches as hold ``samples``, at least one."""
    seen = 0
    for batch in batches:
        if seen >= samples:
            return
        seen += max((len(tensor) for tensor in batch if tensor.dim()), default=1)
        yield batch


def _check_tensors(program: Program) -> None:
    """Refuse tensors that are narrow, and weights that are not finite."""
    for node in program.nodes[:-1]:
        for kind in tensor_types(program.types[node.name]):
            if kind.dtype.is_floating_point and torch.finfo(kind.dtype).bits < 32:
                dtype = str(kind.dtype).removeprefix("torch.")
                raise PreconditionError(
                    f"'{node.name}' ({program.where(node)}) is {dtype}, too coarse to simulate "
                    "integers in; convert the model with .float() first"
                )
    for name, tensor in program.graph_module.named_parameters():
        if not bool(torch.isfinite(tensor).all()):
            raise PreconditionError(f"'{name}' is not finite; a quantised weight needs a range")


__all__ = ["FakeQuantization"]
