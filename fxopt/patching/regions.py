"""Which parts of a program can run tile by tile: from one value on to one that follows from it."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from fxopt.analysis.receptive_field import Interval
from fxopt.edit import Edit
from fxopt.fake_quantize import FakeQuantize
from fxopt.graphs import records_of
from fxopt.patching.context import ATTRIBUTE, QUANTIZED, Context, NotLocal
from fxopt.patching.stage import MAP, PatchedStage, Plan, Step
from fxopt.patching.steps import step_of
from fxopt.program import Program, TensorType, tensor_types
from fxopt.quantized_tensors import quantized_bias, quantized_weight


class NotClosed(NotLocal):
    """A part that gives or takes another value than one map, whatever its operators do."""


class Regions:
    """The parts of ``program`` that begin with the value of ``entry``."""

    def __init__(self, program: Program, entry: fx.Node) -> None:
        self._program, self._entry = program, entry
        self._after = _following(entry)
        self._context = Context(program)
        self._steps: dict[fx.Node, Step | NotLocal] = {}

    def plan(self, end: fx.Node, rows: tuple[Interval, ...], cols: tuple[Interval, ...]) -> Plan:
        """The operators from the entry to ``end`` as a stage whose result is cut so.

        Raises:
            NotLocal: an operator between them cannot run on a tile; with the node.
            NotClosed: it reads an activation from elsewhere, is read from elsewhere, or its end
                is no map.
        """
        if not end.users:
            raise NotClosed(f"nothing reads '{end.name}'")
        if end not in self._after:
            raise NotClosed(f"{self._where(end)} is not computed from '{self._entry.name}'")
        type = self._program.types[end.name]
        if not isinstance(type, TensorType) or len(type.shape) != 4:
            raise NotClosed(f"{self._where(end)} gives no map of four axes")
        nodes = self.nodes(end)
        inside = {self._entry, *nodes}
        steps = []
        for node in nodes:
            if any(True for _ in tensor_types(self._program.types[node.name])):  # not a size
                steps.append(self._step(node))
            self._check_closed(node, inside, end)
        if steps[-1].axes != MAP:
            raise NotClosed(f"{self._where(end)} gives a map whose channels come last")
        values = {self._entry.name, *(step.name for step in steps)}
        weights = dict.fromkeys(n for step in steps for n in step.reads if n not in values)
        entry_type = self._program.types[self._entry.name]
        layers = {str(node.target): self._program.module(node) for node in nodes}
        owners = {name[1:].rpartition(".")[0] for name in weights}
        free = {path: each for path, each in layers.items() if each and path not in owners}
        return Plan(
            self._entry.name, entry_type, tuple(weights), tuple(steps), rows, cols,
            records_of(nodes), free,
        )  # fmt: skip

    def nodes(self, end: fx.Node) -> list[fx.Node]:
        """All from the entry to ``end``, with ``end``, in the program's order."""
        found: set[fx.Node] = {end}
        pending = [end]
        while pending:
            for operand in pending.pop().all_input_nodes:
                if operand in self._after and operand not in found:
                    found.add(operand)
                    pending.append(operand)
        return [node for node in self._after if node in found]

    def _step(self, node: fx.Node) -> Step:
        if node not in self._steps:
            try:
                self._steps[node] = step_of(self._program, node, self._context)
            except NotLocal as reason:
                self._steps[node] = NotLocal(f"{self._where(node)} {reason}")
        step = self._steps[node]
        if isinstance(step, NotLocal):
            raise step
        return step

    def _where(self, node: fx.Node) -> str:
        return f"'{node.name}' ({self._program.where(node)})"

    def _check_closed(self, node: fx.Node, inside: set[fx.Node], end: fx.Node) -> None:
        for operand in node.all_input_nodes:
            if operand not in inside and operand not in self._context.weights:
                reads = f"reads '{operand.name}', which comes from elsewhere"
                raise NotClosed(f"{self._where(node)} {reads}")
        if node is not end:
            for user in node.users:
                if user not in inside:
                    read = f"is read by '{user.name}', which comes after the end"
                    raise NotClosed(f"{self._where(node)} {read}")


def _following(entry: fx.Node) -> dict[fx.Node, None]:
    """What is computed from ``entry``, in the program's order."""
    found: set[fx.Node] = {entry}
    for node in entry.graph.nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return {node: None for node in entry.graph.nodes if node in found and node is not entry}


