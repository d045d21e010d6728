"""What came of a pass: values that reports render and ``fxopt.history`` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fxopt.program import Program


@dataclass(frozen=True)
class Declined:
    """A candidate that a pass leaves alone: ``node`` by name, where it is, and why."""

    node: str
    where: str
    reason: str


@dataclass(frozen=True)
class Rewritten:
    """A site that a pass rewrote: its node by name, where it is, and what became of it.

    ``note`` says what the user should know (weights untied, bytes added); it may be empty.
    """

    node: str
    where: str
    note: str = ""


@dataclass(frozen=True)
class OutputError:
    """Error of one output tensor, relative to that output's own largest absolute value.

    ``error`` is None where the reference is all zero or not finite: it is no evidence.
    """

    output: str
    error: float | None
    remark: str = ""


@dataclass(frozen=True)
class Verification:
    """What a comparison of two programs compared and what it found.

    ``dtype`` is that of the proof (float64 where the leaves allow it), ``max_error`` the largest
    of ``outputs`` there, and ``bound`` what it had to stay under. ``shipped_error`` is the
    distance of the program as it ships, in its own dtype, to the float64 outputs of the original;
    ``original_error`` is the original's own distance to them, in the same dtype.
    """

    dtype: str
    max_error: float
    bound: float
    outputs: tuple[OutputError, ...]
    shipped_dtype: str
    shipped_error: float
    original_error: float
    shipped_bound: float
    batch: int
    seconds: float
    method: str = "whole program"
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class PassRecord:
    """What one pass did, as plain values (no programs).

    ``unverified`` says why there is no verification: switched off, or a model on the meta device.
    """

    name: str
    options: Mapping[str, Any]
    preserves: str
    rewritten: tuple[Rewritten, ...]
    declined: tuple[Declined, ...]
    evidence: Mapping[str, Any] = field(default_factory=dict)
    verification: Verification | None = None
    unverified: str = ""

    @property
    def verified(self) -> str:
        """``yes``, or ``no`` with the reason."""
        reason = f" ({self.unverified})" if self.unverified else ""
        return "yes" if self.verification is not None else f"no{reason}"

    def as_dict(self) -> dict[str, Any]:
        """The record for JSON; ``rewritten`` is a count and ``sites`` the list."""
        verification = asdict(self.verification) if self.verification else None
        return {
            "name": self.name,
            "options": dict(self.options),
            "preserves": self.preserves,
            "rewritten": len(self.rewritten),
            "sites": [asdict(site) for site in self.rewritten],
            "declined": [asdict(site) for site in self.declined],
            "evidence": dict(self.evidence),
            "verification": verification,
            "verified": self.verified,
        }


@dataclass(frozen=True, eq=False)
class PassResult:
    """Outcome of :func:`fxopt.run_pass`: the programs before and after, and the record.

    ``record.verification`` is None if it was switched off.
    """

    before: Program
    after: Program
    record: PassRecord

    @property
    def rewritten(self) -> tuple[Rewritten, ...]:
        return self.record.rewritten

    @property
    def declined(self) -> tuple[Declined, ...]:
        return self.record.declined

    @property
    def evidence(self) -> Mapping[str, Any]:
        return self.record.evidence

    @property
    def verification(self) -> Verification | None:
        return self.record.verification
