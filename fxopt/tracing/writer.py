"""The graph as it is written: nodes for calls, and for every traced tensor the node that it is."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxopt import structures
from fxopt.graphs import mapped
from fxopt.guards import LayoutGuard, ShapeGuard
from fxopt.infer import meta_twin, to_meta
from fxopt.program import Origin, tensor_types, type_of
from fxopt.shapes import (
    Dimension,
    Expression,
    Operation,
    ShapeFloat,
    ShapeInt,
    dimensions_of,
    function_named,
)
from fxopt.tracing import canonical, writes
from fxopt.tracing.aliasing import Storages, Value, View
from fxopt.tracing.known import KnownValues
from fxopt.tracing.trace import Foreign, Trace, Untraceable, user_line

_LITERALS = (
    bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip


KEPT = "_kept_"
"""What the names of an earlier trace's tensors begin with."""


class Writer:
    """Writes the trace of one call of ``model``.

    Methods that take tensors of the user's must run with torch functions not intercepted.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.trace = Trace()
        self.stack: list[str] = []
        """Paths of the modules that are being traced, outermost first."""
        self.names: dict[int, str] = {}
        """Name of every parameter and buffer by identity."""
        for name, tensor in _named_tensors(model):
            self.names.setdefault(id(tensor), name)
        self._named = dict(_named_tensors(model))
        self._learning: dict[fx.Node, bool] = {}
        self._parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._values: dict[int, Value] = {}
        self._nodes: dict[str, fx.Node] = {}
        self._numbers: dict[Expression, fx.Node] = {}
        self._devices: dict[int, tuple[torch.device, fx.Node]] = {}
        self._device_nodes: dict[fx.Node, fx.Node] = {}
        self._unplaced: set[int] = set()
        self._storages = Storages(self._settle)
        self._known = KnownValues(self.trace.constants, self.trace.modules, self._fixed_size)
        self._by_values: set[fx.Node] = set()
        """Nodes whose sizes may depend on values: a leaf that acts by values is before them."""
        self._alive: list[torch.Tensor] = []

    # ---- values ----------------------------------------------------------------------------

    def values(self) -> list[Value]:
        """The value of every tensor of the trace, in the order of their making."""
        return list(self._values.values())

    def seen(self, tensor: torch.Tensor) -> Value | None:
        """The value of ``tensor`` if the trace has read or made it."""
        return self._values.get(id(tensor))

    def adopt(self, earlier: Sequence[Value]) -> None:
        """Take the tensors of an earlier trace, which may be found again, for constants."""
        for index, value in enumerate(earlier):
            self.names[id(value.tensor)] = f"{KEPT}{index}"

    def is_kept(self, tensor: torch.Tensor) -> bool:
        """Whether an earlier trace made ``tensor``."""
        return self.names.get(id(tensor), "").startswith(KEPT)

    def forget(self) -> None:
        """Let go of all tensors: the trace is written."""
        self._values.clear()
        self._alive.clear()

    def is_traced(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self._values

    def is_overwritten(self, tensor: torch.Tensor) -> bool:
        """Whether forward has written into the memory of ``tensor``."""
        value = self._values.get(id(tensor))
        return value is not None and value.storage.version > 0

    def placeholder(self, name: str, example: torch.Tensor) -> torch.Tensor:
        """A new input like ``example``."""
        meta = meta_twin(example.detach())
        self._register(meta, self.node("placeholder", name, (), {}, meta), source=name)
        return meta

    def value_of(self, tensor: torch.Tensor) -> Value:
        """The value of a traced tensor, a parameter, a buffer or a constant."""
        value = self._values.get(id(tensor))
        if value is not None:
            return value
        if tensor.is_meta and id(tensor) not in self.names:
            if isinstance(tensor, nn.Parameter):
                raise Untraceable("it makes a parameter; make it when the module is made")
            raise Untraceable("it uses a tensor that was computed where the tracer cannot follow")
        name = self.names.get(id(tensor))
        if hasattr(tensor, "alias_of"):
            raise Foreign(
                f"it reads '{tensor.alias_of}' through another tensor over its memory",
                "use the parameter itself",
            )
        if name is None and tensor.requires_grad:
            raise Foreign(
                f"it uses a parameter of shape {tuple(tensor.shape)} that is none of its own",
                "register it, or the module that it is of, as a member of the model",
            )
        if name is None:
            name = self.names[id(tensor)] = f"_constant_{len(self.trace.constants)}"
            self.trace.constants[name] = tensor.detach()
        meta = meta_twin(tensor.detach())
        value = self._register(meta, self.node("get_attr", name, (), {}, meta), source=name)
        self._values[id(tensor)] = value
        self._alive.append(tensor)
        return value

    def node_name(self, tensor: torch.Tensor) -> str:
        """Name of the node that computes what ``tensor`` holds now."""
        return self.value_of(tensor).read().name

    def overwrite(self, target: torch.Tensor, node: fx.Node) -> torch.Tensor:
        """``target``, which from here on holds what ``node`` computes."""
        value = self.value_of(target)
        origin = self.trace.origins.get(node.name, Origin())
        self.trace.origins[node.name] = Origin(origin.path, origin.line, value.read().name)
        base = value.base()
        source = self._nodes.get(base.source)
        if source is not None and source.op == "placeholder":
            self.trace.overwritten_inputs.setdefault(base.source, user_line())
        if base.source in self._parameters:
            raise Untraceable(f"it overwrites the parameter '{base.source}'")
        learns = self._learns(node)
        if (value.learns or base.learns) and not torch.is_grad_enabled():
            raise Untraceable("it overwrites under no_grad a tensor that gradients flow through")
        value.write(node, learns=learns)
        return target

    def _register(
        self, tensor: torch.Tensor, node: fx.Node, *, view: View | None = None, source: str = ""
    ) -> Value:
        storage = self._storages.of(tensor)
        value = Value(
            tensor, node, storage, view, storage.version, source,
            fresh=storage.version, learns=self._learns(node),
        )  # fmt: skip
        self._values[id(tensor)] = value
        self._alive.append(tensor)
        return value

    def _learns(self, node: fx.Node) -> bool:
        """Whether gradients flow from what ``node`` computes to an input or a parameter."""
        if node not in self._learning:
            result = self.trace.types[node.name]
            floating = any(t.dtype.is_floating_point or t.dtype.is_complex
                           for t in tensor_types(result))  # fmt: skip
            if node.op == "get_attr":
                tensor = self._named.get(str(node.target))
                learns = tensor is not None and tensor.requires_grad
            else:
                operands = any(map(self._learns, node.all_input_nodes))
                learns = node.op == "placeholder" or node.op == "call_module" or operands
            self._learning[node] = floating and learns and node.target is not torch.detach
        return self._learning[node]

    # ---- nodes -----------------------------------------------------------------------------

    def node(self, op: str, target: Any, args: Any, kwargs: Any, result: Any) -> fx.Node:
        """A new node; ``result`` is what it gives, on the meta device."""
        node = self.trace.graph.create_node(op, target, args, kwargs)
        self._nodes[node.name] = node
        self.trace.types[node.name] = type_of(result)
        if self._by_values and not self._by_values.isdisjoint(node.all_input_nodes):
            self._by_values.add(node)
        self.trace.origins[node.name] = Origin(self.stack[-1] if self.stack else "", user_line())
        return node

    def emit(self, call: canonical.Call, result: Any) -> Any:
        """Write ``call`` down; the tensors of ``result`` (meta) are from here on its values."""
        if isinstance(call.target, nn.Module):
            call = canonical.Call(call.op, self._place(call.target), call.args, call.kwargs)
        node = self.node(
            call.op, call.target, self.argument(call.args), self.argument(call.kwargs), result
        )
        return self._result(node, call, None, result)

    def _result(self, node: fx.Node, call: canonical.Call, index: Any, result: Any) -> Any:
        """The user's view of what ``node`` gives: a tensor, or (nested) tuples of tensors."""
        if isinstance(result, torch.Tensor):
            return self._made(result, node, call, index)
        if isinstance(result, dict):
            return {key: self._item(node, call, key, item) for key, item in result.items()}
        if isinstance(result, (tuple, list)):
            items = [self._item(node, call, index, item) for index, item in enumerate(result)]
            return canonical.rebuilt(result, items)
        return result

    def _item(self, node: fx.Node, call: canonical.Call, index: Any, item: Any) -> Any:
        if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(item)):
            return item
        return self._result(self._element(node, index, item), call, index, item)

    def _element(self, node: fx.Node, index: Any, result: Any) -> fx.Node:
        return self.node("call_function", operator.getitem, (node, index), {}, result)

    def _made(
        self, tensor: torch.Tensor, node: fx.Node, call: canonical.Call, index: Any
    ) -> torch.Tensor:
        parent = self._parent(tensor, call)
        if self.is_traced(tensor):  # the operator returned its own input
            tensor = tensor.view(tensor.shape)
        if not torch.is_grad_enabled():
            node = self.node("call_function", torch.detach, (node,), {}, tensor)
        view = None if parent is None else self._view(call, index, tensor, parent)
        value = self._register(tensor, node, view=view)
        self._note_doubt(call, parent, value)
        return tensor

    def _note_doubt(self, call: canonical.Call, parent: Value | None, value: Value) -> None:
        """Operators that copy or not, as layout and dtype would have it, leave a doubt behind."""
        if not writes.may_copy(call) or not call.args or not isinstance(call.args[0], torch.Tensor):
            return
        source = self.value_of(call.args[0])
        names = (source.current.name, value.current.name)
        guard = LayoutGuard("shares", names, parent is not None, user_line())
        self._storages.doubt(guard, source.storage, value.storage)

    def _settle(self, guard: Any) -> None:
        if isinstance(guard, str):
            raise Untraceable(guard)
        self.trace.layouts.setdefault(guard)

    def note_leaf_by_values(self, arguments: Any, result: Any, alias: str) -> None:
        """What values decide in a leaf: sizes of its result, and whether that is an argument.

        ``alias`` is the reason to refuse where the latter matters.
        """
        given = [t for t in canonical.leaves(arguments) if isinstance(t, torch.Tensor)]
        for made in canonical.leaves(result):
            if isinstance(made, torch.Tensor):
                value = self.value_of(made)
                self._by_values.add(value.current)
                for tensor in given:
                    self._storages.doubt(alias, value.storage, self.value_of(tensor).storage)

    def _parent(self, tensor: torch.Tensor, call: canonical.Call) -> Value | None:
        memory = tensor.untyped_storage()._cdata
        for candidate in canonical.leaves((call.args, call.kwargs)):
            if isinstance(candidate, torch.Tensor):
                value = self.value_of(candidate)
                if value.tensor.untyped_storage()._cdata == memory:
                    return value
        return None

    def _view(self, call: canonical.Call, index: Any, tensor: torch.Tensor, parent: Value) -> View:
        def replay(node: fx.Node) -> fx.Node:
            def substitute(argument: Any) -> Any:
                same = isinstance(argument, torch.Tensor) and self.value_of(argument) is parent
                return node if same else self.argument(argument)

            args = fx.node.map_aggregate(call.args, substitute)
            kwargs = fx.node.map_aggregate(dict(call.kwargs), substitute)
            again = self.node(call.op, call.target, args, kwargs, tensor)
            return again if index is None else self._element(again, index, tensor)

        def scatter(base: fx.Node, new: fx.Node) -> fx.Node:
            inverse = writes.inverse_of_view(call, index, base, new, parent.tensor, tensor)
            if inverse is None:
                what = getattr(call.target, "__name__", call.target)
                hint = ", which no gradient sees" if what == "detach" else ""
                raise Untraceable(
                    f"it overwrites a view made by {what}{hint}; overwrite the tensor itself"
                )
            if isinstance(inverse, fx.Node):
                return inverse
            op, target, args = inverse
            return self.node(op, target, self.argument(args), {}, parent.tensor)

        return View(parent, replay, scatter)

    def _place(self, module: nn.Module) -> str:
        """A path for a layer that stands for a function, near the code that called it."""
        scope = self.stack[-1] if self.stack else ""
        name = canonical.short_name(module)
        base = path = f"{scope}.{name}" if scope else name
        count = 1
        while path in self.trace.modules or has_member(self.model, path):
            path, count = f"{base}_{count}", count + 1
        self.trace.modules[path] = module
        return path

    # ---- arguments -------------------------------------------------------------------------

    def argument(self, argument: Any) -> Any:
        """``argument`` as a graph argument: tensors and shape numbers become nodes."""
        if isinstance(argument, torch.Tensor):
            return self.value_of(argument).read()
        if isinstance(argument, (ShapeInt, ShapeFloat)):
            return self._number(argument.expression)
        if isinstance(argument, torch.device):
            return self._device(argument)
        if isinstance(argument, (slice, tuple, list, Mapping)):
            return mapped(self.argument, argument)
        if type(argument).__module__ == "numpy" and getattr(argument, "ndim", 1) == 0:
            return argument.item()
        if isinstance(argument, (*_LITERALS, fx.Node)) or argument in (None, Ellipsis):
            return argument
        raise Untraceable(f"an operator is called with a {type(argument).__name__}")

    def concrete(self, argument: Any) -> Any:
        """``argument`` with meta tensors and plain numbers: what an operator is tried on."""
        if isinstance(argument, torch.Tensor):
            return self.value_of(argument).tensor
        if isinstance(argument, (ShapeInt, ShapeFloat)):
            return argument.value
        if isinstance(argument, (slice, tuple, list, Mapping)):
            return mapped(self.concrete, argument)
        return argument

    def _number(self, expression: Expression) -> Any:
        """The node that computes a shape number."""
        if not isinstance(expression, (Dimension, Operation)):
            return expression
        if expression not in self._numbers:
            if isinstance(expression, Dimension):
                operands: tuple[Any, ...] = (self._nodes[expression.node], expression.axis)
                node = self.node("call_method", "size", operands, {}, None)
            else:
                operands = tuple(map(self._number, expression.operands))
                function = function_named(expression.function)
                node = self.node("call_function", function, operands, {}, None)
            self._numbers[expression] = node
        return self._numbers[expression]

    def device_of(self, tensor: torch.Tensor, device: torch.device) -> torch.device:
        """What ``tensor.device`` is: known again when it is given to an operator."""
        asked = torch.device(str(device))
        self._devices[id(asked)] = (asked, self.value_of(tensor).read())
        self._unplaced.add(id(asked))
        return asked

    def _device(self, device: torch.device) -> Any:
        """A device that was asked of a tensor stays that tensor's; any other is a literal."""
        if id(device) not in self._devices:
            return device
        self._unplaced.discard(id(device))
        source = self._devices[id(device)][1]
        if source not in self._device_nodes:
            node = self.node("call_function", getattr, (source, "device"), {}, None)
            self._device_nodes[source] = node
        return self._device_nodes[source]

    def device_was_read(self) -> bool:
        """Whether Python asked for a device and may have decided by it."""
        return bool(self._unplaced)

    def assume_layout(self, tensor: torch.Tensor, answer: bool) -> None:
        """Python was told whether ``tensor`` is contiguous."""
        node = self.value_of(tensor).read()
        self._check_sized(node)
        self._settle(LayoutGuard("is_contiguous", (node.name,), answer, user_line()))

    def assume(self, condition: Operation) -> None:
        """A decision that Python took (see :class:`fxopt.shapes.Recorder`)."""
        self.trace.guards.setdefault(condition, ShapeGuard(condition, user_line()))
        for dimension in dimensions_of(condition):
            self._check_sized(self._nodes[dimension.node])
            shape = self.trace.types[dimension.node].shape
            self.trace.sizes[dimension] = shape[dimension.axis]

    def _check_sized(self, node: fx.Node) -> None:
        if node in self._by_values:
            raise Untraceable(
                "it decides by the size of what a submodule gave that is run as it is and may give "
                "another size for other values; take the size of the submodule's input"
            )

    # ---- values of constants ---------------------------------------------------------------

    def known_values(self, tensor: torch.Tensor) -> torch.Tensor:
        """The values of a tensor that is the same for every input.

        Raises:
            Unknown: it is not.
        """
        return self._known.of(self.value_of(tensor).read()).clone()  # type: ignore[no-any-return]

    def for_real(self, function: Any, args: Any, kwargs: Any) -> Any:
        """``function`` of known values; tensors in what it gives become constants.

        Raises:
            Unknown: an argument is not the same for every input.
        """
        with torch.no_grad():
            result = function(*self._real(args), **self._real(kwargs))
        for tensor in canonical.leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.layout != torch.strided:
                raise Untraceable(f"it makes a sparse tensor ({tensor.layout})")
        return pytree.tree_map_only(torch.Tensor, self.constant, result)

    def constant(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor``, which holds real values, as a value of the graph."""
        self.value_of(tensor)
        return tensor

    def _real(self, argument: Any) -> Any:
        if isinstance(argument, torch.Tensor):
            return self.known_values(argument)
        if isinstance(argument, (ShapeInt, ShapeFloat)):
            return argument.plain()
        if isinstance(argument, (slice, tuple, list, Mapping)):
            return mapped(self._real, argument)
        return argument

    def _fixed_size(self, node: fx.Node) -> int:
        source, axis = node.args
        dimension = Dimension(str(source), axis)  # type: ignore[arg-type]
        size: int = self.trace.types[dimension.node].shape[dimension.axis]
        self.assume(Operation("eq", (dimension, size)))
        return size

    # ---- the end ---------------------------------------------------------------------------

    def write_buffers(self, before: Sequence[tuple[nn.Module, str, torch.Tensor]]) -> None:
        """One ``copy_`` for each buffer of ``before`` that the forward wrote or rebound."""
        for module, key, buffer in before:
            now = module._buffers.get(key)
            value = self._values.get(id(buffer))
            if now is not buffer and now is not None and self.is_traced(now):
                new = self._values[id(now)].read()
            elif value is not None and value.storage.version:
                new = value.read()
            else:
                continue
            meta = to_meta(buffer)
            target = self.node("get_attr", self.names[id(buffer)], (), {}, meta)
            self.node("call_method", "copy_", (target, new), {}, meta)

    def output(self, result: Any) -> None:
        """The end of the graph: the leaves of the user's result, flat."""
        leaves, self.trace.out_spec = _flat_result(result)
        for leaf in leaves:
            if isinstance(leaf, (torch.Tensor, ShapeInt, ShapeFloat)):
                self.trace.out_leaves.append(self.argument(leaf))
            elif leaf is None or isinstance(leaf, (bool, int, float, complex, str)):
                self.trace.out_leaves.append(leaf)
            else:
                raise Untraceable(
                    f"it returns a {type(leaf).__name__}, which is neither a tensor nor a structure"
                    " of tensors"
                )
        self.trace.graph.output(tuple(self.trace.out_leaves))


def _flat_result(result: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """The leaves of the user's result; a shape in it has the structure of a ``torch.Size``."""
    leaves, spec = structures.flatten(result)
    sizes = [leaf if isinstance(leaf, canonical.ShapeTuple) else None for leaf in leaves]
    if not any(size is not None for size in sizes):
        return leaves, spec
    plain = [leaf if size is None else torch.Size([1] * len(size))
             for leaf, size in zip(leaves, sizes, strict=True)]  # fmt: skip
    flat = [item for leaf, size in zip(leaves, sizes, strict=True)
            for item in ([leaf] if size is None else size)]  # fmt: skip
    return flat, pytree.tree_structure(pytree.tree_unflatten(plain, spec))


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def has_member(model: nn.Module, path: str) -> bool:
    """Whether ``model`` has an attribute at the dotted ``path``."""
    value: Any = model
    for atom in path.split("."):
        if not hasattr(value, atom):
            return False
        value = getattr(value, atom)
    return True
