"""A program whose patched stages are written out, tile by tile, as what runs on a device.

Every tile's operators are nodes; the last one of a tile writes into the stage's result. A tile
begins when the one before has ended. Planning and execution in an arena look at this program.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import fx

from fxopt.graphs import assemble, share_tree
from fxopt.patching import tiles
from fxopt.patching.stage import MAP, PatchedStage, Step, Tile, emit_tile, places
from fxopt.program import Origin, Program, TensorType, ValueType


def unrolled(program: Program) -> Program:
    """``program`` with no stage in it; itself if it has none. It is for planning, not for users."""
    stages = {
        node.name: stage
        for node in program.nodes
        if isinstance(stage := program.module(node), PatchedStage)
    }
    return _Unrolling(program, stages).program() if stages else program


def tile_operators(program: Program) -> int:
    """How many operators the stages of ``program`` come to, tile by tile."""
    stages = (program.module(node) for node in program.nodes)
    return sum(len(s.table) * len(s.plan.steps) for s in stages if isinstance(s, PatchedStage))


class _Unrolling:
    def __init__(self, program: Program, stages: Mapping[str, PatchedStage]) -> None:
        self._before, self._stages = program, stages
        self._graph = fx.Graph()
        self._nodes: dict[fx.Node, fx.Node] = {}
        self._types: dict[str, ValueType] = {}
        self._origins: dict[str, Origin] = {}

    def program(self) -> Program:
        for node in self._before.nodes:
            if node.name in self._stages:
                self._nodes[node] = self._written_out(node, self._stages[node.name])
                continue
            copied = self._graph.node_copy(node, self._nodes.__getitem__)
            self._nodes[node] = copied
            before = self._before
            self._note(copied, before.types.get(node.name), before.origins.get(node.name))
        tree = share_tree(self._before.graph_module)
        for stage in self._stages.values():
            for position, layer in enumerate(stage.layers()):
                tree.register_module(_layer_name(stage, position), layer)
        module = assemble(tree, self._graph, fx.GraphModule)
        return replace(
            self._before, graph_module=module.eval(), types=self._types, origins=self._origins
        )

    def _note(self, node: fx.Node, type: ValueType, origin: Origin | None) -> fx.Node:
        if node.op != "output":
            self._types[node.name] = type
        if origin is not None:
            self._origins[node.name] = origin
        return node

    def _call(
        self, name: str, function: Any, args: Any, type: ValueType, origin: Origin
    ) -> fx.Node:
        node = self._graph.create_node("call_function", function, args, name=name)
        return self._note(node, type, origin)

    def _written_out(self, node: fx.Node, stage: PatchedStage) -> fx.Node:
        plan, type = stage.plan, self._before.types[node.name]
        origin = plan.result.origin
        x, *weights = (self._nodes[operand] for operand in node.all_input_nodes)
        args = (x, tuple(type.shape[1:]), type.dtype)
        result = self._call(f"{node.name}_result", tiles.buffer, args, type, origin)
        for number, tile in enumerate(stage.table):
            value = self._tile(stage, f"_t{number}", tile, [x, *weights], result)
            where = places(tile[plan.result.name])
            name = f"{node.name}_t{number}"
            result = self._call(name, tiles.write_tile, (result, value, *where), type, origin)
        return result

    def _tile(
        self, stage: PatchedStage, suffix: str, tile: Tile, operands: list[fx.Node],
        after: fx.Node,
    ) -> fx.Node:  # fmt: skip
        plan, (x, *weights) = stage.plan, operands
        batch = self._types[x.name].shape[0]
        layers = {id(layer): n for n, layer in enumerate(stage.layers())}
        entry_type = _part_type(plan.entry_type, batch, tile[plan.entry].shape, MAP)
        origin = next(s.origin for s in plan.steps if plan.entry in s.reads)
        args = (x, after, *places(tile[plan.entry]))
        entry = self._call(f"{plan.entry}{suffix}", tiles.first_tile, args, entry_type, origin)

        def emit(step: Step | None, function: Any, args: Any, kwargs: Any) -> fx.Node:
            if step is None:
                value, rows, cols, axes = args
                size = rows[1] - rows[0], cols[1] - cols[0]
                type = _part_type(self._types[value.name], batch, size, axes)
                origin = self._origins[value.name]
                return self._call(f"{value.name}_crop", function, args, type, origin)
            type = _part_type(step.type, batch, tile[step.name].shape, step.axes)
            op, target = "call_function", function
            if id(function) in layers:
                op, target = "call_module", _layer_name(stage, layers[id(function)])
            node = self._graph.create_node(op, target, args, kwargs, name=f"{step.name}{suffix}")
            return self._note(node, type, step.origin)

        values: dict[str, Any] = dict(zip(plan.weights, weights, strict=True))
        values[plan.entry] = entry
        value: fx.Node = emit_tile(plan, tile, values, emit)
        return value


def _part_type(
    whole: ValueType, batch: int, size: tuple[int, int], axes: tuple[int, int]
) -> TensorType:
    assert isinstance(whole, TensorType)
    shape = [batch, *whole.shape[1:]]
    shape[axes[0]], shape[axes[1]] = size
    return TensorType(tuple(shape), whole.dtype)


def _layer_name(stage: PatchedStage, position: int) -> str:
    return f"_{stage.plan.result.name}_layer_{position}"
