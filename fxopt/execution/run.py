"""A program run step by step as its plan says, every tensor at its planned place.

The buffer is all there is between steps: what an operator reads is what lies in it then. Before an
operator runs, the place of its result is overwritten, unless it runs in place; after it, what
nothing needs any more is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxopt.analysis.fusion import Group, groups
from fxopt.analysis.inplace import overwritable, reads_of
from fxopt.analysis.padding import known_sizes
from fxopt.analysis.placement import Place, Placement, placement
from fxopt.analysis.plan import Scratch
from fxopt.analysis.sizes import value_bytes
from fxopt.errors import ExecutionError, InvalidPlanError
from fxopt.execution.buffer import Buffer, Range, tensors_of
from fxopt.execution.inplace import Call, write_over
from fxopt.graphs import call_node, member
from fxopt.kernels import InPlace
from fxopt.memory_plan import MemoryPlan
from fxopt.operators import Storage
from fxopt.patching.unroll import unrolled
from fxopt.program import Program, TensorType, tensor_types
from fxopt.proof.evidence import SEED
from fxopt.proof.running import evaluation_module

Observer = Callable[[str, Any], None]
"""Is told the name of each node whose value was written, and the value in the buffer."""


def execute_in_arena(
    program: Program,
    plan: MemoryPlan,
    inputs: Sequence[torch.Tensor] | torch.Tensor,
    observer: Observer | None = None,
) -> tuple[Any, ...]:
    """The flat outputs of ``program``, run in one buffer of ``plan.arena.size_bytes`` bytes.

    The program runs in evaluation mode, in the plan's order. Results are written at their planned
    offsets, in place where the plan says so; dead bytes are overwritten after every step. What a
    kernel needs while it runs and the plan does not count (a fused operator's intermediate value,
    the inside of an opaque module) lies elsewhere, never longer than the step. A streamed input,
    weights and constants lie outside.

    The plan is believed, not checked: a wrong one gives wrong outputs. Operators that draw random
    numbers draw each from a seed of its own.

    Args:
        inputs: of the shapes and dtypes that the plan was made for.

    Raises:
        ExecutionError: the plan counts other bytes than the tensors have (a what-if), the inputs
            are others than the plan's, or a view of the plan cannot be one.
        InvalidPlanError: the plan is of another program, lacks an operator or an offset, or a
            tensor lies beyond its arena.
    """
    given = (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs)
    return Run(program, plan, given, observer).outputs()


class Run:
    """One run of a plan.

    Attributes:
        by_planes: names of the nodes that were computed in place, plane by plane.
    """

    def __init__(
        self,
        program: Program,
        plan: MemoryPlan,
        inputs: Sequence[torch.Tensor],
        observer: Observer | None = None,
    ) -> None:
        model, program = plan.memory_model, unrolled(program)
        self._program, self._plan, self._observer = program, plan, observer
        self._module = evaluation_module(program)
        self._placed = placement(program, clip_padding=model.fuse_padding)
        self._groups = {group.value.name: group for group in groups(self._placed, model)}
        self._sizes = _numbers(known_sizes(program))
        self._position = {node: index for index, node in enumerate(program.nodes)}
        self._values: dict[fx.Node, Any] = {}
        self.by_planes: set[str] = set()
        self._check(inputs)
        self._buffer = Buffer(plan.arena.size_bytes, _device(inputs))
        self._steps = {name: step for step, name in enumerate(plan.order)}
        self._last = _last_uses(self._placed, self._groups, self._steps)
        self._ranges: dict[fx.Node | Scratch, Range] = {}
        self._begin(inputs)

    def _check(self, inputs: Sequence[torch.Tensor]) -> None:
        program, order = self._program, self._plan.order
        if sorted(order) != sorted(self._groups):
            other = sorted(set(order) ^ self._groups.keys())[:1] or ["an operator"]
            raise InvalidPlanError(
                f"the plan is not of this program under its memory model: '{other[0]}' is in one "
                "of them only, or twice"
            )
        for name in self._groups:
            type = program.types[name]
            planned = value_bytes(type, self._plan.memory_model)
            if planned != (real := sum(each.bytes for each in tensor_types(type))):
                raise ExecutionError(
                    f"what-if sizes cannot be executed: the plan counts {planned:,} bytes for "
                    f"'{name}', which has {real:,}; leave bytes_per_element out"
                )
        types = list(program.inputs().values())
        found = [TensorType(tuple(each.shape), each.dtype) for each in inputs]
        if found != types:
            wanted, got = (", ".join(map(str, each)) for each in (types, found))
            raise ExecutionError(f"the plan is for inputs {wanted}; these are {got}")

    def _begin(self, inputs: Sequence[torch.Tensor]) -> None:
        """Resident inputs are in the buffer from the first step on."""
        given = [node for node in self._program.nodes if node.op == "placeholder"]
        for node, tensor in zip(given, inputs, strict=True):
            resident = self._plan.memory_model.input_resident and self._placed.in_arena(node)
            self._values[node] = tensor
            if resident:
                self._values[node] = self._place(node)
                self._values[node].copy_(tensor)

    def outputs(self) -> tuple[Any, ...]:
        """Run all steps; the flat outputs, copied out of the buffer."""
        with torch.no_grad(), torch.random.fork_rng():
            return self._outputs()

    def _outputs(self) -> tuple[Any, ...]:
        for step, name in enumerate(self._plan.order):
            group = self._groups[name]
            written = self._placed.values[group.value].view_of is None
            if self._placed.writes_tile(group.value):
                self._write_tile(group)
            elif written and group.main.op != "placeholder":
                self._write(group)
            if self._observer is not None:
                self._observer(name, self.value(group.value))
            self._poison(step)
        results = fx.node.map_arg(self._program.output_node().args[0], self.value)
        copied: tuple[Any, ...] = torch.utils._pytree.tree_map_only(
            torch.Tensor, torch.Tensor.clone, results
        )
        return copied

    def value(self, node: fx.Node) -> Any:
        """What ``node`` gives, as it lies in the buffer now."""
        if node in self._values:
            return self._values[node]
        if node.name in self._sizes:
            return self._sizes[node.name]
        if node.op == "get_attr":
            return member(self._module, str(node.target))
        place, storage = self._placed.values[node], self._placed.descriptions[node].storage
        if storage is Storage.KEPT:
            return self._kept(node)
        if place.place is Place.ARENA and place.view_of is None:
            raise InvalidPlanError(f"'{node.name}' is read before it is written: the order is none")
        result = self._call(node, self.value).run()
        if place.place is Place.FLASH:
            self._values[node] = result
        elif place.place is Place.ARENA and not self._is_padded(node):
            self._check_view(node, result)
        return result

    def _is_padded(self, view: fx.Node) -> bool:
        """Whether ``view`` is of a pad that the kernels behind it supply: it has no memory."""
        at: fx.Node | None = view
        while at is not None and at in self._placed.descriptions:
            if self._placed.descriptions[at].padding is not None:
                return True
            at = self._placed.values[at].view_of
        return False

    def _check_view(self, node: fx.Node, result: Any) -> None:
        streamed = self._placed.values[node].root.op == "placeholder" and not self._resident()
        if not streamed and not all(map(self._buffer.holds, tensors_of(result))):
            raise ExecutionError(
                f"'{node.name}' ({self._program.where(node)}) is planned as a view, but PyTorch "
                "copies: it cannot be executed in the arena"
            )

    def _resident(self) -> bool:
        return self._plan.memory_model.input_resident

    def _kept(self, node: fx.Node) -> torch.Tensor:
        """What a buffer of the model's will hold; nothing reads the buffer itself after this."""
        buffer, source = (self.value(operand) for operand in self._placed.operands[node][:2])
        result: torch.Tensor = source.to(buffer.dtype).expand(buffer.shape)
        return result

    def _call(self, node: fx.Node, lookup: Callable[[fx.Node], Any]) -> Call:
        args = fx.node.map_arg(node.args, lookup)
        kwargs = fx.node.map_arg(node.kwargs, lookup)
        return call_at(self._module, self._position[node], node, args, kwargs)

    def _write(self, group: Group) -> None:
        """Run ``group`` and write its value where it belongs."""
        target = self._place(group.value)
        over = self._overwritten(group)
        below = self._ranges[group.value]
        self._buffer.poison(below, [self._ranges[root] for root in over])
        writer = self._writer(group, over)
        inside: dict[fx.Node, Any] = {}
        for node in group.members:
            call = self._call(node, lambda n: inside[n] if n in inside else self.value(n))
            if node is writer:
                kind = self._placed.descriptions[node].inplace
                if kind is InPlace.PLANES:
                    self.by_planes.add(node.name)
                write_over(call, kind, target, self._scratch(group))
                inside[node] = target
            else:
                inside[node] = call.run()
        result = inside[group.value]
        if result is not target:
            self._values[group.value] = self._copied(group.value, target, result)
        else:
            self._values[group.value] = target

    def _write_tile(self, group: Group) -> None:
        """Run ``group``, whose last member writes into a part of a tensor that is there."""
        inside: dict[fx.Node, Any] = {}
        for node in group.members:
            call = self._call(node, lambda n: inside[n] if n in inside else self.value(n))
            inside[node] = call.run()
        self._values[group.value] = inside[group.value]

    def _copied(self, node: fx.Node, target: Any, result: Any) -> Any:
        """``target`` with what ``result`` has; what is no tensor comes from ``result``."""
        places, results = list(tensors_of(target)), list(tensors_of(result))
        for place, tensor in zip(places, results, strict=True):
            if place.shape != tensor.shape or place.dtype != tensor.dtype:
                raise ExecutionError(
                    f"'{node.name}' gave {tensor.dtype} {tuple(tensor.shape)}, planned as "
                    f"{place.dtype} {tuple(place.shape)}"
                )
            place.copy_(tensor)
        left = iter(places)
        filled = torch.utils._pytree.tree_map_only(torch.Tensor, lambda _: next(left), result)
        return filled

    def _place(self, node: fx.Node) -> Any:
        offset = self._offset(node.name)
        type = self._program.types[node.name]
        size = sum(each.bytes for each in tensor_types(type))
        self._ranges[node] = (offset, offset + size)
        return self._buffer.at(node.name, offset, type)

    def _offset(self, name: str) -> int:
        offset = self._plan.arena.offsets.get(name)
        if offset is None:
            raise InvalidPlanError(f"the plan has no offset for '{name}'")
        return offset

    def _scratch(self, group: Group) -> torch.Tensor | None:
        """One plane, where the plan has scratch memory for it."""
        scratch = Scratch(group.value.name)
        name = str(scratch)
        if name not in self._plan.arena.offsets:
            return None
        type = self._program.types[group.main.name]
        plane = TensorType((self._placed.descriptions[group.main].scratch,), type.dtype)
        offset = self._offset(name)
        self._ranges[scratch] = (offset, offset + plane.bytes)
        memory: torch.Tensor = self._buffer.at(name, offset, plane)
        return memory

    def _overwritten(self, group: Group) -> list[fx.Node]:
        """The tensors over which the plan lets ``group`` write its result."""
        allowed = overwritable(self._placed, group, self._plan.memory_model)
        below = self._ranges[group.value]
        roots = {
            self._placed.values[read.operand].root: None
            for read in reads_of(self._placed, group)
            if read.operand.name in allowed
        }
        return [root for root in roots if root in self._ranges and _meet(self._ranges[root], below)]

    def _writer(self, group: Group, over: Sequence[fx.Node]) -> fx.Node | None:
        """The last member that reads what is overwritten."""
        reading = [
            read.member
            for read in reads_of(self._placed, group)
            if self._placed.values[read.operand].root in over
        ]
        return reading[-1] if reading else None

    def _poison(self, step: int) -> None:
        dead = [each for each in self._ranges if self._last.get(each, step) <= step]
        ranges = [self._ranges.pop(node) for node in dead]
        live = list(self._ranges.values()) if ranges else []
        for each in ranges:
            self._buffer.poison(each, live)


