"""An int8 ONNX file beside the quantised program that it was written from, operator by operator.

Two right executions of a deep integer network drift apart: one step of difference in a layer
becomes several later. So each operator is run as a model of its own, fed with the whole numbers
that torch has at its inputs; there the two may differ by one step, where a sum lies so near to the
middle between two that float32 decides it. From end to end they are compared as two executions of
torch are, in float32 and in float64.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxopt.constants import constants
from fxopt.errors import ExportError
from fxopt.fake_quantize import FakeQuantize
from fxopt.observe import Observer
from fxopt.onnx_batch import bound_of, depth
from fxopt.onnx_deviation import Deviation
from fxopt.onnx_parts import PartedFile
from fxopt.onnx_run import deviation
from fxopt.onnx_whole import SHIFT, ActivationType
from fxopt.program import Program
from fxopt.proof.running import evaluation_module
from fxopt.quantizing.fidelity import OutputLoss, outputs_of, quantisers


@dataclass(frozen=True)
class OperatorAgreement:
    """Whole numbers of one operator in the file and in torch, from the same inputs.

    Attributes:
        node: the quantiser behind the operator.
        where: in the user's names.
        elements: numbers compared.
        differing: those that differ.
        worst: the largest difference, in steps.
    """

    node: str
    where: str
    elements: int
    differing: int
    worst: int


@dataclass(frozen=True)
class EndToEnd:
    """One output of the file beside torch's, and torch in float32 beside torch in float64.

    The SQNR is in dB; None where the two are equal, NaN where one is not finite or does not run.
    ``top1`` is the share of samples with the same largest class, None for an output that is no
    table of classes.
    """

    output: str
    sqnr_db: float | None
    own_sqnr_db: float | None
    top1: float | None
    own_top1: float | None


@dataclass(frozen=True)
class IntegerAgreement:
    """How the file and the program compare.

    ``outputs`` are what stands behind the last quantisers, from the same whole numbers.
    """

    operators: tuple[OperatorAgreement, ...]
    outputs: tuple[Deviation, ...]
    end_to_end: tuple[EndToEnd, ...]

    @property
    def elements(self) -> int:
        return sum(each.elements for each in self.operators)

    @property
    def differing(self) -> int:
        return sum(each.differing for each in self.operators)

    @property
    def worst(self) -> int:
        """The largest difference of all, in steps."""
        return max((each.worst for each in self.operators), default=0)


def integer_agreement(
    program: Program, path: Path, kind: ActivationType, batches: Sequence[Sequence[torch.Tensor]]
) -> IntegerAgreement:
    """Compare the file at ``path`` with ``program``, by operator and from end to end.

    Args:
        program: the quantised program.
        path: the file that was written from it.
        kind: the type of its activations.
        batches: flat inputs; the operators are compared on the first.
    """
    file = PartedFile(path, frozenset(node.name for node in quantisers(program)))
    found = list(_by_operator(program, file, kind, batches[0]))
    operators = tuple(each for each in found if isinstance(each, OperatorAgreement))
    outputs = tuple(each for each in found if isinstance(each, Deviation))
    return IntegerAgreement(operators, outputs, tuple(end_to_end(program, path, batches)))


def _by_operator(
    program: Program, file: PartedFile, kind: ActivationType, inputs: Sequence[torch.Tensor]
) -> Iterator[OperatorAgreement | Deviation]:
    grids = {node: q for node, q in quantisers(program).items() if node.name in file.tensors}
    _check_complete(program, file)
    known = _feeds(program, inputs)
    outputs = dict(outputs_of(program))
    observe = Observer([*grids, *outputs.values()], evaluation_module(program))
    given: dict[fx.Node, torch.Tensor] = {}
    for node, (value,) in observe.in_lockstep([inputs]):
        if node in outputs.values():
            given[node] = value
        if node not in grids:
            continue
        whole = _whole(grids[node], value, kind)
        known[file.tensors[node.name]] = whole
        (found,) = file.part(node.name).run(known)
        apart = abs(found.astype("int32") - whole.astype("int32"))
        yield OperatorAgreement(
            node.name, program.where(node.all_input_nodes[0]), apart.size,
            int((apart > 0).sum()), int(apart.max(initial=0)),
        )  # fmt: skip
    bound = bound_of(torch.float32, depth(program))
    for name, node in outputs.items():
        (result,) = file.tail(name).run(known)
        yield deviation(name, len(given[node]), given[node].cpu(), torch.as_tensor(result), bound)


def _check_complete(program: Program, file: PartedFile) -> None:
    """Refuse a file that lacks quantisers, but for those of constants and of what only moves."""
    fixed = constants(program)
    for node, grid in quantisers(program).items():
        known = grid.settled or node.all_input_nodes[0] in fixed or node.name in file.tensors
        if not known:
            raise ExportError(
                f"the exporter dropped the quantiser behind {program.where(node)}; this is a bug "
                "in fxopt, please report it"
            )


def _feeds(program: Program, inputs: Sequence[torch.Tensor]) -> dict[str, Any]:
    """The inputs by the names that they have in the file."""
    names = program.interface.input_names
    return {n: tensor.cpu().numpy() for n, tensor in zip(names, inputs, strict=True)}


def _whole(grid: FakeQuantize, value: torch.Tensor, kind: ActivationType) -> Any:
    dtype = torch.uint8 if kind == "uint8" else torch.int8
    return (grid.integers(value) + SHIFT[kind]).to(dtype).cpu().numpy()


def end_to_end(
    program: Program, path: Path, batches: Iterable[Sequence[torch.Tensor]]
) -> Iterator[EndToEnd]:
    """Each floating output of the file beside torch's, on all of ``batches``."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = list(program.interface.output_names)
    wanted = {name: names.index(name) for name, _ in outputs_of(program)}
    narrow, wide = evaluation_module(program), copy.deepcopy(evaluation_module(program)).double()
    theirs = {name: OutputLoss() for name in wanted}
    own = {name: OutputLoss() for name in wanted}
    for inputs in batches:
        found = session.run(list(wanted), _feeds(program, inputs)) if wanted else []
        doubled = [t.double() if t.is_floating_point() else t for t in inputs]
        with torch.no_grad():
            here, exact = narrow(*inputs), None
            with suppress(RuntimeError):  # the forward casts, or makes float32 tensors
                exact = wide(*doubled)
        for (name, place), output in zip(wanted.items(), found, strict=True):
            theirs[name].add(here[place].cpu(), torch.as_tensor(output))
            if exact is not None:
                own[name].add(exact[place].cpu(), here[place].cpu().double())
    for name in wanted:
        sqnr, own_sqnr = (
            each[name].sqnr_db if each[name].count else math.nan for each in (theirs, own)
        )
        yield EndToEnd(name, sqnr, own_sqnr, theirs[name].top1, own[name].top1)
