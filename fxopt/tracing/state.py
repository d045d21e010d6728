"""The Python state that a forward pass can reach, as a value that two moments are compared by.

State is what is no parameter and no buffer: attributes of the modules and of their classes,
containers, objects, iterators and random generators in them, and what the code of the modules
closes over or reads from its globals. The walk follows references, takes each object once, and
stops after ``LIMIT`` values. Ours.
"""

from __future__ import annotations

import enum
import functools
import logging
import pickle
import random
import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fxopt.shapes import ShapeFloat, ShapeInt

Place = tuple[str, ...]
"""Where a value is: the owner (a module's path, a class or a function), then the steps to it."""

LIMIT = 30_000


@dataclass(frozen=True, eq=False)
class Snapshot:
    """``plain`` are tokens that are equal if the values are; ``tensors`` the unregistered ones."""

    plain: Mapping[Place, Any]
    tensors: Mapping[Place, torch.Tensor]
    roots: Mapping[Place, Any]
    """The objects whose members the places begin with."""

    def probe(self, place: Place) -> Callable[[], Any]:
        """A question, quickly asked, whose answer changes with what is at ``place``."""

        def answer() -> Any:
            walk = _Walk()
            owner = self.roots.get(place[:1])
            root = place[:2] if isinstance(owner, Mapping) else place[:1]
            walk.put(root, owner.get(place[1]) if isinstance(owner, Mapping) else owner)
            found = walk.finish()
            return dict(found.plain), {p: (id(t), t._version) for p, t in found.tensors.items()}

        return answer

    def changed(self, later: Snapshot) -> list[Place]:
        """Where ``later`` differs, in the order of the walk."""
        places = _differing(self.plain, later.plain)
        for place in dict.fromkeys((*later.tensors, *self.tensors)):
            if self.tensors.get(place) is not later.tensors.get(place):
                places.append(place)
        return places

    def unsteady(self, later: Snapshot) -> list[Place]:
        """As :meth:`changed`, but a tensor may have given way to another one of its shape."""
        kinds = [{p: (t.shape, t.dtype) for p, t in s.tensors.items()} for s in (self, later)]
        return _differing(self.plain, later.plain) + _differing(*kinds)


def _differing(earlier: Mapping[Place, Any], later: Mapping[Place, Any]) -> list[Place]:
    places = dict.fromkeys((*later, *earlier))
    return [p for p in places if earlier.get(p, _ABSENT) != later.get(p, _ABSENT)]


_ABSENT = object()


def text_of(place: Place) -> str:
    """``place`` as the user would write it."""
    owner, *steps = place
    text = "".join(step if step[:1] in "[." else f".{step}" for step in steps)
    return f"{owner}{text}".lstrip(".")


def snapshot(model: nn.Module, kept: Collection[str] = ()) -> Snapshot:
    """The state that ``model`` can reach, without that of the submodules at the paths ``kept``."""
    walk = _Walk()
    functions: dict[int, types.FunctionType] = {}
    members = [(p, m) for p, m in model.named_modules() if not _within(p, kept)]
    roots: dict[Place, Any] = {(p,): vars(m) for p, m in members}
    walk.seen |= {id(m) for m in model.modules()}
    for path, module in members:
        for name, value in vars(module).items():
            if name not in _TENSOR_MEMBERS and not (name[:1] == "_" and value == {}):
                walk.put((path, name), value)
    for cls in {c for _, m in members for c in type(m).__mro__ if not _is_library(c.__module__)}:
        roots.setdefault((cls.__name__,), vars(cls))
        for name, value in vars(cls).items():
            function = getattr(value, "__func__", value)
            if isinstance(function, types.FunctionType):
                functions[id(function)] = function
            elif not name.startswith("__") and not isinstance(function, _DESCRIPTORS):
                walk.put((cls.__name__, name), value)
    for function in functions.values():
        roots.setdefault((function.__name__,), function)
        walk.put((function.__name__,), function)
    found = walk.finish()
    return Snapshot(found.plain, found.tensors, roots)


_TENSOR_MEMBERS = frozenset({"_parameters", "_buffers", "_non_persistent_buffers_set"})
_DESCRIPTORS = (property, functools.cached_property, type(vars(nn.Module)["__weakref__"]))


def _within(path: str, kept: Collection[str]) -> bool:
    return any(path == k or path.startswith(f"{k}.") for k in kept)


def _is_library(module: str) -> bool:
    return module.partition(".")[0] in _LIBRARIES


_LIBRARIES = {"torch", "fxopt", "numpy", "builtins", "typing", "abc", "collections", "functools",
              "logging", "threading", "_thread", "io", "_io", "re", "inspect", "contextlib",
              "warnings", "pathlib", "torchgen", "_pytest"}  # fmt: skip
