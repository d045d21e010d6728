"""The decisions that Python took while a model was captured, checked on every entry.

A graph knows one way through the user's code. A guard holds the condition under which that way is
the user's: over the sizes of the tensors (``x.shape[3] > 32``), their number of dimensions, and
their dtypes where the code asked for one. A violated guard raises; it never computes something
else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxopt.errors import GuardError
from fxopt.graphs import assemble, graph_from_records, graph_to_records, share_tree
from fxopt.infer import MetaInterpreter, MetaTwins, to_meta
from fxopt.shapes import Dimension, Operation, dimensions_of, evaluate


@dataclass(frozen=True)
class ShapeGuard:
    """``condition`` held for the example; ``line`` is the user's line that asked."""

    condition: Operation
    line: str

    def __str__(self) -> str:
        return f"{self.condition} (decided at {self.line})" if self.line else str(self.condition)


@dataclass(frozen=True)
class LayoutGuard:
    """An answer on memory that the user's code acts on: ``nodes`` share it, or one is dense."""

    question: str
    nodes: tuple[str, ...]
    answer: bool
    line: str

    def __str__(self) -> str:
        if self.question == "shares":
            text = f"{self.nodes[1]} shares the memory of {self.nodes[0]}"
        else:
            text = f"{self.nodes[0]} is contiguous"
        return f"'{text}' was {self.answer} (decided at {self.line}) and is {not self.answer}"

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether the answer is the same for the graph's ``values``, which are meta tensors."""
        if any(name not in values for name in self.nodes):
            return True
        tensors = [values[name] for name in self.nodes]
        if self.question == "shares":
            memory = {tensor.untyped_storage()._cdata for tensor in tensors}
            return (len(memory) == 1) == self.answer
        return bool(tensors[0].is_contiguous()) == self.answer


@dataclass(frozen=True)
class Violation:
    """A guard that does not hold, with what was captured and what is."""

    guard: ShapeGuard
    captured: tuple[int, ...]
    found: tuple[int, ...]

    def __str__(self) -> str:
        names = dict.fromkeys(map(str, dimensions_of(self.guard.condition)))
        then = ", ".join(f"{n} = {v}" for n, v in zip(names, self.captured, strict=True))
        now = ", ".join(f"{n} = {v}" for n, v in zip(names, self.found, strict=True))
        return f"{self.guard}: captured with {then}, called with {now}"


@dataclass(frozen=True)
class Unknown:
    """The graph does not run on inputs of these sizes, so nobody can tell what holds."""

    reason: str

    def __str__(self) -> str:
        return f"the captured graph takes no inputs of these sizes: {self.reason}"


@dataclass(frozen=True, eq=False)
class Guards:
    """Every guard of a captured model.

    Attributes:
        shapes: the conditions over sizes, each once.
        ranks: number of dimensions of each input.
        dtypes: dtype of each input whose dtype the user's code asked for (else None).
        texts: how the user would write each input.
        probe: the captured graph on the meta device, which gives the size of any inner value for
            any input sizes; passes do not touch it.
        sizes: the dimensions that the conditions read, for the example.
        example: sizes of the example inputs, for which all conditions hold.
        layouts: the answers on memory, each once.
        devices: device of each input, where the user's code asked for one and may have decided by
            it (else None); a device that is given to an operator is in the graph.
    """

    shapes: tuple[ShapeGuard, ...]
    ranks: tuple[int, ...]
    dtypes: tuple[torch.dtype | None, ...]
    texts: tuple[str, ...]
    probe: fx.GraphModule | None
    sizes: Mapping[Dimension, int]
    example: tuple[tuple[int, ...], ...] = ()
    layouts: tuple[LayoutGuard, ...] = ()
    devices: tuple[torch.device | None, ...] = ()
    _held: set[tuple[Any, ...]] = field(default_factory=set)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        if self.probe is not None:  # a graph module would be traced again when it is unpickled
            state["probe"] = (share_tree(self.probe), graph_to_records(self.probe.graph))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["probe"] is not None:
            tree, records = state["probe"]
            state["probe"] = assemble(tree, graph_from_records(records), fx.GraphModule)
        vars(self).update(state)

    def check(self, tensors: Sequence[torch.Tensor]) -> None:
        """Return if every decision would fall as it did for the example.

        Raises:
            GuardError: naming the first condition that would not, the user's line and both values.
        """
        for tensor, rank, dtype, text in zip(
            tensors, self.ranks, self.dtypes, self.texts, strict=True
        ):
            if tensor.dim() != rank:
                raise GuardError(
                    f"'{text}' has {tensor.dim()} dimensions and was captured with {rank}; capture "
                    "the model again with an input like this"
                )
            if dtype is not None and tensor.dtype != dtype:
                raise GuardError(
                    f"'{text}' is {tensor.dtype} and was captured as {dtype}, which the model's "
                    "code asked for; capture the model again with an input like this"
                )
        for tensor, device, text in zip(tensors, self.devices, self.texts, strict=False):
            if device is not None and tensor.device != device:
                raise GuardError(
                    f"'{text}' is on {tensor.device} and was captured on {device}, which the "
                    "model's code asked for; capture the model again there"
                )
        signature: tuple[Any, ...] = tuple(tuple(tensor.shape) for tensor in tensors)
        if self.layouts:
            signature = tuple((*t.shape, *t.stride(), t.dtype) for t in tensors)
        if (
            not (self.shapes or self.layouts)
            or signature == self.example
            or signature in self._held
        ):
            return
        violations = self.violations(tensors)
        if violations:
            raise GuardError(f"{violations[0]}; capture the model again with an input like this")
        self._held.add(signature)

    def violations(
        self, tensors: Sequence[torch.Tensor]
    ) -> tuple[Violation | LayoutGuard | Unknown, ...]:
        """The guards that inputs of these sizes and layouts break, or that nobody can tell."""
        if self.probe is None or not (self.shapes or self.layouts):
            return ()
        interpreter = MetaInterpreter(self.probe, MetaTwins())
        unknown: tuple[Unknown, ...] = ()
        try:
            interpreter.run(*map(to_meta, tensors))
        except Exception as error:
            unknown = (Unknown(str(error).strip().partition("\n")[0]),)
        values = {node.name: value for node, value in interpreter.env.items()}
        layouts = tuple(guard for guard in self.layouts if not guard.holds(values))
        return _violations(self.shapes, self.sizes, interpreter.env) or layouts or unknown


def _violations(
    guards: Sequence[ShapeGuard], captured: Mapping[Dimension, int], values: Mapping[fx.Node, Any]
) -> tuple[Violation, ...]:
    by_name = {node.name: value for node, value in values.items()}

    def size_of(dimension: Dimension) -> int:
        return int(by_name[dimension.node].shape[dimension.axis])

    broken = []
    for guard in guards:
        dimensions = tuple(dict.fromkeys(dimensions_of(guard.condition)))
        if any(dimension.node not in by_name for dimension in dimensions):
            continue
        if not evaluate(guard.condition, size_of):
            then = tuple(captured[d] for d in dimensions)
            broken.append(Violation(guard, then, tuple(map(size_of, dimensions))))
    return tuple(broken)
