"""What is asked of one model, stage by stage, in a process of its own.

Every stage adds its figures to the record as soon as it has them, so that a time limit or a crash
loses only what comes after. An answer is a number (an error) or a text (why there is none).
"""

from __future__ import annotations

import copy
import gc
import math
import resource
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

import fxopt
from fxopt.captured import to_module
from fxopt.errors import FxoptError, GuardError
from sweep import compare, subject
from sweep.subject import Arguments

Record = dict[str, Any]
Tell = Callable[[Record], None]


@dataclass(frozen=True)
class Questions:
    """What a sweep asks beyond the capture itself."""

    passes: str = "fold_conv_bn"
    onnx: bool = False
    peers: bool = True


def examine(spec: str, questions: Questions, tell: Tell) -> None:
    """Ask everything of the model ``spec``; ``tell`` is given each stage's part of the record."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with _stage("build", tell):
        model, example = subject.subject(spec)
        weights = sum(p.numel() for p in model.parameters())
        tell({"input": _shapes(example), "parameters": weights})
    with _stage("capture", tell):
        seconds, program = _timed(lambda: fxopt.capture(model, example, verify=False))
        opaque = {name: str(reason) for name, reason in program.opaque.items()}
        tell({"capture_s": seconds, "eval_only": program.modes.eval_only, "opaque": opaque})
    if questions.peers:
        _export_peer(model, example, tell)
    with _stage("equality", tell):
        _equality(model, to_module(program).eval(), example, tell)
    del program
    if questions.peers:
        _plain_fx(model, example, tell)
    if questions.passes:
        with _stage("passes", tell):
            rewritten = _passes(model, example, questions.passes, tell)
        if questions.onnx:
            with _stage("onnx", tell):
                tell({"onnx": _onnx(rewritten, example)})
    tell({"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "stage": "done"})


@contextmanager
def _stage(name: str, tell: Tell) -> Iterator[None]:
    tell({"stage": name})
    try:
        yield
    except Exception as error:
        kind = "refused" if isinstance(error, FxoptError) else "crashed"
        tell({kind: _told(error), "stage": name})
        if kind == "crashed":
            tell({"traceback": traceback.format_exc()[-3000:]})
        raise
    finally:
        gc.collect()


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]


def _shapes(example: Arguments) -> Any:
    return [[list(v.shape) for v in value] if isinstance(value, list) else list(value.shape)
            for value in example]  # fmt: skip


def _timed(action: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = action()
    return time.perf_counter() - started, result


def _equality(model: nn.Module, module: Any, example: Arguments, tell: Tell) -> None:
    """Equal in evaluation, at another batch size, at another size, and over a training step."""
    model.eval()
    tell({"eval": _same(model, module, example)})
    tell({"batch": _same(model, module, subject.batch_of(example, 3))})
    other = subject.wider(example)
    tell({"size": "no image" if other is None else _same(model, module, other)})
    if module.facts["modes"].eval_only:
        return
    batch = subject.batch_of(example, 2)
    try:
        theirs = compare.training_step(model, batch)
    except Exception as error:
        tell({"train": f"the model itself fails: {_told(error)}"})
        return
    ours = compare.training_step(module, batch)
    tell({"train": compare.error(theirs.outputs, ours.outputs)})
    tell({"gradients": compare.named_error(theirs.gradients, ours.gradients)})
    tell({"buffers": compare.named_error(theirs.buffers, ours.buffers)})
    model.eval()


def _same(model: nn.Module, module: Callable[..., Any], arguments: Arguments) -> float | str:
    """The error, or why the model or the module does not take these arguments."""
    try:
        theirs = compare.outputs(model, arguments)
    except Exception as error:
        return f"the model itself fails: {_told(error)}"
    try:
        return compare.error(theirs, compare.outputs(module, arguments))
    except GuardError as error:
        return f"guard: {_told(error)}"
    except Exception as error:
        return f"fails: {_told(error)}"


def _export_peer(model: nn.Module, example: Arguments, tell: Tell) -> None:
    """``torch.export`` of the model in evaluation; it keeps one mode only."""
    tell({"stage": "torch.export"})
    try:
        seconds, exported = _timed(lambda: torch.export.export(model.eval(), example))
        tell({"export_s": seconds, "export_eval": _same(model, exported.module(), example)})
    except Exception as error:
        tell({"export_eval": f"fails: {_told(error)}"})
    gc.collect()


def _plain_fx(model: nn.Module, example: Arguments, tell: Tell) -> None:
    """``torch.fx.symbolic_trace`` in evaluation, then asked for everything that capture is."""
    tell({"stage": "torch.fx"})
    try:
        traced = fx.symbolic_trace(copy.deepcopy(model.eval()))
    except Exception as error:
        tell({"fx_eval": f"fails: {_told(error)}"})
        return
    tell({"fx_eval": _same(model, traced, example)})
    tell({"fx_batch": _same(model, traced, subject.batch_of(example, 3))})
    batch = subject.batch_of(example, 2)
    try:
        ours = compare.training_step(traced, batch, gradients=False)
        theirs = compare.training_step(copy.deepcopy(model), batch, gradients=False)
        tell({"fx_train": compare.error(theirs.outputs, ours.outputs)})
    except Exception as error:
        tell({"fx_train": f"fails: {_told(error)}"})


def _passes(model: nn.Module, example: Arguments, passes: str, tell: Tell) -> nn.Module:
    """The way of a user: capture and passes, both verified."""
    seconds, module = _timed(lambda: fxopt.transform(model.eval(), passes, example))
    records = [
        {
            "name": record.name,
            "rewritten": len(record.rewritten),
            "declined": [f"{site.where or site.node}: {site.reason}" for site in record.declined],
            "error": record.verification.max_error if record.verification else None,
            "shipped": record.verification.shipped_error if record.verification else None,
            "method": record.verification.method if record.verification else "",
        }
        for record in fxopt.history(module)
    ]
    left = [
        node.name
        for node in module.graph.nodes
        if node.op == "call_module" and isinstance(module.get_submodule(node.target), _BatchNorm)
    ]
    had = sum(isinstance(m, _BatchNorm) for m in model.modules())
    tell({"transform_s": seconds, "passes": records, "norms": had, "norms_left": len(left)})
    tell({"rewritten_eval": _same(model, module, example)})
    return module


def _onnx(module: nn.Module, example: Arguments) -> float:
    with tempfile.TemporaryDirectory() as directory:
        report = fxopt.export_onnx(module, Path(directory) / "model.onnx")
    return max((deviation.error or 0.0 for deviation in report.deviations), default=math.nan)