_SCALARS = frozenset({int, bool, str, bytes, complex, type(None), type(Ellipsis)})
_ATOMS = (
    type, types.ModuleType, types.BuiltinFunctionType, enum.Enum, logging.Logger, weakref.ref,
    torch.dtype, torch.device, types.GeneratorType,
)  # fmt: skip


@dataclass
class _Same:
    """A value that is compared by identity, and kept alive so that the identity stays its own."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value


@dataclass
class _Walk:
    plain: dict[Place, Any] = field(default_factory=dict)
    tensors: dict[Place, torch.Tensor] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)
    waiting: deque[tuple[Place, Any]] = field(default_factory=deque)
    alive: list[Any] = field(default_factory=list)

    def put(self, place: Place, value: Any) -> None:
        """Take ``value`` down, or, where it holds others, have it wait for its turn."""
        kind = type(value)
        if kind in _SCALARS:
            self.plain[place] = (kind, value)
        elif kind is float:
            self.plain[place] = repr(value)
        elif isinstance(value, (ShapeInt, ShapeFloat)):
            self.plain[place] = ("shape", value.value)
        elif isinstance(value, torch.Tensor):
            if not isinstance(value, nn.Parameter):
                self.tensors[place] = value
        elif isinstance(value, _ATOMS):
            self.plain[place] = _Same(value)
        else:
            self.waiting.append((place, value))

    def finish(self) -> Snapshot:
        while self.waiting and len(self.plain) + len(self.tensors) < LIMIT:
            place, value = self.waiting.popleft()
            if id(value) in self.seen:
                self.plain[place] = _Same(value)
                continue
            self.seen.add(id(value))
            self.alive.append(value)
            token = _random_state(value)
            if token is not None:
                self.plain[place] = token
                continue
            self.plain[place] = _Same(value)
            for step, item in _items(value):
                self.put((*place, step), item)
        return Snapshot(self.plain, self.tensors, {})


def _random_state(value: Any) -> Any:
    """The state of a random generator or an array, or None for anything else."""
    if isinstance(value, random.Random):
        return hash(value.getstate())
    if isinstance(value, torch.Generator):
        return hash(value.get_state().numpy().tobytes())
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    if isinstance(value, numpy.ndarray):
        return _Same(value) if value.nbytes > 1 << 20 else (value.shape, hash(value.tobytes()))
    if isinstance(value, (numpy.random.Generator, numpy.random.RandomState)):
        return hash(pickle.dumps(value))
    return None


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """What ``value`` holds, each with the step that leads to it."""
    if isinstance(value, Mapping):
        yield "<size>", len(value)
        for index, (key, item) in enumerate(list(value.items())):
            yield (f"[{key!r}]" if type(key) in _SCALARS else f"[#{index}]"), item
    elif isinstance(value, (list, tuple, deque)):
        yield "<size>", len(value)
        yield from ((f"[{index}]", item) for index, item in enumerate(list(value)))
    elif isinstance(value, (set, frozenset)):
        yield "<size>", len(value)
        yield from ((f"[#{i}]", v) for i, v in enumerate(sorted(value, key=_order)))
    elif isinstance(value, types.FunctionType):
        yield from _of_function(value)
    elif isinstance(value, types.MethodType):
        yield from ((".__func__", value.__func__), (".__self__", value.__self__))
    elif isinstance(value, functools.partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    elif hasattr(type(value), "__next__"):
        yield from _of_iterator(value)
    elif isinstance(value, nn.Module) or not _is_library(type(value).__module__):
        yield from _attributes(value)


def _order(item: Any) -> tuple[str, str]:
    return type(item).__name__, repr(item) if type(item) in _SCALARS else str(hash(item))


def _of_iterator(value: Any) -> Iterator[tuple[str, Any]]:
    try:
        _, *state = value.__reduce_ex__(4)
    except Exception:
        return
    yield ".state", state


def _of_function(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function of the user's closes over and reads from its module."""
    if _is_library(function.__module__ or "builtins"):
        return
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f"[{name}]", cell.cell_contents
        except ValueError:
            continue  # a cell that is not filled yet
    for name in _names(function.__code__):
        if name in function.__globals__:
            value = function.__globals__[name]
            if not isinstance(value, (types.ModuleType, type)):
                yield f"[{name}]", value


def _names(code: types.CodeType) -> Iterable[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    for name, item in list(getattr(value, "__dict__", {}).items()):
        if name not in _TENSOR_MEMBERS:
            yield name, item
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name != "__dict__" and name != "__weakref__" and hasattr(value, name):
                yield name, getattr(value, name)
