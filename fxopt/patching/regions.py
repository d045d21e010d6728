"""Which parts of a program can run tile by tile: from one value on to one that follows from it."""

from __future__ import annotations

from torch import fx

from fxopt.analysis.receptive_field import Interval
from fxopt.edit import Edit
from fxopt.patching.context import ATTRIBUTE, Context, NotLocal
from fxopt.patching.stage import MAP, PatchedStage, Plan, Step
from fxopt.patching.steps import step_of
from fxopt.program import Program, TensorType, tensor_types


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
        return Plan(self._entry.name, entry_type, tuple(weights), tuple(steps), rows, cols)

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
        if name.startswith(ATTRIBUTE):
            anchor = edit.attribute(name.removeprefix(ATTRIBUTE), after=anchor)
        operands.append(anchor if name.startswith(ATTRIBUTE) else edit.node(name))
    stage = PatchedStage(plan)
    node = edit.call_module(stage, tuple(operands), after=anchor, name="patched_stage")
    edit.replace_uses(last, node)
    for step in reversed(plan.steps[:-1]):
        _remove(edit, edit.node(step.name))


def _remove(edit: Edit, node: fx.Node) -> None:
    """With the sizes that were computed from it, which nothing reads any more."""
    while node.users:
        _remove(edit, next(iter(node.users)))
    edit.remove(node)
