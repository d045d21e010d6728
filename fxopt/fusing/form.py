"""One block of a program becomes its fused form: its graph, and the layers in it."""

from __future__ import annotations

import enum
from collections.abc import Hashable
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from torch import fx, nn

from fxopt.blocks import FUSED_MBCONV, InvertedResidual
from fxopt.calibration import Calibration
from fxopt.channelwise import ChannelMap, with_map_before
from fxopt.edit import Edit
from fxopt.errors import PreconditionError
from fxopt.fusing import rewire
from fxopt.fusing.algebra import Affine, Fused
from fxopt.fusing.closed import Closed, drawn, redrawn
from fxopt.fusing.evaluate import Observer
from fxopt.fusing.regression import Regression
from fxopt.layers import BorderedConv2d, ScaleShift, standard_kind
from fxopt.program import Program


class Weights(enum.Enum):
    """Where the weights of the fused convolution come from."""

    FIT = "fit"
    LINEARIZE = "linearize"
    COMPOSE = "compose"
    RANDOM = "random"


@dataclass(frozen=True)
class Form:
    """What a block is to become.

    Attributes:
        block: as it is in the program.
        whole: rows and columns of the depthwise kernel.
        kernel: rows and columns of the fused kernel.
        keeps_gate: whether its squeeze-excite stays.
        weights: how its weights are found; ``FIT`` needs ``calibration``.
        activates: whether, drawn at random, a block of ratio 1 is activated, as the family's are.
    """

    block: InvertedResidual
    whole: tuple[int, int]
    kernel: tuple[int, int]
    keeps_gate: bool
    weights: Weights
    calibration: Calibration | None = None
    activates: bool = True

    @property
    def is_exact(self) -> bool:
        """Whether the fused block computes what the block does."""
        between = self.block.inner if self.block.expand else self.block.activation
        moved = self.block.gate and (not self.keeps_gate or self.block.expand is None)
        return self.weights is Weights.COMPOSE and not between and not moved and not any(self.crop)

    @property
    def gate_becomes_a_constant(self) -> bool:
        """Whether it is dropped and its mean goes into the projection.

        A fit of ratio 1 sees what the gate did in what it is fitted to.
        """
        fits_projection = self.weights is Weights.FIT and self.block.expand is None
        carried = self.weights is not Weights.RANDOM and not fits_projection
        return carried and self.block.gate is not None and not self.keeps_gate

    @property
    def gate_moves(self) -> bool:
        """Whether it stays and its place is the block's input."""
        return self.block.gate is not None and self.keeps_gate and self.block.expand is None

    @property
    def crop(self) -> tuple[int, int]:
        """Rows and columns that are cut off on each side of the depthwise kernel."""
        rows, cols = self.whole
        return (rows - self.kernel[0]) // 2, (cols - self.kernel[1]) // 2

    def key(self, what: str, program: Program) -> Hashable:
        """Of calls of one block that become the same: data may differ from call to call."""
        if self.weights is Weights.FIT:
            return what, self.block.spatial.conv.name
        modules = [(node.target, program.module(node)) for node in self.block.nodes]
        return what, *(
            repr(module) if module is not None and not list(module.parameters()) else target
            for target, module in modules
        )


def fuse(form: Form, edit: Edit) -> None:
    """Rewrite the block of ``form`` in ``edit``, in which the blocks before it are fused already.

    Raises:
        PreconditionError: there is too little calibration data.
    """
    block = form.block
    settings = _Settings.of(edit.module(block.spatial.conv))
    closed = Closed(edit, block, form.kernel, form.weights is Weights.COMPOSE)
    random = form.weights is Weights.RANDOM
    if form.gate_becomes_a_constant:
        _scale_projection(form, edit, closed.gate_at_rest())
    fused = None if form.weights in (Weights.FIT, Weights.RANDOM) else closed.fused()
    _gate(form, edit, closed, settings)
    if block.expand is not None:
        rewire.without_expansion(edit, block)
    else:
        rewire.without_projection(edit, block, activated=random and form.activates)
    if any(form.crop) and block.pad is not None:
        rewire.cropped_pad(edit, block.pad, form.crop)
    if random:
        _randomise(form, edit, settings)
        return
    _place(form, edit, settings, fused or _fitted(form, edit, settings))


