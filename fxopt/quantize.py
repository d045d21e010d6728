"""A model quantised on pictures, judged on pictures, and written: what ``fxopt quantize`` does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxopt.capture import capture
from fxopt.errors import PreconditionError
from fxopt.export import export_onnx
from fxopt.files import scratch_beside
from fxopt.onnx_agreement import EndToEnd, end_to_end
from fxopt.onnx_report import OnnxReport
from fxopt.onnx_whole import ActivationType
from fxopt.passes import FakeQuantization
from fxopt.pictures import Pictures
from fxopt.program import Program
from fxopt.proof.running import evaluation_module
from fxopt.quantizing.fidelity import OutputLoss, outputs_of
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
        verify: whether capture, folding and the file are compared.
        begin: is called at each step.

    Raises:
        FxoptError: as capture, the pass and the export do.
    """
    begin()
    given = (next(iter(calibration.batches(1)))[0],)
    program = capture(module, given, verify=verify)
    _check_inputs(program)
    begin()
    which = FakeQuantization(calibration=calibration, fold="auto", **dict(options or {}))  # type: ignore[arg-type]
    result = run_pass(which, program, verify=verify)
    judging = calibration if test is None else test
    notes = list(_notes(judging, test))
    if onnx is None:
        begin()
        begin()
        judged = _judge(program, result.after, judging, None, notes)
        return Quantization(program.name, result.record, judged, None, (), tuple(notes))
    target = Path(onnx)
    with scratch_beside(target) as scratch:
        draft = scratch / target.name
        begin()
        written = export_onnx(
            result.after, draft, verify=verify, example_inputs=given,
            activation_type=activation_type,
        )  # fmt: skip
        begin()
        batches = ([images] for images in _fitting(program, judging))
        executors = tuple(end_to_end(result.after, draft, batches))
        judged = _judge(program, result.after, judging, draft, notes)
        # the file appears once all that is said of it is known
        for file in sorted(scratch.iterdir(), key=lambda file: file == draft):
            os.replace(file, target.parent / file.name)
    report = replace(written, path=str(onnx))
    return Quantization(program.name, result.record, judged, report, executors, tuple(notes))


def _fitting(program: Program, pictures: Pictures) -> Iterator[torch.Tensor]:
    """The pictures batch by batch.

    Raises:
        PreconditionError: they are of another size than the model was captured with.
    """
    (wanted,) = (kind.shape[1:] for kind in program.inputs().values())
    for batch in pictures.batches():
        if tuple(batch[0].shape[1:]) != wanted:
            sizes = ["x".join(map(str, shape)) for shape in (batch[0].shape[1:], wanted)]
            raise PreconditionError(
                f"the pictures of '{pictures.source}', to judge on, are {sizes[0]}, and the model "
                f"was quantised for {sizes[1]}; give pictures of that size"
            )
        yield batch[0]


def _notes(pictures: Pictures, test: Pictures | None) -> Iterator[str]:
    if test is None:
        yield "judged on the pictures that calibrated it; --test takes others"
    if pictures.labels is None:
        yield "the pictures have no labels, so there is agreement and no accuracy"


@dataclass
class _Counts:
    right: dict[int, list[int]] = field(default_factory=lambda: {1: [0, 0], 5: [0, 0]})

    def add(self, was: torch.Tensor, now: torch.Tensor, labels: torch.Tensor) -> None:
        for most, counts in self.right.items():
            for place, logits in enumerate((was, now)):
                best = logits.topk(min(most, logits.shape[1]), 1).indices
                counts[place] += int((best == labels[:, None]).any(1).sum())


def _judge(
    before: Program, after: Program, pictures: Pictures, onnx: Path | None, notes: list[str]
) -> Judged | None:
    outputs = list(outputs_of(before))
    shape: tuple[int, ...] = before.types[outputs[0][1].name].shape if outputs else ()
    if len(shape) != 2 or shape[1] < 2:
        notes.append("the first output is no table of classes, so nothing is judged by class")
        return None
    name, classes = outputs[0][0], shape[1]
    labels = pictures.labels
    if labels is not None and not 0 <= min(labels) <= max(labels) < classes:
        notes.append(
            f"the labels are from {min(labels)} to {max(labels)} and the model has {classes} "
            "classes: not used"
        )
        labels = None
    place = before.interface.output_names.index(name)
    run = _runner(after, onnx, name, place)
    loss, counts, plain = OutputLoss(), _Counts(), evaluation_module(before)
    seen = 0
    for images in _fitting(before, pictures):
        with torch.no_grad():
            was = plain(images)[place]
        now = run(images)
        loss.add(was, now)
        if labels is not None:
            counts.add(was, now, torch.tensor(labels[seen : seen + len(images)]))
        seen += len(images)
    count = len(pictures)

    def shares(most: int) -> tuple[float, float] | None:
        before, after = (right / count for right in counts.right[most])
        return (before, after) if labels is not None else None

    runtime = "torch" if onnx is None else "onnxruntime"
    agreement = loss.agreeing / count
    top5 = shares(5) if classes > 5 else None
    return Judged(count, runtime, loss.sqnr_db, agreement, shares(1), top5)


def _runner(
    program: Program, onnx: Path | None, output: str, place: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """An output of the file, or of the program where there is none."""
    if onnx is None:
        module = evaluation_module(program)

        def in_torch(images: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                result: torch.Tensor = module(images)[place]
            return result

        return in_torch
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    (name,) = program.interface.input_names
    return lambda images: torch.as_tensor(session.run([output], {name: images.numpy()})[0])


def _check_inputs(program: Program) -> None:
    names = program.interface.input_names
    if len(names) != 1:
        raise PreconditionError(
            f"{program.name} takes {len(names)} inputs ({', '.join(names)}) and pictures are one; "
            "quantise it in Python with the pass fake_quantize"
        )
