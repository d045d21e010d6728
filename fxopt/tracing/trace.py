"""What a trace is, what stops one, and where in the user's code either happened."""

from __future__ import annotations

import os
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from fxopt.guards import LayoutGuard, ShapeGuard
from fxopt.program import Origin, ValueType
from fxopt.shapes import Dimension, Operation

_LIBRARIES = tuple(
    f"{Path(file).parent}{os.sep}" for file in (torch.__file__, str(Path(__file__).parent))
)
_PYTHON = sysconfig.get_paths()["stdlib"] + os.sep


class Untraceable(Exception):
    """The forward does something that the tracer cannot follow.

    ``paths`` are the modules that were being traced, outermost first; ``remedy`` what to do where
    a submodule of its own would not help.
    """

    paths: tuple[str, ...] = ()

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason)
        self.line = user_line()
        self.remedy = remedy


class Foreign(Untraceable):
    """The forward learns something that is not the model's: run as it is, it would be lost too."""


def is_users(file: str) -> bool:
    """Whether code in ``file`` is neither torch's nor ours, nor Python's own."""
    if file.startswith(_LIBRARIES) or file.startswith("<"):
        return False
    return "site-packages" in file or not file.startswith(_PYTHON)


def user_line() -> str:
    """``file.py:12`` of the innermost frame that is neither torch's nor ours."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if is_users(name):
            return f"{Path(name).name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def asked_by_torch() -> bool:
    """Whether the innermost frame that is not ours is torch's, and not the user's."""
    ours = _LIBRARIES[1]
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(ours):
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None and frame.f_code.co_filename.startswith(_LIBRARIES[0])


@dataclass
class Trace:
    """What a tracer wrote down: the graph, the static types, and everything it noticed.

    ``modules`` are layers that stand for functions, by path; ``constants`` unregistered tensors;
    ``calls`` how many nodes each module's call made; ``flags`` the ``training`` flag of each leaf.
    """

    graph: fx.Graph = field(default_factory=fx.Graph)
    types: dict[str, ValueType] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    guards: dict[Operation, ShapeGuard] = field(default_factory=dict)
    sizes: dict[Dimension, int] = field(default_factory=dict)
    layouts: dict[LayoutGuard, None] = field(default_factory=dict)
    dtype_was_read: bool = False
    device_was_read: bool = False
    overwritten_inputs: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    asked_for_gradients: str = ""
    calls: dict[str, int] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)
    out_leaves: list[Any] = field(default_factory=list)
    out_spec: Any = None
