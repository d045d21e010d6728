"""Networks of the zoo in int8, one a family: what stays in float, and how the executors agree.

    python tools/quantized_zoo.py [MODEL...]

Weights and statistics are seeded, and so are the inputs that calibrate. A row is printed when it is
done: operators that onnxruntime runs on integers and in float (kinds with counts), numbers that
differ from torch's by one step and the largest difference, SQNR of the logits. What is refused is
named with the reason.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from torch import nn

from fxopt.capture import capture
from fxopt.errors import FxoptError
from fxopt.export import export_onnx
from fxopt.passes import FakeQuantization
from fxopt.rewrite import run_pass
from fxopt.zoo import load_model

MODELS = (
    "torchvision:alexnet", "torchvision:vgg11_bn", "torchvision:resnet18",
    "torchvision:densenet121", "torchvision:squeezenet1_1", "torchvision:inception_v3",
    "torchvision:googlenet", "torchvision:shufflenet_v2_x1_0", "torchvision:mobilenet_v2",
    "torchvision:mobilenet_v3_small", "torchvision:mnasnet0_5", "torchvision:efficientnet_b0",
    "torchvision:regnet_y_400mf", "torchvision:convnext_tiny", "timm:resnetv2_50",
    "timm:nf_resnet26", "timm:ghostnet_100", "timm:rexnet_100", "timm:hrnet_w18_small",
    "timm:dla34", "timm:repvgg_a0", "timm:xception41", "timm:res2net50_14w_8s",
    "timm:tf_efficientnet_lite0", "timm:mobilenetv4_conv_small",
)  # fmt: skip
SIDE = 96


@click.command(help=__doc__)
@click.argument("models", nargs=-1)
def main(models: Sequence[str]) -> None:
    click.echo("| model | on integers | in float | one step off | worst | SQNR dB |")
    click.echo("|---|---|---|---|---|---|")
    for name in models or MODELS:
        click.echo(f"| {name} | {_row(name)} |")


def _row(name: str) -> str:
    model = load_model(name)
    _seed_statistics(model)
    images = torch.randn(8, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    try:
        program = capture(model, images[:2])
        which = FakeQuantization(calibration=images, fold="auto")
        result = run_pass(which, program)
        with tempfile.TemporaryDirectory() as folder:
            written = export_onnx(result.after, Path(folder) / "int8.onnx")
    except FxoptError as error:
        return f"refused: {error} | | | | "
    assert written.integers is not None
    optimised, agreement = written.integers.optimised, written.integers.agreement
    assert optimised is not None
    assert agreement is not None
    kinds = Counter(each.kind for each in optimised.in_float)
    floats = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    ratio = next(iter(result.evidence["output_sqnr_db"].values()))
    return (
        f"{optimised.integer} | {floats or 0} | {agreement.differing:,} of "
        f"{agreement.elements:,} | {agreement.worst} | {ratio:.1f}"
    )


def _seed_statistics(model: nn.Module) -> None:
    """Running statistics and affine parameters that are not those of a fresh norm."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (module.running_mean, -0.2, 0.2), (module.running_var, 0.5, 1.5),
                (module.weight, 0.7, 1.3), (module.bias, -0.2, 0.2),
            ):  # fmt: skip
                if tensor is not None:
                    tensor.data.uniform_(low, high, generator=generator)


if __name__ == "__main__":
    main()
