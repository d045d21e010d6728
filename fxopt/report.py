"""What a program is and costs, and what a transformation did, as frozen values.

The schemas of ``to_dict()`` and ``json()`` are in ``docs/report.md``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxopt import schema
from fxopt.analysis.cost import OperatorCost, Weights, cost, weights_of
from fxopt.blocks import InvertedResidual
from fxopt.captured import as_program
from fxopt.captured import history as history_of
from fxopt.modules import ModuleChange, ModuleRow, Weight, module_changes, module_rows
from fxopt.patterns import inverted_residuals
from fxopt.program import Origin, Program, TensorType, tensor_types
from fxopt.results import PassRecord


@dataclass(frozen=True)
class OperatorRow:
    """One operator of the graph.

    Attributes:
        name: of the node, distinct in the graph.
        kind: as in :mod:`fxopt.operators`.
        path: the user's module that it comes from; empty for the model's own forward.
        outputs: type of each tensor that it gives; empty for arithmetic on sizes.
        parameters: elements of the parameters that it reads.
        macs: multiply-accumulates.
        weight_bytes: of those parameters and of its persistent buffers.
        activation_bytes: of the tensors that it writes; 0 for a view.
        weights: those parameters and buffers; operators may share them.
    """

    name: str
    kind: str
    path: str
    outputs: tuple[TensorType, ...]
    parameters: int
    macs: int
    weight_bytes: int
    activation_bytes: int
    weights: tuple[Weight, ...]


@dataclass(frozen=True)
class Totals:
    """Sums over a graph; a tensor that several operators share counts once.

    Attributes:
        parameters: elements of all parameters that the graph reads.
        macs: of convolutions, linear layers and matrix products; elementwise work apart.
        weight_bytes: of those parameters and of the persistent buffers that the graph reads.
        activation_bytes: what all operators write, which is not what is alive at one time.
        unused_parameters: elements of the parameters that forward never reads.
        at_least: the MACs and activations inside opaque leaves are not in the sums.
    """

    parameters: int
    macs: int
    weight_bytes: int
    activation_bytes: int
    unused_parameters: int
    at_least: bool


@dataclass(frozen=True)
class OpaqueLeaf:
    """A module that could not be traced: it runs as it is and every pass leaves it alone."""

    name: str
    path: str
    reason: str


@dataclass(frozen=True)
class BlockRow:
    """An inverted residual block: ``kind`` is MBConv or Fused-MBConv.

    ``path`` is the user's module that holds it, ``stage`` is counted from 1; parameters and MACs
    are those of its operators, a shared parameter in each block that reads it.
    """

    kind: str
    path: str
    stage: int
    operators: int
    parameters: int
    macs: int


@dataclass(frozen=True)
class Unused:
    """Members that forward never reads: parameters with their elements, and BatchNorms."""

    parameters: Mapping[str, int]
    batch_norms: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """A program's operators and totals, for the example inputs as given (batch included).

    Attributes:
        model: the class of the user's model.
        inputs: type of each tensor input by name.
        operators: in the order in which they run.
        totals: sums in which a shared tensor counts once.
        macs_by_kind: MACs of each kind of operator that has any, largest first.
        blocks: inverted residual blocks, plain and fused.
        opaque: modules that could not be traced.
        unused: members that forward never reads.
        eval_only: why the program has no training mode; empty if it has one.
        guards: the conditions outside of which the program refuses to run.
        notes: sentences on what capture and passes found worth knowing.
    """

    model: str
    inputs: Mapping[str, TensorType]
    operators: tuple[OperatorRow, ...]
    totals: Totals
    macs_by_kind: Mapping[str, int]
    blocks: tuple[BlockRow, ...]
    opaque: tuple[OpaqueLeaf, ...]
    unused: Unused
    eval_only: str
    guards: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def largest_activations(self) -> tuple[OperatorRow, ...]:
        """The five operators that write most, largest first."""
        writers = [row for row in self.operators if row.activation_bytes]
        return tuple(sorted(writers, key=lambda row: -row.activation_bytes)[:5])

    def by_module(self, depth: int = 1) -> tuple[ModuleRow, ...]:
        """The operators added up by module path cut to ``depth``, in execution order.

        The rows add up to the totals: a weight that several modules share counts in the first.

        Raises:
            ValueError: the depth is less than 1.
        """
        return module_rows(self.operators, depth)

    def to_dict(self, depth: int | None = None) -> dict[str, Any]:
        """The report in JSON's own types; with a ``depth`` the rows by module too."""
        return schema.report_dict(self, depth)

    def json(self, depth: int | None = None) -> str:
        """The report as strict JSON."""
        return schema.to_json(self.to_dict(depth))

    def text(self, depth: int | None = None) -> str:
        """The report as plain text, by operator, or by module down to ``depth``."""
        from fxopt import render

        return render.to_text(render.report_document(self, depth))

    def markdown(self, depth: int | None = None) -> str:
        """What :meth:`text` says, as GitHub's Markdown."""
        from fxopt import render

        return render.to_markdown(render.report_document(self, depth))


