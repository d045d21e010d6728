"""Dataflow graphs of small nets, by hand: one test per rule and per exception from it.

A graph is written a line a node: ``name (members): bytes + scratch reads a b over a``, ``= a`` for
a view of ``a``, ``resident``, ``out``. Maps are ``(1, 4, 6, 6)`` in float32, 576 bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from capture.checks import net
from torch import Tensor, nn

from fxopt.analysis.dataflow import dataflow
from fxopt.analysis.graph import graph_from_json, graph_to_json, normalised
from fxopt.analysis.liveness import timeline
from fxopt.analysis.memory_model import PRESETS, MemoryModel
from fxopt.analysis.placement import placement
from fxopt.capture import capture
from fxopt.passes import FoldConvBn
from fxopt.program import Program
from fxopt.rewrite import run_pass

PLAIN = MemoryModel()
EPILOGUES = MemoryModel(fuse_epilogues=True)
ADD = MemoryModel(fuse_add=True)
EPILOGUES_ADD = MemoryModel(fuse_epilogues=True, fuse_add=True)
PADDING = MemoryModel(fuse_padding=True)
ELEMENTWISE = MemoryModel(inplace_elementwise=True)
DEPTHWISE = MemoryModel(inplace_depthwise=True)
SCRATCH = MemoryModel(inplace_depthwise=True, inplace_depthwise_scratch=True)
WRITTEN = MemoryModel.preset("pytorch")
TINYENGINE = MemoryModel.preset("tinyengine")


def image(*shape: int) -> Tensor:
    return torch.ones(shape or (1, 4, 6, 6))


def conv(inputs: int = 4, outputs: int = 4, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, **{"padding": 1, **options})


def flow(
    model: MemoryModel, forward: Callable[..., Any], *inputs: Tensor, **members: Any
) -> nx.DiGraph:
    program = capture(net(forward, **members).eval(), inputs or (image(),))
    return checked(dataflow(program, model))


def checked(graph: nx.DiGraph) -> nx.DiGraph:
    """``graph``, if it is canonical, in topological order and survives a file."""
    full = normalised(graph)
    assert {key: set(full.nodes[key]) for key in full} == {
        key: set(graph.nodes[key]) for key in full
    }
    position = {node: step for step, node in enumerate(graph)}
    assert all(position[source] < position[target] for source, target in graph.edges)
    again = graph_from_json(json.loads(json.dumps(graph_to_json(graph))))
    assert list(again) == list(graph)
    assert set(again.edges) == set(graph.edges)
    for node, fields in again.nodes(data=True):
        assert {**fields, "inplace": list(fields["inplace"])} == graph.nodes[node]
    return graph


def text(graph: nx.DiGraph) -> list[str]:
    return [line(graph, node) for node in graph]


def line(graph: nx.DiGraph, node: str) -> str:
    fields = graph.nodes[node]
    words = [node]
    if fields["members"] != [node]:
        words.append(f"({' '.join(fields['members'])})")
    words[-1] += ":"
    words.append(f"= {fields['alias_of']}" if fields["alias_of"] else str(fields["output_bytes"]))
    words += [f"+ {fields['scratch_bytes']}"] if fields["scratch_bytes"] else []
    words += ["reads", *graph.pred[node]] if graph.pred[node] else []
    words += ["over", *fields["inplace"]] if fields["inplace"] else []
    words += [flag for key, flag in (("resident", "resident"), ("output", "out")) if fields[key]]
    return " ".join(words)


def over(graph: nx.DiGraph, node: str) -> list[str]:
    result: list[str] = graph.nodes[node]["inplace"]
    return result


# ---- what is a node, and how large ----------------------------------------------------------


def test_every_operator_writes_a_tensor_of_its_own() -> None:
    found = flow(
        PLAIN, lambda s, x: s.pool(torch.relu(s.bn(s.conv(x)))),
        conv=conv(4, 8), bn=nn.BatchNorm2d(8), pool=nn.MaxPool2d(2),
    )  # fmt: skip
    assert text(found) == [
        "x: 576 resident",
        "conv: 1152 reads x",
        "bn: 1152 reads conv",
        "relu: 1152 reads bn",
        "pool: 288 reads relu out",
    ]
    assert [fields["kind"] for _, fields in found.nodes(data=True)] == [
        "input", "conv2d", "batch_norm", "activation", "pool",
    ]  # fmt: skip
    assert [fields["path"] for _, fields in found.nodes(data=True)] == [
        "",
        "conv",
        "bn",
        "",
        "pool",
    ]
    assert found.graph == {"opaque": [], "notes": [], "constant_bytes": 0}


def test_bytes_per_element_changes_floating_point_alone() -> None:
    def forward(s: Any, x: Tensor, i: Tensor) -> Any:
        return x * 2, i * 2, i > 0

    inputs = (image(2, 3), torch.ones(2, 3, dtype=torch.int64))
    own = flow(PLAIN, forward, *inputs)
    assert text(own) == [
        "x: 24 resident", "i: 48 resident", "mul: 24 reads x out", "mul_1: 48 reads i out",
        "gt: 6 reads i out",
    ]  # fmt: skip
    assert [own.nodes[node]["item_bytes"] for node in own] == [4, 8, 4, 8, 1]
    what_if = flow(MemoryModel(bytes_per_element=2), forward, *inputs)
    assert [what_if.nodes[node]["output_bytes"] for node in what_if] == [12, 48, 12, 48, 6]
    assert [what_if.nodes[node]["item_bytes"] for node in what_if] == [2, 8, 2, 8, 1]


def test_inputs_are_resident_or_streamed() -> None:
    def forward(s: Any, x: Tensor, y: Tensor, unused: Tensor) -> Any:
        return torch.relu(x), y

    inputs = image(2, 3), image(5), image(7)
    assert text(flow(PLAIN, forward, *inputs)) == [
        "x: 24 resident", "y: 20 resident out", "unused: 28 resident", "relu: 24 reads x out",
    ]  # fmt: skip
    streamed = MemoryModel(input_resident=False, inplace_elementwise=True)
    assert text(flow(streamed, forward, *inputs)) == [
        "x: 0", "y: 0 out", "unused: 0", "relu: 24 reads x out",
    ]  # fmt: skip


def test_an_output_that_is_read_inside_and_a_dead_effect() -> None:
    norm = nn.BatchNorm2d(4)

    def forward(s: Any, x: Tensor) -> Any:
        s.norm(x)
        y = torch.relu(x)
        return y, y + 1

    assert text(flow(PLAIN, forward, norm=norm)) == [
        "x: 576 resident", "norm: 576 reads x", "relu: 576 reads x out", "add: 576 reads relu out",
    ]  # fmt: skip


def test_an_operator_with_several_outputs_is_one_node_and_its_items_are_views() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        values, places = x.max(1)
        return values, places + 1

    found = flow(PLAIN, forward, image(2, 6))
    assert text(found) == [
        "x: 48 resident",
        "max_1: 24 reads x",
        "getitem: = max_1 reads max_1 out",
        "getitem_1: = max_1 reads max_1",
        "add: 16 reads getitem_1 out",
    ]
    assert found.nodes["max_1"]["item_bytes"] == 8
    # An item is a part of its producer's bytes, so it is not overwritten.
    assert over(flow(ELEMENTWISE, forward, image(2, 6)), "add") == []


def test_views_are_of_their_operand_and_a_reshape_of_a_rearranged_one_is_a_copy() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        y = x * 2
        a, b = y.chunk(2, 1)
        c = s.drop(torch.flatten(y, 1))
        return a + b, c * 2, y.permute(0, 2, 3, 1).unsqueeze(1).reshape(1, 36, 4)

    assert text(flow(PLAIN, forward, drop=nn.Dropout())) == [
        "x: 576 resident",
        "mul: 576 reads x",
        "chunk: = mul reads mul",
        "getitem: = chunk reads chunk",
        "getitem_1: = chunk reads chunk",
        "flatten: = mul reads mul",
        "drop: = flatten reads flatten",
        "add: 288 reads getitem getitem_1 out",
        "mul_1: 576 reads drop out",
        "permute: = mul reads mul",
        "unsqueeze: = permute reads permute",
        "reshape: 576 reads unsqueeze out",
    ]


def test_an_operand_read_for_its_shape_alone_is_no_operand() -> None:
    def forward(s: Any, x: Tensor, y: Tensor) -> Any:
        return (
            (x * 2).view_as(y), (x * 3).reshape_as(y), s.row.expand_as(y) + x, x.type_as(y),
            torch.rand_like(y), x + torch.zeros_like(y) + y.new_ones(2, 3), x.view(*y.shape),
        )  # fmt: skip

    found = flow(PLAIN, forward, image(2, 3), image(2, 3), row=torch.ones(3))
    assert list(found.successors("y")) == []


def test_arithmetic_on_sizes_reads_no_tensor() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        y = s.conv(x)
        return torch.relu(y).view(y.shape[0] * 2, -1)

    assert text(flow(EPILOGUES, forward, conv=conv())) == [
        "x: 576 resident", "relu (conv relu): 576 reads x", "view: = relu reads relu out",
    ]  # fmt: skip


def test_an_operand_in_keywords_is_viewed() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        return torch.unsqueeze(dim=x.shape[0] - 2, input=x * 2)

    assert text(flow(PLAIN, forward, image(2, 3))) == [
        "x: 24 resident", "mul: 24 reads x", "unsqueeze: = mul reads mul out",
    ]  # fmt: skip


# ---- constants, state, randomness -------------------------------------------------------------


def test_constants_are_no_nodes_and_those_computed_are_counted() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        steps = torch.arange(x.shape[1], device=x.device)  # of sizes alone
        unread = s.table * 3
        scale = s.table * 2 + torch.zeros_like(s.table) + unread
        return x * scale * s.table + steps + scale[:1] + torch.ones(3)

    found = flow(PLAIN, forward, image(2, 3), table=nn.Parameter(torch.ones(2, 3)))
    assert text(found) == [
        "x: 24 resident", "mul_2: 24 reads x", "mul_3: 24 reads mul_2", "add_2: 24 reads mul_3",
        "add_3: 24 reads add_2", "add_4: 24 reads add_3 out",
    ]  # fmt: skip
    # scale, steps (int64) and ones; the parameter is a weight, what only constants read is gone
    assert found.graph["constant_bytes"] == 24 + 24 + 12
    half = flow(
        MemoryModel(bytes_per_element=1), forward, image(2, 3), table=nn.Parameter(torch.ones(2, 3))
    )
    assert half.graph["constant_bytes"] == 6 + 24 + 3


def test_an_output_that_is_constant_lies_in_flash_and_is_noted() -> None:
    found = flow(PLAIN, lambda s, x: (torch.relu(x), s.w, s.w + 1), image(2, 3), w=torch.ones(5))
    assert text(found) == ["x: 24 resident", "relu: 24 reads x out"]
    assert found.graph["notes"] == [
        "the output 'w' depends on no input; it lies in flash",
        "the output 'add' depends on no input; it lies in flash",
    ]
    assert found.graph["constant_bytes"] == 20


def test_random_draws_are_no_constants() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        return x + torch.rand(2, 3), torch.empty(2, 3).bernoulli_(0.5), torch.rand_like(x)

    assert text(flow(PLAIN, forward, image(2, 3))) == [
        "x: 24 resident", "rand: 24", "add: 24 reads x rand out", "applied: 24 out",
        "rand_like: 24 out",
    ]  # fmt: skip


def test_a_buffer_that_forward_writes_is_kept_and_its_new_value_lives_to_the_end() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        s.mean.mul_(0.5).add_(x.mean((0, 2, 3)))
        return x * s.mean[:, None, None] + s.steady, s.count.add_(1)

    found = flow(
        PLAIN, forward, mean=torch.ones(4), count=torch.tensor(0), steady=torch.ones(4, 1, 1)
    )
    lines = text(found)
    assert "mul: 16" in lines  # of the buffer's old value: computed when the net runs
    copies = [entry for entry in lines if entry.startswith("copy_")]
    assert copies == ["copy_: = add reads add out", "copy__1: = add_2 reads add_2 out"]
    assert found.graph["constant_bytes"] == 0


def test_a_buffer_set_to_a_constant_costs_nothing() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        s.flag.fill_(1.0)
        return x * 2

    found = flow(PLAIN, forward, image(2, 3), flag=torch.zeros(3))
    assert text(found) == ["x: 24 resident", "mul: 24 reads x out"]


def test_a_view_of_a_kept_buffer_is_kept_too() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        old = torch.relu(s.state.view(3, 1))
        s.state.copy_(x)
        return x * 2, old

    found = flow(PLAIN, forward, image(3), state=torch.zeros(3))
    assert text(found) == [
        "x: 12 resident", "relu: 12 out", "applied: 12 reads x", "mul: 12 reads x out",
        "copy_: = applied reads applied out",
    ]  # fmt: skip
    assert found.graph["constant_bytes"] == 0


# ---- epilogues --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "shape"),
    [
        (conv(), (1, 4, 6, 6)), (conv(groups=4), (1, 4, 6, 6)), (nn.Linear(6, 6), (1, 4, 6, 6)),
        (nn.ConvTranspose2d(4, 4, 3, padding=1), (1, 4, 6, 6)), (nn.Conv1d(4, 4, 1), (1, 4, 6)),
        (nn.Conv3d(4, 4, 1), (1, 4, 2, 2, 2)),
    ],
    ids=str,
)  # fmt: skip
def test_a_chain_of_epilogues_runs_inside_its_producer(
    host: nn.Module, shape: tuple[int, ...]
) -> None:
    norm = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)](4)
    found = flow(
        EPILOGUES, lambda s, x: s.act(s.norm(s.host(x))), image(*shape),
        host=host, norm=norm, act=nn.PReLU(4),
    )  # fmt: skip
    size = image(*shape).numel() * 4
    assert text(found) == [
        f"x: {size} resident",
        f"act (host norm act): {size} reads x out",
    ]
    assert found.nodes["act"]["path"] == "host"


def test_dropout_between_a_convolution_and_its_epilogue_is_no_obstacle() -> None:
    found = flow(
        EPILOGUES, lambda s, x: s.act(s.same(s.drop(s.conv(x)))) + x,
        conv=conv(), drop=nn.Dropout(), same=nn.Identity(), act=nn.ReLU(),
    )  # fmt: skip
    assert text(found)[1].startswith("act (conv drop")
    assert len(found) == 3


def test_a_gate_fuses_into_the_convolution_before_it() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        return x * torch.sigmoid(s.up(torch.relu(s.down(x.mean((2, 3), keepdim=True)))))

    found = flow(EPILOGUES, forward, down=nn.Conv2d(4, 2, 1), up=nn.Conv2d(2, 4, 1))
    assert text(found) == [
        "x: 576 resident",
        "mean: 16 reads x",
        "relu (down relu): 8 reads mean",
        "sigmoid (up sigmoid): 16 reads relu",
        "mul: 576 reads x sigmoid out",
    ]


def test_a_functional_norm_with_constant_statistics_is_an_epilogue() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        return F.batch_norm(s.conv(x), s.mean * 1, s.mean.exp() * 2)

    found = flow(EPILOGUES, forward, conv=conv(), mean=torch.ones(4))
    assert text(found) == ["x: 576 resident", "batch_norm (conv batch_norm): 576 reads x out"]
    assert found.graph["constant_bytes"] == 32


def _reads_a_statistic(s: Any, x: Tensor) -> Any:
    y = s.conv(x)
    return F.batch_norm(y, x.mean((0, 2, 3)), s.mean.exp())


NO_EPILOGUE: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "two readers": (lambda s, x: (lambda y: torch.relu(y) + y)(s.conv(x)), {}),
    "returned": (lambda s, x: (lambda y: (torch.relu(y), y))(s.conv(x)), {}),
    "returned under dropout": (
        lambda s, x: (lambda y: (torch.relu(y), y))(s.drop(s.conv(x))), {"drop": nn.Dropout()},
    ),
    "dropout with two readers": (
        lambda s, x: (lambda y: torch.relu(y) + y)(s.drop(s.conv(x))), {"drop": nn.Dropout()},
    ),
    "read under dropout": (
        lambda s, x: (lambda y: torch.relu(s.drop(y)) + y)(s.conv(x)), {"drop": nn.Dropout()},
    ),
    "GLU": (lambda s, x: F.glu(s.conv(x), 1), {}),
    "softmax": (lambda s, x: torch.softmax(s.conv(x), 1), {}),
    "layer norm": (lambda s, x: s.norm(s.conv(x)), {"norm": nn.GroupNorm(2, 4)}),
    "norm over the batch": (
        lambda s, x: s.norm(s.conv(x)), {"norm": nn.BatchNorm2d(4, track_running_stats=False)},
    ),
    "computed statistics": (_reads_a_statistic, {"mean": torch.ones(4)}),
    "permuted": (lambda s, x: torch.relu(s.conv(x).permute(0, 2, 3, 1)), {}),
    "transposed": (lambda s, x: torch.relu(s.conv(x).transpose(2, 3)), {}),
    "half": (lambda s, x: torch.relu(s.conv(x)[:, :2]), {}),
    "of a pool": (lambda s, x: torch.relu(s.pool(s.conv(x))), {"pool": nn.MaxPool2d(2)}),
    "of an input": (lambda s, x: torch.relu(x), {}),
    "of a product": (lambda s, x: torch.relu(x * x), {}),
    "multiplication": (lambda s, x: s.conv(x) * 2, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_EPILOGUE)
def test_what_is_no_epilogue_is_an_operator_of_its_own(name: str) -> None:
    forward, members = NO_EPILOGUE[name]
    found = flow(EPILOGUES, forward, conv=conv(), **members)
    assert all(len(fields["members"]) == 1 for _, fields in found.nodes(data=True))


def test_a_sum_that_is_not_fused_takes_in_no_activation() -> None:
    found = flow(EPILOGUES, lambda s, x: torch.relu(s.conv(x) + x), conv=conv())
    assert text(found)[1:] == [
        "conv: 576 reads x", "add: 576 reads conv x", "relu: 576 reads add out",
    ]  # fmt: skip


# ---- the residual add -------------------------------------------------------------------------


def _residual(s: Any, x: Tensor) -> Any:
    y = s.a(x)
    return torch.relu(s.norm(s.c(s.b(y))) + y)


def test_a_residual_add_accumulates_into_the_block_input() -> None:
    found = flow(EPILOGUES_ADD, _residual, a=conv(), b=conv(), c=conv(), norm=nn.BatchNorm2d(4))
    assert text(found) == [
        "x: 576 resident",
        "a: 576 reads x",
        "b: 576 reads a",
        "relu (c norm add relu): 576 reads b a over a out",
    ]
    assert found.nodes["relu"]["kind"] == "conv2d"
    assert found.nodes["relu"]["path"] == "c"


def test_without_epilogues_only_a_bare_convolution_takes_in_the_add() -> None:
    found = flow(ADD, _residual, a=conv(), b=conv(), c=conv(), norm=nn.BatchNorm2d(4))
    assert "add: 576 reads norm a" in text(found)
    bare = flow(ADD, lambda s, x: torch.relu(s.a(x) + s.b(s.b(x))), a=conv(), b=conv())
    assert "add (b_1 add): 576 reads b a over a" in text(bare)
    assert "relu: 576 reads add out" in text(bare)


def test_the_convolution_that_comes_later_takes_in_the_add() -> None:
    for forward in (lambda s, x: s.a(x) + s.b(x), lambda s, x: (lambda a: s.b(x) + a)(s.a(x))):
        assert text(flow(ADD, forward, a=conv(), b=conv())) == [
            "x: 576 resident", "a: 576 reads x", "add (b add): 576 reads x a over a out",
        ]  # fmt: skip


def test_the_earlier_convolution_takes_in_the_add_where_the_later_cannot() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        a, b = s.a(x), s.b(x)
        return a + b, b * 2

    found = flow(ADD, forward, a=conv(), b=conv())
    assert text(found) == [
        "x: 576 resident",
        "b: 576 reads x",
        "add (a add): 576 reads x b over b out",
        "mul: 576 reads b out",
    ]


def test_dropout_makes_a_convolution_no_later() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        a, b = s.a(x), s.b(x)
        return s.drop(a) + b

    found = flow(ADD, forward, a=conv(), b=conv(), drop=nn.Dropout())
    assert text(found)[-1] == "add (b add): 576 reads x drop over drop out"


def test_a_tensor_that_is_added_twice_may_be_overwritten() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        u = x * 2
        return torch.relu(s.conv(x) + u) + u

    assert text(flow(EPILOGUES_ADD, forward, conv=conv()))[-1] == (
        "add_1 (conv add relu add_1): 576 reads x mul over mul out"
    )


def test_dropout_before_the_add_is_no_obstacle() -> None:
    found = flow(ADD, lambda s, x: x * 2 + s.drop(s.conv(x)), conv=conv(), drop=nn.Dropout())
    assert text(found)[-1] == "add (conv drop add): 576 reads x mul over mul out"


def test_an_add_after_an_activation_fuses_and_so_does_the_next() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        u, v = x * 2, x * 3
        return torch.relu(s.conv(x)) + u + v

    found = flow(EPILOGUES_ADD, forward, conv=conv())
    assert text(found)[-1] == (
        "add_1 (conv relu add add_1): 576 reads x mul mul_1 over mul mul_1 out"
    )


def test_the_operand_that_the_convolution_reads_is_not_overwritten() -> None:
    found = flow(ADD, lambda s, x: x * 2 + s.conv(x * 2), conv=conv())
    assert over(found, "add") == ["mul"]
    found = flow(ADD, lambda s, x: (lambda y: y + s.conv(y))(x * 2), conv=conv())
    assert text(found)[-1] == "add (conv add): 576 reads mul out"


def test_an_operand_of_another_shape_or_order_is_read_and_not_overwritten() -> None:
    def broadcast(s: Any, x: Tensor) -> Any:
        return s.conv(x) + x.mean((2, 3), keepdim=True)

    assert text(flow(ADD, broadcast, conv=conv()))[-1] == ("add (conv add): 576 reads x mean out")

    def turned(s: Any, x: Tensor) -> Any:
        return (x * 2).transpose(2, 3) + s.conv(x)

    assert text(flow(ADD, turned, conv=conv()))[-1] == ("add (conv add): 576 reads x transpose out")


def test_a_convolution_that_is_broadcast_does_not_take_in_the_add() -> None:
    found = flow(
        ADD, lambda s, x: x * 2 + s.conv(x.mean((2, 3), keepdim=True)), conv=nn.Conv2d(4, 4, 1)
    )
    assert text(found)[-1] == "add: 576 reads mul conv out"


def _twice(s: Any, x: Tensor) -> Any:
    y = s.conv(x)
    return y + y


NO_SUM: dict[str, Callable[..., Any]] = {
    "itself twice": _twice,
    "itself and its dropout": lambda s, x: (lambda y: y + s.drop(y))(s.conv(x)),
    "a constant": lambda s, x: s.conv(x) + s.bias,
    "a number": lambda s, x: s.conv(x) + 1,
    "returned": lambda s, x: (lambda y: (y + x, y))(s.conv(x)),
    "read elsewhere": lambda s, x: (lambda y: (y + x) * y)(s.conv(x)),
    "a difference": lambda s, x: x - s.conv(x),
    "scaled": lambda s, x: torch.add(x, s.conv(x), alpha=2),
    "of two inputs": lambda s, x: x + x.relu(),
}


@pytest.mark.parametrize("name", NO_SUM)
def test_what_is_no_residual_add_is_an_operator_of_its_own(name: str) -> None:
    found = flow(ADD, NO_SUM[name], conv=conv(), bias=torch.ones(4, 1, 1), drop=nn.Dropout())
    assert all(len(fields["members"]) == 1 for _, fields in found.nodes(data=True))


def test_a_depthwise_convolution_with_an_add_may_overwrite_either() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        u, v = x * 2, x * 3
        return s.conv(u) + v

    both = MemoryModel(fuse_add=True, inplace_depthwise=True, inplace_depthwise_scratch=True)
    found = flow(both, forward, conv=conv(groups=4))
    assert text(found)[-1] == "add (conv add): 576 + 144 reads mul mul_1 over mul mul_1 out"

    def same(s: Any, x: Tensor) -> Any:
        u = x * 2
        return s.conv(u) + u

    assert text(flow(both, same, conv=conv(groups=4)))[-1] == "add (conv add): 576 reads mul out"

    def part(s: Any, x: Tensor) -> Any:
        return s.other(x) + s.conv(x[:, 4:])

    # Over the other operand it needs no plane beside it.
    found = flow(both, part, image(1, 8, 6, 6), conv=conv(groups=4), other=conv(8, 4))
    assert text(found)[-1] == "add (conv add): 576 reads getitem other over other out"


# ---- padding ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reader",
    [conv(padding=0), conv(padding=0, groups=4), nn.AvgPool2d(3), nn.MaxPool2d(3)],
    ids=str,
)
def test_a_zero_pad_read_by_convolutions_and_pools_costs_nothing(reader: nn.Module) -> None:
    found = flow(
        PADDING, lambda s, x: (s.reader(s.same(F.pad(x * 2, (1, 2, 0, 1)))), s.pad(x).mean()),
        reader=reader, same=nn.Dropout(), pad=nn.ZeroPad2d(1),
    )  # fmt: skip
    assert text(found)[:3] == ["x: 576 resident", "mul: 576 reads x", "pad: = mul reads mul"]
    assert "pad_1: 1024 reads x" in text(found)  # read by a mean


def test_a_pad_by_module_costs_nothing_either() -> None:
    for pad in (nn.ZeroPad2d(1), nn.ConstantPad2d(1, 0.0)):
        found = flow(PADDING, lambda s, x: s.conv(s.pad(x)), conv=conv(padding=0), pad=pad)
        assert "pad: = x reads x" in text(found)


def test_widths_that_follow_from_sizes_are_known() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        total = max((-(-x.shape[-1] // 2) - 1) * 2 + 3 - x.shape[-1], 0)
        return s.conv(F.pad(x, (total // 2, total - total // 2, total // 2, total - total // 2)))

    found = flow(PADDING, forward, conv=conv(padding=0, stride=2))
    assert text(found)[1] == "pad: = x reads x"

    def cut(s: Any, x: Tensor) -> Any:
        return s.conv(F.pad(x, (2 - x.shape[1], 4, 4, 4)))

    assert text(flow(PADDING, cut, conv=conv(padding=0)))[1] == "pad: 1792 reads x"


def test_a_max_pool_ignores_minus_infinity_and_a_convolution_does_not() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        return s.reader(F.pad(x, (1, 1, 1, 1), value=-float("inf")))

    assert "pad: = x reads x" in text(flow(PADDING, forward, reader=nn.MaxPool2d(3)))
    for reader in (nn.AvgPool2d(3), conv(padding=0)):
        assert "pad: 1024 reads x" in text(flow(PADDING, forward, reader=reader))


NO_CLIPPING: dict[str, Callable[..., Any]] = {
    "another value": lambda s, x: s.conv(F.pad(x, (1, 1, 1, 1), value=1.0)),
    "mirrored": lambda s, x: s.conv(F.pad(x, (1, 1, 1, 1), mode="reflect")),
    "cut": lambda s, x: s.conv(F.pad(x, (-1, 3, 1, 1))),
    "read by an activation": lambda s, x: s.conv(torch.relu(F.pad(x, (1, 1, 1, 1)))),
    "also read by an activation": lambda s, x: (
        lambda y: (s.conv(y), torch.relu(y))
    )(F.pad(x, (1, 1, 1, 1))),
    "returned": lambda s, x: (lambda y: (s.conv(y), y))(F.pad(x, (1, 1, 1, 1))),
    "transposed convolution": lambda s, x: s.up(F.pad(x, (1, 1, 1, 1))),
    "a convolution that mirrors": lambda s, x: s.mirror(F.pad(x, (1, 1, 1, 1))),
    "read as the kernel": lambda s, x: F.conv2d(s.wide, F.pad(x, (1, 1, 1, 1))),
    "permuted": lambda s, x: s.conv(F.pad(x, (1, 1, 1, 1)).transpose(2, 3)),
    "in another shape": lambda s, x: s.flat(F.pad(x, (1, 1, 1, 1)).flatten(2)),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_CLIPPING)
def test_a_pad_that_its_reader_cannot_do_is_written(name: str) -> None:
    found = flow(
        PADDING, NO_CLIPPING[name], conv=conv(padding=0), up=nn.ConvTranspose2d(4, 4, 3),
        mirror=conv(padding_mode="reflect"),
        flat=nn.Conv1d(4, 4, 3), wide=torch.ones(1, 4, 9, 9),
    )  # fmt: skip
    assert found.nodes["pad"]["alias_of"] is None
    assert found.nodes["pad"]["output_bytes"] == 1024


def test_without_the_option_a_pad_is_written() -> None:
    found = flow(PLAIN, lambda s, x: s.conv(F.pad(x, (1, 1, 1, 1))), conv=conv(padding=0))
    assert text(found)[1] == "pad: 1024 reads x"


# ---- elementwise in place ---------------------------------------------------------------------


OVERWRITES: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "an activation": (lambda s, y, z: torch.relu(y), ["y"]),
    "a norm": (lambda s, y, z: s.norm(y), ["y"]),
    "a sum": (lambda s, y, z: y + z, ["y", "z"]),
    "a product with a row": (lambda s, y, z: y * z[:, :1], ["y"]),
    "a product with a constant": (lambda s, y, z: s.gain * y, ["y"]),
    "itself twice": (lambda s, y, z: y * y, ["y"]),
    "a choice": (lambda s, y, z: torch.where(y > 0, y, z), ["y", "z"]),
    "under a flatten": (lambda s, y, z: torch.relu(y.flatten(1)), ["flatten"]),
    "itself and its dropout": (lambda s, y, z: y + s.drop(y), ["y", "drop"]),
    "itself without the batch": (lambda s, y, z: y + y.view(4, 6, 6), ["y"]),
    "a slice of all": (lambda s, y, z: torch.relu(y[:, :4]), ["getitem"]),
    "a permuted operand": (lambda s, y, z: torch.relu(y.permute(0, 2, 3, 1)), []),
    "a slice": (lambda s, y, z: torch.relu(y[:, 1:]), []),
    "a part": (lambda s, y, z: torch.relu(y.chunk(2, 1)[0]), []),
    "its own transpose": (lambda s, y, z: y + y.transpose(2, 3), []),
    "itself broadcast": (lambda s, y, z: y + y[:, :1], []),
    "a column and a row of one tensor": (lambda s, y, z: y.view(1, -1) + y.view(-1, 1), []),
    "softmax": (lambda s, y, z: torch.softmax(y, 1), []),
    "GLU": (lambda s, y, z: F.glu(y, 1), []),
    "a running sum": (lambda s, y, z: torch.cumsum(y, 1), []),
    "an outer product": (lambda s, y, z: torch.outer(y.flatten(), z.flatten()), []),
    "a norm over the batch": (lambda s, y, z: s.batch_norm(y), []),
    "a pool": (lambda s, y, z: F.max_pool2d(y, 3, 1, 1), []),
    "a comparison": (lambda s, y, z: y > z, []),
    "a wider cast": (lambda s, y, z: y.double(), []),
    "a cast as wide": (lambda s, y, z: y.to(torch.int32), ["y"]),
}  # fmt: skip


def _two(step: Callable[..., Any]) -> Callable[..., Any]:
    """``step`` of two activations that no input is: ``y`` and ``z``."""

    def forward(s: Any, x: Tensor) -> Any:
        return step(s, s.y(x), s.z(x))

    return forward


@pytest.mark.parametrize("name", OVERWRITES)
def test_what_an_operator_may_overwrite(name: str) -> None:
    step, expected = OVERWRITES[name]
    members = {
        "y": conv(), "z": conv(), "drop": nn.Dropout(), "norm": nn.BatchNorm2d(4),
        "batch_norm": nn.BatchNorm2d(4, track_running_stats=False), "gain": torch.ones(4, 1, 1),
    }  # fmt: skip
    found = flow(ELEMENTWISE, _two(step), **members)
    assert over(found, list(found)[-1]) == expected
    assert not any(fields["inplace"] for _, fields in flow(PLAIN, _two(step), **members).nodes(data=True))  # fmt: skip


def test_elements_of_one_what_if_size_may_take_over_each_other() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        return torch.relu(x) > 0

    assert over(flow(ELEMENTWISE, forward), "gt") == []
    int8 = MemoryModel(bytes_per_element=1, inplace_elementwise=True)
    assert over(flow(int8, forward), "gt") == ["relu"]


def test_an_assignment_overwrites_the_tensor_that_it_changes_alone() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        y, z = x * 2, x * 3
        y[:, :2] = z[:, 2:]
        y[:] = z
        return y

    found = flow(ELEMENTWISE, forward)
    assert over(found, "assign_item") == ["mul"]
    assert over(found, "assign_item_1") == ["assign_item"]

    def itself(s: Any, x: Tensor) -> Any:
        y = x * 2
        y[:, :2] = y[:, 2:]
        return y

    assert over(flow(ELEMENTWISE, itself), "assign_item") == []


def test_an_input_is_overwritten_on_a_device_and_never_in_pytorch() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        return torch.relu(x.view(-1))

    assert over(flow(ELEMENTWISE, forward), "relu") == ["view"]
    assert over(flow(MemoryModel(inplace_elementwise=True, inplace_as_written=True), forward), "relu") == []  # fmt: skip


def test_a_tensor_without_elements_is_not_taken_over() -> None:
    found = flow(ELEMENTWISE, lambda s, x: torch.relu(x * 2), image(0, 3))
    assert text(found)[1:] == ["mul: 0 reads x", "relu: 0 reads mul out"]


# ---- depthwise in place -----------------------------------------------------------------------


def test_a_depthwise_convolution_overwrites_its_input_plane_by_plane() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        return s.down(s.same(x))

    found = flow(
        SCRATCH, forward, image(2, 4, 6, 6),
        same=conv(groups=4), down=conv(groups=4, stride=2),
    )  # fmt: skip
    assert text(found) == [
        "x: 1152 resident",
        "same: 1152 + 144 reads x over x",  # a plane is 6 x 6, of one of the two samples
        "down: 288 + 36 reads same over same out",
    ]
    assert [flow(DEPTHWISE, forward, same=conv(groups=4), down=conv(groups=4)).nodes[n]["scratch_bytes"] for n in ("same", "down")] == [0, 0]  # fmt: skip


def test_a_larger_output_may_still_take_over_the_input() -> None:
    found = flow(DEPTHWISE, lambda s, x: s.c(x), c=conv(groups=4, padding=2))
    assert text(found)[1] == "c: 1024 reads x over x out"


@pytest.mark.parametrize(
    "layer",
    [conv(), conv(4, 8, groups=4), conv(groups=2), nn.ConvTranspose2d(4, 4, 1, groups=4)],
    ids=str,
)
def test_other_convolutions_write_a_tensor_of_their_own(layer: nn.Module) -> None:
    assert over(flow(SCRATCH, lambda s, x: s.c(x), c=layer), "c") == []
    assert flow(SCRATCH, lambda s, x: s.c(x), c=layer).nodes["c"]["scratch_bytes"] == 0


def test_a_depthwise_convolution_of_part_of_a_tensor_is_not_in_place() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        return s.c(x[:, 4:])

    found = flow(SCRATCH, forward, image(1, 8, 6, 6), c=conv(groups=4))
    assert text(found)[-1] == "c: 576 reads getitem out"


def test_a_depthwise_convolution_by_function_is_in_place_too() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        return F.conv2d(x, s.w * 2, None, 1, 1, 1, 4)

    found = flow(SCRATCH, forward, w=torch.ones(4, 1, 3, 3))
    assert text(found)[1] == "conv2d: 576 + 144 reads x over x out"


def test_a_computed_kernel_is_not_overwritten() -> None:
    def forward(s: Any, x: Tensor, y: Tensor) -> Any:
        return F.conv2d(x, y, None, 1, 1, 1, 4)

    assert over(flow(DEPTHWISE, forward, image(), image(4, 1, 3, 3)), "conv2d") == ["x"]


def test_a_computed_kernel_that_is_the_input_too_forbids_it() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        return F.conv2d(x, x.view(4, 1, 3, 3), None, 1, 1, 1, 4)

    assert over(flow(DEPTHWISE, forward, image(1, 4, 3, 3)), "conv2d") == []


def test_a_clipped_pad_is_overwritten_with_what_lies_beneath() -> None:
    found = flow(
        TINYENGINE, lambda s, x: s.act(s.c(F.pad(s.a(x), (1, 1, 1, 1)))),
        a=conv(), c=conv(groups=4, padding=0), act=nn.ReLU6(),
    )  # fmt: skip
    assert text(found) == [
        "x: 576 resident",
        "a: 576 reads x",
        "pad: = a reads a",
        "act (c act): 576 reads pad over pad out",
    ]
    assert timeline(found, list(found)).peak_bytes == 2 * 576


def test_a_clipped_pad_of_part_of_a_tensor_is_not_overwritten() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        return s.c(F.pad(x[:, 4:], (1, 1, 1, 1)))

    found = flow(TINYENGINE, forward, image(1, 8, 6, 6), c=conv(groups=4, padding=0))
    assert text(found)[1:] == [
        "getitem: = x reads x", "pad: = getitem reads getitem", "c: 576 reads pad out",
    ]  # fmt: skip


# ---- in place as the user wrote it ------------------------------------------------------------


def _as_written(s: Any, x: Tensor) -> Any:
    y = s.conv(x)
    z = F.relu(y, inplace=True)
    w = torch.relu(z)
    w += z
    return torch.tanh(w)


def test_only_what_the_user_overwrote_is_in_place() -> None:
    assert text(flow(WRITTEN, _as_written, conv=conv())) == [
        "x: 576 resident",
        "conv: 576 reads x",
        "relu: 576 reads conv over conv",
        "relu_1: 576 reads relu",
        "add: 576 reads relu_1 relu over relu_1",
        "tanh: 576 reads add out",
    ]


def test_a_device_does_not_ask_what_the_user_wrote() -> None:
    found = flow(PLAIN, _as_written, conv=conv())
    assert not any(fields["inplace"] for _, fields in found.nodes(data=True))


def test_an_overwritten_input_stays_the_callers() -> None:
    found = flow(WRITTEN, lambda s, x: (x.relu_(), x.view(-1).mul_(2))[1])
    assert over(found, "relu") == []
    assert over(found, "mul") != []  # the result of the first, through a view


def test_an_overwritten_view_of_all_is_in_place_and_an_overwritten_part_is_assigned() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        y = x * 2
        y.view(-1).relu_()
        y[:, 1] = 0
        y[:, :2] += 1
        return y

    found = flow(WRITTEN, forward)
    assert over(found, "relu") == ["view"]
    # The reshape back to y's shape reads nothing of y's old values.
    assert list(found.successors("mul")) == ["view"]
    assert [over(found, node) for node in found if node.startswith("assign")] == [
        ["reshape_as"], ["assign_item"], ["assign_item_1"],
    ]  # fmt: skip
    assert timeline(found, list(found)).step_bytes == (
        576, 1152, 576, 576, 576, 576, 576, 864, 864, 864
    )  # fmt: skip


def test_what_the_user_overwrote_is_still_known_after_a_pass() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.act = conv(), nn.BatchNorm2d(4), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Any:
            return self.act(self.norm(self.conv(x)))

    folded = run_pass(FoldConvBn(), capture(Net().eval(), image())).after
    (last,) = list(checked(dataflow(folded, WRITTEN)))[2:]
    assert over(dataflow(folded, WRITTEN), last) == [list(dataflow(folded, WRITTEN))[1]]


# ---- what is not known ------------------------------------------------------------------------


def test_an_operator_that_the_table_does_not_hold_is_noted() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        return torch.special.bessel_j0(torch.special.bessel_j0(x)), torch.linalg.inv(
            x[0, :, :4, :4]
        )

    found = flow(TINYENGINE, forward)
    assert "special_bessel_j0: 576 reads x" in text(found)
    (bessel, inverse) = found.graph["notes"]
    assert "bessel_j0' (" in bessel
    assert "and 1 more) is not in the operator table" in bessel
    assert "'linalg_inv' (" in inverse
    assert "it is taken to write a tensor of its own" in inverse
    assert found.graph["opaque"] == []


def test_operators_that_keep_tensors_inside_are_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
            self.recur = nn.GRU(4, 5, batch_first=True)

        def forward(self, x: Tensor) -> Any:
            x = self.attend(x, x, x, need_weights=False)[0] + x
            x = self.attend(x, x, x, need_weights=False)[0] + x
            return self.recur(x)[0]

    found = checked(dataflow(capture(Net().eval(), image(1, 6, 4)), TINYENGINE))
    assert found.graph["opaque"] == ["attend", "recur"]
    # With no weights returned, the attention's only tensor is all of its bytes: the sum may take it.
    assert over(found, "add")[0] == "getitem"


def test_an_opaque_leaf_is_a_node_and_named() -> None:
    class Opaque(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, : int((x.sum() * 0).item()) + 4] * 2

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.strange, self.conv = Opaque(), conv()

        def forward(self, x: Tensor) -> Any:
            return torch.relu(self.strange(self.conv(x)))

    program = capture(Net().eval(), image())
    assert program.opaque
    found = checked(dataflow(program, TINYENGINE))
    assert found.graph["opaque"] == ["strange"]
    assert text(found)[1:] == [
        "conv: 576 reads x", "strange: 576 reads conv", "relu: 576 reads strange over strange out",
    ]  # fmt: skip


# ---- all together -----------------------------------------------------------------------------


class Block(nn.Module):
    """An inverted residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = 3 * channels
        self.expand, self.norm1 = nn.Conv2d(channels, hidden, 1), nn.BatchNorm2d(hidden)
        self.depthwise, self.norm2 = conv(hidden, hidden, groups=hidden), nn.BatchNorm2d(hidden)
        self.project, self.norm3 = nn.Conv2d(hidden, channels, 1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.norm1(self.expand(x)), inplace=True)
        y = F.relu6(self.norm2(self.depthwise(y)), inplace=True)
        return x + self.norm3(self.project(y))


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        # The input, the expansion and, unless in place, as much again.
        ("tflm", (1 + 3 + 3) * 576),
        ("tinyengine", (1 + 3) * 576),
        ("tinyengine_exact", (1 + 3) * 576 + 144),
        # Input, convolution and norm; the activations are in place.
        ("pytorch", (1 + 3 + 3) * 576),
    ],
)
def test_peaks_of_an_inverted_residual_block_by_hand(name: str, peak: int) -> None:
    graph = checked(dataflow(capture(Block(4).eval(), image()), MemoryModel.preset(name)))
    assert timeline(graph, list(graph)).peak_bytes == peak
    int8 = replace(MemoryModel.preset(name), bytes_per_element=1)
    graph = dataflow(capture(Block(4).eval(), image()), int8)
    assert 4 * timeline(graph, list(graph)).peak_bytes == peak


