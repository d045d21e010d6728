"""Small nets with seeded weights, and BatchNorms whose deletion would show."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxopt.program import Program


def seeded(model: nn.Module, seed: int = 0) -> nn.Module:
    """``model`` in evaluation mode with seeded weights, γ, β, running means and variances."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan = parameter[0].numel() if parameter.dim() > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan**0.5)
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                fill_norm(module, generator)
    return model.eval()


def fill_norm(norm: Any, generator: torch.Generator) -> None:
    """Statistics far from the fresh norm's 0 and 1."""
    if norm.running_mean is not None:
        norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator))
        norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) * 2 + 0.3)
    if norm.weight is not None:
        norm.weight.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
        norm.bias.copy_(torch.randn(norm.num_features, generator=generator))


def image(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A seeded normal tensor, ``(2, 3, 9, 13)`` unless told."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (2, 3, 9, 13), generator=generator).to(dtype)


class ConvBn(nn.Module):
    """conv → norm → act, the pair that passes look for."""

    def __init__(self, inputs: int = 3, outputs: int = 4, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, **options)
        self.norm = nn.BatchNorm2d(outputs)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.act(self.norm(self.conv(x)))
        return result


def text(program: Program) -> str:
    """The graph, a line a node: ``input x``, ``norm = norm(conv)``, ``return norm``."""
    lines = []
    for node in program.nodes:
        target = str(getattr(node.target, "__name__", node.target))
        operands = [str(argument) for argument in node.args]
        operands += [f"{key}={value}" for key, value in node.kwargs.items()]
        lines.append(f"{node.name} = {target}({', '.join(operands)})")
        if node.op == "placeholder":
            lines[-1] = f"input {node.name}"
        elif node.op == "output":
            lines[-1] = "return " + ", ".join(map(str, node.args[0]))  # type: ignore[arg-type]
    return "\n".join(lines)


def modules_called(program: Program, kind: type[nn.Module]) -> list[fx.Node]:
    """The nodes that call a module of ``kind``."""
    return [node for node in program.nodes if isinstance(program.module(node), kind)]