@dataclass(frozen=True)
class TransformReport:
    """What passes did: the reports of the program before and after, and each pass's record."""

    before: Report
    after: Report
    passes: tuple[PassRecord, ...]

    def by_module(self, depth: int = 1) -> tuple[ModuleChange, ...]:
        """Each module before and after, by path cut to ``depth``.

        Raises:
            ValueError: the depth is less than 1.
        """
        return module_changes(self.before.by_module(depth), self.after.by_module(depth))

    def to_dict(self, depth: int | None = None) -> dict[str, Any]:
        """The transformation in JSON's own types; with a ``depth`` the change by module too."""
        return schema.transform_dict(self, depth)

    def json(self, depth: int | None = None) -> str:
        """The transformation as strict JSON."""
        return schema.to_json(self.to_dict(depth))

    def text(self, depth: int | None = None) -> str:
        """The transformation as plain text: the change, each pass, every declined site."""
        from fxopt import render

        return render.to_text(render.transform_document(self, depth))

    def markdown(self, depth: int | None = None) -> str:
        """What :meth:`text` says, as GitHub's Markdown."""
        from fxopt import render

        return render.to_markdown(render.transform_document(self, depth))


def report(
    model: nn.Module | Program,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> Report:
    """The report of a model, of a program, or of a module that :func:`fxopt.transform` gave.

    A model is captured with the example inputs (as :func:`fxopt.capture` does). A transformed
    module has its facts with it, and is captured again only if example inputs are given.

    Raises:
        CaptureError: the model cannot be captured.
        TypeError: example inputs are given with a program, which has its own.

    >>> from torch import nn
    >>> import torch
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU()).eval()
    >>> report(net, torch.zeros(2, 3, 9, 11)).totals.macs  # 2 images, 8 x 4 x 5 outputs, 3 x 3 x 3
    8640
    """
    program = as_program(model, example_inputs, example_kwargs)
    recaptured = example_inputs is not None or example_kwargs is not None
    history = history_of(model) if isinstance(model, nn.Module) and not recaptured else ()
    return _report(program, history)


def _report(program: Program, history: Sequence[PassRecord]) -> Report:
    costs = cost(program)
    read = weights_of(program)
    weights = _named(program, read)
    unused = _unused(program, read)
    totals = Totals(
        costs.parameters,
        costs.macs,
        costs.weight_bytes,
        costs.activation_bytes,
        sum(unused.parameters.values()),
        costs.at_least,
    )
    rows = tuple(_row(program, row, weights[row.node]) for row in costs.operators)
    done = [f"sites rewritten by {record.name}: {len(record.rewritten)}" for record in history]
    return Report(
        program.name,
        program.inputs(),
        rows,
        totals,
        costs.macs_by_kind,
        _blocks(program, rows),
        tuple(OpaqueLeaf(n, _path(program, n), why) for n, why in program.opaque.items()),
        unused,
        program.modes.eval_only,
        tuple(map(str, program.guards.shapes)),
        (*program.notes, *done),
    )


def _path(program: Program, name: str) -> str:
    return program.origins.get(name, Origin()).path


def _blocks(program: Program, rows: Sequence[OperatorRow]) -> tuple[BlockRow, ...]:
    by_name = {row.name: row for row in rows}
    found = []
    for block in inverted_residuals(program):
        if isinstance(block, InvertedResidual):
            own = [by_name[node.name] for node in block.nodes]
            weights = {weight.name: weight for row in own for weight in row.weights}.values()
            parameters = sum(weight.elements for weight in weights if weight.is_parameter)
            macs = sum(row.macs for row in own)
            found.append(BlockRow(block.kind, block.path, block.stage, len(own), parameters, macs))
    return tuple(found)


def _row(program: Program, row: OperatorCost, weights: tuple[Weight, ...]) -> OperatorRow:
    return OperatorRow(
        row.node,
        row.kind,
        _path(program, row.node),
        tuple(tensor_types(program.types[row.node])),
        row.parameters,
        row.macs,
        row.weight_bytes,
        row.activation_bytes,
        weights,
    )


def _named(program: Program, read: Mapping[str, Weights]) -> dict[str, tuple[Weight, ...]]:
    """What each node reads, under the first of a tensor's names."""
    names: dict[int, str] = {}
    for name, tensor in program.graph_module.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), name)
    return {
        node: tuple(
            Weight(names[key], t.numel(), t.numel() * t.itemsize, isinstance(t, nn.Parameter))
            for key, t in weights.tensors.items()
        )
        for node, weights in read.items()
    }


def _unused(program: Program, read: Mapping[str, Weights]) -> Unused:
    keys = {key for weights in read.values() for key in weights.tensors}
    graph_module = program.graph_module
    parameters = {
        name: parameter.numel()
        for name, parameter in graph_module.named_parameters()
        if id(parameter) not in keys
    }
    norms = []
    for path, module in graph_module.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            own = {id(t) for t in (*module.parameters(), *module.buffers())}
            if own and not own & keys:
                norms.append(path)
    return Unused(parameters, tuple(norms))