def test_epilogues_and_sums_of_a_long_chain() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        for _ in range(40):
            x = s.drop(torch.relu(x + s.conv(x)))
        return x

    graph = flow(EPILOGUES_ADD, forward, conv=conv(), drop=nn.Dropout())
    assert len(graph) == 1 + 2 * 40  # the last of each is its dropout: a view of the convolution
    assert len(flow(PLAIN, forward, conv=conv(), drop=nn.Dropout())) == 1 + 4 * 40


# ---- nets as they come ------------------------------------------------------------------------


def from_zoo(name: str, size: int = 64, **options: Any) -> Program:
    library, _, name = name.partition(":")
    zoo = pytest.importorskip(library)
    build = zoo.models.get_model if library == "torchvision" else zoo.create_model
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = build(name, **options)
    return capture(model.eval(), torch.zeros(1, 3, size, size), verify=False)


# Bytes; Lin et al. (2020, 2021) publish the first two rows' tinyengine column in KiB.
MOBILENETS = [
    (1.0, 224, {"tinyengine": 1_404_928, "tflm": 1_505_280}),
    (0.35, 144, {"tinyengine": 290_304, "tflm": 311_040}),
    (0.35, 128, {"tinyengine": 229_376, "tflm": 245_760}),
]


@pytest.mark.parametrize(("width", "size", "peaks"), MOBILENETS)
def test_peaks_of_mobilenet_v2(width: float, size: int, peaks: dict[str, int]) -> None:
    program = from_zoo("torchvision:mobilenet_v2", size, width_mult=width)
    for name, peak in peaks.items():
        float32 = dataflow(program, MemoryModel.preset(name))
        assert timeline(float32, list(float32)).peak_bytes == 4 * peak
        int8 = checked(dataflow(program, replace(MemoryModel.preset(name), bytes_per_element=1)))
        assert timeline(int8, list(int8)).peak_bytes == peak


