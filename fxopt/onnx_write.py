"""The exporter's own work: from a graph module to an ONNX file that ``onnx.checker`` accepts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxopt.errors import ExportError
from fxopt.isolation import silenced
from fxopt.onnx_report import Shape
from fxopt.onnx_whole import NAME

LARGEST_FILE = 2**31 - 1
"""Bytes that one protobuf message may hold; weights beyond go to a file beside it."""


def _export(
    graph_module: fx.GraphModule,
    inputs: Sequence[torch.Tensor],
    names: tuple[Sequence[str], Sequence[str]],
    axes: tuple[dict[int, str] | None, ...],
    opset: int,
    path: Path,
) -> None:
    try:
        written = torch.onnx.export(
            graph_module,
            tuple(inputs),
            None,
            input_names=names[0],
            output_names=names[1],
            opset_version=opset,
            dynamo=True,
            dynamic_shapes=axes,
        )
    except Exception as error:
        raise ExportError(_operator_refused(error)) from error
    assert written is not None
    _name(written.model)
    _strip(written.model)
    weights = sum(t.nbytes for t in graph_module.state_dict().values())
    written.save(path, external_data=weights > 0.9 * LARGEST_FILE)


def _name(model: Any) -> None:
    """Give the nodes that were told a name theirs."""
    for node in model.graph.all_nodes():
        named = node.attributes.pop(NAME, None)
        if named is not None:
            node.name = named.as_string()


def _strip(model: Any) -> None:
    """Remove what the exporter remembers of the user's files: paths, stack traces, module names."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        values += node.outputs
    for value in values:
        value.metadata_props.clear()


def _operator_refused(error: BaseException) -> str:
    """The exporter's failure in one line, the operator first where the exporter names it."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    root = (str(causes[-1]).splitlines() or [type(causes[-1]).__name__])[0]
    for cause in reversed(causes):
        found = re.search(r"OpOverload\(op='([\w.]+)'|target=torch\.ops\.([\w.]+)", str(cause))
        if found:
            operator = found[1] or found[2]
            return f"the operator '{operator}' cannot be written as ONNX: {root}"
    return f"torch's ONNX exporter failed: {type(causes[-1]).__name__}: {root}"


def _check(path: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ExportError(f"onnx.checker refuses the file: {first}") from error


def write_onnx(
    graph_module: fx.GraphModule,
    inputs: Sequence[torch.Tensor],
    input_names: Sequence[str],
    output_names: Sequence[str],
    open_batch: Sequence[bool],
    opset: int,
    path: Path,
) -> None:
    """Write ``graph_module`` to ``path``; axis 0 is open where ``open_batch`` says so of an input.

    What the exporter prints, warns and logs is dropped, and the random state is kept.

    Raises:
        ExportError: the exporter fails (the operator is named) or ``onnx.checker`` does.
    """
    with torch.random.fork_rng(devices=[]), silenced():
        axes = tuple({0: "batch"} if is_open else None for is_open in open_batch)
        _export(graph_module, inputs, (input_names, output_names), axes, opset, path)
        _check(path)


def opset_in(path: Path) -> int:
    """The version of the operator set that the file names."""
    import onnx

    sets = onnx.load(str(path), load_external_data=False).opset_import
    return next(int(each.version) for each in sets if each.domain == "")


def shapes_in(path: Path) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """``(inputs, outputs)``: the shape of each by name, as the file states it."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph

    def shape(value: Any) -> Shape:
        return tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)

    return {v.name: shape(v) for v in graph.input}, {v.name: shape(v) for v in graph.output}