@dataclass(frozen=True)
class _Settings:
    """Of the convolution that goes."""

    stride: tuple[int, int]
    padding: tuple[int, int] | str
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"]
    weight: nn.Parameter
    has_bias: bool

    @staticmethod
    def of(conv: Any) -> _Settings:
        return _Settings(conv.stride, conv.padding, conv.padding_mode, conv.weight,
                         conv.bias is not None)  # fmt: skip

    def parameter(self, values: torch.Tensor | None) -> nn.Parameter | None:
        """``values`` in the dtype of the weight that goes, and as trainable as that."""
        if values is None:
            return None
        return nn.Parameter(values.to(self.weight.dtype), self.weight.requires_grad)


def _gate(form: Form, edit: Edit, closed: Closed, settings: _Settings) -> None:
    """Drop the gate, keep it, or (ratio 1) move it to the input, where it pools something else."""
    block = form.block
    if block.gate is None or (form.keeps_gate and block.expand is not None):
        return
    if not form.keeps_gate:
        rewire.without_gate(edit, block.gate)
        return
    squeeze = None if form.weights is Weights.RANDOM else closed.squeeze()
    for pooled in rewire.with_gate_on_input(edit, block):
        if squeeze is not None:
            _stretch(edit, pooled, squeeze, settings)


def _scale_projection(form: Form, edit: Edit, factors: torch.Tensor) -> None:
    """What the gate is on average goes into the weights that read what it multiplied."""
    project_node = form.block.project
    assert project_node is not None
    none = torch.zeros_like(factors)
    before = ChannelMap(factors, none, none, none)
    project = edit.module(project_node.conv)
    key = form.key("project", edit.program)
    edit.replace_module(project_node.conv, lambda: with_map_before(project, before), key=key)


def _stretch(edit: Edit, pooled: fx.Node, squeeze: Affine, settings: _Settings) -> None:
    dtype = settings.weight.dtype
    layer = ScaleShift(squeeze.scale.to(dtype), squeeze.shift.to(dtype))
    layer.requires_grad_(settings.weight.requires_grad).eval()
    readers = list(pooled.users)
    node = edit.call_module(layer, (pooled,), after=pooled, name="squeeze")
    for reader in readers:
        reader.replace_input_with(pooled, node)


# ---- the layers --------------------------------------------------------------------------------


def _place(form: Form, edit: Edit, settings: _Settings, fused: Fused) -> None:
    """Let the convolution be ``fused``, its bias in the running mean of the norm that follows."""
    block = form.block
    end = block.spatial if block.expand is not None else block.project
    assert end is not None
    border = fused.border if form.weights is Weights.COMPOSE else None
    if border is not None and _shows(border, form, settings):
        _place_bordered(form, edit, settings, fused, border)
        return
    norm = None if end.norm is None else edit.module(end.norm)
    bias = fused.bias if norm is None else None
    conv = _convolution(form, settings, fused.weight, bias)
    edit.replace_module(block.spatial.conv, lambda: conv, key=form.key("conv", edit.program))
    if end.norm is not None:
        key = form.key("norm", edit.program)
        edit.replace_module(end.norm, lambda: _shifted(norm, fused.bias), key=key)


def _shows(border: torch.Tensor, form: Form, settings: _Settings) -> bool:
    """Whether zeros around the expanded map are other than the expansion's constant."""
    if not border.is_meta and not bool(border.any()):
        return False
    zeros = settings.padding_mode == "zeros" and settings.padding not in ((0, 0), "valid")
    return zeros or form.block.pad is not None


def _place_bordered(
    form: Form, edit: Edit, settings: _Settings, fused: Fused, border: torch.Tensor
) -> None:
    rest = fused.bias - border.sum((1, 2))
    layer: Any = BorderedConv2d(settings.stride, _padding(form, settings))
    layer.weight = settings.parameter(torch.cat((fused.weight, border[:, None]), 1))
    layer.bias = settings.parameter(rest if settings.has_bias else None)
    layer.block = FUSED_MBCONV
    conv = edit.node(form.block.spatial.conv)
    edit.replace_module(conv, layer.eval, key=form.key("conv", edit.program))
    if form.block.pad is not None:
        pad = edit.node(form.block.pad)
        conv.args = (pad.args[0], pad.kwargs.get("pad") or pad.args[1])
        edit.remove(pad)


def _padding(form: Form, settings: _Settings) -> Any:
    if isinstance(settings.padding, str) or form.block.pad is not None:
        return settings.padding  # the pad before it is cropped
    return tuple(have - crop for have, crop in zip(settings.padding, form.crop, strict=True))


