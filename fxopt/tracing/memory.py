"""Tensors that share memory with parameters and buffers, which no copy and no state_dict keeps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fxopt.errors import CaptureError
from fxopt.tracing.closures import held

_Span = tuple[int, int, str]


def check_memory(model: nn.Module) -> dict[int, str]:
    """Which tensors that ``model`` holds unregistered are over a registered one's memory, by id.

    Raises:
        CaptureError: two registered tensors overlap.
    """
    spans: dict[int, list[_Span]] = {}
    registered = set()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        registered.add(id(tensor))
        if not _has_memory(tensor):
            continue
        other = _overlap(tensor, spans)
        if other is not None:
            raise CaptureError(
                f"'{name}' and '{other}' share memory and are two tensors, which no state_dict "
                "keeps; make them one tensor, or copy one"
            )
        spans.setdefault(_storage(tensor), []).append((*_span(tensor), name))
    aliases = {}
    for tensor in held_tensors(model):
        owner = _overlap(tensor, spans) if _has_memory(tensor) else None
        if owner is not None and id(tensor) not in registered:
            aliases[id(tensor)] = owner
    return aliases


def held_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Tensors in the modules' attributes, in containers and closures there too."""
    seen: set[int] = set()
    for module in model.modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                yield from _tensors(value, seen)


def _tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    if id(value) in seen or isinstance(value, nn.Module):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
        return
    for item in held(value):
        yield from _tensors(item, seen)


def _has_memory(tensor: torch.Tensor) -> bool:
    return not tensor.is_meta and tensor.layout == torch.strided and tensor.numel() > 0


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size()


def _overlap(tensor: torch.Tensor, spans: dict[int, list[_Span]]) -> str | None:
    begin, end = _span(tensor)
    for start, stop, name in spans.get(_storage(tensor), ()):
        if start < end and begin < stop:
            return name
    return None
