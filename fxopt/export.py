"""Writes a program as ONNX, and the file exists only if it computes what torch computes."""

from __future__ import annotations

import copy
import importlib
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from fxopt.capture import capture
from fxopt.captured import apply_flags, program_of
from fxopt.errors import ExportError, ExportMismatchError
from fxopt.files import scratch_beside
from fxopt.normfree.folding import folded_program
from fxopt.onnx_agreement import IntegerAgreement, integer_agreement
from fxopt.onnx_batch import BatchPlan, bound_of, depth, plan_batch, seeded
from fxopt.onnx_deviation import Deviation
from fxopt.onnx_floats import optimised
from fxopt.onnx_integer import (
    in_input_range,
    is_quantized,
    narrow_quantisers,
    with_integers,
)
from fxopt.onnx_report import IntegerReport, OnnxReport
from fxopt.onnx_run import Runner, deviation, own_rounding, run_file, run_torch, runner_of
from fxopt.onnx_whole import SHIFT, ActivationType
from fxopt.onnx_write import opset_in, shapes_in, write_onnx
from fxopt.patching.regions import unpatched
from fxopt.patching.unroll import tile_operators
from fxopt.program import Program, TensorType, tensor_types

MINIMUM_OPSET = 18
MANY = 2000
"""Operators of stages from which on their export takes minutes."""


def export_onnx(
    module: nn.Module | Program,
    path: str | os.PathLike[str],
    *,
    verify: bool = True,
    opset: int = MINIMUM_OPSET,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    activation_type: ActivationType = "uint8",
) -> OnnxReport:
    """Write ``module`` to ``path`` as ONNX, in eval mode, with a dynamic batch axis.

    Inputs and outputs bear the program's names; the batch is fixed only where a guard or the graph
    fixes it, and the other axes have the example's sizes. Layers with scaled weight standardisation
    are written as plain ones, quantised programs as integers: QuantizeLinear and DequantizeLinear
    around operators, int8 weights, int32 biases. The file is checked by ``onnx.checker``
    and, with ``verify``, run in onnxruntime against torch on seeded inputs at two batch sizes; a
    quantised one operator by operator (:mod:`fxopt.onnx_agreement`).

    Args:
        module: what :func:`fxopt.transform` gave, a :class:`~fxopt.program.Program`, or any module
            (it is captured first). It is not changed.
        path: the file; its directory must exist. A file that is there is replaced at the end.
        verify: whether the file is run before it is put in place.
        opset: version of the operator set, 18 or later.
        example_inputs: one tensor or a tuple, where the module has not been captured or other
            sizes are wanted.
        example_kwargs: the same, by keyword.
        activation_type: of a quantised program, ``uint8`` or ``int8`` (which onnxruntime runs more
            slowly); the quantisers are the same.

    Raises:
        ExportError: the path cannot be written, a package is missing, an operator has no ONNX
            form, the program has no tensor output, or onnxruntime cannot run the file.
        ExportMismatchError: the file runs and departs from torch; nothing is written.
        CaptureError: ``module`` had to be captured and could not be.
    """
    target = Path(path)
    if activation_type not in SHIFT:
        raise ExportError(f"activation_type is uint8 or int8, not {activation_type!r}")
    if opset < MINIMUM_OPSET:
        raise ExportError(f"opset {opset} is too old for the exporter; ask for 18 or later")
    with scratch_beside(target) as scratch:
        _require_packages()
        program, notes = _whole_stages(program_to_write(module, example_inputs, example_kwargs))
        _tell_of_size(program)
        example = example_of(program, example_inputs, example_kwargs)
        plan = plan_batch(program, example)
        graph_module, output_names, left_out = _for_inference(program)
        notes += left_out
        if plan.reason:
            notes.append(plan.reason)
        draft = scratch / target.name
        inputs = seeded(example, plan.batched, plan.sizes[0])
        names = (program.interface.input_names, output_names)
        open_batch = [plan.dynamic and batched for batched in plan.batched]
        written = _in_plain_operators(program, graph_module, activation_type)
        write_onnx(written, inputs, *names, open_batch, opset, draft)
        shapes, written_opset = shapes_in(draft), opset_in(draft)
        runtime, deviations = "", tuple[Deviation, ...]()
        integers = None
        if is_quantized(program):
            integers = IntegerReport(activation_type, narrow_quantisers(program))
        if verify:
            run, runtime, remark = runner_of(draft)
            notes += [remark] if remark else []
            if integers is None:
                deviations = _compare(program, graph_module, run, output_names, plan, example)
                refuse_mismatch(deviations, target)
            else:
                batches = [
                    in_input_range(program, seeded(example, plan.batched, size))
                    for size in plan.sizes
                ]
                if example_inputs is not None or example_kwargs:
                    batches.insert(0, example)
                agreement = integer_agreement(program, draft, activation_type, batches)
                refuse_steps(agreement, target)
                refuse_mismatch(agreement.outputs, target)
                integers = replace(integers, agreement=agreement, optimised=optimised(draft))
        size = sum(file.stat().st_size for file in scratch.iterdir())
        # The weights first: a model file without them would be broken.
        for file in sorted(scratch.iterdir(), key=lambda file: file.name == target.name):
            os.replace(file, target.parent / file.name)
    return OnnxReport(
        path=str(path),
        opset=written_opset,
        bytes=size,
        inputs=shapes[0],
        outputs=shapes[1],
        dynamic_batch=plan.dynamic,
        runtime=runtime,
        deviations=deviations,
        guards_not_carried=_not_carried(program, plan),
        notes=tuple(notes),
        integers=integers,
    )


