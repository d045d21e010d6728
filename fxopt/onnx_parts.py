"""An int8 ONNX file taken apart at its quantised tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class PartedFile:
    """An ONNX file that can be taken apart at its quantised tensors.

    Attributes:
        tensors: by quantiser of the program, the name of the tensor of whole numbers.
    """

    def __init__(self, path: Path, names: frozenset[str]) -> None:
        import onnx

        self._model = onnx.load(str(path))
        graph = self._model.graph
        self._nodes = list(graph.node)
        self._reads = [tuple(filter(None, node.input)) for node in self._nodes]
        self._producer = {n: place for place, node in enumerate(self._nodes) for n in node.output}
        self._weights = {each.name: each for each in graph.initializer}
        ends = (*graph.input, *graph.output)
        self._kinds = {each.name: each.type.tensor_type.elem_type for each in ends}
        reader = {name: place for place, names in enumerate(self._reads) for name in names}
        made = [node for node in self._nodes if node.op_type == "QuantizeLinear"]
        self.tensors: dict[str, str] = {}
        for quantiser in made:
            name = quantiser.output[0]
            self._kinds[name] = self._weights[quantiser.input[2]].data_type
            while self._nodes[reader[name]].op_type != "DequantizeLinear":  # cut to fewer bits
                cut = self._nodes[reader[name]].output[0]
                self._kinds[cut] = self._kinds.pop(name)
                name = cut
            if quantiser.name in names:
                self.tensors[quantiser.name] = name
        self._ends = {each.name for each in graph.input} | set(self.tensors.values())

    def part(self, quantiser: str) -> Part:
        """The operators between ``quantiser`` and those before it, as a model of its own."""
        return self._before(self.tensors[quantiser])

    def tail(self, output: str) -> Part:
        """The operators between an output and the last quantisers."""
        return self._before(output)

    def _before(self, target: str) -> Part:
        from onnx import helper

        places: set[int] = set()
        inputs: set[str] = set()
        todo = [target]
        while todo:
            name = todo.pop()
            if name in self._ends and name != target:
                inputs.add(name)
            elif name in self._producer and self._producer[name] not in places:
                places.add(self._producer[name])
                todo += self._reads[self._producer[name]]
        used = dict.fromkeys(name for place in places for name in self._reads[place])

        def declared(name: str) -> Any:
            return helper.make_tensor_value_info(name, self._kinds[name], None)

        graph = helper.make_graph(
            [self._nodes[place] for place in sorted(places)], "part",
            [declared(name) for name in sorted(inputs)], [declared(target)],
            [self._weights[name] for name in used if name in self._weights],
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=self._model.opset_import)
        model.ir_version = self._model.ir_version
        return Part(model, tuple(sorted(inputs)))


@dataclass(frozen=True)
class Part:
    """Operators of a file as a model of its own, and the names of its inputs."""

    model: Any
    inputs: tuple[str, ...]

    def run(self, known: Mapping[str, Any]) -> list[Any]:
        """Its outputs in onnxruntime; ``known`` has NumPy arrays by name."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(
            self.model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return list(session.run(None, {name: known[name] for name in self.inputs}))
