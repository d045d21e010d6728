"""A report's operators added up by the user's modules, and how a transformation changed the sums.

A module path is cut to a depth: at depth 2 everything inside ``blocks.0`` is one row. An operator
above that depth has a row with its module's own path; the empty path is the model's own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fxopt.report import OperatorRow


@dataclass(frozen=True)
class Weight:
    """A parameter, or else a persistent buffer, that operators read; its name tells it apart."""

    name: str
    elements: int
    bytes: int
    is_parameter: bool


@dataclass(frozen=True)
class ModuleRow:
    """The operators of one module. A weight counts in the first row whose operators read it.

    Attributes:
        path: of the module, cut to the depth; empty for the model's own forward.
        operators: number of operators.
        parameters: elements of the parameters that they read.
        macs: multiply-accumulates.
        weight_bytes: of those parameters and of the persistent buffers that they read.
        activation_bytes: of the tensors that they write.
        shared_weight_bytes: of the weights that they read and that an earlier row counts.
        at_least: MACs and activations inside an opaque leaf are not in the sums.
    """

    path: str
    operators: int
    parameters: int
    macs: int
    weight_bytes: int
    activation_bytes: int
    shared_weight_bytes: int
    at_least: bool


def module_rows(operators: Sequence[OperatorRow], depth: int) -> tuple[ModuleRow, ...]:
    """The operators by module path cut to ``depth``, in the order of each module's first operator.

    Raises:
        ValueError: the depth is less than 1.
    """
    if depth < 1:
        raise ValueError(f"the depth of module paths is at least 1, not {depth}")
    groups: dict[str, list[OperatorRow]] = {}
    for operator in operators:
        path = ".".join(operator.path.split(".")[:depth])
        groups.setdefault(path, []).append(operator)
    counted: set[str] = set()
    rows = []
    for path, members in groups.items():
        rows.append(_module_row(path, members, counted))
        counted.update(weight.name for member in members for weight in member.weights)
    return tuple(rows)


def _module_row(path: str, operators: Sequence[OperatorRow], counted: set[str]) -> ModuleRow:
    weights = {weight.name: weight for row in operators for weight in row.weights}.values()
    own = [weight for weight in weights if weight.name not in counted]
    return ModuleRow(
        path,
        len(operators),
        sum(weight.elements for weight in own if weight.is_parameter),
        sum(row.macs for row in operators),
        sum(weight.bytes for weight in own),
        sum(row.activation_bytes for row in operators),
        sum(weight.bytes for weight in weights if weight.name in counted),
        any(row.kind == "opaque" for row in operators),
    )


@dataclass(frozen=True)
class ModuleChange:
    """One module before and after a transformation; None where it has no operators."""

    path: str
    before: ModuleRow | None
    after: ModuleRow | None

    @property
    def changed(self) -> bool:
        return self.before != self.after


def module_changes(
    before: Sequence[ModuleRow], after: Sequence[ModuleRow]
) -> tuple[ModuleChange, ...]:
    """The rows of two programs side by side: those before in their order, then what is new."""
    old, new = ({row.path: row for row in rows} for rows in (before, after))
    return tuple(ModuleChange(path, old.get(path), new.get(path)) for path in {**old, **new})
