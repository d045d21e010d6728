"""Example inputs as text: ``1x3x160x224``, ``mask=1x64x64:int64``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fxopt.errors import ModelSpecError

DTYPES = {
    "bfloat16": torch.bfloat16,
    "bool": torch.bool,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
}


@dataclass(frozen=True)
class InputSpec:
    """One input: by ``name`` (a keyword argument) or, without, by its place.

    ``dtype`` None means the model's own.
    """

    shape: tuple[int, ...]
    name: str | None = None
    dtype: torch.dtype | None = None


_INPUT = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?")


def parse_input(text: str) -> InputSpec:
    """The input that ``text`` describes: ``[NAME=]SIZExSIZE…[:DTYPE]``.

    Raises:
        ModelSpecError: it is not of that form, a size is 0, or there is no such dtype.

    >>> parse_input("mask=1x64x64:int64")
    InputSpec(shape=(1, 64, 64), name='mask', dtype=torch.int64)
    """
    match = _INPUT.fullmatch(text.strip())
    if match is None:
        raise ModelSpecError(
            f"cannot read the input '{text}'; write sizes with x between them, as in 1x3x160x224, "
            "or NAME=1x3x64x64:int64"
        )
    shape = tuple(map(int, match["shape"].split("x")))
    if 0 in shape:
        raise ModelSpecError(f"the input '{text}' has a size of 0; give sizes of 1 or more")
    dtype = parse_dtype(match["dtype"]) if match["dtype"] else None
    return InputSpec(shape, match["name"], dtype)


def parse_dtype(text: str) -> torch.dtype:
    """The dtype called ``text``.

    Raises:
        ModelSpecError: there is none of that name.
    """
    if text not in DTYPES:
        raise ModelSpecError(f"unknown dtype '{text}'; there are {', '.join(DTYPES)}")
    return DTYPES[text]


def example_tensors(
    specs: Sequence[InputSpec], dtype: torch.dtype | None = None, seed: int = 0
) -> tuple[tuple[torch.Tensor, ...] | None, dict[str, torch.Tensor] | None]:
    """``(example_inputs, example_kwargs)`` for ``specs``, each None where there is none.

    Floats are normal numbers, integers 0 and 1 (they may be indices); ``dtype`` is for inputs that
    do not say theirs. The global random state stays as it is.

    Raises:
        ModelSpecError: a name is given twice.
    """
    generator = torch.Generator().manual_seed(seed)
    positional: list[torch.Tensor] = []
    by_name: dict[str, torch.Tensor] = {}
    for spec in specs:
        tensor = _draw(spec, spec.dtype or dtype or torch.get_default_dtype(), generator)
        if spec.name is None:
            positional.append(tensor)
        elif spec.name in by_name:
            raise ModelSpecError(f"the input '{spec.name}' is given twice; give it once")
        else:
            by_name[spec.name] = tensor
    return tuple(positional) or None, by_name or None


def _draw(spec: InputSpec, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if dtype.is_floating_point:
        return torch.randn(spec.shape, generator=generator).to(dtype)
    return torch.randint(0, 2, spec.shape, generator=generator).to(dtype)
