"""Reports of programs and of transformations, as values, as JSON and as text."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from fxopt.capture import capture
from fxopt.captured import to_module
from fxopt.report import Report, TransformReport, report
from fxopt.results import Declined, OutputError, PassRecord, Rewritten, Verification


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.conv(x)) + x)


class Net(nn.Module):
    """A residual net with members that forward never reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2)
        self.block = Block(4)
        self.head = nn.Linear(4, 5)
        self.unread = nn.Linear(6, 7)
        self.unread_norm = nn.BatchNorm1d(7)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.block(self.stem(image)).mean((2, 3))
        result: torch.Tensor = self.head(x.view(x.shape[0], 2, 2).flatten(1))
        return result


@pytest.fixture(scope="module")
def net_report() -> Report:
    return report(Net().eval(), torch.zeros(2, 3, 9, 13))


RECORD = PassRecord(
    "fold_conv_bn",
    {"dtype": torch.float32, "limit": math.inf},
    "values",
    (Rewritten("block_norm", "'block.norm'"), Rewritten("n", "'n'", "untied, 96 bytes added")),
    (Declined("unread", "'unread_norm'", "its input is also read by 'add'"),),
    {"tensor": torch.tensor([1.0, math.nan]), "ratio": 0.5},
    Verification(
        "float64",
        2e-15,
        1e-12,
        (OutputError("logits", 2e-15), OutputError("mask", None, "the reference is all zero")),
        "float32",
        3.1e-7,
        2.9e-7,
        2.4e-6,
        2,
        0.25,
        "site by site",
        ("one leaf ran in float32",),
    ),
)


def test_rows_name_the_users_modules(net_report: Report) -> None:
    rows = [(row.kind, row.path) for row in net_report.operators if row.kind != "shape"]
    assert rows == [
        ("conv2d", "stem"),
        ("conv2d", "block.conv"),
        ("batch_norm", "block.norm"),
        ("elementwise", "block"),
        ("activation", "block"),
        ("reduce", ""),
        ("view", ""),
        ("view", ""),
        ("linear", "head"),
    ]
    assert len({row.name for row in net_report.operators}) == len(net_report.operators)


def test_totals_leave_out_what_forward_never_reads(net_report: Report) -> None:
    assert net_report.totals.parameters == (4 * 27 + 4) + 4 * 4 * 9 + 8 + 25
    assert net_report.totals.unused_parameters == 6 * 7 + 7 + 14
    assert net_report.unused.parameters == {
        "unread.weight": 42,
        "unread.bias": 7,
        "unread_norm.weight": 7,
        "unread_norm.bias": 7,
    }
    assert net_report.unused.batch_norms == ("unread_norm",)
    assert net_report.totals.macs == 2 * (4 * 24 * 27 + 4 * 24 * 36 + 20)
    assert sum(net_report.macs_by_kind.values()) == net_report.totals.macs


def test_largest_activations_come_first(net_report: Report) -> None:
    sizes = [row.activation_bytes for row in net_report.largest_activations]
    assert sizes == [2 * 4 * 24 * 4] * 5
    assert net_report.largest_activations[0].path == "stem"


def test_json_has_the_documented_keys(net_report: Report) -> None:
    document = json.loads(net_report.json())
    assert document == net_report.to_dict()
    assert document["schema"] == "fxopt.report/1"
    assert document["model"] == "Net"
    assert document["input_shapes"] == {"image": [2, 3, 9, 13]}
    assert document["input_dtypes"] == {"image": "float32"}
    stem = document["operators"][0]
    assert stem == {
        "name": stem["name"],
        "kind": "conv2d",
        "path": "stem",
        "output_shape": [2, 4, 4, 6],
        "dtype": "float32",
        "parameters": 112,
        "macs": 2 * 4 * 24 * 27,
        "weight_bytes": 448,
        "activation_bytes": 2 * 4 * 24 * 4,
    }
    assert document["totals"]["macs"] == net_report.totals.macs
    assert document["macs_by_kind"] == net_report.macs_by_kind


