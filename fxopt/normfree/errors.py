"""What dropping the filters' means costs: the error of each layer and of the outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxopt.fidelity import Compared, Deviation, fidelity
from fxopt.normfree.folding import folded_program
from fxopt.norms import batch_norms
from fxopt.observe import Observer
from fxopt.program import Program
from fxopt.proof.running import evaluation_module
from fxopt.scaled_ws import ScaledWS, folded


def lost(
    before: Program, after: Program, batches: Iterable[Sequence[torch.Tensor]]
) -> dict[str, Any]:
    """Relative errors of every converted layer, alone and in the network, and of the outputs.

    Alone, a layer reads what it read in the original; in place, what the converted layers before
    it give (:mod:`fxopt.fidelity`).
    """
    batches = list(batches)
    layers = list(_converted(before, after))
    alone = _errors_alone(before, layers, batches)
    plain = folded_program(after)
    nodes = {node.name: node for node in plain.nodes}
    compared = [Compared(each.call.name, each.result, nodes[each.call.name]) for each in layers]
    in_place, outputs = fidelity(before, plain, compared, batches)
    rows = [
        {"layer": str(each.call.target), "alone": own, "in place": placed}
        for each, own, placed in zip(layers, alone, in_place, strict=True)
    ]
    return {"layer_errors": rows, **outputs}


@dataclass(frozen=True)
class _Converted:
    """A call of a layer, the original's value that stands for its result now, the layer folded."""

    call: fx.Node
    result: fx.Node
    layer: nn.Module


def _converted(before: Program, after: Program) -> Iterator[_Converted]:
    gone = {norm for norm in batch_norms(before) if norm.name not in after.types}
    nodes = {node.name: node for node in after.nodes}
    for call in before.nodes:
        if call in gone:
            continue
        result = call
        while len(result.users) == 1 and next(iter(result.users)) in gone:
            result = next(iter(result.users))
        layer = after.module(nodes[call.name]) if result is not call else None
        if isinstance(layer, ScaledWS):
            yield _Converted(call, result, folded(layer))


def _errors_alone(
    before: Program, layers: Sequence[_Converted], batches: Iterable[Sequence[torch.Tensor]]
) -> list[float]:
    pairs = [node for each in layers for node in (each.call.all_input_nodes[0], each.result)]
    if not pairs:
        return []
    observe = Observer(pairs, evaluation_module(before))
    sums = [Deviation() for _ in layers]
    for inputs in batches:
        values = observe(inputs)
        with torch.no_grad():
            for place, (each, total) in enumerate(zip(layers, sums, strict=True)):
                read, gave = values[2 * place : 2 * place + 2]
                total.add(gave, each.layer(read))
    return [each.relative_error() for each in sums]
