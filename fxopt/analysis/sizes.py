"""How many bytes values take under a memory model."""

from __future__ import annotations

from fxopt.analysis.memory_model import MemoryModel
from fxopt.program import TensorType, ValueType, tensor_types


def item_bytes(type: TensorType, model: MemoryModel) -> int:
    """Bytes of one element."""
    if model.bytes_per_element is not None and type.dtype.is_floating_point:
        return model.bytes_per_element
    return type.dtype.itemsize


def value_bytes(value: ValueType, model: MemoryModel) -> int:
    """Bytes of all tensors in a value."""
    return sum(type.elements * item_bytes(type, model) for type in tensor_types(value))
