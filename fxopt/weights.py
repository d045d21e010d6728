"""Loads a state_dict from a file, or says which of its keys do not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxopt.errors import ModelSpecError

_SHOWN = 3


def load_weights(model: nn.Module, path: Path) -> None:
    """Load the state_dict in ``path`` into ``model``, every key of it.

    Only tensors are unpickled, no code is run.

    Raises:
        ModelSpecError: there is no such file, it holds something else than a state_dict, or its
            keys or shapes differ from the model's; the first few are named.
    """
    state = _read(path)
    own = model.state_dict()
    differing = [
        key
        for key, tensor in own.items()
        if isinstance(tensor, torch.Tensor)
        and isinstance(state.get(key), torch.Tensor)
        and state[key].shape != tensor.shape
    ]
    fitting = state
    if differing:  # torch would raise before it has looked at the keys
        fitting = {key: own[key] if key in differing else value for key, value in state.items()}
    try:
        # Not strict, to have the keys as lists; torch also knows which keys old files may lack.
        missing, unexpected = model.load_state_dict(fitting, strict=False)
    except Exception as error:
        raise ModelSpecError(
            f"the weights in '{path}' do not load: {' '.join(str(error).split())}"
        ) from error
    shapes = [
        f"{key} is {tuple(state[key].shape)}, the model's {tuple(own[key].shape)}"
        for key in differing
    ]
    troubles = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    told = [f"{len(keys)} {word} ({_first(keys)})" for word, keys in troubles if keys]
    if told:
        raise ModelSpecError(
            f"the weights in '{path}' do not fit {type(model).__name__}: {'; '.join(told)}"
        )


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ModelSpecError(f"there is no weights file '{path}'")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch's message is a page on how to run untrusted code; its type tells enough.
        raise ModelSpecError(
            f"cannot read weights from '{path}' ({type(error).__name__}): it must be a state_dict "
            "written by torch.save, with nothing but tensors in it"
        ) from error
    if not isinstance(state, Mapping):
        raise ModelSpecError(
            f"'{path}' holds a {type(state).__name__}, not a state_dict; write "
            "torch.save(model.state_dict(), file)"
        )
    return state


def _first(keys: Sequence[str]) -> str:
    more = ", ..." if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more
