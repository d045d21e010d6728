"""The graph of an exported program becomes the steps of a module.

Each operator of aten is spelled as a function (:mod:`fxopt.aten`); an activation or a pooling of a
layer of torch's becomes that layer again.
"""

from __future__ import annotations

import functools
import inspect
import operator
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxopt.aten import FIRST_ALONE, Unspelled, spelled
from fxopt.exported import ExportedModule, Recipe, Scope, Step, class_of
from fxopt.graphs import Operand
from fxopt.tracing import canonical


def exported_module(program: torch.export.ExportedProgram, file: str) -> ExportedModule:
    """The module of ``program``, whose file is called ``file``; its guards are the program's own.

    Raises:
        Unspelled: it holds an operator that has no function here, is in training mode, or has no
            example inputs, by which its guards are made.
    """
    flat = program.module()
    if program.example_inputs is None or not hasattr(flat, "_guards_fn"):
        raise Unspelled(
            "it has no example inputs, without which it does not say what sizes it takes; export "
            "the model again with torch.export.export"
        )
    args, kwargs = program.example_inputs
    return _Building(flat, file).module((*args, *kwargs.values()))


class _Building:
    """Work on one exported program, whose graph is that of ``flat``."""

    def __init__(self, flat: fx.GraphModule, file: str) -> None:
        self.flat = flat
        self.file = file
        self.root: ExportedModule = _scope(flat, ExportedModule())
        self.steps: list[Step] = []

    def module(self, example: tuple[Any, ...]) -> ExportedModule:
        nodes = list(self.flat.graph.nodes)
        for node in nodes:
            if node.op == "call_function" and not _is_left_over(node):
                self._add(node)
        codegen: Any = self.flat.graph._codegen
        recipe = Recipe(
            inspect.signature(self.flat.forward),
            codegen.pytree_info.in_spec,
            codegen.pytree_info.out_spec,
            functools.partial(_checked, _on_line(self.file, 1), self.flat._guards_fn.forward),  # type: ignore[union-attr]
            tuple(node.name for node in nodes if node.op == "placeholder"),
            {node.name: str(node.target) for node in nodes if node.op == "get_attr"},
            tuple(self.steps),
            tuple(_operands(nodes[-1].args[0])),
        )
        root = self.root
        root.__class__ = class_of(_model_name(nodes), recipe.signature)
        root._recipe = recipe
        root.example_input_array = example
        root.eval()
        return root

    def _add(self, node: fx.Node) -> None:
        try:
            call = spelled(node.target, node.args, node.kwargs)
            if call is not None and call[0] in FIRST_ALONE:
                _check_first_alone(node)
        except Unspelled as error:
            raise Unspelled(f"the operator '{node.target}' ('{node.name}'): {error}") from None
        if call is None:
            return
        function, args, kwargs = call
        scope, kind = _scope_of(node)
        line = _on_line(*(_users_line(node) or (self.file, len(self.steps) + 1)))
        called: Callable[..., Any] | str = function
        of_a_layer = scope != "" and kind.startswith("torch.nn.modules.")
        if of_a_layer and self._place(scope, function, args, kwargs):
            called, args, kwargs = scope, args[:1], {}
        scope = self._enter(scope)
        operands = _operands(args), _operands(kwargs)
        self.steps.append(Step(node.name, scope, called, *operands, line))

    def _place(self, path: str, function: Any, args: Any, kwargs: Any) -> bool:
        """Whether the activation or pooling that the call spells now stands at ``path``."""
        name = str(getattr(function, "__name__", ""))
        in_place = bool(kwargs.get("inplace")) or name.endswith("_")
        if any(isinstance(leaf, fx.Node) for leaf in canonical.leaves((args[1:], kwargs))):
            return False  # an option that depends on the input
        layer = canonical.spell(function, name, args, kwargs, str).target
        if not isinstance(layer, nn.Module):
            return False
        if hasattr(layer, "inplace"):
            layer.inplace = in_place  # type: ignore[assignment]
        parent, _, member = path.rpartition(".")
        holder = self.root.get_submodule(self._enter(parent))
        there = getattr(holder, member, None)
        if there is None:
            holder.add_module(member, layer)
            return True
        return type(there) is type(layer) and repr(there) == repr(layer)

    def _enter(self, path: str) -> str:
        """``path``, with scopes made where there are none, or how far it can be gone."""
        holder: nn.Module = self.root
        entered: list[str] = []
        for name in filter(None, path.split(".")):
            if not hasattr(holder, name):
                holder.add_module(name, Scope())
            child = getattr(holder, name)
            if not isinstance(child, Scope):
                break
            entered.append(name)
            holder = child
        return ".".join(entered)