def _whole_stages(program: Program) -> tuple[Program, list[str]]:
    """Of a quantised program its patched stages as they were, and that it says so."""
    whole = unpatched(program) if is_quantized(program) else program
    note = "patched stages are written whole: int8 runtimes have no integer kernels of tiles"
    return whole, [] if whole is program else [note]


def _in_plain_operators(
    program: Program, graph_module: fx.GraphModule, kind: ActivationType
) -> fx.GraphModule:
    """What the exporter is given for ``graph_module``."""
    if is_quantized(program):
        if coarsest_dtype(program) != torch.float32:
            raise ExportError(
                "a quantised program is written in float32 beside its integers, and this one is "
                f"{str(coarsest_dtype(program)).removeprefix('torch.')}; convert it with .float()"
            )
        return with_integers(program, _for_inference(program)[0], kind)
    plain = folded_program(program)
    return graph_module if plain is program else _for_inference(plain)[0]


def refuse_steps(agreement: IntegerAgreement, target: Path) -> None:
    """Raise ``ExportMismatchError`` for the first operator that is off by more than one step."""
    for wrong in (each for each in agreement.operators if each.worst > 1):
        raise ExportMismatchError(
            f"the operator at {wrong.where} of the file departs from torch by {wrong.worst} steps "
            f"of its grid, where one is rounding; '{target}' is not written"
        )


def _tell_of_size(program: Program) -> None:
    count = tile_operators(program)
    if count > MANY:
        warnings.warn(
            f"patched stages are written out tile by tile, here as {count:,} operators: the export "
            "takes minutes and the file is large; a coarser grid has fewer",
            stacklevel=3,
        )


def _require_packages() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ExportError(
                f"ONNX export needs the package '{package}' ({error}); "
                "pip install 'fxopt[onnx]' installs it"
            ) from error


def program_to_write(
    module: nn.Module | Program, example_inputs: Any, example_kwargs: Mapping[str, Any] | None
) -> Program:
    """The program of ``module``, which is captured where that has not been done."""
    if isinstance(module, Program):
        return module
    return program_of(module) or capture(module, example_inputs, example_kwargs)


