"""What onnxruntime runs in float of an int8 ONNX file, seen in the model that it optimised."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class FloatOperator:
    """An operator that works on floating-point tensors: its name and kind in the file, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Optimised:
    """The operators that onnxruntime runs.

    Attributes:
        integer: how many work on numbers of 8 bits.
        conversions: how many QuantizeLinear and DequantizeLinear are left.
        in_float: the others.
    """

    integer: int
    conversions: int
    in_float: tuple[FloatOperator, ...]

    @property
    def float_share(self) -> float:
        """Operators in float, of all but conversions."""
        return len(self.in_float) / max(1, self.integer + len(self.in_float))


_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear")
_WITH_KERNELS = frozenset(
    """
    Conv Gemm MatMul Add Mul Sigmoid LeakyRelu Softmax AveragePool GlobalAveragePool Concat Where
    MaxPool Reshape Transpose Squeeze Unsqueeze Flatten Slice Split Gather Expand Resize Relu Clip
    FusedConv NhwcFusedConv FusedGemm FusedMatMul
    """.split()
)
"""What onnxruntime has integer kernels for on a CPU, or runs on whole numbers as it is."""
_SHAPES = ("Shape", "Size", "ArgMax", "ArgMin", "NonZero")


def optimised(path: Path) -> Optimised:
    """What onnxruntime makes of the file at ``path``.

    An operator is in float if it reads or gives a floating-point tensor that is no weight.
    """
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath).graph
    types = _types(graph)
    constants = {each.name for each in graph.initializer}
    computed = [n for n in graph.node if n.op_type != "Constant"]
    conversions = [n for n in computed if n.op_type in _CONVERSIONS]
    others = [n for n in computed if n.op_type not in _CONVERSIONS]
    producers = {name: n for n in graph.node for name in n.output}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = []
    for node in others:
        tensors = [name for name in (*node.input, *node.output) if name not in constants]
        whole = node.op_type.startswith(("QLinear", "QGemm")) or node.op_type in _SHAPES
        if not whole and any(types.get(name) in _FLOATS for name in tensors if name):
            reason = _reason(node, producers, readers, constants)
            found.append(FloatOperator(node.name, node.op_type, reason))
    on_bytes = [n for n in others if any(types.get(name) in _BYTES for name in n.input)]
    return Optimised(len(on_bytes), len(conversions), tuple(found))


_FLOAT, _INT64, _BOOL = 1, 7, 9
_BYTES = (2, 3)
"""uint8, int8."""
_FLOATS = (1, 10, 11, 16)
"""float32, float16, float64, bfloat16."""


def _types(graph: Any) -> Mapping[str, int]:
    """The element type of each tensor; contributed operators are unknown to onnx's inference."""
    types = {each.name: each.data_type for each in graph.initializer}
    types |= {each.name: each.type.tensor_type.elem_type for each in graph.input}
    for node in graph.node:
        types |= dict.fromkeys(node.output, _type(node, types))
    return types


def _type(node: Any, types: Mapping[str, int]) -> int:
    if node.op_type == "QuantizeLinear" and len(node.input) > 2:
        return types.get(node.input[2], 2)
    if node.op_type == "DequantizeLinear":
        return _FLOAT
    if node.op_type in _SHAPES:
        return _INT64
    if node.op_type in ("Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "Not"):
        return _BOOL
    if node.op_type == "Cast":
        return int(next(a.i for a in node.attribute if a.name == "to"))
    if node.op_type == "Constant":
        return int(next((a.t.data_type for a in node.attribute if a.name == "value"), _INT64))
    if node.op_type == "QGemm":  # without a scale for its result it gives floats
        return types.get(node.input[0], 2) if len(node.input) > 7 else _FLOAT
    if node.op_type in ("QLinearConcat", "QLinearWhere", "Where"):
        return types.get(node.input[1], 2)
    first = next((name for name in node.input if name), "")
    return types.get(first, _FLOAT)


def _reason(
    node: Any, producers: Mapping[str, Any], readers: Mapping[str, list[Any]], constants: set[str]
) -> str:
    if node.op_type not in _WITH_KERNELS:
        return f"onnxruntime has no integer kernel for {node.op_type}"
    for name in _plain_operands(node, producers, constants):
        return f"its operand '{name}' is not quantised"
    read_by = [reader.op_type for name in node.output for reader in readers.get(name, [])]
    if set(read_by) != {"QuantizeLinear"}:
        return "its result is not quantised"
    return "onnxruntime did not take the pattern"


def _plain_operands(node: Any, producers: Mapping[str, Any], constants: set[str]) -> Iterator[str]:
    for name in node.input:
        producer = producers.get(name)
        if (
            name
            and name not in constants
            and (producer is None or producer.op_type != "DequantizeLinear")
        ):
            yield name
