"""The trace of a model's call, if the calls after it would compute the same.

One trace is one call. Where it left the Python state that it can reach as it was, and drew no
random numbers of Python's or NumPy's, every call computes the same. Where it did not, the call is
traced again from the state that it left: the second trace must be the first one and leave the
state in turn, up to tables that depend on no value. What the user keeps outside of the model
is seen to as well (see ``kept``). Ours.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxopt.interface import Call
from fxopt.tracing.copies import sharing_copy
from fxopt.tracing.kept import Kept, Watch, depends_on_values, forget_frames, make_real
from fxopt.tracing.lines import changed_at
from fxopt.tracing.modes import first_difference
from fxopt.tracing.state import Place, Snapshot, snapshot, text_of
from fxopt.tracing.tracer import Tracer
from fxopt.tracing.writer import Trace, Untraceable, Writer


class Unsettled(Untraceable):
    """The next call may compute something else; ``trace`` is of the first one."""

    def __init__(self, reason: str, remedy: str, trace: Trace) -> None:
        super().__init__(reason, remedy)
        self.trace = trace
        self.line = ""


class Raised(Exception):
    """The forward raised an error of its own while it was traced, in the submodule at ``path``."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


@dataclass(frozen=True)
class Tracing:
    """How a model is traced: its private copy, the call, the leaves, the mode."""

    private: nn.Module
    call: Call
    leaves: Mapping[str, str]
    training: bool

    def model(self) -> nn.Module:
        """A copy with objects of its own."""
        return sharing_copy(self.private).train(self.training)

    def settled(self) -> Trace:
        """The trace.

        Raises:
            Untraceable: something cannot be followed, or the next call may be another
                (:class:`Unsettled`).
            Raised: the forward raised.
        """
        trace, survivors, _ = self._once(())
        if not survivors:
            return trace
        found = {id(kept.tensor): kept for kept in survivors}
        again, others, read = self._once(found)
        stale = [found[i].node for i in read if depends_on_values(found[i].node)]
        if stale:
            origin = trace.origins.get(stale[0].name)
            raise _unsettled(
                "it reads what an earlier call computed and kept outside of the model",
                trace, line=origin.line if origin else "",
            )  # fmt: skip
        del others
        return again if read else trace

    def _once(self, known: Collection[int]) -> tuple[Trace, list[Kept], list[int]]:
        """One call from a fresh copy, what of it is kept outside, which of ``known`` it read."""
        model = self.model()
        tracer = Tracer(model, self.leaves)
        before, numbers = snapshot(model, self.leaves), _numbers()
        try:
            trace = tracer.run(self.call)
        except Exception as error:
            self._clean_up(tracer, error)
            if isinstance(error, Untraceable):
                raise
            failure = tracer.failure
            path = failure[1] if failure is not None and failure[0] is error else ""
            raise Raised(path) from error
        read = [key for key in known if tracer.writer.read(key)]
        try:
            if _numbers() != numbers:
                raise self._drawing(trace)
            places = before.changed(snapshot(model, self.leaves))
            if places:
                self._check_second_call(model, tracer.writer, before)
        finally:
            watch = Watch(tracer.writer)
            del model, before
            survivors = self._cured(watch, trace)
        return trace, survivors, read

    def _clean_up(self, tracer: Tracer, error: Exception) -> None:
        watch, trace = Watch(tracer.writer), tracer.writer.trace
        tracer.release()
        forget_frames(error)
        self._cured(watch, trace)

    def _cured(self, watch: Watch, trace: Trace) -> list[Kept]:
        survivors = watch.survivors()
        if survivors:
            make_real(survivors, trace, self.model(), self.call)
        return survivors

    # ---- the next call ---------------------------------------------------------------------

    def _check_second_call(self, model: nn.Module, first: Writer, before: Snapshot) -> None:
        """Raise if the call that follows may differ."""
        trace = first.trace
        left = snapshot(model, self.leaves)
        kept = _detached(left, first)
        tracer = Tracer(model, self.leaves)
        _make_known(kept, tracer.writer)
        try:
            second = tracer.run(self.call)
        except Untraceable:
            raise
        except Exception as error:
            place = self._first_plain(before.changed(left))
            raise self._located(
                place, trace, f"it changes '{text_of(place)}', with which the next call raises "
                f"{type(error).__name__}: {' '.join(str(error).split())}"
            ) from error  # fmt: skip
        read = [k for k in kept if tracer.writer.read(id(k.tensor))]
        for item in read:
            if depends_on_values(item.node):
                place = next(p for p, t in left.tensors.items() if t is item.tensor)
                raise self._located(
                    place, trace,
                    f"it keeps '{text_of(place)}', computed from inputs, weights or chance, and "
                    "the next call reads it",
                )  # fmt: skip
        unsteady = left.unsteady(snapshot(model, self.leaves))
        unsteady = [place for place in unsteady if not self._only_written(place, model)]
        if unsteady:
            place = self._first_plain(unsteady)
            raise self._located(
                place, trace, f"it changes '{text_of(place)}' in every call, and reads it"
            )
        difference = None if read else first_difference(trace, second)
        if difference is not None:
            place = self._first_plain(before.changed(left))
            raise self._located(
                place, trace,
                f"it changes '{text_of(place)}', with which the next call computes something else "
                f"(at {difference.line})",
            )  # fmt: skip

    @staticmethod
    def _first_plain(places: list[Place]) -> Place:
        return next((p for p in places if p[-1] != "<size>"), places[0])

    def _only_written(self, place: Place, model: nn.Module) -> bool:
        """Whether an attribute of a module is set and never looked at."""
        if len(place) != 2:
            return False
        owners = [m for p, m in model.named_modules() if p == place[0] and place[1] in vars(m)]
        if not owners:
            return False
        with _reads_of(owners[0]) as names:
            self._run(model)
        return place[1] not in names

    def _run(self, model: nn.Module) -> None:
        tracer = Tracer(model, self.leaves)
        left = snapshot(model, self.leaves)
        _make_known([Kept(t, None) for t in left.tensors.values() if t.is_meta], tracer.writer)  # type: ignore[arg-type]
        tracer.run(self.call)

    # ---- where -----------------------------------------------------------------------------

    def _located(self, place: Place, trace: Trace, reason: str) -> Unsettled:
        """The refusal, with the line and the module where ``place`` changes."""
        model = self.model()
        tracer = Tracer(model, self.leaves)
        probe = snapshot(model, self.leaves).probe(place)
        paths: list[tuple[str, ...]] = []
        line = self._watched(tracer, probe, paths)
        return _unsettled(reason, trace, line=line, paths=paths[-1] if paths else ())

    def _drawing(self, trace: Trace) -> Unsettled:
        tracer = Tracer(self.model(), self.leaves)
        paths: list[tuple[str, ...]] = []
        line = self._watched(tracer, _numbers, paths)
        error = _unsettled(
            "it draws random numbers of Python or NumPy", trace, line=line,
            paths=paths[-1] if paths else (),
        )  # fmt: skip
        error.remedy = "draw them with torch, which the captured module repeats"
        return error

    def _watched(self, tracer: Tracer, probe: Any, paths: list[tuple[str, ...]]) -> str:
        first = probe()

        def look() -> Any:
            now = probe()
            if now == first or not paths:
                paths.append(tuple(tracer.writer.stack))
                del paths[:-1]
            return now

        line = changed_at(lambda: tracer.run(self.call), look)
        watch = Watch(tracer.writer)
        tracer.release()
        self._cured(watch, tracer.writer.trace)
        return line


