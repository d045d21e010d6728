"""A model quantised on pictures, judged on pictures, and written: what ``fxopt quantize`` does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxopt.capture import capture
from fxopt.errors import PreconditionError
from fxopt.export import export_onnx
from fxopt.onnx_agreement import EndToEnd, end_to_end
from fxopt.onnx_report import OnnxReport
from fxopt.onnx_whole import ActivationType
from fxopt.passes import FakeQuantization
from fxopt.pictures import Pictures
from fxopt.program import Program
from fxopt.proof.running import evaluation_module
from fxopt.quantizing.fidelity import Loss
from fxopt.results import PassRecord
from fxopt.rewrite import run_pass


@dataclass(frozen=True)
class Judged:
    """A quantised network beside the one in float, over pictures.

    Attributes:
        pictures: how many.
        runtime: what ran the quantised network, ``onnxruntime`` or ``torch``.
        sqnr_db: of all logits; None where they are equal.
        agreement: share of pictures with the same likeliest class.
        top1, top5: shares that are right, before and after; None without labels.
    """

    pictures: int
    runtime: str
    sqnr_db: float | None
    agreement: float
    top1: tuple[float, float] | None
    top5: tuple[float, float] | None


@dataclass(frozen=True)
class Quantization:
    """What came of quantising a model.

    Attributes:
        model: its class.
        record: of the pass; its evidence has every tensor's grid and loss.
        judged: None where the model has no output of classes.
        onnx: the file, where one was written.
        executors: the file beside torch, on the pictures.
        notes: sentences for the reader.
    """

    model: str
    record: PassRecord
    judged: Judged | None
    onnx: OnnxReport | None
    executors: tuple[EndToEnd, ...] = ()
    notes: tuple[str, ...] = ()


def quantize(
    module: nn.Module,
    calibration: Pictures,
    *,
    test: Pictures | None = None,
    options: Mapping[str, Any] | None = None,
    onnx: str | os.PathLike[str] | None = None,
    activation_type: ActivationType = "uint8",
    example: tuple[torch.Tensor, ...] | None = None,
    verify: bool = True,
    begin: Callable[[], None] = lambda: None,
) -> Quantization:
    """Fold and quantise ``module``, judge it on pictures, and write it as integer ONNX.

    Args:
        module: of one input ``(N, C, H, W)``; it is not changed.
        calibration: what the ranges come from.
        test: what it is judged on; the calibration's own without it.
        options: of the pass ``fake_quantize``, but for ``calibration`` and ``fold``.
        onnx: the file to write.
        activation_type: of the file.
        example: what it is captured with; the first pictures without it.
        verify: whether capture, folding and the file are compared.
        begin: is called at each step.

    Raises:
        FxoptError: as capture, the pass and the export do.
    """
    begin()
    given = example or (next(iter(calibration.batches(1)))[0],)
    program = capture(module, given, verify=verify)
    _check_inputs(program)
    begin()
    which = FakeQuantization(calibration=calibration, fold="auto", **dict(options or {}))  # type: ignore[arg-type]
    result = run_pass(which, program, verify=verify)
    begin()
    written = None
    if onnx is not None:
        written = export_onnx(
            result.after, onnx, verify=verify, example_inputs=given, activation_type=activation_type
        )
    begin()
    judging = calibration if test is None else test
    executors: tuple[EndToEnd, ...] = ()
    if onnx is not None:
        batches = ([each[0]] for each in judging.batches())
        executors = tuple(end_to_end(result.after, Path(onnx), batches))
    notes = list(_notes(judging, test))
    judged = _judge(program, result.after, judging, onnx, notes)
    return Quantization(program.name, result.record, judged, written, executors, tuple(notes))


def _notes(pictures: Pictures, test: Pictures | None) -> Iterator[str]:
    if test is None:
        yield "judged on the pictures that calibrated it; --test takes others"
    if pictures.labels is None:
        yield "the pictures have no labels, so there is agreement and no accuracy"


@dataclass
class _Counts:
    agreeing: int = 0
    right: dict[int, list[int]] = field(default_factory=lambda: {1: [0, 0], 5: [0, 0]})

    def add(self, was: torch.Tensor, now: torch.Tensor, labels: torch.Tensor | None) -> None:
        self.agreeing += int((was.argmax(1) == now.argmax(1)).sum())
        if labels is None:
            return
        for most, counts in self.right.items():
            for place, logits in enumerate((was, now)):
                best = logits.topk(min(most, logits.shape[1]), 1).indices
                counts[place] += int((best == labels[:, None]).any(1).sum())


def _judge(
    before: Program, after: Program, pictures: Pictures, onnx: Any, notes: list[str]
) -> Judged | None:
    types = [before.types[node.name] for node in before.output_node().all_input_nodes]
    if not types or len(types[0].shape) != 2:
        notes.append("the first output is no table of classes, so nothing is judged by class")
        return None
    classes = types[0].shape[1]
    labels = pictures.labels
    if labels is not None and max(labels) >= classes:
        notes.append(
            f"the labels go up to {max(labels)} and the model has {classes} classes: not used"
        )
        labels = None
    run = _runner(after, onnx)
    loss, counts, plain = Loss(), _Counts(), evaluation_module(before)
    for batch in pictures.batches():
        with torch.no_grad():
            was = plain(batch[0])[0]
        now = run(batch[0])
        loss.add(was, now, None)
        counts.add(was, now, batch[1] if labels is not None else None)
    count = len(pictures)

    def shares(most: int) -> tuple[float, float] | None:
        before, after = (right / count for right in counts.right[most])
        return (before, after) if labels is not None else None

    runtime = "torch" if onnx is None else "onnxruntime"
    agreement = counts.agreeing / count
    return Judged(count, runtime, loss.sqnr_db, agreement, shares(1), shares(5))


def _runner(program: Program, onnx: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The first output of the file, or of the program where there is none."""
    if onnx is None:
        module = evaluation_module(program)

        def in_torch(images: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                result: torch.Tensor = module(images)[0]
            return result

        return in_torch
    import onnxruntime

    session = onnxruntime.InferenceSession(Path(onnx), providers=["CPUExecutionProvider"])
    (name,) = program.inputs()
    output = program.interface.output_names[0]
    return lambda images: torch.as_tensor(session.run([output], {name: images.numpy()})[0])


def _check_inputs(program: Program) -> None:
    names = list(program.inputs())
    if len(names) != 1:
        raise PreconditionError(
            f"{program.name} takes {len(names)} inputs ({', '.join(names)}) and pictures are one; "
            "quantise it in Python with the pass fake_quantize"
        )
