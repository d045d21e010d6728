"""An editable copy of a program: collects the changes of a pass, commits a new program."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from fxopt.graphs import assemble, copy_tree, share_tensors
from fxopt.errors import InvalidProgramError
from fxopt.infer import META, MetaTwins, on_meta, run_module
from fxopt.program import Origin, Program, TensorType, ValueType, has_effect, type_of


@dataclass(frozen=True)
class Untied:
    """A tensor that several calls shared and that a rewrite had to copy: its name, bytes added."""

    name: str
    bytes_added: int


class Edit:
    """Changes to a copy of ``program``; the program itself stays as it is.

    Modules are values: a pass never changes one, it puts a new one at one call site. Nodes given
    to the methods may be the program's own or their names: they are found in the copy by name.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._tree = copy_tree(program.graph_module, share_tensors(program.graph_module))
        self._graph = copy.deepcopy(program.graph_module.graph)
        self._nodes = {node.name: node for node in self._graph.nodes}
        self._called_before = _called(self._graph)
        self._origins = dict(program.origins)
        self._made: dict[Hashable, str] = {}
        self._derived: dict[str, list[str]] = {}
        self._copies: dict[int, tuple[str, torch.Tensor, dict[int, torch.Tensor]]] = {}
        self.changed: set[str] = set()
        self.stands_for: dict[str, str] = {}
        """Of each removed node, the node whose value takes its place."""

    def node(self, node: fx.Node | str) -> fx.Node:
        """The copy's node of that name."""
        return self._nodes[node if isinstance(node, str) else node.name]

    def module(self, node: fx.Node | str) -> nn.Module:
        """The module that ``node`` calls: read it, never change it."""
        return self._tree.get_submodule(str(self.node(node).target))

    def replace_module(
        self, node: fx.Node | str, make: Callable[[], nn.Module], *, key: Hashable
    ) -> fx.Node:
        """Let ``node`` call ``make()`` instead; other calls of its old module keep that.

        Calls replaced under the same ``key`` share one new module. It takes the old one's path if
        nothing else uses that any more.
        """
        site = self.node(node)
        old = str(site.target)
        if key not in self._made:
            module = make()
            path = self._fresh(old)
            self._insert(path, module)
            self._derived.setdefault(old, []).append(path)
            self._made[key] = path
            self._note_copies(old, self._tree.get_submodule(old), module)
        site.target = self._made[key]
        self.changed.add(site.name)
        return site

    def call_module(
        self, module: nn.Module, args: tuple[Any, ...], *, after: fx.Node | str, name: str
    ) -> fx.Node:
        """A new node that calls ``module``, placed after ``after`` and named like ``name``."""
        anchor = self.node(after)
        origin = self._origins.get(anchor.name, Origin())
        path = self._fresh(f"{origin.path}.{name}" if origin.path else name)
        self._insert(path, module)
        return self._new(anchor, "call_module", path, args, {})

    def call_function(
        self, function: Callable[..., Any], args: tuple[Any, ...], *, after: fx.Node | str
    ) -> fx.Node:
        """A new node that calls ``function``, placed after ``after``."""
        return self._new(self.node(after), "call_function", function, args, {})

    def replace_uses(self, old: fx.Node | str, new: fx.Node | str) -> None:
        """Whoever reads ``old`` reads ``new`` from here on; ``old`` goes, unless ``new`` reads it."""
        before, after = self.node(old), self.node(new)
        before.replace_all_uses_with(after, delete_user_cb=lambda user: user is not after)
        self.stands_for[before.name] = after.name
        for earlier, later in self.stands_for.items():
            if later == before.name:
                self.stands_for[earlier] = after.name
        if not before.users:
            self._graph.erase_node(before)

    def commit(self) -> Program:
        """The edited copy as a new program, in canonical form."""
        for node in reversed(list(self._graph.nodes)):
            if not node.users and not has_effect(node, self._tree):
                self._graph.erase_node(node)
        self._settle_paths()
        graph_module = assemble(self._tree, self._graph, fx.GraphModule)
        graph_module.eval()
        names = [node.name for node in self._graph.nodes]
        types = self._types(graph_module)
        return replace(
            self.program,
            graph_module=graph_module,
            types=types,
            origins={name: self._origins[name] for name in names if name in self._origins},
            opaque={n: r for n, r in self.program.opaque.items() if n in types},
        ).check()

    def untied(self) -> tuple[Untied, ...]:
        """Tensors that were shared and are not any more, after :meth:`commit`."""
        alive = {id(t) for t in (*self._tree.parameters(), *self._tree.buffers())}
        found = []
        for name, old, made in self._copies.values():
            extra = len(made) + (id(old) in alive) - 1
            if extra > 0:
                found.append(Untied(name, extra * old.numel() * old.element_size()))
        return tuple(found)

    # ---- inner work ------------------------------------------------------------------------

    def _new(self, anchor: fx.Node, op: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        with self._graph.inserting_after(anchor):
            node = self._graph.create_node(op, target, args, kwargs)
        self._nodes[node.name] = node
        self._origins[node.name] = self._origins.get(anchor.name, Origin())
        self.changed.add(node.name)
        return node

    def _fresh(self, base: str) -> str:
        path, count = base, 1
        while _member(self._tree, path) is not None:
            path, count = f"{base}_{count}", count + 1
        return path

    def _insert(self, path: str, module: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        self._tree.get_submodule(parent).add_module(name, module)

    def _note_copies(self, path: str, old: nn.Module, new: nn.Module) -> None:
        for name, tensor in old.named_parameters(recurse=False):
            replacement = getattr(new, name, None)
            if isinstance(replacement, torch.Tensor) and replacement is not tensor:
                entry = self._copies.setdefault(id(tensor), (f"{path}.{name}", tensor, {}))
                entry[2][id(replacement)] = replacement

    def _settle_paths(self) -> None:
        """New modules take the paths of those that nothing uses any more; the rest go."""
        called = _called(self._graph)
        read = {str(n.target).rpartition(".")[0] for n in self._graph.nodes if n.op == "get_attr"}
        lent = {id(owner) for m in self._tree.modules()
                for (owner,), _ in m.__dict__.get("_borrowed", {}).values()}  # fmt: skip
        for old in sorted(self._called_before - called):
            module = self._tree.get_submodule(old)
            if old in read or id(module) in lent:
                continue
            heirs = self._derived.get(old, [])
            heir = self._tree.get_submodule(heirs[0]) if heirs else None
            if heirs:
                _remove(self._tree, heirs[0])
                self._retarget(heirs[0], old)
            self._swap(module, heir)

    def _retarget(self, path: str, new: str) -> None:
        for node in self._graph.nodes:
            if node.op == "call_module" and node.target == path:
                node.target = new

    def _swap(self, old: nn.Module, heir: nn.Module | None) -> None:
        """Put ``heir`` wherever ``old`` is a member; members below ``old`` stay."""
        replacement = heir
        if old._modules:
            replacement = heir if heir is not None else nn.Module()
            for name, child in old._modules.items():
                replacement.add_module(name, child)
        for holder in list(self._tree.modules()):
            for name, member in list(holder._modules.items()):
                if member is old:
                    if replacement is None:
                        del holder._modules[name]
                    else:
                        holder._modules[name] = replacement

    def _types(self, graph_module: fx.GraphModule) -> dict[str, ValueType]:
        """Static types; only what changed, and what reads something whose type changed, is run."""
        types: dict[str, ValueType] = {}
        twins = MetaTwins()
        for node in self._graph.nodes:
            known = self.program.types.get(node.name)
            same_operands = all(
                types.get(operand.name) == self.program.types.get(operand.name)
                for operand in node.all_input_nodes
            )
            if node.op == "output":
                continue
            if node.name in self.program.types and node.name not in self.changed and same_operands:
                types[node.name] = known
            else:
                types[node.name] = self._type(graph_module, node, types, twins)
        return types

    def _type(
        self, graph_module: fx.GraphModule, node: fx.Node, types: dict[str, ValueType],
        twins: MetaTwins,
    ) -> ValueType:  # fmt: skip
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs), lambda operand: _example(types[operand.name])
        )
        try:
            if node.op == "call_module":
                module = graph_module.get_submodule(str(node.target))
                return type_of(run_module(module, twins.module(module), args, kwargs))
            if node.op == "call_method":
                return type_of(on_meta(getattr(torch.Tensor, str(node.target)), args, kwargs))
            if node.op == "get_attr":
                return type_of(_member(graph_module, str(node.target)))
            return type_of(on_meta(node.target, args, kwargs))  # type: ignore[arg-type]
        except Exception as error:
            raise InvalidProgramError(
                f"the rewritten '{node.name}' ({self._origins.get(node.name, Origin())}) does not "
                f"take its inputs: {error}; this is a bug in the pass"
            ) from error


def _called(graph: fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if node.op == "call_module"}


def _member(tree: nn.Module, path: str) -> Any:
    value: Any = tree
    for atom in path.split("."):
        value = getattr(value, atom, None)
        if value is None:
            return None
    return value


def _remove(tree: nn.Module, path: str) -> None:
    parent, _, name = path.rpartition(".")
    del tree.get_submodule(parent)._modules[name]


def _example(value: ValueType) -> Any:
    if isinstance(value, TensorType):
        return torch.empty(value.shape, dtype=value.dtype, device=META)
    return tuple(map(_example, value)) if isinstance(value, tuple) else value