_REMEDY = (
    "make it a buffer or an argument, or move that part into a submodule without parameters, which "
    "is then run as it is"
)


def _unsettled(
    reason: str, trace: Trace, *, line: str, paths: tuple[str, ...] = ()
) -> Unsettled:  # fmt: skip
    error = Unsettled(reason, _REMEDY, trace)
    error.line, error.paths = line, paths
    return error


def _numbers() -> tuple[Any, ...]:
    """The states of Python's and NumPy's own random generators."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return (random.getstate(),)
    kind, keys, *others = numpy.random.get_state()
    return random.getstate(), kind, keys.tobytes(), *others


def _detached(left: Snapshot, writer: Writer) -> list[Kept]:
    """The traced tensors that ``left`` holds."""
    return [
        Kept(tensor, writer.value_of(tensor).current)
        for tensor in left.tensors.values()
        if tensor.is_meta and writer.is_traced(tensor)
    ]


def _make_known(kept: list[Kept], writer: Writer) -> None:
    """Let ``writer`` take the tensors of an earlier trace for constants."""
    for index, item in enumerate(kept):
        name = f"_kept_{index}"
        writer.names[id(item.tensor)] = name
        writer.trace.constants[name] = item.tensor


@contextmanager
def _reads_of(module: nn.Module) -> Iterator[set[str]]:
    """Names of the attributes of ``module`` that the user's code asks for."""
    names: set[str] = set()

    def asked(self: Any, name: str) -> Any:
        if self is module:
            names.add(name)
        return object.__getattribute__(self, name)

    nn.Module.__getattribute__ = asked  # type: ignore[method-assign, assignment]
    try:
        yield names
    finally:
        del nn.Module.__getattribute__