def example_of(
    program: Program, example_inputs: Any, example_kwargs: Mapping[str, Any] | None
) -> list[torch.Tensor]:
    """One tensor an input: the user's, or of the captured types (integers are 0 and 1)."""
    if example_inputs is None and not example_kwargs:
        return [
            (torch.arange(type_.elements) % 2).reshape(type_.shape).to(type_.dtype)
            for type_ in program.inputs().values()
        ]
    positional = () if example_inputs is None else example_inputs
    if isinstance(positional, torch.Tensor):
        positional = (positional,)
    tensors = program.interface.flatten(tuple(positional), dict(example_kwargs or {}))
    program.guards.check(tensors)
    return [tensor.detach().cpu() for tensor in tensors]


def _for_inference(program: Program) -> tuple[fx.GraphModule, tuple[str, ...], list[str]]:
    """A copy in eval mode whose outputs are tensors alone, their names, and what was left out."""
    graph_module = copy.deepcopy(program.graph_module).cpu().eval()
    apply_flags(graph_module, {path: flags[False] for path, flags in program.modes.fixed.items()})
    notes = []
    output = next(iter(reversed(graph_module.graph.nodes)))
    kept, names = [], []
    for value, name in zip(output.args[0], program.interface.output_names, strict=True):
        if isinstance(value, fx.Node) and isinstance(program.types[value.name], TensorType):
            kept.append(value)
            names.append(name)
        else:
            notes.append(f"output '{name}' is not a tensor and is not in the file")
    if not kept:
        raise ExportError(f"{program.name} returns no tensor, so there is nothing to write")
    output.args = (tuple(kept),)
    for node in reversed(graph_module.graph.nodes):
        if node.op == "call_method" and node.target == "copy_":
            notes.append(f"the file does not write the buffer '{node.args[0]}' back, forward does")
            graph_module.graph.erase_node(node)
    graph_module.recompile()
    return graph_module, tuple(names), notes


def _compare(
    program: Program,
    graph_module: fx.GraphModule,
    run: Runner,
    output_names: Sequence[str],
    plan: BatchPlan,
    example: Sequence[torch.Tensor],
) -> tuple[Deviation, ...]:
    coarsest = coarsest_dtype(program)
    bound = bound_of(coarsest, depth(program))
    found: list[Deviation] = []
    for size in plan.sizes:
        inputs = seeded(example, plan.batched, size)
        reference = run_torch(graph_module, inputs)
        outputs = run_file(run, program.interface.input_names, inputs)
        pairs = list(zip(output_names, reference, outputs, strict=True))
        here = [deviation(name, size, ours, theirs, bound) for name, ours, theirs in pairs]
        if any(map(_too_far, here)):
            # Half of the digits must agree, however much the network magnifies rounding.
            most = math.sqrt(torch.finfo(coarsest).eps)
            own = own_rounding(graph_module, inputs, reference)
            here = [
                deviation(name, size, ours, theirs, max(bound, min(4 * rounding, most)))
                for (name, ours, theirs), rounding in zip(pairs, own, strict=True)
            ]
        found += here
    return tuple(found)


def coarsest_dtype(program: Program) -> torch.dtype:
    """The floating dtype in ``program`` that rounds most."""
    types = [t.dtype for value in program.types.values() for t in tensor_types(value)]
    dtypes = {*types, *(p.dtype for p in program.graph_module.parameters())}
    floats = [dtype for dtype in dtypes if dtype.is_floating_point]
    return max(floats, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def _too_far(deviation: Deviation) -> bool:
    return deviation.error is not None and not deviation.error <= deviation.bound


def refuse_mismatch(deviations: Sequence[Deviation], target: Path) -> None:
    """Raise ``ExportMismatchError`` for the first output that is farther off than its bound."""
    for wrong in filter(_too_far, deviations):
        how = wrong.remark or f"departs from torch by {wrong.error:.1e} (bound {wrong.bound:.1e})"
        raise ExportMismatchError(
            f"output '{wrong.output}' of the file {how} at batch {wrong.batch}; "
            f"'{target}' is not written"
        )


def _not_carried(program: Program, plan: BatchPlan) -> tuple[str, ...]:
    constants = [
        f"{leaf.text} is {leaf.constant!r}"
        for leaf in program.interface.leaves
        if not leaf.is_tensor
    ]
    return (*map(str, plan.open_guards), *constants)