def test_an_operator_with_several_outputs_lists_them() -> None:
    class Halves(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            left, right = x.chunk(2, 1)
            return left + right

    rows = report(Halves(), torch.zeros(2, 4, 3)).to_dict()["operators"]
    assert rows[0]["output_shape"] == [[2, 2, 3], [2, 2, 3]]
    assert rows[0]["dtype"] == ["float32", "float32"]


def test_a_size_has_no_shape(net_report: Report) -> None:
    sizes = [row for row in net_report.to_dict()["operators"] if row["kind"] == "shape"]
    assert sizes
    assert all(row["output_shape"] is None and row["dtype"] is None for row in sizes)


def test_text_of_a_report_is_plain_and_tells_the_totals(net_report: Report) -> None:
    text = net_report.text()
    assert "\x1b" not in text
    assert text.startswith("Net, image 2x3x9x13 float32\n")
    lines = [line.split() for line in text.splitlines()]
    assert ["parameters", "289"] in lines
    assert ["parameters", "never", "read", "63"] in lines
    assert ["MACs", f"{net_report.totals.macs:,}"] in lines
    assert "never read by forward: 4 parameter tensors and 1 BatchNorm" in text
    assert "at least" not in text
    rows = [line for line in text.splitlines() if line.startswith(("stem ", "block.conv "))]
    assert " ".join(rows[0].split()) == "stem conv2d 2x4x4x6 float32 112 5,184 448 B 768 B"


def test_rows_of_the_table_that_write_nothing_are_only_counted(net_report: Report) -> None:
    hidden = [row for row in net_report.operators if row.kind in ("view", "shape")]
    assert f"not shown, as they write nothing: {len(hidden)} operators" in net_report.text()


def opaque_program() -> Any:
    program = capture(Net().eval(), torch.zeros(1, 3, 9, 13))
    name = next(node.name for node in program.nodes if str(node.target) == "block.conv")
    return replace(program, opaque={name: "it branches on values"})


def test_totals_with_opaque_leaves_say_at_least() -> None:
    found = report(opaque_program())
    assert found.totals.at_least
    assert [row.kind for row in found.operators].count("opaque") == 1
    assert found.totals.macs == 4 * 24 * 27 + 20
    assert found.totals.parameters == 289
    text = found.text()
    assert "at least 2,612" in text
    assert "opaque: 'block.conv' runs as it is" in text
    assert "it branches on values" in text
    assert found.to_dict()["opaque"][0]["path"] == "block.conv"


def test_guards_and_notes_are_told() -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if x.shape[-1] > 4 else x - 1

    program = replace(capture(Branching(), torch.zeros(2, 7)), notes=("its input is overwritten",))
    found = report(program)
    assert len(found.guards) == 1
    assert "> 4" in found.guards[0]
    assert f"guard: {found.guards[0]}" in found.text()
    assert "note: its input is overwritten" in found.text()


def test_many_guards_are_counted_in_the_text_and_listed_in_the_json(net_report: Report) -> None:
    many = replace(net_report, guards=tuple(f"x.shape[0] > {i}" for i in range(8)))
    assert "x.shape[0] > 4" in many.text()
    assert "x.shape[0] > 5" not in many.text()
    assert "and 3 more guards" in many.text()
    assert len(many.to_dict()["guards"]) == 8


def test_a_program_without_a_training_mode_says_why(net_report: Report) -> None:
    text = replace(net_report, eval_only="training runs the auxiliary head").text()
    assert "evaluation only: training runs the auxiliary head" in text


def test_example_inputs_with_a_program_are_refused() -> None:
    program = capture(Net().eval(), torch.zeros(1, 3, 9, 13))
    with pytest.raises(TypeError, match="has its own example inputs"):
        report(program, torch.zeros(1, 3, 9, 13))


def test_a_transformed_module_reports_its_own_program_and_its_history() -> None:
    program = capture(Net().eval(), torch.zeros(2, 3, 9, 13))
    found = report(to_module(program, (RECORD,)))
    assert found.operators == report(program).operators
    assert found.notes[-1] == "sites rewritten by fold_conv_bn: 2"


def test_a_graph_without_products_has_a_report() -> None:
    found = report(nn.Sequential(nn.ReLU()), torch.zeros(2, 3))
    assert found.totals.macs == 0
    assert found.macs_by_kind == {}
    assert "MACs" in found.text()


def folded(net_report: Report) -> TransformReport:
    rows = tuple(row for row in net_report.operators if row.kind != "batch_norm")
    totals = replace(net_report.totals, parameters=net_report.totals.parameters - 4)
    return TransformReport(
        net_report, replace(net_report, operators=rows, totals=totals), (RECORD,)
    )


def test_json_of_a_transformation_is_strict_and_has_the_documented_keys(
    net_report: Report,
) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    document = json.loads(folded(net_report).json(), parse_constant=refuse)
    assert document["schema"] == "fxopt.transform/1"
    assert document["before"] == net_report.to_dict()
    assert len(document["after"]["operators"]) == len(document["before"]["operators"]) - 1
    (done,) = document["passes"]
    assert done["name"] == "fold_conv_bn"
    assert done["options"] == {"dtype": "float32", "limit": None}
    assert done["rewritten"] == 2
    assert [site["node"] for site in done["sites"]] == ["block_norm", "n"]
    assert done["declined"][0]["node"] == "unread"
    assert done["declined"][0]["reason"] == "its input is also read by 'add'"
    assert done["evidence"] == {"tensor": [1.0, None], "ratio": 0.5}
    verification = done["verification"]
    assert (verification["dtype"], verification["max_error"]) == ("float64", 2e-15)
    assert verification["bound"] == 1e-12
    assert verification["outputs"][1]["error"] is None


def test_text_of_a_transformation_tells_the_change(net_report: Report) -> None:
    text = folded(net_report).text()
    lines = [line.split() for line in text.splitlines()]
    assert ["batch_norm", "1", "0", "-1"] in lines
    assert ["conv2d", "2", "2"] in lines
    assert ["parameters", "289", "285", "-4"] in lines
    assert "\x1b" not in text


def test_text_of_a_transformation_tells_what_each_pass_did(net_report: Report) -> None:
    text = folded(net_report).text()
    assert "fold_conv_bn{dtype=float32,limit=inf}: 2 sites rewritten, 1 declined" in text
    assert "verified in float64: largest error 2.0e-15, bound 1.0e-12" in text
    assert "as shipped in float32: error 3.1e-07, the original's own 2.9e-07, bound 2.4e-06" in text
    assert "compared: site by site, batch 2, 0.2 s" in text
    assert "remark: one leaf ran in float32" in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "mask no evidence the reference is all zero" in lines
    assert "'n' untied, 96 bytes added" in lines
    assert "unread 'unread_norm' its input is also read by 'add'" in lines
    assert "  ratio: 0.5" in text


def test_a_pass_that_was_not_verified_says_so(net_report: Report) -> None:
    record = replace(RECORD, verification=None, rewritten=RECORD.rewritten[:1], options={})
    unverified = TransformReport(net_report, net_report, (record,))
    assert "fold_conv_bn: 1 site rewritten, 1 declined\n  not verified" in unverified.text()
    assert unverified.to_dict()["passes"][0]["verification"] is None


def test_a_pass_that_may_change_values_has_no_bound(net_report: Report) -> None:
    assert RECORD.verification is not None
    free = replace(RECORD.verification, bound=math.inf, shipped_bound=math.inf)
    found = TransformReport(net_report, net_report, (replace(RECORD, verification=free),))
    assert "largest error 2.0e-15, no bound" in found.text()
    assert found.to_dict()["passes"][0]["verification"]["bound"] is None