def _convolution(
    form: Form, settings: _Settings, weight: torch.Tensor, bias: torch.Tensor | None
) -> nn.Conv2d:
    outputs, inputs = weight.shape[:2]
    conv: Any = nn.Conv2d(
        inputs, outputs, form.kernel, settings.stride, _padding(form, settings),
        bias=False, padding_mode=settings.padding_mode, device="meta",
    )  # fmt: skip
    conv.weight, conv.bias = settings.parameter(weight), settings.parameter(bias)
    conv.block = FUSED_MBCONV
    return conv.eval()  # type: ignore[no-any-return]


def _shifted(norm: Any, bias: torch.Tensor) -> nn.Module:
    """``norm(x + bias)`` as a norm of ``x``; its own γ and β."""
    made: Any = nn.Module.__new__(standard_kind(norm))
    nn.Module.__init__(made)
    inner = {*vars(made), "_borrowed"}
    vars(made).update({name: value for name, value in vars(norm).items() if name not in inner})
    for name in ("weight", "bias"):
        made.register_parameter(name, getattr(norm, name))
    mean = norm.running_mean
    made.register_buffer("running_mean", (mean.double() - bias).to(mean.dtype))
    for name in ("running_var", "num_batches_tracked"):
        made.register_buffer(name, getattr(norm, name))
    return made.eval()  # type: ignore[no-any-return]


def _randomise(form: Form, edit: Edit, settings: _Settings) -> None:
    """Every layer of the block as before any training."""
    block = form.block
    types = edit.program.types
    inputs = types[block.entry.name].shape[1]
    outputs = types[(block.spatial.conv if block.expand else block.end).name].shape[1]
    end = block.spatial if block.expand is not None else block.project
    assert end is not None
    name = str(block.spatial.conv.target)
    weight = drawn(settings.weight, (outputs, inputs, *form.kernel), name)
    bias = torch.zeros_like(weight[:, 0, 0, 0]) if end.norm is None else None
    conv = _convolution(form, settings, weight, bias)
    edit.replace_module(block.spatial.conv, lambda: conv, key=form.key("conv", edit.program))
    others = [end.norm, *(block.gate.nodes if block.gate and form.keeps_gate else ())]
    if block.expand is not None and block.project is not None:
        others += block.project.nodes
    for node in others:
        if node is not None and node.op == "call_module":
            layer = edit.module(node)
            if standard_kind(layer) in _TRAINED:
                _redraw(edit, node, layer)


_TRAINED = (nn.Conv2d, nn.Conv1d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


def _redraw(edit: Edit, node: fx.Node, layer: nn.Module) -> None:
    name = str(node.target)
    edit.replace_module(node, lambda: redrawn(layer, name), key=("random", name))


# ---- the fit -----------------------------------------------------------------------------------


def _fitted(form: Form, edit: Edit, settings: _Settings) -> Fused:
    """Least squares: from what the fused convolution reads to what the original's sums are."""
    block, program = form.block, edit.program
    assert form.calibration is not None
    assert block.project is not None
    target = block.spatial.conv if block.expand is not None else block.project.conv
    conv = edit.node(block.spatial.conv)
    reads = Observer([conv.all_input_nodes[0]], edit.tree)
    wanted = Observer([program.node(target.name)], program.graph_module)
    regression = Regression(form.kernel, settings.stride)
    for inputs in form.calibration.batches(program):
        (maps,), (sums,) = reads(inputs), wanted(inputs)
        regression.add(_padded(form, settings, maps), sums)
    if regression.samples < regression.unknowns:
        needed = f"{regression.unknowns:,} unknowns of each output channel"
        raise PreconditionError(
            f"weights=fit has {regression.samples:,} samples for the {needed} in '{block.path}'; "
            f"give at least {_images(form, program, regression):,} calibration images"
        )
    return regression.solution(program.types[block.entry.name].shape[1])


def _images(form: Form, program: Program, regression: Regression) -> int:
    positions: int = prod(program.types[form.block.spatial.conv.name].shape[2:])
    return -(-regression.unknowns // positions)


def _padded(form: Form, settings: _Settings, maps: torch.Tensor) -> torch.Tensor:
    """``maps`` with the convolution's own padding around them."""
    padding = _padding(form, settings)
    if padding == "valid":
        return maps
    if padding == "same":
        total = [each - 1 for each in form.kernel]
        rows, cols = ((each // 2, each - each // 2) for each in total)
    else:
        rows, cols = ((each, each) for each in padding)
    mode = "constant" if settings.padding_mode == "zeros" else settings.padding_mode
    return nn.functional.pad(maps, (*cols, *rows), mode=mode)
