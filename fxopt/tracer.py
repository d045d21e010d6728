"""Follows a forward pass on example shapes and writes down what it does.

Tensors are plain tensors on the meta device and every torch function is intercepted, so the
user's code sees real tensors (``isinstance`` holds, Python loops loop) while nothing is computed.
Sizes are :class:`~fxopt.shapes.ShapeInt`: arithmetic on them is recorded, decisions become guards.
What cannot be followed raises :class:`Untraceable`; it is never guessed.
"""

from __future__ import annotations

import contextlib
import operator
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxopt import canonical
from fxopt.aliasing import Replay, Scatter, Storages, Value, View
from fxopt.guards import ShapeGuard
from fxopt.infer import MetaTwins, on_meta, run_module, to_meta
from fxopt.interface import Call
from fxopt.program import Origin, ValueType, type_of
from fxopt.shapes import (
    Dimension,
    Expression,
    Operation,
    ShapeFloat,
    ShapeInt,
    dimensions_of,
    function_named,
    shape_number,
)

_LIBRARIES = tuple(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, __file__))


class Untraceable(Exception):
    """The forward does something that the tracer cannot follow.

    ``paths`` are the modules that were being traced, outermost first.
    """

    paths: tuple[str, ...] = ()

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.line = user_line()


def user_line() -> str:
    """``file.py:12`` of the innermost frame that is neither torch's nor ours."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_LIBRARIES) and not name.startswith("<"):
            return f"{Path(name).name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


@dataclass
class Trace:
    """What a tracer wrote down: the graph, the static types, and everything it noticed."""

    graph: fx.Graph = field(default_factory=fx.Graph)
    types: dict[str, ValueType] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    guards: dict[Operation, ShapeGuard] = field(default_factory=dict)
    sizes: dict[Dimension, int] = field(default_factory=dict)
    dtype_reads: set[str] = field(default_factory=set)
    overwritten_inputs: dict[str, str] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)
    out_leaves: list[Any] = field(default_factory=list)
    out_spec: Any = None


class Tracer(TorchFunctionMode):
    """Traces one call of ``model``; modules named in ``opaque`` and ``kept`` are leaves.

    ``names`` gives the path of every parameter and buffer by identity, ``twins`` the meta modules.
    """

    def __init__(self, model: nn.Module, leaves: Mapping[str, str], twins: MetaTwins) -> None:
        super().__init__()
        self.model = model
        self.leaves = leaves
        self.twins = twins
        self.trace = Trace()
        self.values: dict[int, Value] = {}
        self.nodes: dict[str, fx.Node] = {}
        self.storages = Storages()
        self.kept: list[Any] = []
        self.numbers: dict[Expression, fx.Node] = {}
        self.stack: list[str] = []
        self.in_leaf = False
        self.failure: tuple[BaseException, str] | None = None
        self.paths: dict[int, str] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            self.paths.setdefault(id(module), path)
        self.names: dict[int, str] = {}
        for name, tensor in _named_tensors(model):
            self.names.setdefault(id(tensor), name)
        self.device = torch.device("cpu")

    # ---- running ---------------------------------------------------------------------------

    def run(self, call: Call) -> Trace:
        """Trace ``model`` on ``call``."""
        inputs = []
        for leaf, value in zip(call.leaves, call.values, strict=True):
            if leaf.is_tensor:
                self.device = value.device
                inputs.append(self._placeholder(leaf.name, value))
        buffers = [(m, k, b) for m in self.model.modules() for k, b in m._buffers.items()]
        args, kwargs = call.arguments(inputs)
        with _patched_module_call(self), torch.enable_grad(), self:
            result = self.model(*args, **kwargs)
        self._write_buffers(buffers)
        self._output(result)
        return self.trace

    def _placeholder(self, name: str, example: torch.Tensor) -> torch.Tensor:
        node = self.trace.graph.placeholder(name)
        meta = to_meta(example.detach())
        self._register(meta, node, source=name)
        self._note(node, meta)
        return meta

    def _write_buffers(self, before: Sequence[tuple[nn.Module, str, Any]]) -> None:
        for module, key, buffer in before:
            if buffer is None:
                continue
            now = module._buffers.get(key)
            source = self.values.get(id(buffer))
            if now is not buffer and now is not None and id(now) in self.values:
                new = self.values[id(now)].read()
            elif source is not None and source.storage.version:
                new = source.read()
            else:
                continue
            target = self.trace.graph.get_attr(self.names[id(buffer)])
            self._note(target, to_meta(buffer))
            self._note(self.trace.graph.call_method("copy_", (target, new)), to_meta(buffer))

    def _output(self, result: Any) -> None:
        leaves, self.trace.out_spec = pytree.tree_flatten(result)
        for leaf in leaves:
            if isinstance(leaf, (torch.Tensor, ShapeInt, ShapeFloat)):
                self.trace.out_leaves.append(self.argument(leaf))
            elif leaf is None or isinstance(leaf, (bool, int, float, str)):
                self.trace.out_leaves.append(leaf)
            else:
                raise Untraceable(
                    f"it returns a {type(leaf).__name__}, which is neither a tensor nor a structure"
                    " of tensors"
                )
        self.trace.graph.output(tuple(self.trace.out_leaves))

    # ---- modules ---------------------------------------------------------------------------

    def call_module(
        self, module: nn.Module, args: Any, kwargs: Any, original: Callable[..., Any]
    ) -> Any:
        path = self.paths.get(id(module))
        if path is None:
            if any(True for _ in module.parameters()):
                raise Untraceable(
                    f"a {type(module).__name__} that is no registered submodule is called; put it "
                    "into an attribute, a ModuleList or a ModuleDict"
                )
            path = self.stack[-1] if self.stack else ""
        self.stack.append(path)
        before = len(self.trace.types)
        try:
            if path in self.leaves or canonical.is_leaf(module):
                return self._leaf(path, module, args, kwargs)
            return original(module, *args, **kwargs)
        except Untraceable as error:
            error.paths = error.paths or tuple(self.stack)
            raise
        except Exception as error:
            if self.failure is None or self.failure[0] is not error:
                self.failure = (error, path)
            raise
        finally:
            self.stack.pop()
            self.trace.calls[path] = len(self.trace.types) - before

    def _leaf(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return self._call_leaf(path, module, args, kwargs)

    def _call_leaf(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        values = self.concrete((args, kwargs))
        with self._inside_leaf():
            result = run_module(module, self.twins.module(module), *values)
        self.trace.flags[path] = module.training
        overwritten = args[0] if getattr(module, "inplace", False) and args else None
        made = self.emit(canonical.Call("call_module", path, tuple(args), dict(kwargs)), result)
        if overwritten is not None and isinstance(made, torch.Tensor):
            return self._overwrite(overwritten, self.values[id(made)].current)
        return made

    @contextlib.contextmanager
    def _inside_leaf(self) -> Iterator[None]:
        self.in_leaf = True
        try:
            yield
        finally:
            self.in_leaf = False

    # ---- functions -------------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name in ("__get__", "__set__"):
            return self._property(name, func, args)
        if name in _VALUE_READERS and self._reads_values(args, kwargs):
            raise Untraceable(
                f"it decides by the values of a tensor ({name.strip('_')}), which differ from input"
                " to input"
            )
        special = getattr(self, f"_do_{name.strip('_')}", None) if name in _SPECIAL else None
        if special is not None:
            answer = special(*args, **kwargs)
            if answer is not NotImplemented:
                return answer
        return self._call(func, name, args, kwargs)

    def _call(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        if kwargs.get("out") is not None:
            out = kwargs.pop("out")
            return self._overwrite(out, self.values[id(self._call(func, name, args, kwargs))].read())
        target = canonical.overwritten(name, args, kwargs)
        if target is not None:
            return self._in_place(func, name, target, args, kwargs)
        meta_args, meta_kwargs = self.concrete((args, kwargs))
        try:
            result = on_meta(func, meta_args, meta_kwargs)
        except NotImplementedError as error:
            raise Untraceable(f"{name} has no shape without values ({error})") from None
        leaves = pytree.tree_leaves(result)
        if not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
            self._bake(args, kwargs)
            return result
        self._guard_pieces(name, args, kwargs, result)
        return self.emit(canonical.spell(func, name, args, kwargs, self._node_name), result)

    def _node_name(self, tensor: torch.Tensor) -> str:
        return self.value_of(tensor).read().name

    def _in_place(self, func: Any, name: str, target: Any, args: Any, kwargs: Any) -> Any:
        if self.names.get(id(target), "").endswith("num_batches_tracked"):
            return target  # a norm's own statistic, which the norm that is called keeps itself
        value = self.value_of(target)
        shape = value.tensor.shape
        on_meta(func, *self.concrete((args, kwargs)))
        if value.tensor.shape != shape:
            raise Untraceable(f"{name} changes the shape of a tensor in place")
        call = canonical.pure(func, name, args, kwargs, self._node_name)
        result = self._shape_of_call(call)
        node = self.values[id(self.emit(call, result))].current
        if result.dtype != value.tensor.dtype:
            dtype = value.tensor.dtype
            node = self._node("call_method", "to", (node, dtype), {}, value.tensor)
        return self._overwrite(target, node)

    def _shape_of_call(self, call: canonical.Call) -> Any:
        args, kwargs = self.concrete((call.args, dict(call.kwargs)))
        if isinstance(call.target, nn.Module):
            return on_meta(call.target.forward, args, kwargs)
        function = call.target
        if call.op == "call_method":
            function = getattr(torch.Tensor, call.target)
        return on_meta(function, args, kwargs)

    def _overwrite(self, target: torch.Tensor, node: fx.Node) -> torch.Tensor:
        value = self.value_of(target)
        old = value.read()
        origin = self.trace.origins.get(node.name, Origin())
        self.trace.origins[node.name] = Origin(origin.path, origin.line, old.name)
        root = value
        while root.view is not None:
            root = root.view.parent
        if root.source in self.trace.types and root.current.op == "placeholder":
            self.trace.overwritten_inputs.setdefault(root.source, user_line())
        if isinstance(self._source_tensor(root), nn.Parameter):
            raise Untraceable(f"it overwrites the parameter '{root.source}' in its forward")
        value.write(node)
        return target

    def _source_tensor(self, value: Value) -> Any:
        return next((t for t in self.kept if self.names.get(id(t)) == value.source), None)

    def _guard_pieces(self, name: str, args: Any, kwargs: Any, result: Any) -> None:
        """``split`` and its like give as many pieces as the size allows: that count is a decision."""
        if name not in _PIECES or not isinstance(args[0], torch.Tensor):
            return
        position = _PIECES[name]
        dim = kwargs.get("dim", args[position] if len(args) > position else 0)
        size = self.shape_of(args[0])[int(dim)]
        if isinstance(size, ShapeInt):
            size.plain()

    # ---- emission --------------------------------------------------------------------------

    def emit(self, call: canonical.Call, result: Any) -> Any:
        """Write ``call`` down; the tensors of ``result`` (meta) are from here on its values."""
        target = self._place(call.target) if isinstance(call.target, nn.Module) else call.target
        args, kwargs = self.argument(call.args), self.argument(call.kwargs)
        node = self._node(call.op, target, args, kwargs, result)
        parents = [t for t in pytree.tree_leaves((call.args, call.kwargs))
                   if isinstance(t, torch.Tensor)]  # fmt: skip
        if isinstance(result, torch.Tensor):
            return self._made(result, node, call, target, None, parents)
        if isinstance(result, dict):
            return {k: self._made(v, self._element(node, k, v), call, target, k, parents)
                    for k, v in result.items()}  # fmt: skip
        made = [
            self._made(item, self._element(node, index, item), call, target, index, parents)
            if isinstance(item, torch.Tensor) else item
            for index, item in enumerate(result)
        ]  # fmt: skip
        return _rebuilt(result, made)

    def _made(
        self, tensor: torch.Tensor, node: fx.Node, call: canonical.Call, target: Any, index: Any,
        parents: Sequence[torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        parent = self._parent(tensor, parents)
        if id(tensor) in self.values:
            tensor = tensor.view(tensor.shape)
        if not torch.is_grad_enabled():
            detached = self.trace.graph.call_function(torch.detach, (node,))
            self._note(detached, tensor)
            node = detached
        view = None
        if parent is not None:
            view = View(parent, *self._view_functions(call, target, index, tensor, parent))
        self._register(tensor, node, view=view)
        return tensor

    def _parent(self, tensor: torch.Tensor, parents: Sequence[torch.Tensor]) -> Value | None:
        memory = tensor.untyped_storage()._cdata
        for candidate in parents:
            value = self.value_of(candidate)
            if value.tensor.untyped_storage()._cdata == memory:
                return value
        return None

    def _view_functions(
        self, call: canonical.Call, target: Any, index: Any, tensor: torch.Tensor, parent: Value
    ) -> tuple[Replay, Scatter]:
        def replay(node: fx.Node) -> fx.Node:
            def substitute(argument: Any) -> Any:
                same = isinstance(argument, torch.Tensor) and self.value_of(argument) is parent
                return node if same else self.argument(argument)

            args = fx.node.map_aggregate(call.args, substitute)
            kwargs = fx.node.map_aggregate(call.kwargs, substitute)
            again = self._node(call.op, target, args, kwargs, None)
            self.trace.types[again.name] = type_of(tensor)
            return again if index is None else self._element(again, index, tensor)

        def scatter(base: fx.Node, new: fx.Node) -> fx.Node:
            inverse = canonical.inverse_of_view(call, index, base, new, parent.tensor, tensor)
            if inverse is None:
                what = getattr(target, "__name__", str(target))
                raise Untraceable(f"it overwrites a view made by {what}")
            return self._node(*inverse, result=parent.tensor) if isinstance(inverse, tuple) else new

        return replay, scatter

    def _element(self, node: fx.Node, index: Any, result: Any) -> fx.Node:
        return self._node("call_function", operator.getitem, (node, index), {}, result)

    def _node(self, op: str, target: Any, args: Any, kwargs: Any, result: Any = None) -> fx.Node:
        node = self.trace.graph.create_node(op, target, args, kwargs)
        self._note(node, result)
        return node

    def _note(self, node: fx.Node, result: Any) -> None:
        self.nodes[node.name] = node
        self.trace.types[node.name] = type_of(result)
        path = self.stack[-1] if self.stack else ""
        self.trace.origins[node.name] = Origin(path, user_line())

    def _register(
        self, tensor: torch.Tensor, node: fx.Node, *, view: View | None = None, source: str = ""
    ) -> Value:
        storage = self.storages.of(tensor)
        value = Value(tensor, node, storage, view, storage.version, source)
        self.values[id(tensor)] = value
        self.kept.append(tensor)
        return value

    def _place(self, module: nn.Module) -> str:
        """Give a module that replaces a function call a path near the code that called it."""
        scope = self.stack[-1] if self.stack else ""
        base = f"{scope}.{canonical.short_name(module)}" if scope else canonical.short_name(module)
        path, count = base, 1
        while path in self.trace.modules or _has_member(self.model, path):
            path, count = f"{base}_{count}", count + 1
        self.trace.modules[path] = module
        return path

    # ---- arguments -------------------------------------------------------------------------

    def value_of(self, tensor: torch.Tensor) -> Value:
        """The value of a traced tensor, a parameter, a buffer or a constant."""
        value = self.values.get(id(tensor))
        if value is not None:
            return value
        if tensor.is_meta and id(tensor) not in self.names:
            raise Untraceable("a tensor is used that was computed where the tracer cannot follow")
        name = self.names.get(id(tensor))
        if name is None:
            name = f"_constant_{len(self.trace.constants)}"
            self.trace.constants[name] = tensor.detach()
            self.names[id(tensor)] = name
        node = self.trace.graph.get_attr(name)
        self.kept.append(tensor)
        meta = to_meta(tensor.detach())
        value = self._register(meta, node, source=name)
        self.values[id(tensor)] = value
        self._note(node, meta)
        return value

    def argument(self, argument: Any) -> Any:
        """``argument`` as a graph argument: tensors and shape numbers become nodes."""
        if isinstance(argument, torch.Tensor):
            return self.value_of(argument).read()
        if isinstance(argument, (ShapeInt, ShapeFloat)):
            return self._number(argument.expression)
        if isinstance(argument, slice):
            return slice(*map(self.argument, (argument.start, argument.stop, argument.step)))
        if isinstance(argument, (tuple, list)):
            kind = list if isinstance(argument, list) else tuple
            return kind(map(self.argument, argument))
        if isinstance(argument, dict):
            return {key: self.argument(value) for key, value in argument.items()}
        if isinstance(argument, _LITERALS) or argument is None or argument is Ellipsis:
            return argument
        if isinstance(argument, fx.Node):
            return argument
        raise Untraceable(f"an operator is called with a {type(argument).__name__}")

    def _number(self, expression: Expression) -> Any:
        """The node that computes a shape number."""
        if not isinstance(expression, (Dimension, Operation)):
            return expression
        if expression not in self.numbers:
            if isinstance(expression, Dimension):
                source = self._node_named(expression.node)
                node = self.trace.graph.call_method("size", (source, expression.axis))
            else:
                operands = tuple(map(self._number, expression.operands))
                function = function_named(expression.function)
                node = self.trace.graph.call_function(function, operands)
            self._note(node, None)
            self.numbers[expression] = node
        return self.numbers[expression]

    def _node_named(self, name: str) -> fx.Node:
        return self.nodes[name]

    def concrete(self, tree: Any) -> Any:
        """``tree`` with meta tensors and plain numbers, to find out what an operator gives."""
        if isinstance(tree, torch.Tensor):
            value = self.value_of(tree)
            return value.tensor
        if isinstance(tree, (ShapeInt, ShapeFloat)):
            return tree.value
        if isinstance(tree, slice):
            return slice(*map(self.concrete, (tree.start, tree.stop, tree.step)))
        if isinstance(tree, torch.Size):
            return tree
        if isinstance(tree, (tuple, list)):
            kind = list if isinstance(tree, list) else tuple
            return kind(map(self.concrete, tree))
        if isinstance(tree, dict):
            return {key: self.concrete(value) for key, value in tree.items()}
        return tree

    def _bake(self, args: Any, kwargs: Any) -> None:
        """The answer was a plain Python value: shape numbers in the question are decided by it."""
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, (ShapeInt, ShapeFloat)):
                leaf.plain()

    # ---- questions about tensors -----------------------------------------------------------

    def assume(self, condition: Operation) -> None:
        self.trace.guards.setdefault(condition, ShapeGuard(condition, user_line()))
        for dimension in dimensions_of(condition):
            node = self._node_named(dimension.node)
            self.trace.sizes[dimension] = self.trace.types[node.name].shape[dimension.axis]

    def shape_of(self, tensor: torch.Tensor) -> tuple[Any, ...]:
        """The sizes of ``tensor``: shape numbers, plain ints for parameters and constants."""
        value = self.value_of(tensor)
        node = value.read()
        shape = tuple(value.tensor.shape)
        if node.op == "get_attr":
            return torch.Size(shape)
        return canonical.ShapeTuple(
            shape_number(Dimension(node.name, axis), size, self) for axis, size in enumerate(shape)
        )

    def _property(self, kind: str, func: Any, args: Any) -> Any:
        attribute = func.__self__.__name__
        tensor = args[0]
        if kind == "__set__":
            if attribute == "requires_grad":
                return None
            raise Untraceable(f"it assigns to the .{attribute} of a tensor")
        if attribute in canonical.VIEW_PROPERTIES:
            function, *extra = canonical.VIEW_PROPERTIES[attribute]
            return self._call(function, function.__name__, (tensor, *extra), {})
        if id(tensor) not in self.values and not tensor.is_meta:
            return func(*args)
        if attribute == "shape":
            return self.shape_of(tensor)
        if attribute == "device":
            return self.device
        if attribute in ("is_cpu", "is_cuda", "is_meta"):
            return attribute == f"is_{self.device.type}"
        if attribute == "dtype":
            self.trace.dtype_reads.add(user_line())
        return getattr(self.value_of(tensor).tensor, attribute)

    def _reads_values(self, args: Any, kwargs: Any) -> bool:
        return any(isinstance(a, torch.Tensor) for a in pytree.tree_leaves((args, kwargs)))

    def _do_size(self, tensor: torch.Tensor, dim: int | None = None) -> Any:
        shape = self.shape_of(tensor)
        return shape if dim is None else shape[dim]

    def _do_numel(self, tensor: torch.Tensor) -> Any:
        return canonical.product(self.shape_of(tensor))

    _do_nelement = _do_numel

    def _do_len(self, tensor: torch.Tensor) -> Any:
        return int(self.shape_of(tensor)[0])

    def _do_iter(self, tensor: torch.Tensor) -> Any:
        return iter(self._call(torch.unbind, "unbind", (tensor, 0), {}))

    def _do_get_device(self, tensor: torch.Tensor) -> Any:
        return -1 if self.device.type == "cpu" else self.device.index or 0

    def _do_is_contiguous(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return self.value_of(tensor).tensor.is_contiguous(*args, **kwargs)

    def _do_requires_grad(self, tensor: torch.Tensor, requires_grad: bool = True) -> Any:
        return tensor

    def _do_set_grad_enabled(self, mode: bool) -> Any:
        return torch._C._set_grad_enabled(mode)

    def _do_stride(self, tensor: torch.Tensor, *args: Any) -> Any:
        raise Untraceable("it asks for the strides of a tensor")

    _do_data_ptr = _do_storage = _do_untyped_storage = _do_storage_offset = _do_stride

    def _do_type(self, tensor: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
        return NotImplemented if dtype is not None else tensor.type()

    def _do_tensor(self, data: Any, **kwargs: Any) -> Any:
        return self._constant_or_node(torch.tensor, data, kwargs)

    def _do_as_tensor(self, data: Any, **kwargs: Any) -> Any:
        if isinstance(data, torch.Tensor):
            return NotImplemented
        return self._constant_or_node(torch.as_tensor, data, kwargs)

    def _do_from_numpy(self, data: Any) -> Any:
        return self._constant_or_node(torch.from_numpy, data, {})

    def _constant_or_node(self, function: Any, data: Any, kwargs: Any) -> Any:
        leaves = pytree.tree_leaves(data)
        if any(isinstance(leaf, torch.Tensor) for leaf in leaves):
            raise Untraceable("it builds a tensor out of the values of tensors")
        if all(isinstance(leaf, (int, float, bool, ShapeInt, ShapeFloat)) for leaf in leaves):
            return NotImplemented
        constant = function(data, **kwargs)
        self.kept.append(constant)
        self.value_of(constant)
        return constant


_SPECIAL = frozenset({
    "size", "numel", "nelement", "__len__", "__iter__", "get_device", "is_contiguous", "stride",
    "requires_grad_", "data_ptr", "storage", "untyped_storage", "storage_offset", "type", "tensor",
    "as_tensor", "from_numpy", "_set_grad_enabled",
})  # fmt: skip
_VALUE_READERS = frozenset({
    "__bool__", "item", "tolist", "__int__", "__float__", "__index__", "__complex__", "numpy",
    "__array__", "__contains__", "equal", "allclose", "is_nonzero", "nonzero", "unique",
    "masked_select", "argwhere", "unique_consecutive", "bincount",
})  # fmt: skip
_PIECES = {"unbind": 1, "split": 2, "chunk": 2, "tensor_split": 2, "split_with_sizes": 2}
_LITERALS = (
    bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _has_member(model: nn.Module, path: str) -> bool:
    value: Any = model
    for atom in path.split("."):
        if not hasattr(value, atom):
            return False
        value = getattr(value, atom)
    return True


def _rebuilt(result: Any, items: list[Any]) -> Any:
    """``items`` in the kind of sequence that ``result`` is (``torch.return_types.max``, …)."""
    if isinstance(result, list):
        return items
    if type(result) is tuple:
        return tuple(items)
    if hasattr(result, "_fields"):
        return type(result)(*items)
    return type(result)(items)


@contextlib.contextmanager
def _patched_module_call(tracer: Tracer) -> Iterator[None]:
    """Every module call goes to the tracer, as does every custom autograd function."""
    original = nn.Module.__call__
    apply = torch.autograd.Function.__dict__["apply"]

    def module_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if tracer.in_leaf:
            return original(module, *args, **kwargs)
        return tracer.call_module(module, args, kwargs, original)

    def function_apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if tracer.in_leaf:
            return apply.__get__(None, cls)(*args, **kwargs)
        raise Untraceable(f"it applies the custom autograd function {cls.__name__}")

    nn.Module.__call__ = module_call  # type: ignore[assignment, method-assign]
    torch.autograd.Function.apply = classmethod(function_apply)  # type: ignore
    try:
        yield
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]
        torch.autograd.Function.apply = apply
