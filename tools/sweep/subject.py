"""A model of the zoo made ready: seeded weights and statistics, the smallest input it takes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.zoo import load_model

SIDES = (32, 64, 96, 128, 160, 192, 224, 240, 256, 288, 299, 320, 336, 384, 448, 512, 768, 1024)
SEED = 11

Arguments = tuple[Any, ...]


def subject(spec: str) -> tuple[nn.Module, Arguments]:
    """The seeded model in eval mode, and arguments for a batch of one.

    Raises:
        ValueError: it takes none of the inputs that are tried.
    """
    model = load_model(spec)
    example = _smallest_input(model)
    _unsettle(model, example)
    return model.eval(), example


def batch_of(example: Arguments, size: int, seed: int = SEED) -> Arguments:
    """Other values of the example's kind, ``size`` samples of each tensor."""
    generator = torch.Generator().manual_seed(seed)

    def made(value: Any) -> Any:
        if isinstance(value, list):
            return [made(v[None])[0] for v in value]
        return torch.rand((size, *value.shape[1:]), generator=generator) * 2 - 1

    return tuple(made(value) for value in example)


def wider(example: Arguments, by: int = 32) -> Arguments | None:
    """The arguments with ``by`` more columns, or None if they are no image tensors."""
    if not all(isinstance(value, Tensor) for value in example):
        return None
    shapes = [(*value.shape[:-1], value.shape[-1] + by) for value in example]
    return batch_of(tuple(torch.empty(shape, device="meta") for shape in shapes), 1)


def _smallest_input(model: nn.Module) -> Arguments:
    for example in _candidates(model):
        if _runs(model, batch_of(example, 1), False) and _runs(model, batch_of(example, 2), True):
            return batch_of(example, 1)
    for example in _candidates(model):  # its training may be what fails, or want labels
        if _runs(model, batch_of(example, 1), False):
            return batch_of(example, 1)
    raise ValueError("no input found: it takes no image, clip, pair or list of images")


def _candidates(model: nn.Module) -> Iterator[Arguments]:
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    own = tuple(config.get("input_size") or (3, 224, 224))
    channels, fixed = own[0], bool(config.get("fixed_input_size"))
    for side in () if fixed else [side for side in SIDES if side < own[-1]]:
        yield (torch.empty(1, channels, side, side, device="meta"),)
    yield (torch.empty(1, *own, device="meta"),)
    for side in (112, 224):
        yield (torch.empty(1, 3, 16, side, side, device="meta"),)
    yield (torch.empty(1, 3, 128, 128, device="meta"),) * 2
    yield ([torch.empty(3, 128, 128, device="meta")],)


def _runs(model: nn.Module, arguments: Arguments, training: bool) -> bool:
    model.train(training)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            model(*arguments)
    except Exception:
        return False
    return True


def _unsettle(model: nn.Module, example: Arguments) -> None:
    """Parameters and statistics that no rewrite can drop unseen, with activations kept in range.

    What fresh weights have at 0 or 1 (biases, scales, the last norm of a residual branch) is
    moved by seeded noise. A forward in training, where it runs, gives norms statistics of these
    very activations, and those are moved too.
    """
    generator = torch.Generator().manual_seed(SEED)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator).to(tensor)

    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.dim() < 2:
                parameter.add_(noise(parameter), alpha=0.1)
            elif not parameter.any():
                parameter.add_(noise(parameter), alpha=0.02)
        torch.manual_seed(SEED)
        _runs(model, batch_of(example, 2), True)
        for module in model.modules():
            mean, variance = (getattr(module, f"running_{name}", None) for name in ("mean", "var"))
            if isinstance(mean, Tensor) and isinstance(variance, Tensor):
                mean.add_(noise(mean) * variance.sqrt(), alpha=0.1)
                variance.mul_(1 + 0.2 * noise(variance).tanh())
    model.zero_grad()