def patched(program: Program, plan: Plan) -> Program:
    """``program`` with a stage for the operators of ``plan``."""
    edit = Edit(program)
    patch(edit, plan)
    return edit.commit()


def patch(edit: Edit, plan: Plan) -> None:
    """Let a stage do what the operators of ``plan`` did."""
    last = anchor = edit.node(plan.result.name)
    operands = [edit.node(plan.entry)]
    for name in plan.weights:
        if name.startswith((ATTRIBUTE, QUANTIZED)):
            anchor = _tensor(edit, name, anchor)
        operands.append(anchor if name.startswith((ATTRIBUTE, QUANTIZED)) else edit.node(name))
    stage = PatchedStage(plan)
    node = edit.call_module(stage, tuple(operands), after=anchor, name="patched_stage")
    edit.replace_uses(last, node)
    for step in reversed(plan.steps[:-1]):
        _remove(edit, edit.node(step.name))


def _tensor(edit: Edit, name: str, after: fx.Node) -> fx.Node:
    """A parameter or buffer, or what a quantised layer makes of its weight or bias."""
    path = name[1:]
    if name.startswith(ATTRIBUTE):
        return edit.attribute(path, after=after)
    owner, _, member = path.rpartition(".")
    layer: Any = edit.tree.get_submodule(owner)
    tensors: list[Any] = []
    for each in (member, "weight_scale", "input_scale")[: 2 if member == "weight" else 3]:
        after = edit.attribute(f"{owner}.{each}" if owner else each, after=after)
        tensors.append(after)
    if member == "weight":
        arguments = (*tensors, layer.axis, layer.most, layer.qas)
        return edit.call_function(quantized_weight, arguments, after=after)
    return edit.call_function(quantized_bias, (*tensors, layer.qas), after=after)


class StageMark(nn.Module):
    """Says of a stage that has been written out what it was, to be made again.

    A member of the module that nothing calls. ``names`` are those of the nodes, in order; what
    stays of them after a fold is the stage's still.
    """

    def __init__(self, plan: Plan, names: tuple[str, ...]) -> None:
        super().__init__()
        self.entry, self.names = plan.entry, names
        self.rows, self.cols = plan.rows, plan.cols


def unpatch(edit: Edit, node: fx.Node | str, *, marked: bool) -> None:
    """Write out the operators of a stage as they were before, and leave a mark if wanted."""
    call, stage = edit.node(node), edit.module(node)
    assert isinstance(stage, PatchedStage)
    plan = stage.plan
    origins = {step.name: step.origin for step in plan.steps}
    last: fx.Node = call
    values = {plan.entry: call.all_input_nodes[0]}
    for record in plan.written:
        last = edit.restored(record, values, origins.get(record.name), plan.layers, after=last)
        values[record.name] = last
    if marked:
        names = tuple(values[record.name].name for record in plan.written)
        edit.add_member(f"{last.name}_stage", StageMark(plan, names))
    edit.replace_uses(call, last)


def unpatched(program: Program) -> Program:
    """``program`` with its stages written out; itself if it has none."""
    stages = [n for n in program.nodes if isinstance(program.module(n), PatchedStage)]
    if not stages:
        return program
    edit = Edit(program)
    for node in stages:
        unpatch(edit, node, marked=False)
    return edit.commit()


def marks(program: Program) -> dict[str, Plan]:
    """By path of its mark, the plan of each stage that is to be made again."""
    found = dict(program.graph_module.named_children())
    return {path: _again(program, m) for path, m in found.items() if isinstance(m, StageMark)}


def _again(program: Program, mark: StageMark) -> Plan:
    """The stage of what is there now; the quantisers behind its entry and its end belong to it."""
    nodes = {node.name: node for node in program.nodes}
    last = nodes[[name for name in mark.names if name in nodes][-1]]
    behind = [user for user in last.users if _quantises(program, user)]
    last = behind[0] if behind else last
    entry = nodes[mark.entry]
    try:
        return Regions(program, entry).plan(last, mark.rows, mark.cols)
    except NotClosed:  # the entry's quantiser is read by others too
        return Regions(program, next(iter(entry.users))).plan(last, mark.rows, mark.cols)


def _quantises(program: Program, node: fx.Node) -> bool:
    return isinstance(program.module(node), FakeQuantize)


def _remove(edit: Edit, node: fx.Node) -> None:
    """With the sizes that were computed from it, which nothing reads any more."""
    while node.users:
        _remove(edit, next(iter(node.users)))
    edit.remove(node)
