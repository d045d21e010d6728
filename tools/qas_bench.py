"""What a training step with quantisation-aware scaling takes, over one of fake quantisation.

    python tools/qas_bench.py [MODEL ...]

Forward, backward and a step of SGD with momentum, in one process and in turns, the median: the
folded network in float, fake quantisation in float units, the same network with torch's own fake
quantisers (``torch.fake_quantize_per_channel_affine``; biases in float), and quantised units
without and with QAS. Set MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4294967296
MALLOC_TOP_PAD_=268435456, so that freed activations are kept and no page faults are measured.
"""

from __future__ import annotations

import copy
import statistics
import time
from pathlib import Path
from typing import Any

import click
import torch
from tabulate import tabulate
from torch import nn
from torch.optim import SGD

import fxopt
from fxopt.fake_quantize import FakeQuantize
from fxopt.passes import FakeQuantization, FoldConvBn
from fxopt.quantized_layers import QuantizedConv2d, QuantizedLayer, QuantizedLinear
from fxopt.zoo import load_model

SMALL = f"{Path(__file__).parent}/small_nets.py:Mobile"
MODELS = ("torchvision:mobilenet_v2", "torchvision:resnet18", SMALL)


class _TorchQuantizer(nn.Module):
    def __init__(self, grid: FakeQuantize) -> None:
        super().__init__()
        self.grid = (float(grid.scale), int(grid.zero_point), grid.low, grid.high)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.fake_quantize_per_tensor_affine(input, *self.grid)


class _TorchWeight:
    """Goes before a quantised layer and quantises its weight by torch's own function."""

    def quantized_weight(self: Any) -> torch.Tensor:
        zeros = torch.zeros_like(self.weight_scale, dtype=torch.int32)
        most = self.most
        return torch.fake_quantize_per_channel_affine(
            self.weight, self.weight_scale, zeros, self.axis, -most, most
        )

    def quantized_bias(self: Any) -> Any:
        return self.bias


class _TorchConv2d(_TorchWeight, QuantizedConv2d):
    pass


class _TorchLinear(_TorchWeight, QuantizedLinear):
    pass


_OF_TORCH: dict[type[nn.Module], type[nn.Module]] = {
    QuantizedConv2d: _TorchConv2d, QuantizedLinear: _TorchLinear,
}  # fmt: skip


def with_torchs_quantisers(net: nn.Module) -> nn.Module:
    """A copy of a quantised network, with torch's functions in the place of ours."""
    twin = copy.deepcopy(net)
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, FakeQuantize) and not child.settled:
                setattr(module, name, _TorchQuantizer(child))
            elif isinstance(child, QuantizedLayer):
                child.__class__ = _OF_TORCH[type(child)]
    return twin


def networks(spec: str, batch: int, size: int) -> tuple[dict[str, nn.Module], torch.Tensor]:
    """The networks that are compared, by name, and a batch."""
    model = load_model(spec).eval()
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    images = torch.randn(batch, first.in_channels, size, size)

    def quantised(qas: bool | None) -> nn.Module:
        which = FakeQuantization(calibration=images, fold="auto", qas=qas, bias_correction=False)  # type: ignore[arg-type]
        return fxopt.transform(model, [which], images, verify=False)

    plain = quantised(None)
    nets = {
        "fp32": fxopt.transform(model, [FoldConvBn()], images, verify=False),
        "fake quantised": plain,
        "torch's": with_torchs_quantisers(plain),
        "int8 units": quantised(False),
        "QAS": quantised(True),
    }
    return nets, images


@click.command(help=__doc__)
@click.option("--batch", default=16, show_default=True)
@click.option("--size", default=96, show_default=True, help="Rows and columns of the images.")
@click.option("--rounds", default=15, show_default=True)
@click.argument("specs", nargs=-1)
def main(batch: int, size: int, rounds: int, specs: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    rows = []
    for spec in specs or MODELS:
        nets, images = networks(spec, batch, size)
        steps = {name: _Step(net, images) for name, net in nets.items()}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(rounds + 1):
            for name, step in steps.items():
                times[name].append(step.seconds())
        spent = {name: statistics.median(each[1:]) for name, each in times.items()}
        plain = spent["fake quantised"]
        ratios = [each / plain for each in spent.values()]
        rows.append([spec.rpartition("/")[2], 1e3 * plain, *ratios])
    headers = ("model", "ms a step", *nets)
    click.echo(tabulate(rows, headers, floatfmt=("", ".1f", *(".2f",) * len(nets))))


class _Step:
    """A step of training on one batch, again and again."""

    def __init__(self, net: nn.Module, images: torch.Tensor) -> None:
        self.net, self.images = net.train(), images
        self.optimizer = SGD(net.parameters(), 1e-4, 0.9)

    def seconds(self) -> float:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        torch.autograd.backward(self.net(self.images).square().mean())
        self.optimizer.step()
        return time.perf_counter() - start


if __name__ == "__main__":
    main()
