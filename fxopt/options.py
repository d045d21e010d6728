"""The options of a pass: the fields of its class, by name, type and default, and as text."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from fxopt.rewrite import Pass


def option_types(kind: type[Pass]) -> dict[str, Any]:
    """Type of every option of a pass class by name."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in _options(kind)}


def required_options(kind: type[Pass]) -> tuple[str, ...]:
    """The options of a pass class that have no default."""
    no = dataclasses.MISSING
    return tuple(f.name for f in _options(kind) if f.default is no and f.default_factory is no)


def _options(kind: type[Pass]) -> list[dataclasses.Field[Any]]:
    if not dataclasses.is_dataclass(kind):
        return []
    return [field for field in dataclasses.fields(kind) if field.init]


def parse_value(text: str, kind: Any) -> Any:
    """``text`` as a value of an option's type.

    Types: ``bool``, ``int``, ``float``, ``str``, an ``Enum`` (by value), a ``Literal``, any class
    that is made from a text, and unions of these with each other and with ``None``.

    Raises:
        ValueError: it is none.
    """
    alternatives = typing.get_args(kind)
    if _is_union(kind):
        return _first_that_takes(text, alternatives)
    if typing.get_origin(kind) is typing.Literal:
        return _choice(text, {str(a): a for a in alternatives})
    if typing.get_origin(kind) is not None:
        raise TypeError(f"an option cannot be of type {kind}; make it a class with a text form")
    if kind is types.NoneType:
        return _choice(text.lower(), {"none": None})
    if kind is bool:
        return _choice(text.lower(), {"true": True, "false": False})
    if issubclass(kind, enum.Enum):
        return _choice(text, {str(member.value): member for member in kind})
    return kind(text)


def takes_list(kind: Any) -> bool:
    """Whether a value of that type may hold commas: a class says so with ``listed = True``."""
    kinds = typing.get_args(kind) if _is_union(kind) else (kind,)
    return any(getattr(each, "listed", False) for each in kinds)


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _choice(text: str, choices: Mapping[str, Any]) -> Any:
    if text not in choices:
        raise ValueError(text)
    return choices[text]


def _first_that_takes(text: str, alternatives: Sequence[Any]) -> Any:
    # None first: a str takes every text
    for kind in sorted(alternatives, key=lambda a: a is not types.NoneType):
        with contextlib.suppress(ValueError):
            return parse_value(text, kind)
    raise ValueError(text)


def type_text(kind: Any) -> str:
    """An option's type as the user reads it: ``int``, ``true|false``, ``keep|drop``.

    A class that is made from a text may say in ``form`` what that looks like.
    """
    alternatives = typing.get_args(kind)
    if _is_union(kind):
        return "|".join(map(type_text, alternatives))
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(map(str, alternatives))
    if kind is types.NoneType:
        return "none"
    if kind is bool:
        return "true|false"
    if issubclass(kind, enum.Enum):
        return "|".join(str(member.value) for member in kind)
    return str(getattr(kind, "form", kind.__name__))
