"""The immutable value that everything in fxopt is a function of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxopt.errors import InvalidProgramError
from fxopt.graphs import member
from fxopt.guards import Guards
from fxopt.interface import Interface


@dataclass(frozen=True)
class TensorType:
    """Static type of a tensor for the example inputs: ``shape`` (batch included) and ``dtype``."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.shape))}]"


ValueType = Any
"""A :class:`TensorType`, a plain number, ``None``, or a tuple of value types."""


def type_of(value: Any) -> ValueType:
    """The static type of what a node gave: tensors become :class:`TensorType`, numbers stay."""
    if isinstance(value, torch.Tensor):
        return TensorType(tuple(value.shape), value.dtype)
    if isinstance(value, (tuple, list)):
        return tuple(type_of(item) for item in value)
    if isinstance(value, dict):
        return tuple(type_of(item) for item in value.values())
    return value


def tensor_types(value: ValueType) -> Iterator[TensorType]:
    """Every tensor type inside ``value``."""
    if isinstance(value, TensorType):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from tensor_types(item)


@dataclass(frozen=True)
class Origin:
    """Where a node comes from, in the user's own names.

    ``path`` is the user's module (empty for the root), ``line`` the line of the user's code
    (``model.py:12``), and ``overwrote`` the node whose storage the user's code overwrote with this
    node's value (``inplace=True``, ``+=``).
    """

    path: str = ""
    line: str = ""
    overwrote: str | None = None

    def __str__(self) -> str:
        return f"'{self.path}'" if self.path else self.line or "the model's own forward"


@dataclass(frozen=True)
class ModeContract:
    """What ``.train()`` and ``.eval()`` do to a captured module.

    ``fixed`` names the modules that do not follow the mode, with their ``training`` flag in eval
    and in train mode (a frozen norm has ``(False, False)``). ``eval_only`` is empty, or the reason
    for which the program has no training mode. ``training`` is the mode that the user's model was
    in, ``initial`` the modules that were in another.
    """

    fixed: Mapping[str, tuple[bool, bool]] = field(default_factory=dict)
    eval_only: str = ""
    training: bool = False
    initial: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Program:
    """A captured model: a graph in canonical form and what is known of it.

    Attributes:
        graph_module: flat tensors in, a flat tuple of outputs; never mutated, shares its
            parameters with the other programs of its pipeline.
        types: static type of every node's value by node name.
        origins: where each node comes from, by node name.
        interface: how the user calls the model, and the structure of what comes back.
        guards: the decisions that Python took while the model was captured.
        modes: what the training mode does.
        opaque: names of nodes that call a module which could not be traced, with the reason.
        notes: sentences for the report (a forward that overwrites its input, say).
        name: the class of the user's model.
    """

    graph_module: fx.GraphModule
    types: Mapping[str, ValueType]
    origins: Mapping[str, Origin]
    interface: Interface
    guards: Guards
    modes: ModeContract
    opaque: Mapping[str, str]
    notes: tuple[str, ...]
    name: str

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """Every node, in topological order."""
        return tuple(self.graph_module.graph.nodes)

    def node(self, name: str) -> fx.Node:
        """The node called ``name``."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(name)

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that ``node`` calls, or None if it calls none."""
        return (
            self.graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
        )

    def tensors_read(self, node: fx.Node) -> list[torch.Tensor]:
        """The parameters and buffers that ``node`` reads, those too that its layer borrows."""
        module = self.module(node)
        if module is not None:
            borrowed = [getattr(module, name) for name in vars(module).get("_borrowed", ())]
            return [*module.parameters(), *module.buffers(), *borrowed]
        value = member(self.graph_module, str(node.target)) if node.op == "get_attr" else None
        return [value] if isinstance(value, torch.Tensor) else []

    @property
    def is_on_meta(self) -> bool:
        """Whether its parameters have shapes and no values."""
        return any(parameter.is_meta for parameter in self.graph_module.parameters())

    def inputs(self) -> dict[str, TensorType]:
        """Type of every tensor input by its name."""
        return {n.name: self.types[n.name] for n in self.nodes if n.op == "placeholder"}

    def output_node(self) -> fx.Node:
        """The one ``output`` node; its argument is a flat tuple."""
        return self.nodes[-1]

    def where(self, node: fx.Node) -> str:
        """``node`` in the user's names, for messages."""
        return str(self.origins.get(node.name, Origin()))

    def check(self) -> Program:
        """This program, if it is in canonical form.

        Raises:
            InvalidProgramError: naming the first node that breaks a rule. It is a bug in fxopt or
                in the pass that made the program.
        """
        _check_graph(self)
        return self


def has_effect(node: fx.Node, tree: nn.Module) -> bool:
    """Whether ``node`` must stay even if nothing reads it: it writes a buffer or draws numbers."""
    if node.op in ("placeholder", "output"):
        return True
    if node.op == "call_method":
        return node.target == "copy_"
    if node.op == "call_module":
        return getattr(tree.get_submodule(str(node.target)), "running_mean", None) is not None
    return False


def _check_graph(program: Program) -> None:
    def wrong(node: fx.Node, what: str) -> InvalidProgramError:
        return InvalidProgramError(
            f"node '{node.name}' ({program.where(node)}) {what}; this is a bug in fxopt or in the "
            "last pass, please report it"
        )

    seen: set[fx.Node] = set()
    nodes = program.nodes
    last_placeholder = max((i for i, n in enumerate(nodes) if n.op == "placeholder"), default=-1)
    for index, node in enumerate(nodes):
        if any(operand not in seen for operand in node.all_input_nodes):
            raise wrong(node, "reads a node that comes later")
        if index < last_placeholder and node.op != "placeholder":
            raise wrong(node, "stands before an input")
        if (node.op == "output") != (index == len(nodes) - 1):
            raise wrong(node, "breaks the rule of one output, placed last")
        if node.op != "output" and node.name not in program.types:
            raise wrong(node, "has no static type")
        if not node.users and not has_effect(node, program.graph_module):
            raise wrong(node, "is dead: nothing reads it")
        if node.op in ("call_module", "get_attr"):
            _check_target(program, node, wrong)
        seen.add(node)


def _check_target(program: Program, node: fx.Node, wrong: Any) -> None:
    path, _, name = str(node.target).rpartition(".")
    try:
        holder = program.graph_module.get_submodule(path)
    except AttributeError:
        raise wrong(node, f"refers to '{node.target}', which does not exist") from None
    if not hasattr(holder, name):
        raise wrong(node, f"refers to '{node.target}', which does not exist")
    target = getattr(holder, name)
    if node.op == "call_module" and getattr(target, "inplace", False):
        raise wrong(node, "calls a module with inplace=True")
