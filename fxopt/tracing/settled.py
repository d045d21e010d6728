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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxopt.interface import Call
from fxopt.tracing.copies import sharing_copy
from fxopt.tracing.intercept import random_state_left_alone
from fxopt.tracing.kept import Kept, Watch, depends_on_values, forget_frames, make_real
from fxopt.tracing.lines import changed_at
from fxopt.tracing.modes import first_difference
from fxopt.tracing.state import Place, Snapshot, snapshot, text_of
from fxopt.tracing.trace import Trace, Untraceable
from fxopt.tracing.tracer import Tracer


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
    gradients: bool = True

    def settled(self) -> Trace:
        """The trace.

        Raises:
            Untraceable: something cannot be followed, or the next call may be another
                (:class:`Unsettled`).
            Raised: the forward raised.
        """
        with self._calls() as first:
            trace = first.checked_trace()
        if not first.outside:
            return trace
        found = {id(kept.tensor): kept for kept in first.outside}
        with self._calls() as second:
            again = second.checked_trace()
            read = [kept for key, kept in found.items() if second.has_read(kept.tensor)]
        stale = [kept.node for kept in read if depends_on_values(kept.node)]
        if stale or (read and second.outside):
            node = (stale or [second.outside[0].node])[0]
            reason = "it reads what an earlier call kept outside of the model"
            raise _unsettled(
                reason, trace, line=((stale and trace) or again).origins[node.name].line
            )
        return again if read else trace

    @contextmanager
    def _calls(self) -> Iterator[Calls]:
        """Calls of a fresh copy, after which the user's own code holds no tensor of theirs."""
        calls = Calls(self, sharing_copy(self.private).train(self.training))
        try:
            yield calls
        except Exception as error:
            forget_frames(error)
            raise
        finally:
            calls.outside = self._cured(calls.end())

    def _cured(self, watches: list[tuple[Watch, Trace]]) -> list[Kept]:
        found = []
        for watch, trace in watches:
            kept = watch.survivors()
            if kept:
                model = sharing_copy(self.private, own_buffers=True).train(self.training)
                make_real(kept, trace, model, self.call)
            found += kept
        return found

    def line_of_change(self, place: Place | None) -> tuple[str, tuple[str, ...]]:
        """The line where ``place`` (None: the random numbers) changes, and the modules there."""
        paths: list[tuple[str, ...]] = []
        with self._calls() as calls:
            before = snapshot(calls.model, self.leaves)
            probe = _numbers if place is None else before.probe(place)
            tracer = calls.tracer()
            first = probe()

            def look() -> Any:
                now = probe()
                if now == first or not paths:
                    paths[:] = [tuple(tracer.writer.stack)]
                return now

            line = changed_at(lambda: tracer.run(self.call), look)
        return line, paths[0] if paths else ()


