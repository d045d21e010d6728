"""Graph modules put together, copied and written as plain values."""

from __future__ import annotations

import copy
import keyword
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import fx, nn

Kind = TypeVar("Kind", bound=fx.GraphModule)

_MEMBERS = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")


def assemble(tree: nn.Module, graph: fx.Graph, kind: type[Kind]) -> Kind:
    """A graph module over all of ``tree``, also the members that ``graph`` does not use."""
    result = kind({}, fx.Graph())
    for members in _MEMBERS:
        setattr(result, members, getattr(tree, members))
    graph.set_codegen(_Code())
    result.graph = graph
    return result


class _Code(fx.graph.CodeGen):
    """Code that reaches members whose names are Python keywords (``heads.class``) by ``getattr``.

    That is what torch writes for names that are no identifiers, so for its sake they are none.
    """

    def _gen_python_code(self, nodes: Any, *args: Any, **kwargs: Any) -> Any:
        renamed = {n: n.target for n in nodes if n.op in ("call_module", "get_attr")
                   and any(map(keyword.iskeyword, str(n.target).split(".")))}  # fmt: skip
        try:
            for node, target in renamed.items():
                atoms = str(target).split(".")
                node.target = ".".join(f"{_MARK}{a}" if keyword.iskeyword(a) else a for a in atoms)
            code = super()._gen_python_code(nodes, *args, **kwargs)
        finally:
            for node, target in renamed.items():
                node.target = target
        return replace(code, src=code.src.replace(_MARK, "")) if renamed else code


_MARK = "\N{INVISIBLE SEPARATOR}"


def copy_tree(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy of the members of ``module`` (ties kept), without its graph.

    What ``memo`` maps by identity is not copied, as for ``copy.deepcopy``.
    """
    tree = nn.Module()
    for members in _MEMBERS:
        setattr(tree, members, copy.deepcopy(getattr(module, members), memo))
    return tree


def share_tree(module: nn.Module) -> nn.Module:
    """The very members of ``module``, without its graph."""
    tree = nn.Module()
    for members in _MEMBERS:
        setattr(tree, members, getattr(module, members))
    return tree


def share_tensors(module: nn.Module) -> dict[int, Any]:
    """A memo that makes a deep copy share all parameters and buffers of ``module``."""
    return {id(t): t for t in (*module.parameters(), *module.buffers())}


@dataclass(frozen=True)
class NodeRecord:
    """A graph node as plain values; operands are :class:`Operand`."""

    name: str
    op: str
    target: Any
    args: Any
    kwargs: Any


@dataclass(frozen=True)
class Operand:
    """A node that another one reads, by name."""

    name: str


@dataclass(frozen=True)
class LibraryOperator:
    """An operator of ``torch.ops``, which does not pickle, by its name."""

    name: str
    overload: str


def _named(target: Any) -> Any:
    if isinstance(target, torch._ops.OpOverload):
        return LibraryOperator(target.overloadpacket._qualified_op_name, target._overloadname)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return LibraryOperator(target._qualified_op_name, "")
    return target


def target_of(record: NodeRecord) -> Any:
    """What the node of ``record`` calls."""
    return _found(record.target)


def _found(target: Any) -> Any:
    if not isinstance(target, LibraryOperator):
        return target
    library, _, name = target.name.partition("::")
    packet = getattr(getattr(torch.ops, library), name)
    return getattr(packet, target.overload) if target.overload else packet


def graph_to_records(graph: fx.Graph) -> tuple[NodeRecord, ...]:
    """``graph`` as values that can be pickled."""
    return records_of(graph.nodes)


def records_of(nodes: Iterable[fx.Node]) -> tuple[NodeRecord, ...]:
    """``nodes`` as values; what they read is named."""

    def plain(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return Operand(argument.name)
        return mapped(plain, argument)

    return tuple(
        NodeRecord(n.name, n.op, _named(n.target), plain(n.args), plain(n.kwargs)) for n in nodes
    )


def graph_from_records(records: tuple[NodeRecord, ...]) -> fx.Graph:
    """The graph that :func:`graph_to_records` wrote, with the same names."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}

    def wired(argument: Any) -> Any:
        if isinstance(argument, Operand):
            return nodes[argument.name]
        return mapped(wired, argument)

    for record in records:
        args, kwargs = wired(record.args), wired(record.kwargs)
        nodes[record.name] = graph.create_node(
            record.op, target_of(record), args, kwargs, name=record.name
        )
    return graph


def mapped(function: Callable[[Any], Any], argument: Any) -> Any:
    """``argument`` with ``function`` applied to the items of its containers."""
    if isinstance(argument, (tuple, list)):
        return (list if isinstance(argument, list) else tuple)(map(function, argument))
    if isinstance(argument, Mapping):
        return {key: function(value) for key, value in argument.items()}
    if isinstance(argument, slice):
        return slice(*map(function, (argument.start, argument.stop, argument.step)))
    return argument


def member(model: nn.Module, path: str) -> Any:
    """The module, parameter or buffer of ``model`` at the dotted ``path``."""
    return operator.attrgetter(path)(model)


def call_node(
    node: fx.Node, args: Any, kwargs: Mapping[str, Any], module_at: Callable[[str], nn.Module]
) -> Any:
    """What a call node gives for these arguments; ``module_at`` finds the module of a path."""
    if node.op == "call_module":
        return module_at(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(torch.Tensor, str(node.target))(*args, **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def with_sources(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """``nodes`` and everything that they are computed from."""
    found: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.all_input_nodes
    return found
