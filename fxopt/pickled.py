"""A model that was pickled whole, ``torch.save(model, FILE)``: to load it is to run its code."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxopt.errors import ModelSpecError

SUFFIXES = (".pt", ".pth")


def load_pickled(path: Path, *, trust: bool) -> nn.Module:
    """The module in ``path``, on the CPU.

    Args:
        path: a file that ``torch.save(model, path)`` wrote.
        trust: whether it may be unpickled, which runs whatever code it names. Without it the file
            is only looked at.

    Raises:
        ModelSpecError: there is no such file, it is TorchScript, an exported program, a
            state_dict or no file of ``torch.save``; it is not trusted, or it does not load.
    """
    _check_format(path)
    found = _tensors_in(path)
    if found is None:
        if not trust:
            raise ModelSpecError(
                f"'{path}' is pickled, and to load it is to run whatever code is in it; if you "
                "know who wrote it, give --trust-pickle (trust_pickle=True)"
            )
        found = _unpickled(path)
    if not isinstance(found, nn.Module):
        raise ModelSpecError(_no_module(path, found))
    return found


def _check_format(path: Path) -> None:
    if not path.is_file():
        raise ModelSpecError(f"there is no file '{path}'")
    members = []
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = [name.partition("/")[2] for name in archive.namelist()]
    if "constants.pkl" in members:
        raise ModelSpecError(
            f"'{path}' is TorchScript, which cannot be captured; give the Python code of the model "
            "(FILE.py:NAME) and its weights with --weights"
        )
    if any(name.startswith("models/") for name in members):
        raise ModelSpecError(
            f"'{path}' is an exported program; rename it to '{path.stem}.pt2', by which it is known"
        )
    if "data.pkl" not in members and not _begins_as_pickle(path):
        raise ModelSpecError(f"'{path}' is no file of torch.save; was it written to its end?")


def _begins_as_pickle(path: Path) -> bool:
    """``torch.save`` before its zip format."""
    with path.open("rb") as file:
        return file.read(1) == b"\x80"


def _tensors_in(path: Path) -> Any:
    """What the file holds if that is tensors and plain values alone, else None."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        return None


def _unpickled(path: Path) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # where the pickled classes may be, as for package.module:NAME
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split())
        raise ModelSpecError(
            f"'{path}' cannot be unpickled: {type(error).__name__}: {reason}; the classes in it "
            "must be importable here under the same names"
        ) from error


def _no_module(path: Path, found: object) -> str:
    tensors = isinstance(found, Mapping) and any(
        isinstance(value, torch.Tensor) for value in found.values()
    )
    if not tensors:
        return f"'{path}' holds a {type(found).__name__}, not an nn.Module"
    return (
        f"'{path}' holds a state_dict, which has no code; name the model (FILE.py:NAME) and give "
        f"--weights {path}"
    )