class Calls:
    """One call after the other of one model, each traced."""

    def __init__(self, tracing: Tracing, model: nn.Module) -> None:
        self.model = model
        self.outside: list[Kept] = []
        """What is held by others than ``model`` when all is over."""
        self._tracing = tracing
        self._tracers: list[Tracer] = []

    def tracer(self) -> Tracer:
        """The tracer of the next call."""
        tracer = Tracer(self.model, self._tracing.leaves, self._tracing.gradients)
        for earlier in self._tracers:
            tracer.writer.adopt(earlier.writer.values())
        self._tracers.append(tracer)
        return tracer

    def has_read(self, tensor: torch.Tensor) -> bool:
        """Whether the first call read ``tensor``."""
        return self._tracers[0].writer.seen(tensor) is not None

    def end(self) -> list[tuple[Watch, Trace]]:
        """Drop everything; the tensors of the traces are only watched from here on."""
        watches = []
        for tracer in self._tracers:
            watches.append((Watch(tracer.writer), tracer.writer.trace))
            tracer.release()
        self._tracers.clear()
        del self.model
        return watches

    def checked_trace(self) -> Trace:
        """The trace of the first call, if the second would be the same."""
        before, numbers = self._state(), _numbers()
        tracer = self.tracer()
        try:
            with random_state_left_alone():
                trace = tracer.run(self._tracing.call)
        except Untraceable:
            raise
        except Exception as error:
            failure = tracer.failure
            path = failure[1] if failure is not None and failure[0] is error else ""
            raise Raised(path) from error
        if _numbers() != numbers:
            drawing = self._unsettled(None, "it draws random numbers of Python or NumPy")
            drawing.remedy = "draw them with torch, whose numbers the captured module repeats"
            raise drawing
        self._check_tensors(before)
        left = self._state()
        if before.changed(left):
            self._check_second(before, left)
        return trace

    def _state(self) -> Snapshot:
        return snapshot(self.model, self._tracing.leaves)

    def _check_tensors(self, before: Snapshot) -> None:
        """No tensor may be overwritten that is no buffer and was there before the call."""
        writer = self._tracers[0].writer
        buffers = {id(buffer) for buffer in self.model.buffers()}
        for place, tensor in before.tensors.items():
            value = writer.seen(tensor)
            if value is not None and value.storage.version and id(tensor) not in buffers:
                reason = f"it overwrites the tensor '{text_of(place)}', which is no buffer"
                error = _unsettled(
                    reason, writer.trace, line=writer.trace.origins[value.current.name].line
                )
                error.remedy = "register it as a buffer"
                raise error

    def _check_second(self, before: Snapshot, left: Snapshot) -> None:
        """Trace the call that follows, and compare."""
        changed = _told(before.changed(left))
        second = self.tracer()
        try:
            trace = second.run(self._tracing.call)
        except Untraceable:
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise self._unsettled(
                changed, f"{{}}, with which the next call raises {what}"
            ) from error
        now = self._state()
        read = False
        for place, tensor in left.tensors.items():
            earlier = self._tracers[0].writer.seen(tensor)
            if (
                earlier is None
                or not second.writer.is_kept(tensor)
                or second.writer.seen(tensor) is None
            ):
                continue
            read = True
            stale = depends_on_values(earlier.current, self._fixed())
            if stale or now.tensors.get(place) is not tensor:
                refusal = self._unsettled(place, "{}, and the next call reads it")
                origin = self._tracers[0].writer.trace.origins.get(earlier.current.name)
                refusal.line = refusal.line or (origin.line if origin else "")
                raise refusal
        unsteady = [p for p in left.unsteady(now) if not self._only_written(p)]
        if unsteady:
            raise self._unsettled(_told(unsteady), "{} in every call")
        difference = None if read else first_difference(self._tracers[0].writer.trace, trace)
        if difference is not None:
            raise self._unsettled(changed, "{}, with which the next call computes something else")

    def _fixed(self) -> set[str]:
        """Names of tensors that stay as they are between two calls; a step moves parameters."""
        fixed = {name for name, _ in self.model.named_buffers()}
        if not self._tracing.training:
            fixed |= {name for name, _ in self.model.named_parameters()}
        return fixed

    def _only_written(self, place: Place) -> bool:
        """Whether ``place`` is an attribute of a module that each call sets before it reads it."""
        owner = next((m for p, m in self.model.named_modules() if p == place[0]), None)
        if len(place) < 2 or owner is None or place[1] not in vars(owner):
            return False
        with _reads_of(owner) as names:
            self.tracer().run(self._tracing.call)
        return place[1] not in names

    def _unsettled(self, place: Place | None, reason: str) -> Unsettled:
        """The refusal, with the line and the modules where ``place`` changes."""
        line, paths = self._tracing.line_of_change(place)
        text = "" if place is None else f"it changes '{text_of(place)}'"
        trace = self._tracers[0].writer.trace
        return _unsettled(reason.format(text), trace, line=line, paths=paths)


def _told(places: list[Place]) -> Place:
    """The place to name: rather a value than a number of values."""
    return next((p for p in places if p[-1] != "<size>"), places[0])


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


@contextmanager
def _reads_of(module: nn.Module) -> Iterator[set[str]]:
    """Names of the attributes of ``module`` that the user's code asks for before it sets them."""
    names: set[str] = set()
    given: set[str] = set()
    assign = nn.Module.__setattr__

    def asked(self: Any, name: str) -> Any:
        if self is module and name not in given:
            names.add(name)
        return object.__getattribute__(self, name)

    def assigned(self: Any, name: str, value: Any) -> None:
        if self is module:
            given.add(name)
        with_reads = set(names)
        assign(self, name, value)
        names.intersection_update(with_reads)  # nn.Module looks at its own members meanwhile

    nn.Module.__getattribute__ = asked  # type: ignore[method-assign, assignment]
    nn.Module.__setattr__ = assigned  # type: ignore[method-assign, assignment]
    try:
        yield names
    finally:
        del nn.Module.__getattribute__
        nn.Module.__setattr__ = assign  # type: ignore[method-assign]
