"""Runs an ONNX file beside the graph that it was written from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxopt.errors import ExportError
from fxopt.onnx_deviation import Deviation

Runner = Callable[[Mapping[str, Any]], Any]
"""NumPy arrays by input name to NumPy arrays in the order of the outputs."""


def runner_of(path: Path) -> tuple[Runner, str, str]:
    """``(run, what runs it, note)``: onnxruntime on the CPU, or onnx's reference evaluator.

    onnxruntime has no float64 convolution; the evaluator that defines ONNX runs such a file, on
    NumPy.

    Raises:
        ExportError: onnxruntime refuses the file for another reason.
    """
    import onnx.reference
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it has to say comes back as an exception
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented as error:
        evaluator = onnx.reference.ReferenceEvaluator(str(path))
        note = f"onnxruntime cannot run this file, so onnx's evaluator did: {_reason(error)}"
        return lambda feeds: evaluator.run(None, dict(feeds)), "onnx reference evaluator", note
    except Exception as error:
        raise ExportError(
            f"onnxruntime refuses the file: {_reason(error)}; verify=False writes it unchecked"
        ) from error
    return lambda feeds: session.run(None, dict(feeds)), "onnxruntime", ""


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].split(" : ")[-1]


def run_torch(
    graph_module: fx.GraphModule, inputs: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """The flat outputs of ``graph_module``, without gradients."""
    with torch.no_grad():
        outputs: tuple[torch.Tensor, ...] = graph_module(*inputs)
    return outputs


def run_file(
    run: Runner, names: Sequence[str], inputs: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """The outputs that the file computes for ``inputs``.

    Raises:
        ExportError: the file does not run.
    """
    try:
        feeds = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return tuple(torch.as_tensor(output) for output in run(feeds))
    except Exception as error:
        raise does_not_run(inputs, _reason(error)) from error


def does_not_run(inputs: Sequence[torch.Tensor], reason: str) -> ExportError:
    """That a written file fails on ``inputs``."""
    sizes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs)
    return ExportError(
        f"the file does not run on inputs of {sizes}: {reason}; verify=False writes it unchecked"
    )


def deviation(
    name: str, batch: int, reference: torch.Tensor, found: torch.Tensor, bound: float
) -> Deviation:
    """How far ``found`` is from torch's ``reference``, against ``bound``."""
    if reference.shape != found.shape:
        shapes = f"{tuple(found.shape)} where torch gives {tuple(reference.shape)}"
        return Deviation(name, batch, float("inf"), bound, f"has shape {shapes}")
    if reference.numel() == 0:
        return Deviation(name, batch, None, bound, "has no elements")
    if not reference.is_floating_point():
        return Deviation(name, batch, float((reference != found).double().mean()), DECISIONS)
    if not bool(reference.isfinite().all()):
        return Deviation(name, batch, None, bound, "torch's is not finite: no evidence")
    largest = reference.double().abs().max()
    if largest == 0:
        return Deviation(name, batch, None, bound, "torch's is all zero: no evidence")
    error = (reference.double() - found.double()).abs().max() / largest
    return Deviation(name, batch, float(error), bound)


DECISIONS = 1e-3
"""Of an output of integers, one element in a thousand may fall otherwise: it is a decision (an
argmax, a comparison, a rounding) on numbers that both sides round."""


def own_rounding(
    graph_module: fx.GraphModule,
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
) -> list[float]:
    """Distance of torch's own ``outputs`` to those of the same graph in float64.

    Relative to each output's largest value. It tells a network that magnifies rounding from a file
    that is wrong; 0, which excuses nothing, where the graph does not run in float64.
    """
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    try:
        exact = run_torch(copy.deepcopy(graph_module).double(), wide)
    except RuntimeError:
        return [0.0] * len(outputs)
    return [
        float((out.double() - ref.double()).abs().max() / ref.double().abs().max())
        if ref.is_floating_point() and ref.numel()
        else 0.0
        for out, ref in zip(outputs, exact, strict=True)
    ]
