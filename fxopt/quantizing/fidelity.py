"""How much of each tensor quantisation leaves, beside the same program in float."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from fxopt.fake_quantize import FakeQuantize
from fxopt.graphs import assemble, copy_tree, share_tensors
from fxopt.observe import Observer
from fxopt.program import Program, TensorType
from fxopt.proof.running import evaluation_module
from fxopt.quantized_layers import QuantizedLayer


@dataclass
class Loss:
    """What quantisation does to one tensor, summed up over batches.

    Attributes:
        signal: sum of squares of the float program's values.
        noise: that of the differences.
        clipped: values of the float program beyond the grid.
        count: values in all.
    """

    signal: float = 0.0
    noise: float = 0.0
    clipped: int = 0
    count: int = 0

    def add(self, was: torch.Tensor, now: torch.Tensor, grid: FakeQuantize | None) -> None:
        """One batch of the float program's values and of the quantised one's."""
        was, now = was.detach(), now.detach()  # an output may be a parameter
        self.signal += float(torch.linalg.vector_norm(was, dtype=torch.float64)) ** 2
        self.noise += float(torch.linalg.vector_norm(was - now, dtype=torch.float64)) ** 2
        self.count += was.numel()
        if grid is not None:
            low, high = grid.range
            half = float(grid.scale) / 2
            self.clipped += int(((was < low - half) | (was > high + half)).sum())

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantisation noise in dB; None where there is no signal or no noise."""
        if not (math.isfinite(self.signal) and math.isfinite(self.noise)):
            return math.nan
        if self.signal <= 0 or self.noise <= 0:
            return None
        return 10 * math.log10(self.signal / self.noise)


@dataclass
class OutputLoss(Loss):
    """Of an output; of a table ``(N, classes)`` also the samples whose largest class stays."""

    samples: int = 0
    agreeing: int = 0

    def add(self, was: torch.Tensor, now: torch.Tensor, grid: FakeQuantize | None = None) -> None:
        super().add(was, now, grid)
        if was.dim() == 2 and was.shape[1] > 1:
            self.samples += len(was)
            self.agreeing += int((was.argmax(1) == now.argmax(1)).sum())

    @property
    def top1(self) -> float | None:
        """The share of samples whose largest class stays; None for an output of no classes."""
        return self.agreeing / self.samples if self.samples else None


@dataclass
class Losses:
    """Losses by quantiser and by output."""

    tensors: dict[fx.Node, Loss] = field(default_factory=dict)
    outputs: dict[str, OutputLoss] = field(default_factory=dict)


def quantisers(program: Program) -> dict[fx.Node, FakeQuantize]:
    """The calls of quantisers, in the program's order."""
    calls = {node: program.module(node) for node in program.nodes}
    return {node: layer for node, layer in calls.items() if isinstance(layer, FakeQuantize)}


def in_float(program: Program, *, shifted: bool = False) -> fx.GraphModule:
    """The module of ``program`` with nothing quantised in it; it shares parameters in float units.

    Args:
        shifted: whether biases keep what calibration added to them.
    """
    module = evaluation_module(program)
    tree = copy_tree(module, share_tensors(module))
    for path, layer in list(tree.named_modules(remove_duplicate=False)):
        plain = _in_float(layer, shifted)
        if plain is not None:
            plain._modules |= layer._modules  # what the user holds below it
            parent, _, name = path.rpartition(".")
            tree.get_submodule(parent)._modules[name] = plain
    return assemble(tree, module.graph, fx.GraphModule)


def _in_float(layer: nn.Module, shifted: bool) -> nn.Module | None:
    if isinstance(layer, FakeQuantize):
        return nn.Identity()
    if isinstance(layer, QuantizedLayer):
        bias = layer.float_bias()
        if bias is not None and layer.bias_shift is not None and not shifted:
            bias = bias - layer.bias_shift
        return layer.as_plain(layer.float_weight(), bias)
    return None


def losses(program: Program, batches: Iterable[Sequence[torch.Tensor]]) -> Losses:
    """What the quantisation of ``program`` costs on ``batches``, tensor by tensor.

    Args:
        program: without patched stages, inside of which nothing can be observed.
        batches: flat inputs.
    """
    grids = quantisers(program)
    found = Losses({node: Loss() for node, grid in grids.items() if not grid.settled})
    outputs = dict(outputs_of(program))
    watched = [*found.tensors, *outputs.values()]
    trees = (in_float(program), evaluation_module(program))
    before, after = (Observer(watched, tree) for tree in trees)
    for inputs in batches:
        pairs = zip(before.in_lockstep([inputs]), after.in_lockstep([inputs]), strict=True)
        for (node, (was,)), (_, (now,)) in pairs:
            if node in found.tensors:
                found.tensors[node].add(was, now, grids[node])
            for name in (name for name, output in outputs.items() if output is node):
                found.outputs.setdefault(name, OutputLoss()).add(was, now)
    return found


def outputs_of(program: Program) -> Iterator[tuple[str, fx.Node]]:
    """The floating outputs by name, with the nodes that give them."""
    results = program.output_node().args[0]
    for name, node in zip(program.interface.output_names, results, strict=True):  # type: ignore
        kind = program.types[node.name] if isinstance(node, fx.Node) else None
        if isinstance(kind, TensorType) and kind.dtype.is_floating_point:
            yield name, node
