"""Writes a program with ``torch.export.save``, and the file exists only if it computes the same."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxopt.captured import apply_flags
from fxopt.errors import ExportError
from fxopt.export import coarsest_dtype, example_of, program_to_write, refuse_mismatch
from fxopt.files import scratch_beside
from fxopt.graphs import assemble, copy_tree, share_tree
from fxopt.interface import Call
from fxopt.isolation import isolated, silenced
from fxopt.normfree.folding import folded_program
from fxopt.onnx_batch import BatchPlan, bound_of, depth, plan_batch, seeded
from fxopt.onnx_deviation import Deviation
from fxopt.onnx_report import Shape, deviations_table, shape_text
from fxopt.onnx_run import deviation, does_not_run
from fxopt.program import Program

SUFFIX = ".pt2"


@dataclass(frozen=True)
class Pt2Report:
    """A written ``.pt2`` file.

    Attributes:
        path: the file, as it was asked for.
        bytes: its size.
        inputs: shape of every input by name; an open axis carries its name (``batch``).
        dynamic_batch: whether the file takes any batch size.
        deviations: per output and batch size; empty if it was not run (``verify=False``).
        guards_not_carried: decisions that the captured module checks on entry and the file does
            not.
        notes: sentences for the reader.
    """

    path: str
    bytes: int
    inputs: Mapping[str, Shape]
    dynamic_batch: bool
    deviations: tuple[Deviation, ...]
    guards_not_carried: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report for JSON."""
        return {
            "path": self.path,
            "bytes": self.bytes,
            "inputs": {name: list(shape) for name, shape in self.inputs.items()},
            "dynamic_batch": self.dynamic_batch,
            "deviations": [vars(deviation) for deviation in self.deviations],
            "guards_not_carried": list(self.guards_not_carried),
            "notes": list(self.notes),
        }

    def text(self) -> str:
        """The report as lines of text."""
        batch = "any batch size" if self.dynamic_batch else "this batch size only"
        lines = [f"torch.export: {self.path} ({self.bytes:,} bytes, {batch}, evaluation only)"]
        lines += [f"  input {name}: {shape_text(shape)}" for name, shape in self.inputs.items()]
        if self.deviations:
            lines += ["the file against the program, relative to each output's largest value:"]
            lines += [deviations_table(self.deviations)]
        else:
            lines += ["not run against the program (verification is off)"]
        lines += [f"guard not in the file: {guard}" for guard in self.guards_not_carried]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def export_pt2(
    module: nn.Module | Program,
    path: str | os.PathLike[str],
    *,
    verify: bool = True,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> Pt2Report:
    """Write ``module`` to ``path`` with ``torch.export``, for evaluation, with a dynamic batch.

    ``torch.export.load(path).module()`` is called as the user's model is, and its state_dict has
    the user's keys; layers with scaled weight standardisation are plain ones there. The batch is
    fixed only where a guard, the graph or torch.export fixes it, and the other axes have the
    example's sizes. With ``verify`` the file is loaded and run beside the program on seeded inputs
    at two batch sizes.

    Args:
        module: what :func:`fxopt.transform` gave, a :class:`~fxopt.program.Program`, or any module
            (it is captured first). It is not changed.
        path: the file, ending in ``.pt2``; its directory must exist. A file that is there is
            replaced at the end.
        verify: whether the file is run before it is put in place.
        example_inputs: one tensor or a tuple, where the module has not been captured or other
            sizes are wanted.
        example_kwargs: the same, by keyword.

    Raises:
        ExportError: the path cannot be written, or torch.export cannot write the program.
        ExportMismatchError: the file runs and departs from the program; nothing is written.
        CaptureError: ``module`` had to be captured and could not be.
    """
    target = Path(path)
    check_suffix(path)
    with scratch_beside(target) as scratch, isolated():
        program = program_to_write(module, example_inputs, example_kwargs)
        example = example_of(program, example_inputs, example_kwargs)
        plan = plan_batch(program, example)
        model, plain = _for_evaluation(program), folded_program(program)
        written = model if plain is program else _for_evaluation(plain)
        exported = _exported(written, program, plan, example)
        if plan.dynamic and not _is_open(exported):
            sizes = (_batch(example, plan),)
            reason = "the batch size is fixed by torch.export"
            plan = BatchPlan(sizes, plan.batched, reason=reason)
            exported = _exported(written, program, plan, example)
        draft = scratch / target.name
        _save(exported, draft)
        deviations = _compare(model, program, plan, example, draft) if verify else ()
        refuse_mismatch(deviations, target)
        size = draft.stat().st_size
        os.replace(draft, target)
    shapes = _shapes(exported)
    return Pt2Report(
        path=str(path),
        bytes=size,
        inputs=dict(zip(program.interface.input_names, shapes, strict=True)),
        dynamic_batch=plan.dynamic,
        deviations=deviations,
        guards_not_carried=tuple(map(str, plan.open_guards)),
        notes=(plan.reason,) if plan.reason else (),
    )


def check_suffix(path: str | os.PathLike[str]) -> None:
    """Return if ``path`` ends as ``torch.export.load`` wants it.

    Raises:
        ExportError: it does not.
    """
    if Path(path).suffix != SUFFIX:
        raise ExportError(f"cannot write '{path}': torch.export's files end in {SUFFIX}")


def _for_evaluation(program: Program) -> nn.Module:
    """The program called as the user's model is, without guards, under the model's class name."""
    # torch 2.13's own copy of a graph module makes every buffer persistent.
    tree, graph = copy_tree(program.graph_module, {}), copy.deepcopy(program.graph_module.graph)
    graph_module = assemble(tree, graph, fx.GraphModule).cpu().eval()
    apply_flags(graph_module, {path: flags[False] for path, flags in program.modes.fixed.items()})
    run: Any = type(graph_module).forward
    interface = program.interface

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return interface.unflatten(run(self, *interface.flatten(args, kwargs)))

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    signature = inspect.Signature([own, *interface.signature.parameters.values()])
    forward.__signature__ = signature  # type: ignore[attr-defined]
    model: nn.Module = type(program.name, (nn.Module,), {"forward": forward})()
    vars(model).update(vars(share_tree(graph_module)))
    return model.eval()


def _call(program: Program, tensors: Sequence[torch.Tensor]) -> Any:
    """``(args, kwargs)`` of the user's call with these tensors."""
    interface = program.interface
    constants = tuple(leaf.constant for leaf in interface.leaves)
    call = Call(interface.signature, interface.in_spec, interface.leaves, constants)
    return call.arguments(tensors)


def _exported(
    model: nn.Module, program: Program, plan: BatchPlan, example: Sequence[torch.Tensor]
) -> torch.export.ExportedProgram:
    inputs = seeded(example, plan.batched, plan.sizes[0])
    args, kwargs = _call(program, inputs)
    collection: Any = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for tensor, batched in zip(inputs, plan.batched, strict=True):
        if plan.dynamic and batched:
            collection[tensor] = {0: torch.export.Dim.AUTO}
    try:
        with silenced(), torch.no_grad():
            shapes = collection.dynamic_shapes(model, args, kwargs)
            exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    except Exception as error:
        raise ExportError(f"torch.export cannot write {program.name}: {_told(error)}") from error
    exported.example_inputs = _call(program, example)
    return exported


def _save(exported: torch.export.ExportedProgram, draft: Path) -> None:
    try:
        with silenced():
            torch.export.save(exported, draft)
    except Exception as error:
        raise ExportError(f"torch.export.save fails: {_told(error)}") from error


def _told(error: Exception) -> str:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {reason}"


def _compare(
    model: nn.Module,
    program: Program,
    plan: BatchPlan,
    example: Sequence[torch.Tensor],
    draft: Path,
) -> tuple[Deviation, ...]:
    """The file beside the model; they run the same operators in the same order, so 0 is usual."""
    bound = bound_of(coarsest_dtype(program), depth(program))
    found: list[Deviation] = []
    with silenced():
        loaded = torch.export.load(draft).module()
    for size in plan.sizes:
        inputs = seeded(example, plan.batched, size)
        sides = [_outputs(side, program, inputs) for side in (model, loaded)]
        for name, ours, theirs in zip(program.interface.output_names, *sides, strict=True):
            if isinstance(ours, torch.Tensor):
                found.append(deviation(name, size, ours, theirs, bound))
    return tuple(found)


def _outputs(side: nn.Module, program: Program, inputs: Sequence[torch.Tensor]) -> list[Any]:
    args, kwargs = _call(program, [tensor.clone() for tensor in inputs])
    try:
        with torch.no_grad():
            return pytree.tree_leaves(side(*args, **kwargs))
    except Exception as error:
        raise does_not_run(inputs, _told(error)) from error


def _is_open(exported: torch.export.ExportedProgram) -> bool:
    return any("batch" in shape for shape in _shapes(exported))


def _batch(example: Sequence[torch.Tensor], plan: BatchPlan) -> int:
    pairs = zip(example, plan.batched, strict=True)
    return next(tensor.shape[0] for tensor, batched in pairs if batched)


def _size(size: Any) -> int | str:
    """A number, also where torch kept a symbol for it that has come to be one."""
    known = size if isinstance(size, int) else size.node.maybe_as_int()
    return "batch" if known is None else int(known)


def _shapes(exported: torch.export.ExportedProgram) -> list[Shape]:
    """The shape of every input that is a tensor, as the program has it."""
    values = {node.name: node.meta.get("val") for node in exported.graph.nodes}
    tensors = [values.get(name) for name in exported.graph_signature.user_inputs]
    return [
        tuple(map(_size, tensor.shape)) for tensor in tensors if isinstance(tensor, torch.Tensor)
    ]
