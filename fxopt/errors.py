"""Every error that fxopt raises on purpose.

Each message says what is wrong, where (in the names of the user's own modules) and what to do
about it. The command line prints the message alone and leaves with the class's ``exit_code``.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "CaptureError",
    "ExportError",
    "ExportMismatchError",
    "FxoptError",
    "GuardError",
    "InvalidGraphError",
    "InvalidPlanError",
    "InvalidProgramError",
    "ModelSpecError",
    "PassError",
    "PipelineSpecError",
    "PreconditionError",
    "VerificationError",
]


class FxoptError(Exception):
    """Base of every error that fxopt raises on purpose."""

    exit_code: ClassVar[int] = 2


class CaptureError(FxoptError):
    """The model cannot be captured, or the captured graph does not compute what the model does."""


class GuardError(FxoptError):
    """A captured module is called where a decision that capture recorded would fall otherwise."""


class PipelineSpecError(FxoptError):
    """A pass, an option or a value in a pipeline spec is wrong."""


class ModelSpecError(FxoptError):
    """A MODEL on the command line, its weights or its inputs cannot be had."""


class PassError(FxoptError):
    """A pass could not run."""


class PreconditionError(PassError):
    """The program does not meet what a pass needs as a whole."""


class VerificationError(PassError):
    """A rewritten program departs from the one that it was made of."""

    exit_code: ClassVar[int] = 1


class InvalidGraphError(FxoptError):
    """A dataflow graph is malformed: a field, an edge, a cycle."""


class InvalidPlanError(FxoptError):
    """A schedule or an arena plan breaks a rule, or claims a size that it does not have."""


class ExecutionError(FxoptError):
    """A plan cannot be executed: its sizes are a what-if, the inputs others, a view none."""


class ExportError(FxoptError):
    """The program cannot be written in the wanted format."""


class ExportMismatchError(ExportError):
    """The exported file runs, and computes something else."""

    exit_code: ClassVar[int] = 1


class InvalidProgramError(FxoptError):
    """A program broke its own canonical form: a bug in fxopt or in a pass."""

    exit_code: ClassVar[int] = 70
