"""Quantised layers whose weight and bias go over to quantised units, in which they train."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import fx

from fxopt.edit import Edit
from fxopt.integer_training import UpdateRounding
from fxopt.patching.regions import unpatched
from fxopt.program import Program
from fxopt.quantized_layers import QuantizedLayer
from fxopt.quantizing.layers import in_units
from fxopt.quantizing.preparation import WriteOut, prepared_by
from fxopt.results import Declined
from fxopt.rewrite import Site, declined, site


@dataclass(frozen=True)
class ToUnits:
    """Layers of a quantised program in units that ``qas`` and ``update_rounding`` tell of.

    A patched stage, whose operators have the units too, is written out first.
    """

    qas: bool
    update_rounding: UpdateRounding | None

    def sites(self, program: Program) -> Iterator[Site | Declined]:
        whole = unpatched(program)
        bound = bound_to_float(whole)
        left = []
        for node, layer in quantized_calls(whole):
            if str(node.target) in bound:
                units = "float units" if layer.qas is None else "the units that it has"
                reason = f"it trains in {units}: {bound[str(node.target)]}"
                yield declined(whole, node, reason)
            elif (layer.qas, layer.update_rounding) != (self.qas, self.update_rounding):
                left.append(node)
        if whole is program:
            names = _other_names(program)
            for node in left:
                tensors = program.tensors_read(node)
                dead = tuple(name for each in tensors for name in names[id(each)])
                yield prepared_by(self, site(node, facts=dead))
        elif left:
            step = WriteOut()
            yield from (prepared_by(step, stage) for stage in step.sites(program))

    def rewrite(self, site: Site, edit: Edit) -> str:
        layer: Any = edit.module(site.node)
        make = partial(in_units, layer, self.qas, self.update_rounding)
        edit.replace_module(site.node, make, key=("units", edit.node(site.node).target))
        for name in site.facts:
            edit.drop_parameter(name)
        return f"trains in quantised units{' with QAS' if self.qas else ''}"


def with_units(program: Program, *, qas: bool) -> Program:
    """A quantised program without patched stages, as if it had been quantised with ``qas``."""
    step = ToUnits(qas, None)
    edit = Edit(program)
    for found in step.sites(program):
        if isinstance(found, Site):
            found.facts.rewrite(edit)
    return edit.commit()


def quantized_calls(program: Program) -> Iterator[tuple[fx.Node, QuantizedLayer]]:
    """The calls of layers with quantised weights, in the program's order."""
    for node in program.nodes:
        layer = program.module(node)
        if isinstance(layer, QuantizedLayer):
            yield node, layer


def bound_to_float(program: Program) -> Mapping[str, str]:
    """By path, the layers whose weight or bias somebody else reads too, and who does.

    Each has another scale for it, so that no units are those of both. In float units they train as
    with QAS, but for weights at the ends of the grid.
    """
    readers: dict[int, dict[str, None]] = defaultdict(dict)
    for node in program.nodes:
        for tensor in program.tensors_read(node):
            attribute = node.op == "get_attr"
            readers[id(tensor)]["the forward" if attribute else f"'{node.target}'"] = None
    found: dict[str, str] = {}
    for node, layer in quantized_calls(program):
        path = str(node.target)
        for name in ("weight", "bias"):
            tensor = getattr(layer, name)
            others = [] if tensor is None else [r for r in readers[id(tensor)] if r != f"'{path}'"]
            if others:
                found.setdefault(path, f"its {name} is also read by {others[0]}")
    return found


def _other_names(program: Program) -> Mapping[int, list[str]]:
    """Of parameters, by identity, those of the user's that are no members of a quantised layer."""
    found: dict[int, list[str]] = defaultdict(list)
    for path, module in program.graph_module.named_modules():
        if not isinstance(module, QuantizedLayer):
            for name, parameter in module._parameters.items():
                found[id(parameter)].append(f"{path}.{name}" if path else name)
    return found
