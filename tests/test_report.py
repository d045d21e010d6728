"""Reports of programs and of transformations, as values, as JSON and as text."""

from __future__ import annotations

import json
import math
import re
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


class Tied(nn.Module):
    """Two branches that share a weight, and a head that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 3, 1, bias=False)
        self.right = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.right[0].weight = self.left.weight
        self.head = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.head((self.left(x) + self.right(x)).mean((2, 3))))
        return result


@pytest.fixture(scope="module")
def tied_report() -> Report:
    return report(Tied().eval(), torch.zeros(1, 3, 4, 5))


def test_operators_are_added_up_by_module_in_execution_order(net_report: Report) -> None:
    rows = net_report.by_module()
    assert [(row.path, row.parameters) for row in rows] == [
        ("stem", 4 * 27 + 4),
        ("block", 4 * 4 * 9 + 8),
        ("", 0),
        ("head", 25),
    ]
    assert [row.operators for row in rows if row.path] == [1, 4, 1]
    assert [row.macs for row in rows] == [2 * 4 * 24 * 27, 2 * 4 * 24 * 36, 0, 2 * 20]
    assert rows[1].weight_bytes == 4 * (4 * 4 * 9 + 16) + 8


def test_a_deeper_cut_shows_the_modules_inside(net_report: Report) -> None:
    paths = ["stem", "block.conv", "block.norm", "block", "", "head"]
    assert [row.path for row in net_report.by_module(2)] == paths
    assert net_report.by_module(9) == net_report.by_module(2)


@pytest.mark.parametrize("depth", [1, 2])
def test_modules_add_up_to_the_totals(net_report: Report, tied_report: Report, depth: int) -> None:
    for found in (net_report, tied_report):
        rows, totals = found.by_module(depth), found.totals
        assert sum(row.operators for row in rows) == len(found.operators)
        assert sum(row.parameters for row in rows) == totals.parameters
        assert sum(row.macs for row in rows) == totals.macs
        assert sum(row.weight_bytes for row in rows) == totals.weight_bytes
        assert sum(row.activation_bytes for row in rows) == totals.activation_bytes


def test_a_weight_that_modules_share_counts_in_the_first(tied_report: Report) -> None:
    left, right, *_, head = tied_report.by_module()
    assert (left.parameters, left.shared_weight_bytes) == (9, 0)
    assert (right.parameters, right.shared_weight_bytes) == (3 + 6, 4 * 9)
    assert (head.operators, head.parameters, head.shared_weight_bytes) == (2, 12, 0)


def test_text_by_module_says_which_weights_are_shared(
    tied_report: Report, net_report: Report
) -> None:
    lines = [" ".join(line.split()) for line in tied_report.text(depth=1).splitlines()]
    assert "right 2 9 180 47.6% 68 B 480 B 36 B" in lines
    assert "shared weights: read here too, counted in a module above" in lines
    assert "shared" not in net_report.text(depth=1)


def test_text_by_module_names_what_a_module_does_itself(net_report: Report) -> None:
    def named(depth: int) -> list[str]:
        table = net_report.text(depth).split("\n\n")[1].splitlines()[2:]
        return [line.split("  ")[0] for line in table]

    assert named(1) == ["stem", "block", "Net (own forward)", "head"]
    own = ["block (own forward)", "Net (own forward)", "head"]
    assert named(2) == ["stem", "block.conv", "block.norm", *own]


def test_text_by_module_differs_from_the_text_in_the_first_table_only(net_report: Report) -> None:
    by_operator, by_module = net_report.text(), net_report.text(depth=1)
    start = by_operator.index("total\n")
    assert by_module.endswith(by_operator[start:])
    assert "parameters never read" in by_module


def test_modules_with_opaque_leaves_say_at_least() -> None:
    found = report(opaque_program())
    assert [row.path for row in found.by_module() if row.at_least] == ["block"]
    line = next(line for line in found.text(depth=1).splitlines() if line.startswith("block "))
    assert line.count("at least") == 2


def test_a_depth_below_one_is_refused(net_report: Report) -> None:
    for refused in (net_report.by_module, net_report.text, net_report.to_dict):
        with pytest.raises(ValueError, match="depth of module paths is at least 1, not 0"):
            refused(0)


def test_json_has_the_modules_if_asked(tied_report: Report) -> None:
    document = json.loads(tied_report.json(depth=1))
    assert document.pop("module_depth") == 1
    modules = document.pop("modules")
    assert document == tied_report.to_dict()
    assert modules[1] == {
        "path": "right",
        "operators": 2,
        "parameters": 9,
        "macs": 180,
        "weight_bytes": 68,
        "activation_bytes": 480,
        "shared_weight_bytes": 36,
        "at_least": False,
    }


def tables(text: str) -> list[list[str]]:
    """The cells of every table row, whether of text or of Markdown, and all other words."""
    plain = text.replace("&nbsp;", "").replace("\\", "").replace("|", " ")
    rows = [re.sub(r"^(#+|-) ", "", line).split() for line in plain.splitlines()]
    return [row for row in rows if row and not set("".join(row)) <= set("-:")]


@pytest.mark.parametrize("depth", [None, 1, 2])
def test_markdown_says_what_the_text_says(net_report: Report, depth: int | None) -> None:
    markdown = tables(net_report.markdown(depth))
    assert all(row in markdown for row in tables(net_report.text(depth)))
    transformed = folded(net_report)
    markdown = tables(transformed.markdown(depth))
    assert all(row in markdown for row in tables(transformed.text(depth)))


def test_markdown_has_headings_and_aligned_tables(net_report: Report) -> None:
    markdown = net_report.markdown(depth=1)
    headings = [line for line in markdown.splitlines() if line.startswith("#")]
    assert headings == [
        "## Net, image 2x3x9x13 float32",
        "### Modules",
        "### Totals",
        "### MACs by kind",
        "### Largest activations",
    ]
    rule = markdown.splitlines()[5]
    assert re.fullmatch(r"\|:-+\|(-+:\|){6}", rule)


def test_markdown_escapes_what_would_be_markup(net_report: Report) -> None:
    row = replace(net_report.operators[0], path="a|b", name="<lambda>_*")
    odd = replace(net_report, operators=(row,), notes=("first\nsecond", "of __call__"))
    lines = odd.markdown().splitlines()
    assert any(line.startswith("| a\\|b (\\<lambda>\\_\\*) | conv2d") for line in lines)
    assert lines[-2:] == ["- note: first second", "- note: of \\_\\_call\\_\\_"]


def test_markdown_folds_long_tables_away(net_report: Report) -> None:
    many = replace(net_report, operators=net_report.operators[:1] * 40)
    fold = "<details><summary>40 rows</summary>\n\n| operator"
    assert fold in many.markdown()
    assert many.markdown().count("\n\n</details>\n") == 1
    fewer = replace(net_report, operators=net_report.operators[:1] * 39)
    assert "<details>" not in fewer.markdown()


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
    assert "fold_conv_bn: 1 site rewritten, 1 declined\n  verified: no\n" in unverified.text()
    assert unverified.to_dict()["passes"][0]["verification"] is None


def test_a_pass_that_may_change_values_has_no_bound(net_report: Report) -> None:
    assert RECORD.verification is not None
    free = replace(RECORD.verification, bound=math.inf, shipped_bound=math.inf)
    found = TransformReport(net_report, net_report, (replace(RECORD, verification=free),))
    assert "largest error 2.0e-15, no bound" in found.text()
    assert found.to_dict()["passes"][0]["verification"]["bound"] is None


def test_a_transformation_by_module_says_what_changed(net_report: Report) -> None:
    changes = folded(net_report).by_module(2)
    assert [change.path for change in changes if change.changed] == ["block.norm"]
    (norm,) = [change for change in changes if change.path == "block.norm"]
    assert norm.before in net_report.by_module(2)
    assert norm.after is None
    assert folded(net_report).to_dict(depth=1)["changed_modules"] == ["block"]
    assert folded(net_report).to_dict(depth=1)["after"]["modules"][1]["parameters"] == 144
    assert "changed_modules" not in folded(net_report).to_dict()


def test_text_of_a_transformation_by_module_has_both_figures(net_report: Report) -> None:
    lines = [" ".join(line.split()) for line in folded(net_report).text(depth=1).splitlines()]
    block = "block 4 -> 3 152 -> 144 6,912 648 -> 576 3,072 -> 2,304"
    assert block in lines
    assert "head 1 25 40 100 40" in lines
    assert "changed: 1 of 4 modules" in lines
    deeper = folded(net_report).text(depth=2).splitlines()
    assert any(" ".join(line.split()).startswith("block.norm 1 -> 0 8 -> 0") for line in deeper)


def test_a_module_that_a_pass_brings_in_comes_last(net_report: Report) -> None:
    done = TransformReport(folded(net_report).after, net_report, ())
    assert [change.path for change in done.by_module(2)][-1] == "block.norm"
    assert "0 -> 8" in done.text(depth=2)


def test_markdown_of_a_transformation_has_a_heading_for_each_pass(net_report: Report) -> None:
    lines = folded(net_report).markdown(depth=1).splitlines()
    assert [line for line in lines if line.startswith("#")] == [
        "## Net, image 2x3x9x13 float32",
        "### Change",
        "### Change by module",
        "### fold_conv_bn{dtype=float32,limit=inf}: 2 sites rewritten, 1 declined",
    ]
    assert "- verified in float64: largest error 2.0e-15, bound 1.0e-12" in lines
    assert any(line.startswith("| &nbsp;&nbsp;batch_norm ") for line in lines)
    assert lines[-1] == "BatchNorms left in the graph: 0"
