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


@dataclass(frozen=True, eq=False)
class Guards:
    """Every guard of a captured model.

    Attributes:
        shapes: the conditions over sizes, each once.
        ranks: number of dimensions of each input.
        dtypes: dtype of each input whose dtype the user's code asked for (else None).
        lead: whether guards that fix the batch size exist, as the guards themselves.
        probe: the captured graph on the meta device, which gives the size of any inner value for
            any input sizes; passes do not touch it.
        sizes: the dimensions that the conditions read, for the example.
    """

    shapes: tuple[ShapeGuard, ...]
    ranks: tuple[int, ...]
    dtypes: tuple[torch.dtype | None, ...]
    texts: tuple[str, ...]
    probe: fx.GraphModule | None
    sizes: Mapping[Dimension, int]
    example: tuple[tuple[int, ...], ...] = ()
    _held: set[tuple[tuple[int, ...], ...]] = field(default_factory=set)

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
        signature = tuple(tuple(tensor.shape) for tensor in tensors)
        if not self.shapes or signature == self.example or signature in self._held:
            return
        violations = self.violations(tensors)
        if violations:
            raise GuardError(f"{violations[0]}; capture the model again with an input like this")
        self._held.add(signature)

    def violations(self, tensors: Sequence[torch.Tensor]) -> tuple[Violation, ...]:
        """The shape guards that inputs of these sizes break."""
        if self.probe is None or not self.shapes:
            return ()
        interpreter = MetaInterpreter(self.probe, MetaTwins())
        try:
            interpreter.run(*map(to_meta, tensors))
        except Exception:  # the sizes fit no operator: the real run says so, better than we could
            if not interpreter.env:
                return ()
        return _violations(self.shapes, self.sizes, interpreter.env)


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
            break
        if not evaluate(guard.condition, size_of):
            then = tuple(captured[d] for d in dimensions)
            broken.append(Violation(guard, then, tuple(map(size_of, dimensions))))
    return tuple(broken)
