"""Follows a forward pass on example shapes.

Tensors are plain tensors on the meta device and every torch function is intercepted, so the
user's code sees real tensors (``isinstance`` holds, Python loops loop) while nothing is computed.
Sizes are :class:`~fxopt.shapes.ShapeInt`: arithmetic on them is recorded, decisions become guards.
What cannot be followed raises :class:`Untraceable`; it is never guessed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from fxopt.infer import MetaTwins, on_meta, run_module
from fxopt.interface import Call
from fxopt.shapes import ShapeFloat, ShapeInt
from fxopt.tracing import (
    canonical,
    checkpoints,
    gradients,
    opaque,
    pieces,
    readers,
    spelled,
    writes,
)
from fxopt.tracing.autocast import Autocast
from fxopt.tracing.distributions import unvalidated
from fxopt.tracing.known import Unknown
from fxopt.tracing.questions import Questions
from fxopt.tracing.trace import Trace, Untraceable, asked_by_torch
from fxopt.tracing.writer import Writer


class Tracer(TorchFunctionMode):
    """Traces one call of ``model``; the modules at the paths in ``leaves`` are called as such.

    ``gradients`` is what a tensor answers that is asked whether it needs one.
    """

    def __init__(self, model: nn.Module, leaves: Mapping[str, str], gradients: bool = True) -> None:
        super().__init__()
        self.model = model
        self.leaves = leaves
        self.writer = Writer(model)
        self._questions = Questions(self.writer, self._call, gradients)
        self.failure: tuple[BaseException, str] | None = None
        """The exception that left a module last, and the innermost module's path."""
        self._twins = MetaTwins()
        self._raised: Untraceable | None = None
        self._in_leaf = False
        self._autocast = Autocast.entered("cpu")
        self._start = opaque.TensorsAtStart(model)
        self._paths: dict[int, str] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            self._paths.setdefault(id(module), path)

    def run(self, call: Call) -> Trace:
        """Trace ``model`` on ``call``.

        Raises:
            Untraceable: the forward does something that cannot be followed.
        """
        inputs = []
        for leaf, value in zip(call.leaves, call.values, strict=True):
            if leaf.is_tensor:
                self._questions.device = value.device
                inputs.append(self.writer.placeholder(leaf.name, value))
        self._autocast = Autocast.entered(self._questions.device.type)
        buffers = [
            (module, key, buffer)
            for module in self.model.modules()
            for key, buffer in module._buffers.items()
            if buffer is not None
        ]
        args, kwargs = call.arguments(inputs)
        noticed = checkpoints.noticed(self.writer.trace)
        with self._module_calls_intercepted(), noticed, unvalidated(), torch.enable_grad(), self:
            result = self.model(*args, **kwargs)
        if self._raised is not None:
            raise self._raised
        self.writer.write_buffers(buffers)
        self.writer.output(result)
        self.writer.trace.device_was_read |= self.writer.device_was_read()
        return self.writer.trace

    def release(self) -> None:
        """Let go of what the last error holds."""
        self.failure = self._raised = None

    # ---- modules ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def _module_calls_intercepted(self) -> Iterator[None]:
        """Every module call comes here, as does every custom autograd function."""
        original = nn.Module.__call__
        apply = torch.autograd.Function.__dict__["apply"]
        over = False

        def module_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self._in_leaf:
                return original(module, *args, **kwargs)
            return self._call_module(module, args, kwargs, original)

        def function_apply(cls: type, *args: Any, **kwargs: Any) -> Any:
            if self._in_leaf or over:  # a class made meanwhile may have kept this function
                return apply.__get__(None, cls)(*args, **kwargs)
            if checkpoints.is_checkpoint(cls):
                return checkpoints.called(self.writer, *args, **kwargs)
            raise Untraceable(f"it applies the custom autograd function {cls.__name__}")

        nn.Module.__call__ = module_call  # type: ignore[assignment, method-assign]
        torch.autograd.Function.apply = classmethod(function_apply)  # type: ignore
        try:
            yield
        finally:
            over = True
            nn.Module.__call__ = original  # type: ignore[method-assign]
            torch.autograd.Function.apply = apply

    def _call_module(
        self, module: nn.Module, args: Any, kwargs: Any, original: Callable[..., Any]
    ) -> Any:
        writer = self.writer
        path = self._path(module)
        writer.stack.append(path)
        before = len(writer.trace.types)
        try:
            inner = bool(self._paths.get(id(module)))
            gradients.check_module(module, path)
            plain = canonical.is_leaf(module) and not self._autocast.switched()
            plain = plain and not self._start.replaced(module, writer)
            if inner and (path in self.leaves or plain):
                with torch._C.DisableTorchFunction():
                    return self._call_leaf(path, module, args, kwargs)
            if isinstance(module, torch.jit.ScriptModule):
                raise Untraceable("it is TorchScript")
            return original(module, *args, **kwargs)
        except Untraceable as error:
            error.paths = error.paths or tuple(writer.stack)
            raise
        except Exception as error:
            if self.failure is None or self.failure[0] is not error:
                self.failure = (error, path)
            raise
        finally:
            writer.stack.pop()
            writer.trace.calls[path] = len(writer.trace.types) - before

    def _path(self, module: nn.Module) -> str:
        path = self._paths.get(id(module))
        if path is not None:
            return path
        tensors = (*module.parameters(), *module.buffers())
        if any(id(tensor) not in self.writer.names for tensor in tensors):
            raise Untraceable(
                f"a {type(module).__name__} that is no registered submodule is called; put it into "
                "an attribute, a ModuleList or a ModuleDict"
            )
        return self.writer.stack[-1] if self.writer.stack else ""

    def _call_leaf(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self._autocast.switched():
            raise Untraceable(f"it calls '{path}', which is run as it is, under autocast")
        values = self.writer.concrete((args, kwargs))
        spelled.check_renormalised(getattr(module, "max_norm", None))
        trial = self._try_leaf(path, module, *values)
        self.writer.trace.flags[path] = module.training
        call = canonical.Call("call_module", path, tuple(args), kwargs)
        made = self.writer.emit(call, trial.result)
        if trial.by_values:
            self.writer.note_leaf_by_values((args, kwargs), made, opaque.ALIAS)
        if path in self.leaves or not isinstance(made, torch.Tensor):
            return made
        if canonical.writes_input(module) and args:
            return self.writer.overwrite(args[0], self.writer.value_of(made).current)
        return made

    def _try_leaf(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> opaque.Trial:
        twin = self._twins.module(module)
        self._in_leaf = True
        try:
            if path not in self.leaves:
                return opaque.Trial(run_module(module, twin, args, kwargs), by_values=False)
            if self._start.replaced(module, self.writer):
                raise Untraceable("it puts other tensors into a submodule that is run as it is")
            return opaque.try_out(module, twin, args, kwargs)
        finally:
            self._in_leaf = False

    # ---- functions -------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return self._function(func, args, dict(kwargs or {}))
        except Exception as error:
            if (
                self._raised is None and not asked_by_torch()
            ):  # it counts if the user's code catches it
                what = " ".join(str(error).split())
                self._raised = Untraceable(
                    f"it catches an error of an operator ({what}), which other inputs may not raise"
                )
                self._raised.paths = tuple(self.writer.stack)
            raise

    def _function(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func is torch.device:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if name in ("__get__", "__set__"):
            return self._questions.property(name, func, args)
        if name in readers.READERS and _has_tensor(args, kwargs):
            return self._for_real(func, name, args, kwargs)
        if name in _AUTOGRAD and _has_tensor(args, kwargs):
            raise Untraceable(f"it asks autograd for something ({name})")
        answer = self._questions.answer(name, args, kwargs)
        if answer is not NotImplemented:
            return answer
        return self._call(func, name, args, kwargs)

    def _call(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        writer = self.writer
        if self._autocast.switched():
            args, kwargs = self._autocast.arguments(name, args, kwargs, self._cast, self._learns)
        if name in spelled.PREPARED:
            args, kwargs = spelled.PREPARED[name](writer, args, kwargs)
        out = kwargs.pop("out", None)
        if out is not None:
            return self._call_into(out, self._call(func, name, args, kwargs))
        target = writes.overwritten(name, args, kwargs)
        if target is not None:
            return self._call_in_place(func, name, target, args, kwargs)
        try:
            result = on_meta(func, *writer.concrete((args, kwargs)))
        except (NotImplementedError, RuntimeError) as error:
            return self._without_shape(func, name, args, kwargs, error)
        if not _has_tensor((result,), {}):
            return self._plain_answer(name, args, kwargs, result)
        self._guard_pieces(name, args, kwargs)
        return writer.emit(canonical.spell(func, name, args, kwargs, writer.node_name), result)

    def _call_into(self, out: Any, made: Any) -> Any:
        """``made``, written into the tensors of an ``out=`` argument."""
        if not isinstance(out, torch.Tensor):
            items = [self._call_into(o, m) for o, m in zip(out, made, strict=True)]
            return canonical.rebuilt(made, items)
        writer = self.writer
        target, source = writer.value_of(out), writer.value_of(made)
        if target.tensor.shape != source.tensor.shape:
            if target.view is not None or target.tensor.numel():
                raise Untraceable("it gives an out= argument of another shape than the result's")
            target.tensor.resize_(source.tensor.shape)
        return self._overwrite(out, source.read(), source.tensor.dtype)

    def _overwrite(self, target: torch.Tensor, node: fx.Node, dtype: torch.dtype) -> torch.Tensor:
        """``target`` overwritten by what ``node`` gives in ``dtype``; it keeps its own."""
        tensor = self.writer.value_of(target).tensor
        if dtype != tensor.dtype:
            node = self.writer.node("call_method", "to", (node, tensor.dtype), {}, tensor)
        return self.writer.overwrite(target, node)

    def _for_real(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """What an operator that needs values gives for those of constants."""
        try:
            return self.writer.for_real(func, args, kwargs)
        except Unknown as unknown:
            raise readers.refusal(name, unknown) from None

    def _without_shape(
        self, func: Any, name: str, args: Any, kwargs: dict[str, Any], error: Exception
    ) -> Any:
        try:
            return self.writer.for_real(func, args, kwargs)
        except Unknown:
            pass
        if readers.needs_values(error):
            raise readers.without_shape(name, error) from None
        raise error

    def _plain_answer(self, name: str, args: Any, kwargs: dict[str, Any], answer: Any) -> Any:
        """An answer that is no tensor: what it depends on is baked in, and must be guarded."""
        known = name in _DTYPE_QUESTIONS or name in _RANK_QUESTIONS or answer is None
        if _has_tensor(args, kwargs) and not known:
            raise Untraceable(f"it asks a tensor something that may change ({name})")
        self._bake(args, kwargs)
        self.writer.trace.dtype_was_read |= name in _DTYPE_QUESTIONS
        return answer

    def _call_in_place(
        self, func: Any, name: str, target: Any, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        writer = self.writer
        if writer.names.get(id(target), "").endswith("num_batches_tracked"):
            return target  # a norm's own statistic, which the norm that is called keeps itself
        if name in writes.RESHAPING:
            raise Untraceable(f"{name} changes the shape of a tensor in place")
        if writes.initialises(func) and writer.value_of(target).learns:
            raise Untraceable(f"nn.init.{name} overwrites a tensor that gradients flow through")
        if name == "detach_":
            return gradients.detached(writer, target)
        on_meta(func, *writer.concrete((args, kwargs)))
        call = writes.pure(func, name, args, kwargs, writer.node_name)
        result = self._result_of(call)
        node = writer.value_of(writer.emit(call, result)).current
        return self._overwrite(target, node, result.dtype)

    def _result_of(self, call: canonical.Call) -> torch.Tensor:
        function = call.target
        if isinstance(function, nn.Module):
            function = function.forward
        elif isinstance(function, str):
            function = getattr(torch.Tensor, function)
        return on_meta(function, *self.writer.concrete((call.args, call.kwargs)))  # type: ignore[no-any-return]

    def _cast(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self._call(torch.Tensor.to, "to", (tensor, dtype), {})  # type: ignore[no-any-return]

    def _learns(self, tensor: torch.Tensor) -> bool:
        return torch.is_grad_enabled() and id(tensor) in self.writer.names and tensor.requires_grad

    def _guard_pieces(self, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        """``split`` and its like give as many pieces as the size allows: a decision on it."""
        position = pieces.DIMENSION.get(name)
        tensor = args[0] if args else kwargs.get("input")
        if position is None or not isinstance(tensor, torch.Tensor):
            return
        dim = kwargs.get("dim", args[position] if len(args) > position else 0)
        by_name = next((kwargs[key] for key in pieces.COUNTS if key in kwargs), None)
        asked = args[1] if len(args) > 1 else by_name
        pieces.settle_number(name, self._questions.shape(tensor)[int(dim)], asked)

    def _bake(self, args: Any, kwargs: dict[str, Any]) -> None:
        """The answer is a plain Python value: shape numbers in the question are decided by it."""
        for leaf in canonical.leaves((args, kwargs)):
            if isinstance(leaf, (ShapeInt, ShapeFloat)):
                leaf.plain()


def _has_tensor(args: Any, kwargs: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in canonical.leaves((args, kwargs)))


_DTYPE_QUESTIONS = frozenset({
    "is_floating_point", "is_complex", "is_signed", "element_size", "type", "result_type",
    "can_cast", "is_same_dtype", "is_conj", "is_neg", "is_inference", "promote_types",
})  # fmt: skip
_RANK_QUESTIONS = frozenset({"dim", "ndimension", "is_tensor", "is_storage", "__repr__",
                             "__format__", "is_pinned"})  # fmt: skip
_AUTOGRAD = frozenset({
    "register_hook", "register_post_accumulate_grad_hook", "retain_grad", "backward", "grad",
})  # fmt: skip