def test_peaks_of_the_blocks_of_mobilenet_v2() -> None:
    """MCUNetV2 (Lin et al., 2021), Figure 1, with the image resident: features.0 to features.18."""
    program = from_zoo("torchvision:mobilenet_v2", 224)
    graph = dataflow(program, replace(TINYENGINE, bytes_per_element=1))
    peaks: dict[str, int] = {}
    for node, needed in zip(graph, timeline(graph, list(graph)).step_bytes, strict=True):
        block = ".".join(graph.nodes[node]["path"].split(".")[:2])
        peaks[block] = max(needed, peaks.get(block, 0))
    assert [round(peaks[f"features.{block}"] / 1024, 2) for block in range(19)] == [
        539, 588, 1372, 514.5, 514.5, 171.5, 171.5, 171.5, 85.75, 85.75, 85.75, 91.88, 128.62,
        128.62, 128.62, 53.59, 53.59, 61.25, 76.56,
    ]  # fmt: skip


NETS = [
    "torchvision:resnet18", "torchvision:mobilenet_v3_small", "torchvision:shufflenet_v2_x0_5",
    "torchvision:squeezenet1_1", "torchvision:swin_t", "timm:nfnet_l0", "timm:ghostnet_050",
    "timm:hrnet_w18_small", "timm:tf_efficientnet_b0", "timm:mobilevit_xxs",
]  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_every_operator_of_a_net_is_in_one_node_or_outside_of_the_arena(name: str) -> None:
    program = from_zoo(name)
    for model in (*PRESETS.values(), MemoryModel()):
        graph = checked(dataflow(program, model))
        members = [node for _, fields in graph.nodes(data=True) for node in fields["members"]]
        assert len(set(members)) == len(members)
        placed = placement(program, clip_padding=model.fuse_padding)
        outside = {node.name for node in placed.values if not placed.in_arena(node)}
        assert {*members, *outside} == {node.name for node in program.nodes[:-1]}
        assert outside.isdisjoint(members)
        assert all(fields["members"][-1] == node for node, fields in graph.nodes(data=True))
        # Nothing of the table is missing, and nothing is hidden.
        assert (graph.graph["notes"], graph.graph["opaque"]) == ([], [])
        returned = {node.name for node in program.output_node().all_input_nodes}
        assert {node for node, out in graph.nodes(data="output") if out} == returned


def test_pads_around_convolutions_with_same_padding_cost_nothing() -> None:
    program = from_zoo("timm:tf_efficientnet_b0", 63)
    pads = [
        fields["output_bytes"]
        for _, fields in dataflow(program, MemoryModel.preset("tflm")).nodes(data=True)
        if fields["kind"] == "pad"
    ]
    assert pads == [0] * 5