def call_at(
    tree: torch.nn.Module, position: int, node: fx.Node, args: Any, kwargs: Mapping[str, Any]
) -> Call:
    """The node at a position of its program as a call that draws random numbers of its own."""
    module = tree.get_submodule(str(node.target)) if node.op == "call_module" else None

    def run() -> Any:
        torch.manual_seed(SEED + position)
        return call_node(node, args, kwargs, tree.get_submodule)

    return Call(node, module, args, kwargs, run)


def _numbers(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are the same wherever tensors lie: not a device."""
    return {name: value for name, value in sizes.items() if not isinstance(value, torch.device)}


def _device(inputs: Sequence[torch.Tensor]) -> torch.device:
    return next((tensor.device for tensor in inputs), torch.device("cpu"))


def _meet(one: Range, other: Range) -> bool:
    return max(one[0], other[0]) < min(one[1], other[1])


def _last_uses(
    placed: Placement, groups: Mapping[str, Group], steps: Mapping[str, int]
) -> dict[fx.Node | Scratch, int]:
    """The last step at which each tensor is needed; outputs are needed after all of them."""
    last: dict[fx.Node | Scratch, int] = {}
    for name, group in groups.items():
        used = [group.value, *(read.operand for read in reads_of(placed, group))]
        kept = group.value in placed.returned or placed.is_kept(group.value)
        for node in used:
            root = placed.values[node].root
            last[root] = max(last.get(root, 0), steps[name])
        if kept:
            last[placed.values[group.value].root] = len(steps)
    return last
