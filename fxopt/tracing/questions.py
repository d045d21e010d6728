"""What user code asks a tensor, and what it is told: sizes, devices, dtypes, never values.

An answer that is a number of a size stays symbolic; one that Python may decide by is guarded, or
refused where no guard could hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fxopt.shapes import Dimension, ShapeFloat, ShapeInt, shape_number
from fxopt.tracing import canonical, gradients
from fxopt.tracing.trace import Untraceable, asked_by_torch, user_line
from fxopt.tracing.writer import Writer

_QUESTIONS = frozenset({
    "size", "numel", "nelement", "__len__", "__iter__", "get_device", "stride", "requires_grad_",
    "data_ptr", "storage", "untyped_storage", "storage_offset", "tensor", "as_tensor",
    "from_numpy", "_set_grad_enabled", "is_contiguous", "cpu", "cuda", "is_same_size", "type",
})  # fmt: skip
_PLAIN_PROPERTIES = frozenset({
    "dtype", "itemsize", "ndim", "layout", "is_sparse", "is_sparse_csr", "is_quantized",
    "is_nested", "is_mkldnn", "grad",
})  # fmt: skip


class Questions:
    """Answers for the tensors of one trace.

    ``operate`` writes an operator, where the answer is a tensor. ``gradients`` is what a tensor
    answers that is asked whether it needs one. ``device`` is the inputs'.
    """

    def __init__(self, writer: Writer, operate: Callable[..., Any], gradients: bool) -> None:
        self.writer = writer
        self.device = torch.device("cpu")
        self._operate = operate
        self._gradients = gradients

    def answer(self, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """The answer to the function or method ``name``; NotImplemented if it is no question."""
        if name not in _QUESTIONS:
            return NotImplemented
        return getattr(self, f"_ask_{name.strip('_')}")(*args, **kwargs)

    def shape(self, tensor: torch.Tensor) -> tuple[Any, ...]:
        """The sizes of ``tensor``: shape numbers, plain ints for parameters and constants."""
        value = self.writer.value_of(tensor)
        node, shape = value.read(), value.tensor.shape
        if node.op == "get_attr":
            return shape
        return canonical.ShapeTuple(
            shape_number(Dimension(node.name, axis), size, self.writer)
            for axis, size in enumerate(shape)
        )

    def property(self, kind: str, func: Any, args: Any) -> Any:
        attribute = func.__self__.__name__
        tensor = args[0]
        if kind == "__set__":
            if attribute == "requires_grad":
                return self._set_requires_grad(tensor, args[1])
            raise Untraceable(f"it assigns to the .{attribute} of a tensor")
        if attribute in canonical.VIEW_PROPERTIES:
            function, *extra = canonical.view_property(attribute, tensor.dim())
            return self._operate(function, function.__name__, (tensor, *extra), {})
        own = id(tensor) in self.writer.names and not self.writer.is_kept(tensor)
        if own or not (self.writer.is_traced(tensor) or tensor.is_meta):
            if attribute == "device" and id(tensor) in self.writer.names:
                return self.writer.device_of(tensor, tensor.device)
            self.writer.trace.dtype_was_read |= attribute == "dtype"
            return func(*args)
        if attribute == "requires_grad" and not asked_by_torch():
            self.writer.trace.asked_for_gradients = user_line()
            return self._gradients
        if attribute in ("grad_fn", "is_leaf") and not asked_by_torch():
            raise Untraceable(f"it decides by the .{attribute} of a tensor")
        if attribute == "shape":
            return self.shape(tensor)
        if attribute == "device":
            return self.writer.device_of(tensor, self.device)
        if attribute in ("is_cpu", "is_cuda", "is_meta"):
            self.writer.trace.device_was_read = True
            return attribute == f"is_{self.device.type}"
        if attribute == "nbytes":
            self.writer.trace.dtype_was_read = True
            return self._ask_numel(tensor) * self.writer.value_of(tensor).tensor.itemsize
        if attribute == "_backward_hooks":
            raise Untraceable("it copies or pickles a tensor (copy.copy); use clone()")
        if attribute not in _PLAIN_PROPERTIES:
            raise Untraceable(f"it asks for the .{attribute} of a tensor")
        if attribute in ("dtype", "itemsize"):
            self.writer.trace.dtype_was_read = True
        return getattr(self.writer.value_of(tensor).tensor, attribute)

    def _ask_size(self, tensor: torch.Tensor, dim: int | None = None) -> Any:
        shape = self.shape(tensor)
        return shape if dim is None else shape[dim]

    def _ask_is_same_size(self, tensor: torch.Tensor, other: torch.Tensor) -> bool:
        return self.shape(tensor) == self.shape(other)

    def _ask_numel(self, tensor: torch.Tensor) -> Any:
        return canonical.product(self.shape(tensor))

    _ask_nelement = _ask_numel

    def _ask_len(self, tensor: torch.Tensor) -> int:
        return int(self.shape(tensor)[0])

    def _ask_iter(self, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
        return iter(self._operate(torch.unbind, "unbind", (tensor, 0), {}))

    def _ask_get_device(self, tensor: torch.Tensor) -> int:
        self.writer.trace.device_was_read = True
        return -1 if self.device.type == "cpu" else self.device.index or 0

    def _ask_is_contiguous(self, tensor: torch.Tensor, **kwargs: Any) -> Any:
        if id(tensor) in self.writer.names:
            return NotImplemented
        if kwargs:
            raise Untraceable("it asks for the memory format of a tensor")
        answer = self.writer.value_of(tensor).tensor.is_contiguous()
        self.writer.assume_layout(tensor, answer)
        return answer

    def _ask_cpu(self, tensor: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self._operate(torch.Tensor.to, "to", (tensor, torch.device("cpu")), kwargs)  # type: ignore[no-any-return]

    def _ask_cuda(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._operate(torch.Tensor.to, "to", (tensor, torch.device("cuda", *args)), kwargs)  # type: ignore[no-any-return]

    def _ask_requires_grad(self, tensor: torch.Tensor, requires_grad: bool = True) -> torch.Tensor:
        self._set_requires_grad(tensor, requires_grad)
        return tensor

    def _set_requires_grad(self, tensor: torch.Tensor, flag: bool) -> None:
        writer = self.writer
        value = writer.value_of(tensor) if writer.is_traced(tensor) else None
        gradients.check_flag(tensor, writer.names.get(id(tensor)), value, flag)

    def _ask_type(self, tensor: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
        if dtype is not None and not isinstance(dtype, str):
            return NotImplemented
        if self.device.type != "cpu":
            raise Untraceable("it asks for the type of a tensor by its name")
        if dtype is None:
            self.writer.trace.dtype_was_read = self.writer.trace.device_was_read = True
            return torch.empty(0, dtype=self.writer.value_of(tensor).tensor.dtype).type()
        return self._operate(torch.Tensor.to, "to", (tensor, torch.empty(0).type(dtype).dtype), {})

    def _ask_set_grad_enabled(self, mode: bool) -> None:
        torch._C._set_grad_enabled(mode)

    def _ask_stride(self, tensor: torch.Tensor, *args: Any) -> Any:
        raise Untraceable("it asks where in memory a tensor is")

    _ask_data_ptr = _ask_storage = _ask_untyped_storage = _ask_storage_offset = _ask_stride

    def _ask_tensor(self, data: Any, **kwargs: Any) -> Any:
        return self._literal_or_constant(torch.tensor, data, kwargs)

    def _ask_as_tensor(self, data: Any, **kwargs: Any) -> Any:
        if isinstance(data, torch.Tensor):
            return NotImplemented
        return self._literal_or_constant(torch.as_tensor, data, kwargs)

    def _ask_from_numpy(self, data: Any) -> Any:
        return self._literal_or_constant(torch.from_numpy, data, {})

    def _literal_or_constant(self, function: Any, data: Any, kwargs: dict[str, Any]) -> Any:
        """Plain numbers are arguments of a node; other data (an array) becomes a constant."""
        leaves = list(canonical.leaves(data))
        if any(isinstance(leaf, torch.Tensor) for leaf in leaves):
            raise Untraceable("it builds a tensor out of the values of tensors")
        if all(isinstance(leaf, (int, float, bool, ShapeInt, ShapeFloat)) for leaf in leaves):
            return NotImplemented
        constant = function(data, **kwargs)
        self.writer.value_of(constant)
        return constant
