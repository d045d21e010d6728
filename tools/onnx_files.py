"""A module written as an ONNX file that lives as long as the process, and such a file run."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from torch import nn

from fxopt.isolation import silenced

OPSET: Final = 18


def exported(module: nn.Module, images: torch.Tensor) -> Path:
    """The module as ONNX, its batch open; the exporter folds the BatchNorms."""
    file = fresh_file("fp32.onnx")
    with silenced():
        torch.onnx.export(
            module,
            (images[:2],),
            file,
            input_names=["input"],
            opset_version=OPSET,
            dynamo=True,
            dynamic_shapes=({0: "batch"},),
            external_data=False,
        )
    return file


def fresh_file(name: str) -> Path:
    """A path at which nothing is yet."""
    return Path(tempfile.mkdtemp(dir=_folder().name)) / name


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Lives as long as the process."""
    return tempfile.TemporaryDirectory(prefix="quantizers-")


def run_onnx(file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """Runs the file, of one input and one output, in onnxruntime on as many threads as torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])