def _scope(module: nn.Module, made: Any, memo: dict[Any, Any] | None = None) -> Any:
    """``made`` with the tensors of ``module``, and so on below; loose tensors become buffers.

    Tied tensors are read from a file as several views of the same memory; they are tied again.
    """
    memo = {} if memo is None else memo
    memo[id(module)] = made
    made._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    for members in ("_parameters", "_buffers"):
        tensors = getattr(module, members).items()
        tied = {name: memo.setdefault(_place_of(tensor), tensor) for name, tensor in tensors}
        setattr(made, members, tied)
    if {"weight", "running_mean"} & {*made._parameters, *made._buffers}:
        for name in {"weight", "bias"} - set(module._modules):  # a layer has them, be they None
            made._parameters.setdefault(name, None)
    for name, value in vars(module).items():
        if isinstance(value, torch.Tensor):
            made.register_buffer(name, value, persistent=False)
    for name, child in module.named_children():
        if type(child) is nn.Module:
            made.add_module(name, memo.get(id(child)) or _scope(child, Scope(), memo))
    return made


def _place_of(tensor: torch.Tensor | None) -> Any:
    """What two tensors have in common if they are one; a key of its own for an empty one."""
    if tensor is None or tensor.numel() == 0:
        return ("empty", id(tensor))
    return (type(tensor), tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def _operands(tree: Any) -> Any:
    def operand(node: fx.Node) -> Any:
        return Operand(node.name)

    return fx.node.map_arg(tree, operand)


def _is_left_over(node: fx.Node) -> bool:
    """One of several results that nothing reads."""
    return node.target is operator.getitem and not node.users


def _check_first_alone(node: fx.Node) -> None:
    for user in node.users:
        if user.target is not operator.getitem or (user.args[1] != 0 and not _is_left_over(user)):
            raise Unspelled("only its first result has a counterpart among torch's functions")


def _checked(line: Callable[..., Any], guards: Callable[..., None], *flat: Any) -> None:
    line(guards, flat, {})


# ---- where a call comes from -----------------------------------------------------------------


def _stack(node: fx.Node) -> list[tuple[str, str]]:
    """``(path, class)`` of the modules that the call is in, outermost first."""
    entries: Mapping[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    return [
        (path, kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}")
        for path, kind in entries.values()
        if re.fullmatch(r"[\w.]*", path) and not path.startswith("_empty_nn_module_stack")
    ]


def _scope_of(node: fx.Node) -> tuple[str, str]:
    return next(reversed(_stack(node)), ("", ""))


def _model_name(nodes: Sequence[fx.Node]) -> str:
    roots = (kind for node in nodes for path, kind in _stack(node) if path == "")
    name = next(roots, "").rpartition(".")[2]
    return name if name.isidentifier() else "ExportedProgram"


def _users_line(node: fx.Node) -> tuple[str, int] | None:
    """The innermost frame of the exporting process that was neither torch's nor fxopt's."""
    frames = re.findall(r'File "([^"<]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [(file, int(line)) for file, line in frames if not re.search(_LIBRARIES, file)]
    return own[-1] if own else None


_LIBRARIES = r"(^|[/\\])(torch|fxopt)[/\\]"


@functools.cache
def _on_line(file: str, line: int) -> Callable[..., Any]:
    """``f(function, args, kwargs)`` that calls from ``file:line``, where capture looks for it."""
    template = lambda function, args, kwargs: function(*args, **kwargs)  # noqa: E731
    code = template.__code__.replace(co_filename=file, co_firstlineno=line)
    return types.FunctionType(code, {})
