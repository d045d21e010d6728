"""Reads a ``.pt2`` file that ``torch.export.save`` wrote, and unpickles nothing but tensors.

``torch.export.load`` would unpickle anything where tensors alone do not load, and load compiled
code. What remains is that torch makes Python code of the file's own graph and guards: a ``.pt2`` is
to be loaded from those whom one trusts, and :func:`load_exported` cannot change that.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from fxopt.aten import Unspelled
from fxopt.errors import ModelSpecError
from fxopt.exported_graph import exported_module
from fxopt.isolation import silenced


def load_exported(path: Path) -> nn.Module:
    """The module that the ``.pt2`` file at ``path`` holds, under its own names; for eval only.

    Raises:
        ModelSpecError: there is no such file, it holds pickled objects or compiled code,
            ``torch.export.load`` refuses it, or the program in it cannot be used: it was exported
            in training mode or without example inputs, or an operator has no function here.
    """
    _check_archive(path)
    try:
        with silenced(), _tensors_only():
            program = torch.export.load(path)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        raise ModelSpecError(
            f"torch.export.load refuses '{path}' ({type(error).__name__}: {reason}); write it with "
            "torch.export.save, and with a torch of about this version"
        ) from error
    try:
        return exported_module(program, path.name)
    except Unspelled as error:
        raise ModelSpecError(f"the program in '{path}' cannot be used: {error}") from error


_RUNS_CODE = {
    "data/aotinductor/": "compiled code",
    "data/constants/custom_obj_": "a pickled object",
    "data/constants/opaque_obj_": "a pickled object",
}
"""Places in the archive whose content cannot be loaded without running it."""


def _check_archive(path: Path) -> None:
    if not path.is_file():
        raise ModelSpecError(f"there is no file '{path}'")
    if not zipfile.is_zipfile(path):
        raise ModelSpecError(
            f"'{path}' is no archive of torch.export.save; was it written to its end?"
        )
    with zipfile.ZipFile(path) as archive:
        members = archive.namelist()
    for place, what in _RUNS_CODE.items():
        if any(place in member for member in members):
            raise ModelSpecError(
                f"'{path}' holds {what}, and to load that is to run it; export the model without"
            )


@contextlib.contextmanager
def _tensors_only() -> Iterator[None]:
    """Makes every ``torch.load`` below refuse what is not a tensor."""
    changed = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
