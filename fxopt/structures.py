"""Results that are objects: dataclasses, namespaces and dictionaries of a class of their own.

``torch.utils._pytree`` takes these as leaves unless somebody registers their class. Here they
become :class:`Record`, which is registered, with their members as children; nothing is registered
for the user's classes, and an object is rebuilt with the members it had, without its ``__init__``.
"""

from __future__ import annotations

import dataclasses
import types
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils import _pytree as pytree


@dataclass
class Record:
    """An object of class ``kind``: its attributes, and its items if it is a dictionary."""

    kind: type
    attributes: Mapping[str, Any]
    items: Mapping[Any, Any]


def flatten(value: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """The leaves of ``value`` and its structure, as :func:`unflatten` wants it."""
    return pytree.tree_flatten(as_records(value))


def unflatten(leaves: Sequence[Any], spec: pytree.TreeSpec) -> Any:
    """The user's own structure with these leaves."""
    return _as_objects(pytree.tree_unflatten(list(leaves), spec))


def as_records(value: Any) -> Any:
    """``value`` with every object that pytree does not look into as a :class:`Record`."""
    return pytree.tree_map(lambda leaf: _recorded(leaf) if _is_object(leaf) else leaf, value)


def _is_object(value: Any) -> bool:
    if isinstance(value, type):
        return False
    return dataclasses.is_dataclass(value) or isinstance(value, (types.SimpleNamespace, dict))


def _recorded(value: Any) -> Record:
    attributes = {field.name: getattr(value, field.name)
                  for field in dataclasses.fields(value) if hasattr(value, field.name)
                  } if dataclasses.is_dataclass(value) else {}  # fmt: skip
    attributes |= getattr(value, "__dict__", {})
    items = dict(value) if isinstance(value, dict) else {}
    return Record(
        type(value),
        {name: as_records(member) for name, member in attributes.items()},
        {key: as_records(item) for key, item in items.items()},
    )


def _as_objects(value: Any) -> Any:
    return pytree.tree_map(
        lambda leaf: _rebuilt(leaf) if isinstance(leaf, Record) else leaf,
        value,
        is_leaf=lambda node: isinstance(node, Record),
    )


def _rebuilt(record: Record) -> Any:
    kind: Any = record.kind
    made = kind.__new__(kind)
    for name, member in record.attributes.items():
        object.__setattr__(made, name, _as_objects(member))
    base = OrderedDict if issubclass(record.kind, OrderedDict) else dict
    for key, item in record.items.items():
        base.__setitem__(made, key, _as_objects(item))
    return made


_Context = tuple[type, tuple[str, ...], tuple[Any, ...]]


def _children(record: Record) -> tuple[list[Any], _Context]:
    names, keys = tuple(record.attributes), tuple(record.items)
    return [*record.attributes.values(), *record.items.values()], (record.kind, names, keys)


def _children_with_keys(record: Record) -> tuple[list[tuple[Any, Any]], _Context]:
    children, context = _children(record)
    _, names, keys = context
    paths = [*map(pytree.GetAttrKey, names), *map(pytree.MappingKey, keys)]
    return list(zip(paths, children, strict=True)), context


def _from_children(children: Any, context: _Context) -> Record:
    kind, names, keys = context
    values = list(children)
    attributes = dict(zip(names, values[: len(names)], strict=True))
    return Record(kind, attributes, dict(zip(keys, values[len(names) :], strict=True)))


pytree.register_pytree_node(
    Record, _children, _from_children, flatten_with_keys_fn=_children_with_keys,
    serialized_type_name="fxopt.structures.Record",
)  # fmt: skip
