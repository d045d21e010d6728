"""Functions that a model holds, made to speak of its copy.

``copy.deepcopy`` keeps a function as it is, so a lambda or a hook over ``self`` would go on using
the original module: its parameters, its mode, its counters. Here every function that is reached
from the modules' attributes, and whose closure or defaults reach the model, is made anew; its
cells are filled once the copy exists.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_HOLDERS = (types.FunctionType, types.MethodType, functools.partial, dict, list, tuple, set,
            frozenset)  # fmt: skip


class Rebinding:
    """The functions of ``model`` that are to be copied with it.

    ``memo`` has the copies of the model's tensors, and is given the functions' unfinished ones, as
    ``copy.deepcopy`` wants them; after the copy,
    :meth:`finish` fills their cells from the memo.
    """

    def __init__(self, model: nn.Module, memo: dict[int, Any]) -> None:
        self._memo = memo
        self._own = {id(module) for module in model.modules()}
        self._own |= set(memo)
        self._made: list[tuple[types.FunctionType, types.FunctionType]] = []
        self._speaks: dict[int, bool] = {}
        for module in model.modules():
            for value in vars(module).values():
                for function in _functions(value, set()):
                    self._prepare(function)

    def finish(self) -> None:
        """Give the copies what the originals hold, copied where it belongs to the model."""
        for old, new in self._made:
            for before, after in zip(old.__closure__ or (), new.__closure__ or (), strict=True):
                if _filled(before):
                    after.cell_contents = self._copied(before.cell_contents)
            if old.__defaults__:
                new.__defaults__ = tuple(map(self._copied, old.__defaults__))
            if old.__kwdefaults__:
                new.__kwdefaults__ = {k: self._copied(v) for k, v in old.__kwdefaults__.items()}

    def _copied(self, value: Any) -> Any:
        return copy.deepcopy(value, self._memo) if self._reaches_model(value) else value

    def _prepare(self, function: types.FunctionType) -> None:
        if id(function) in self._memo or not self._reaches_model(function):
            return
        cells = tuple(types.CellType() for _ in function.__closure__ or ())
        new = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, None, cells
        )
        new.__dict__.update(vars(function))
        self._memo[id(function)] = new
        self._made.append((function, new))
        for value in held(function):
            for inner in _functions(value, set()):
                self._prepare(inner)

    def _reaches_model(self, value: Any) -> bool:
        if id(value) in self._own:
            return True
        if not isinstance(value, _HOLDERS):
            return False
        if id(value) not in self._speaks:
            self._speaks[id(value)] = False  # while it is being asked: structures may be cyclic
            self._speaks[id(value)] = any(map(self._reaches_model, held(value)))
        return self._speaks[id(value)]


def _functions(value: Any, seen: set[int]) -> Iterator[types.FunctionType]:
    """Every plain function in ``value``, through containers, partials and bound methods."""
    if id(value) in seen or isinstance(value, (nn.Module, torch.Tensor)):
        return
    seen.add(id(value))
    if isinstance(value, types.FunctionType):
        yield value
    else:
        for item in held(value):
            yield from _functions(item, seen)


def held(value: Any) -> list[Any]:
    """What a function, a partial, a bound method or a container holds directly."""
    if not isinstance(value, _HOLDERS):
        return []
    if isinstance(value, types.FunctionType):
        cells = [c.cell_contents for c in value.__closure__ or () if _filled(c)]
        return [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    return list(value.values()) if isinstance(value, dict) else list(value)


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
