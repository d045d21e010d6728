"""An editable copy of a program: collects the changes of a pass, commits a new program."""

from __future__ import annotations

import copy
import operator
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import fx, nn

from fxopt.errors import InvalidProgramError
from fxopt.graphs import (
    NodeRecord,
    Operand,
    assemble,
    call_node,
    copy_tree,
    mapped,
    share_tensors,
    target_of,
    with_sources,
)
from fxopt.infer import META, MetaTwins, on_meta, run_module
from fxopt.program import ModeContract, Origin, Program, TensorType, ValueType, has_effect, type_of


@dataclass(frozen=True)
class Untied:
    """A tensor that several calls shared and that a rewrite had to copy: its name, bytes added."""

    name: str
    bytes_added: int


class Edit:
    """Changes to a copy of ``program``; the program itself stays as it is.

    Modules are values: a pass never changes one, it puts a new one at one call site. Nodes given
    to the methods may be the program's own or their names: they are found in the copy by name.
    The copy's nodes may also be rewired as torch.fx allows (``node.args = …``).
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._tree = copy_tree(program.graph_module, share_tensors(program.graph_module))
        self._graph = copy.deepcopy(program.graph_module.graph)
        self._nodes = {node.name: node for node in self._graph.nodes}
        self._placed = _called(self._graph)
        """Paths of modules that were called once; those that nothing uses at the end go."""
        self._origins = dict(program.origins)
        self._made: dict[Hashable, str] = {}
        self._derived: dict[str, list[str]] = {}
        self._copies: dict[int, tuple[str, torch.Tensor, dict[int, torch.Tensor]]] = {}
        self.changed: set[str] = set()
        self.stands_for: dict[str, str] = {}
        """Of each removed node, the node whose value takes its place."""

    def node(self, node: fx.Node | str) -> fx.Node:
        """The copy's node of that name."""
        found: fx.Node = self._nodes[node if isinstance(node, str) else node.name]
        return found

    def module(self, node: fx.Node | str) -> nn.Module:
        """The module that ``node`` calls: read it, never change it."""
        return self._tree.get_submodule(str(self.node(node).target))

    @property
    def tree(self) -> nn.Module:
        """The modules and tensors of the copy: read them, never change them."""
        return self._tree

    def replace_module(
        self, node: fx.Node | str, make: Callable[[], nn.Module], *, key: Hashable
    ) -> fx.Node:
        """Let ``node`` call ``make()`` instead; other calls of its old module keep that.

        Calls replaced under the same ``key`` share one new module, so the key says all that
        ``make`` depends on. It takes the old one's path if nothing else uses that any more.
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
        home = self._home(self._origins.get(anchor.name, Origin()).path)
        path = self._fresh(f"{home}.{name}" if home else name)
        self._insert(path, module)
        return self._new(anchor, "call_module", path, args, {})

    def call_function(
        self, function: Callable[..., Any], args: tuple[Any, ...], *, after: fx.Node | str
    ) -> fx.Node:
        """A new node that calls ``function``, placed after ``after``."""
        return self._new(self.node(after), "call_function", function, args, {})

    def attribute(self, path: str, *, after: fx.Node | str) -> fx.Node:
        """A new node that reads the parameter or buffer at ``path``, placed after ``after``."""
        node = self._new(self.node(after), "get_attr", path, (), {})
        self._origins[node.name] = Origin(path.rpartition(".")[0])
        return node

    def copied(
        self, node: fx.Node | str, operands: Mapping[fx.Node, fx.Node], *, after: fx.Node | str
    ) -> fx.Node:
        """A new node that does what ``node`` does, reads others, and is placed after ``after``."""
        old = self.node(node)
        read: Any = (old.args, old.kwargs)
        args, kwargs = fx.node.map_arg(read, lambda each: operands.get(each, each))
        new = self._new(self.node(after), old.op, old.target, args, kwargs)
        self._origins[new.name] = self._origins.get(old.name, Origin())
        return new

    def restored(
        self, record: NodeRecord, values: Mapping[str, fx.Node], origin: Origin | None,
        layers: Mapping[str, nn.Module], *, after: fx.Node,
    ) -> fx.Node:  # fmt: skip
        """A new node as ``record`` says, placed after ``after``.

        What it reads is in ``values`` or in the copy by name, the module that it calls at its path
        or in ``layers``.
        """

        def wired(argument: Any) -> Any:
            if isinstance(argument, Operand):
                return values.get(argument.name) or self.node(argument.name)
            return mapped(wired, argument)

        path = str(record.target)
        if record.op == "call_module":
            if path in layers and not _exists(self._tree, path):
                self._insert(path, layers[path])
            self._placed.add(path)
        args, kwargs = wired(record.args), wired(record.kwargs)
        node = self._new(after, record.op, target_of(record), args, kwargs)
        self._origins[node.name] = origin or self._origins[node.name]
        return node

    def add_member(self, path: str, module: nn.Module) -> None:
        """Put a module at ``path`` that nothing calls."""
        parent, _, name = path.rpartition(".")
        self._tree.get_submodule(parent).add_module(name, module)

    def drop_member(self, path: str) -> None:
        """Take out the module at ``path``, which nothing calls."""
        _remove(self._tree, path)

    def drop_parameter(self, path: str) -> None:
        """Take out the parameter at ``path``, if it is there still; nothing reads it any more."""
        parent, _, name = path.rpartition(".")
        self._tree.get_submodule(parent)._parameters.pop(name, None)

    def replace_uses(self, old: fx.Node | str, new: fx.Node | str) -> None:
        """Whoever reads ``old`` reads ``new``, but for what ``new`` is computed from.

        ``old`` goes, unless ``new`` is computed from it.
        """
        before, after = self.node(old), self.node(new)
        sources = with_sources([after])
        before.replace_all_uses_with(after, delete_user_cb=lambda user: user not in sources)
        self.stands_for[before.name] = after.name
        for earlier, later in self.stands_for.items():
            if later == before.name:
                self.stands_for[earlier] = after.name
        if not before.users:
            self._graph.erase_node(before)

    def remove(self, node: fx.Node | str) -> None:
        """Take out a node that nothing reads any more, whatever it wrote in training."""
        self._graph.erase_node(self.node(node))

    def commit(self) -> Program:
        """The edited copy as a new program, in canonical form."""
        for node in reversed(list(self._graph.nodes)):
            if not node.users and not has_effect(node, self._tree):
                self._graph.erase_node(node)
        self.changed |= self._rewired()
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
            modes=self._modes(),
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
        while _exists(self._tree, path):
            path, count = f"{base}_{count}", count + 1
        return path

    def _home(self, path: str) -> str:
        """The innermost container around ``path``; a layer that the graph calls is none."""
        while path in self._placed or not _exists(self._tree, path):
            path = path.rpartition(".")[0]
        return path

    def _insert(self, path: str, module: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        self._tree.get_submodule(parent).add_module(name, module)
        self._placed.add(path)

    def _note_copies(self, path: str, old: nn.Module, new: nn.Module) -> None:
        for name, replacement in new.named_parameters(recurse=False):
            tensor = getattr(old, name, None)
            if isinstance(tensor, torch.Tensor) and replacement is not tensor:
                _, _, made = self._copies.setdefault(
                    id(tensor), (self._users_name(path, old, name), tensor, {})
                )
                made[id(replacement)] = replacement

    def _users_name(self, path: str, layer: nn.Module, name: str) -> str:
        """The key of a layer's tensor in the user's ``state_dict``."""
        if name not in layer.__dict__.get("_borrowed", {}):
            return f"{path}.{name}"
        named = (*self._tree.named_parameters(), *self._tree.named_buffers())
        return next(n for n, tensor in named if tensor is getattr(layer, name))

    def _rewired(self) -> set[str]:
        """Nodes that a pass changed by hand, not through a method of this class."""
        originals = {node.name: node for node in self.program.nodes}
        return {
            node.name
            for node in self._graph.nodes
            if node.op != "output" and node.name in originals
            and _by_name(node, self.stands_for) != _by_name(originals[node.name], self.stands_for)
        }  # fmt: skip

    def _settle_paths(self) -> None:
        """New modules take the paths of those that nothing uses any more; the rest go."""
        called = _called(self._graph)
        kept = self._in_use(called)
        calls = defaultdict(list)
        for node in self._graph.nodes:
            if node.op == "call_module":
                calls[str(node.target)].append(node)
        holders = _holders(self._tree)
        for old in sorted(self._placed - called):
            module = self._tree.get_submodule(old) if _exists(self._tree, old) else None
            if module is None or id(module) in kept:
                continue
            path = self._heir(old, called)
            heir = self._tree.get_submodule(path) if path else None
            if path:
                _remove(self._tree, path)
                calls[old] = calls.pop(path)
                for node in calls[old]:
                    node.target = old
                called.remove(path)
                called.add(old)
            _swap(module, heir, holders)

    def _in_use(self, called: set[str]) -> set[int]:
        """Modules that are called, with all below them, or whose tensors something else reads."""
        calls = [self._tree.get_submodule(path) for path in called]
        holders = {
            str(n.target).rpartition(".")[0] for n in self._graph.nodes if n.op == "get_attr"
        }
        used = {id(module) for call in calls for module in call.modules()}
        used |= {id(self._tree.get_submodule(path)) for path in holders}
        for call in calls:
            used |= {id(owner) for (owner,), _ in call.__dict__.get("_borrowed", {}).values()}
        return used

    def _heir(self, old: str, called: set[str]) -> str | None:
        """The path of the first module in use that was made in place of the one at ``old``."""
        for path in self._derived.get(old, []):
            found = path if path in called else self._heir(path, called)
            if found:
                return found
        return None

    def _modes(self) -> ModeContract:
        """A module made in place of one that does not follow the mode does not either."""
        contract = self.program.modes
        fixed = dict(contract.fixed)
        for old, paths in self._derived.items():
            if old in fixed:
                fixed |= dict.fromkeys(paths, fixed[old])
        return replace(contract, fixed={p: f for p, f in fixed.items() if _exists(self._tree, p)})

    def _types(self, graph_module: fx.GraphModule) -> dict[str, ValueType]:
        """Static types; only what changed, and what reads something whose type changed, is run."""
        types: dict[str, ValueType] = {}
        twins = MetaTwins()
        sizes: dict[fx.Node, Any] = {}
        for node in self._graph.nodes:
            if node.op == "output":
                continue
            if node.name not in self.changed and self._reads_the_same(node, types):
                types[node.name] = self.program.types[node.name]
            else:
                types[node.name] = self._type(graph_module, node, types, twins, sizes)
        return types

    def _reads_the_same(self, node: fx.Node, types: dict[str, ValueType]) -> bool:
        """Whether its operands have the types of those that they are or stand for."""
        if node.name not in self.program.types:
            return False
        before = [self.program.types[each.name] for each in self._operands_before[node.name]]
        return before == [types[each.name] for each in node.all_input_nodes]

    @cached_property
    def _operands_before(self) -> dict[str, list[fx.Node]]:
        return {node.name: node.all_input_nodes for node in self.program.nodes}

    def _type(
        self, graph_module: fx.GraphModule, node: fx.Node, types: dict[str, ValueType],
        twins: MetaTwins, sizes: dict[fx.Node, Any],
    ) -> ValueType:  # fmt: skip
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs), lambda operand: _operand(operand, types, sizes)
        )
        try:
            if node.op == "call_module":
                module = graph_module.get_submodule(str(node.target))
                return type_of(run_module(module, twins.module(module), args, kwargs))
            if node.op == "call_method":
                return type_of(on_meta(getattr(torch.Tensor, str(node.target)), args, kwargs))
            if node.op == "get_attr":
                return type_of(operator.attrgetter(str(node.target))(graph_module))
            return type_of(on_meta(node.target, args, kwargs))  # type: ignore[arg-type]
        except Exception as error:
            raise InvalidProgramError(
                f"the rewritten '{node.name}' ({self._origins.get(node.name, Origin())}) does not "
                f"take its inputs: {error}; this is a bug in the pass"
            ) from error


_Holders = dict[int, list[tuple[nn.Module, str]]]


def _holders(tree: nn.Module) -> _Holders:
    """Where each module is a member, by its identity."""
    found: _Holders = defaultdict(list)
    for holder in tree.modules():
        for name, member in holder._modules.items():
            found[id(member)].append((holder, name))
    return found


def _swap(old: nn.Module, heir: nn.Module | None, holders: _Holders) -> None:
    """Put ``heir`` wherever ``old`` is a member; members below ``old`` stay."""
    replacement = heir
    if old._modules:
        replacement = heir if heir is not None else nn.Module()
        for name, child in old._modules.items():
            replacement._modules.setdefault(name, child)
            holders[id(child)].append((replacement, name))
    for holder, name in holders.pop(id(old), ()):
        if holder._modules.get(name) is old and replacement is None:
            del holder._modules[name]
        elif holder._modules.get(name) is old:
            holder._modules[name] = replacement
            holders[id(replacement)].append((holder, name))


def _called(graph: fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if node.op == "call_module"}


def _exists(tree: nn.Module, path: str) -> bool:
    value: Any = tree
    for atom in path.split(".") if path else ():
        if not hasattr(value, atom):
            return False
        value = getattr(value, atom)
    return True


def _by_name(node: fx.Node, stands_for: Mapping[str, str]) -> Any:
    """What ``node`` computes from which operands, comparable between copies of a graph."""

    def plain(operand: fx.Node) -> Any:
        return Operand(stands_for.get(operand.name, operand.name))

    arguments: Any = (node.args, node.kwargs)
    return node.op, node.target, fx.node.map_arg(arguments, plain)


def _remove(tree: nn.Module, path: str) -> None:
    parent, _, name = path.rpartition(".")
    del tree.get_submodule(parent)._modules[name]


def _operand(node: fx.Node, types: Mapping[str, ValueType], sizes: dict[fx.Node, Any]) -> Any:
    """A tensor without values in the place of ``node``, or the size that it gives."""
    if types[node.name] is not None or node.op not in ("call_function", "call_method"):
        return _example(types[node.name])
    if node not in sizes:
        read = partial(_operand, types=types, sizes=sizes)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), read)
        sizes[node] = call_node(node, args, kwargs, lambda path: nn.Module())
    return sizes[node]


def _example(value: ValueType) -> Any:
    if isinstance(value, TensorType):
        return torch.empty(value.shape, dtype=value.dtype, device=META)
    return tuple(map(_example, value)) if isinstance(value, tuple) else value
