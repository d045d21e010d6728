"""fxopt: convolutional networks as torch.fx graphs, rewritten under proof.

Names are imported when they are first used, so that ``import fxopt`` and ``fxopt --help`` do not
wait for torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxopt.analysis.memory_model import MemoryModel
    from fxopt.analysis.signal import SignalPropagation, signal_propagation
    from fxopt.capture import capture
    from fxopt.captured import history
    from fxopt.errors import (
        CaptureError,
        ExecutionError,
        ExportError,
        ExportMismatchError,
        FxoptError,
        GuardError,
        InvalidGraphError,
        InvalidPlanError,
        InvalidProgramError,
        ModelSpecError,
        PassError,
        PipelineSpecError,
        PreconditionError,
        VerificationError,
    )
    from fxopt.execution.run import execute_in_arena
    from fxopt.export import export_onnx
    from fxopt.memory import plan_memory
    from fxopt.memory_plan import MemoryPlan
    from fxopt.pipeline import transform
    from fxopt.program import Program
    from fxopt.pt2 import export_pt2
    from fxopt.qas_ratio import QasRatio, qas_ratio
    from fxopt.report import Report, report
    from fxopt.results import Declined, PassResult
    from fxopt.rewrite import run_pass
    from fxopt.scaled_ws import ScaledWSConv1d, ScaledWSConv2d, ScaledWSConv3d, ScaledWSLinear

__all__ = [
    "CaptureError",
    "Declined",
    "ExecutionError",
    "ExportError",
    "ExportMismatchError",
    "FxoptError",
    "GuardError",
    "InvalidGraphError",
    "InvalidPlanError",
    "InvalidProgramError",
    "MemoryModel",
    "MemoryPlan",
    "ModelSpecError",
    "PassError",
    "PassResult",
    "PipelineSpecError",
    "PreconditionError",
    "Program",
    "QasRatio",
    "Report",
    "ScaledWSConv1d",
    "ScaledWSConv2d",
    "ScaledWSConv3d",
    "ScaledWSLinear",
    "SignalPropagation",
    "VerificationError",
    "capture",
    "execute_in_arena",
    "export_onnx",
    "export_pt2",
    "history",
    "plan_memory",
    "qas_ratio",
    "report",
    "run_pass",
    "signal_propagation",
    "transform",
]

_HOMES = {
    "Declined": "fxopt.results",
    "MemoryModel": "fxopt.analysis.memory_model",
    "MemoryPlan": "fxopt.memory_plan",
    "PassResult": "fxopt.results",
    "Program": "fxopt.program",
    "QasRatio": "fxopt.qas_ratio",
    "Report": "fxopt.report",
    "ScaledWSConv1d": "fxopt.scaled_ws",
    "ScaledWSConv2d": "fxopt.scaled_ws",
    "ScaledWSConv3d": "fxopt.scaled_ws",
    "ScaledWSLinear": "fxopt.scaled_ws",
    "SignalPropagation": "fxopt.analysis.signal",
    "capture": "fxopt.capture",
    "execute_in_arena": "fxopt.execution.run",
    "export_onnx": "fxopt.export",
    "export_pt2": "fxopt.pt2",
    "history": "fxopt.captured",
    "plan_memory": "fxopt.memory",
    "qas_ratio": "fxopt.qas_ratio",
    "report": "fxopt.report",
    "run_pass": "fxopt.rewrite",
    "signal_propagation": "fxopt.analysis.signal",
    "transform": "fxopt.pipeline",
}


def __getattr__(name: str) -> Any:
    if name in ("optim", "passes"):
        return import_module(f"fxopt.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'fxopt' has no attribute '{name}'")
    value = getattr(import_module(_HOMES.get(name, "fxopt.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """Keeps ``fxopt.capture`` the function when ``fxopt/capture.py`` is imported.

    Python binds every imported submodule on its package; two of ours bear the name of the function
    that they define, and the function is what a user means.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in __all__):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
