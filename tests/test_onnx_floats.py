"""What onnxruntime leaves in float: small models by hand, one for each reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fxopt.onnx_floats import Optimised, optimised

MAP = [2, 4, 6, 6]
FLOAT = TensorProto.FLOAT


class Graph:
    """A graph that is written operator by operator; each takes and gives names."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}

    def __call__(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        names = [f"{kind.lower()}_{len(self.nodes)}_{place}" for place in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, name=names[0], **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, value: Any, dtype: str) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants[name] = np.array(value, dtype)
        return name

    def quantised(self, x: str, scale: float = 0.05) -> str:
        """``x`` through QuantizeLinear and DequantizeLinear."""
        grid = self.constant(scale, "float32"), self.constant(128, "uint8")
        found: str = self("DequantizeLinear", self("QuantizeLinear", x, *grid), *grid)
        return found

    def weight(self, *shape: int) -> str:
        values = np.random.default_rng(0).integers(-100, 100, shape)
        grid = self.constant(0.01, "float32"), self.constant(0, "int8")
        found: str = self("DequantizeLinear", self.constant(values, "int8"), *grid)
        return found

    def optimised(self, folder: Path, output: str, *others: str) -> Optimised:
        named = [helper.make_tensor_value_info(o, FLOAT, None) for o in (output, *others)]
        graph = helper.make_graph(
            self.nodes, "graph", [helper.make_tensor_value_info("x", FLOAT, MAP)], named,
            [numpy_helper.from_array(value, name) for name, value in self.constants.items()],
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
        model.ir_version = 9
        onnx.save(model, folder / "net.onnx")
        return optimised(folder / "net.onnx")


def reasons(found: Optimised) -> list[tuple[str, str]]:
    return [(each.kind, each.reason) for each in found.in_float]


def test_a_quantised_convolution_is_an_integer_operator(tmp_path: Path) -> None:
    graph = Graph()
    y = graph.quantised(graph("Conv", graph.quantised("x"), graph.weight(3, 4, 1, 1)))
    found = graph.optimised(tmp_path, y)
    assert found.in_float == ()
    assert found.integer >= 1
    assert found.conversions == 2
    assert found.float_share == 0


@pytest.mark.parametrize("kind", ["Sqrt", "Erf", "Softplus", "Exp", "Tanh"])
def test_there_is_no_integer_kernel(tmp_path: Path, kind: str) -> None:
    graph = Graph()
    found = graph.optimised(tmp_path, graph.quantised(graph(kind, graph.quantised("x"))))
    assert reasons(found) == [(kind, f"onnxruntime has no integer kernel for {kind}")]
    assert found.float_share == 1


def test_an_operand_is_not_quantised(tmp_path: Path) -> None:
    graph = Graph()
    root = graph("Sqrt", graph.quantised("x"))
    y = graph.quantised(graph("Add", graph.quantised("x", 0.1), root))
    assert reasons(graph.optimised(tmp_path, y))[-1] == (
        "Add",
        f"its operand '{root}' is not quantised",
    )


def test_a_result_is_not_quantised(tmp_path: Path) -> None:
    graph = Graph()
    y = graph("Sigmoid", graph.quantised("x"))
    assert reasons(graph.optimised(tmp_path, y)) == [("Sigmoid", "its result is not quantised")]


def test_the_pattern_is_not_taken(tmp_path: Path) -> None:
    """The runtime has integers for nearest neighbours alone."""
    graph = Graph()
    sizes = graph.constant([1, 1, 2, 2], "float32")
    made = graph("Resize", graph.quantised("x"), "", sizes, mode="linear")
    found = graph.optimised(tmp_path, graph.quantised(made))
    assert reasons(found) == [("Resize", "onnxruntime did not take the pattern")]


def test_a_float_network_is_all_float(tmp_path: Path) -> None:
    graph = Graph()
    found = graph.optimised(tmp_path, graph("Exp", graph("Softplus", "x")))
    assert [each.kind for each in found.in_float] == ["Softplus", "Exp"]
    assert (found.integer, found.conversions) == (0, 0)


def test_what_follows_a_choice_is_seen(tmp_path: Path) -> None:
    """The first operand of Where is boolean and its result is not."""
    graph = Graph()
    where = graph(
        "Where", graph("Greater", "x", graph.constant(0, "float32")), "x", graph("Exp", "x")
    )
    found = graph.optimised(tmp_path, graph("Sin", graph("Cos", where)))
    assert {"Exp", "Where", "Cos", "Sin"} <= {each.kind for each in found.in_float}


def test_sizes_are_not_in_float(tmp_path: Path) -> None:
    graph = Graph()
    shape = graph("Shape", graph("Sqrt", "x"))
    y = graph("Cast", graph("Add", shape, graph.constant([1], "int64")), to=FLOAT)
    found = graph.optimised(tmp_path, y)
    assert "Shape" not in [each.kind for each in found.in_float]


def test_names_the_operator_of_the_file(tmp_path: Path) -> None:
    graph = Graph()
    root = graph("Sqrt", graph.quantised("x"))
    (found,) = graph.optimised(tmp_path, graph.quantised(root)).in_float
    assert found.name == root


def test_leaves_nothing_behind(tmp_path: Path) -> None:
    graph = Graph()
    graph.optimised(tmp_path, graph("Sqrt", "x"))
    assert [each.name for each in tmp_path.iterdir()] == ["net.onnx"]
