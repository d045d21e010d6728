"""What a quantised program's record says of it, as plain values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from fxopt.fake_quantize import FakeQuantize
from fxopt.patching.regions import unpatched
from fxopt.program import Program
from fxopt.quantized_layers import QuantizedLayer
from fxopt.quantizing.fidelity import Loss, losses, quantisers
from fxopt.quantizing.layers import floored_channels
from fxopt.quantizing.units import quantized_calls


def quantisation_evidence(
    program: Program, batches: Iterable[Sequence[torch.Tensor]], data: str
) -> dict[str, Any]:
    """Figures of a quantised ``program`` on ``batches``, which ``data`` describes."""
    program = unpatched(program)
    found = losses(program, batches)
    grids = quantisers(program)
    top1 = {name: each.top1 for name, each in found.outputs.items() if each.samples}
    return {
        "measured_on": data,
        "output_sqnr_db": {name: loss.sqnr_db for name, loss in found.outputs.items()},
        **({"top1_agreement": top1} if top1 else {}),
        "tensors": [
            _tensor(program, node, grids[node], loss) for node, loss in found.tensors.items()
        ],
        "floored_channels": _floored(program),
        "weight_bytes": _weight_bytes(program),
    }


def _tensor(program: Program, node: fx.Node, grid: FakeQuantize, loss: Loss) -> dict[str, Any]:
    source = node.all_input_nodes[0]
    is_input = source.op == "placeholder"
    return {
        "node": source.name,
        "where": f"input '{source.target}'" if is_input else program.where(source),
        "range": list(grid.range),
        "scale": float(grid.scale),
        "zero_point": int(grid.zero_point),
        "clipped": loss.clipped / max(1, loss.count),
        "sqnr_db": loss.sqnr_db,
    }


def quantized_layers(program: Program) -> dict[str, QuantizedLayer]:
    """The layers with quantised weights that are called, by path."""
    return {str(node.target): layer for node, layer in quantized_calls(program)}


def _floored(program: Program) -> dict[str, list[int]]:
    """By layer, the channels whose scale is not their weights'."""
    found = {path: floored_channels(layer) for path, layer in quantized_layers(program).items()}
    return {path: channels for path, channels in found.items() if channels}


def _weight_bytes(program: Program) -> dict[str, int]:
    """Bytes of all parameters in float and as they are kept: int8 weights, int32 biases, scales."""
    seen = {id(p): p.numel() * p.element_size() for p in program.graph_module.parameters()}
    before = sum(seen.values())
    for layer in quantized_layers(program).values():
        seen[id(layer.weight)] = layer.weight.numel() + 4 * layer.weight_scale.numel()
        if layer.bias is not None:
            seen[id(layer.bias)] = 4 * layer.bias.numel()
    return {"before": before, "after": sum(seen.values())}
