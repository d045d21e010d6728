"""The layers of a fused block: its convolution, and the norm that takes the constant in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx, nn

from fxopt.blocks import FUSED_MBCONV
from fxopt.edit import Edit
from fxopt.fusing import rewire
from fxopt.fusing.algebra import Fused
from fxopt.fusing.closed import drawn, redrawn
from fxopt.fusing.form import Form, Weights
from fxopt.layers import BorderedConv2d, remade, standard_kind


@dataclass(frozen=True)
class Settings:
    """Of the convolution that goes."""

    stride: tuple[int, int]
    padding: tuple[int, int] | str
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"]
    weight: nn.Parameter
    has_bias: bool

    @staticmethod
    def of(conv: Any) -> Settings:
        return Settings(conv.stride, conv.padding, conv.padding_mode, conv.weight,
                         conv.bias is not None)  # fmt: skip

    def parameter(self, values: torch.Tensor | None) -> nn.Parameter | None:
        """``values`` in the dtype of the weight that goes, and as trainable as that."""
        if values is None:
            return None
        return nn.Parameter(values.to(self.weight.dtype), self.weight.requires_grad)


def place(form: Form, edit: Edit, settings: Settings, fused: Fused) -> None:
    """Let the convolution be ``fused``, its bias in the running mean of the norm that follows."""
    block = form.block
    end = block.spatial if block.expand is not None else block.project
    assert end is not None
    border = fused.border if form.weights is Weights.COMPOSE else None
    if border is not None and _shows(border, form, edit, settings):
        _place_bordered(form, edit, settings, fused, border)
        return
    norm = None if end.norm is None else edit.module(end.norm)
    bias = fused.bias if norm is None else None
    conv = _convolution(form, settings, fused.weight, bias)
    edit.replace_module(block.spatial.conv, lambda: conv, key=form.key("conv", edit.program))
    if end.norm is not None:
        key = form.key("norm", edit.program)
        edit.replace_module(end.norm, lambda: _shifted(norm, fused.bias), key=key)


def _shows(border: torch.Tensor, form: Form, edit: Edit, settings: Settings) -> bool:
    """Whether zeros around the expanded map are other than the expansion's constant."""
    if not border.is_meta and not bool(border.any()):
        return False
    own = settings.padding_mode == "zeros" and settings.padding not in ((0, 0), "valid")
    if own or form.block.pad is None:
        return own
    _, pad = rewire.pad_before(edit, edit.node(form.block.spatial.conv))
    return pad.is_of_zeros


def _place_bordered(
    form: Form, edit: Edit, settings: Settings, fused: Fused, border: torch.Tensor
) -> None:
    weight = torch.cat((fused.weight, border[:, None]), 1)
    rest = fused.bias - border.sum((1, 2))
    layer = _convolution(
        form, settings, weight, rest if settings.has_bias else None, BorderedConv2d
    )
    conv = edit.node(form.block.spatial.conv)
    edit.replace_module(conv, lambda: layer, key=form.key("conv", edit.program))
    if form.block.pad is None:
        return
    node, pad = rewire.pad_before(edit, conv)
    if pad.is_of_zeros:
        conv.args = (node.all_input_nodes[0], pad.widths)
        edit.remove(node)


def padding_of(form: Form, settings: Settings) -> Any:
    if isinstance(settings.padding, str) or form.crops_pad:
        return settings.padding
    return tuple(have - crop for have, crop in zip(settings.padding, form.crop, strict=True))


def _convolution(
    form: Form, settings: Settings, weight: torch.Tensor, bias: torch.Tensor | None,
    kind: type[nn.Conv2d] = nn.Conv2d,
) -> nn.Conv2d:  # fmt: skip
    outputs, inputs = weight.shape[:2]
    conv: Any = kind(
        inputs, outputs, form.kernel, settings.stride, padding_of(form, settings),
        bias=False, padding_mode=settings.padding_mode, device="meta",
    )  # fmt: skip
    conv.weight, conv.bias = settings.parameter(weight), settings.parameter(bias)
    conv.block = FUSED_MBCONV
    return conv.eval()  # type: ignore[no-any-return]


def _shifted(norm: Any, bias: torch.Tensor) -> nn.Module:
    """``norm(x + bias)`` as a norm of ``x``; its own γ and β."""
    mean = norm.running_mean
    statistics = {"running_var": norm.running_var, "num_batches_tracked": norm.num_batches_tracked}
    moved = {"running_mean": (mean.double() - bias).to(mean.dtype)}
    return remade(norm, {"weight": norm.weight, "bias": norm.bias}, {**moved, **statistics})


def randomise(form: Form, edit: Edit, settings: Settings) -> None:
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
