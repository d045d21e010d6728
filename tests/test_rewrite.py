"""The driver: collects what a pass finds, runs its rewrite to the end, holds it to its promise."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from seeded import ConvBn, image, seeded, text
from torch import nn

from fxopt.capture import capture
from fxopt.captured import to_module
from fxopt.edit import Edit
from fxopt.errors import PassError, VerificationError
from fxopt.passes import FoldConvBn
from fxopt.program import Program
from fxopt.results import Declined
from fxopt.rewrite import Pass, Preserves, Site, declined, options_of, run_pass, site


@dataclass(frozen=True)
class Swap:
    """Put ``change(copy of the module)`` at every call of a module of ``kind``, once."""

    kind: type[nn.Module]
    change: Callable[[Any], Any]
    preserves: Preserves = Preserves.VALUES
    name: ClassVar[str] = "swap"

    def sites(self, program: Program) -> Iterator[Site | Declined]:
        for node in program.nodes:
            module = program.module(node)
            if type(module) is self.kind and not hasattr(module, "swapped"):
                yield site(node)

    def rewrite(self, site: Site, edit: Edit) -> str:
        old = edit.module(site.node)

        def make() -> nn.Module:
            result = copy.deepcopy(old)
            made: nn.Module = self.change(result) or result
            made.swapped = True  # type: ignore[assignment]
            return made

        path = str(edit.node(site.node).target)
        edit.replace_module(site.node, make, key=path)
        return f"was at {path}"


@dataclass(frozen=True)
class DropNorm:
    """Wrong: takes every BatchNorm away and changes nothing else."""

    name: ClassVar[str] = "drop_norm"
    preserves: ClassVar[Preserves] = Preserves.VALUES

    def sites(self, program: Program) -> Iterator[Site | Declined]:
        for node in program.nodes:
            if isinstance(program.module(node), nn.BatchNorm2d):
                yield site(node)

    def rewrite(self, site: Site, edit: Edit) -> None:
        norm = edit.node(site.node)
        edit.replace_uses(norm, norm.all_input_nodes[0])


@dataclass(frozen=True)
class JoinRelus:
    """Two ReLUs in a row are one; reports of three in a row show sites that share a node."""

    name: ClassVar[str] = "join_relus"
    preserves: ClassVar[Preserves] = Preserves.VALUES

    def sites(self, program: Program) -> Iterator[Site | Declined]:
        for node in program.nodes:
            if isinstance(program.module(node), nn.ReLU):
                source = node.all_input_nodes[0]
                if isinstance(program.module(source), nn.ReLU):
                    yield site(node, source)
                else:
                    yield declined(program, node, "it follows no other")

    def rewrite(self, site: Site, edit: Edit) -> None:
        second = edit.node(site.node)
        edit.replace_uses(second, second.all_input_nodes[0])


class Fresh(ConvBn):
    """Its norm is as torch makes it: the identity to 5e-6."""

    def reset(self) -> Fresh:
        self.norm = nn.BatchNorm2d(4).eval()
        return self


def program_of(model: nn.Module) -> Program:
    return capture(seeded(model), image())


def test_passes_are_recognised_by_what_they_have() -> None:
    assert isinstance(DropNorm(), Pass)
    assert isinstance(FoldConvBn(), Pass)
    assert not isinstance("fold_conv_bn", Pass)
    assert not isinstance(nn.ReLU(), Pass)


def test_options_are_the_fields() -> None:
    swap = Swap(nn.ReLU, len)
    assert options_of(swap) == {"kind": nn.ReLU, "change": len, "preserves": Preserves.VALUES}
    assert options_of(FoldConvBn()) == {"scale_shift": False}


def test_sites_that_share_a_node_are_left_for_the_next_round() -> None:
    program = program_of(nn.Sequential(*(nn.ReLU() for _ in range(4))))
    result = run_pass(JoinRelus(), program)
    assert [n.name for n in result.after.nodes] == ["input_1", "_0", "output"]
    # round 1: (1, 0) and (3, 2); round 2: what they left
    assert [(s.node, s.where) for s in result.rewritten] == [
        ("_1", "'1'"), ("_3", "'3'"), ("_2", "'2'"),
    ]  # fmt: skip
    assert [(d.node, d.where, d.reason) for d in result.declined] == [
        ("_0", "'0'", "it follows no other")
    ]
    assert result.verification is not None
    assert result.verification.max_error == 0


def test_later_of_two_sites_that_share_a_node_is_declined_where_it_stays() -> None:
    @dataclass(frozen=True)
    class Pairs:
        """Both ReLUs claim the convolution; the first to be rewritten ends the pass."""

        name: ClassVar[str] = "pairs"
        preserves: ClassVar[Preserves] = Preserves.INTERFACE

        def sites(self, program: Program) -> Iterator[Site | Declined]:
            relus = [n for n in program.nodes if isinstance(program.module(n), nn.ReLU)]
            if len(relus) == 2:
                yield from (site(relu, relu.all_input_nodes[0]) for relu in relus)

        def rewrite(self, site: Site, edit: Edit) -> None:
            relu = edit.node(site.node)
            edit.replace_uses(relu, relu.all_input_nodes[0])

    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.a, self.b = nn.ReLU(), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return self.a(y) - self.b(y) * 2

    result = run_pass(Pairs(), program_of(Fork()))
    assert [s.node for s in result.rewritten] == ["a"]
    assert "b" in [n.name for n in result.after.nodes]


def test_norms_in_a_row_fold_one_round_after_the_other() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU()
    )
    result = run_pass(FoldConvBn(), program_of(model))
    assert text(result.after) == ("input input_1\n_0 = 0(input_1)\n_4 = 4(_0)\nreturn _4")
    assert [s.where for s in result.rewritten] == ["'1'", "'2'", "'3'"]
    assert result.declined == ()
    assert result.verification is not None
    assert result.verification.max_error <= 1e-13


def test_pass_that_never_ends_is_stopped() -> None:
    @dataclass(frozen=True)
    class Restless(DropNorm):
        name: ClassVar[str] = "restless"

        def rewrite(self, site: Site, edit: Edit) -> None:
            edit.replace_module(site.node, lambda: nn.BatchNorm2d(4), key=1)

    with pytest.raises(PassError, match=r"'restless' still finds sites after 100 rounds"):
        run_pass(Restless(), program_of(ConvBn()), verify=False)


def test_nothing_to_do_gives_the_same_program_and_error_zero() -> None:
    program = program_of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    result = run_pass(FoldConvBn(), program)
    assert text(result.after) == text(program)
    assert result.after is result.before is program
    assert result.rewritten == result.declined == ()
    assert result.verification is not None
    assert result.verification.max_error == 0.0
    assert [error.error for error in result.verification.outputs] == [0.0]
    assert result.verification.method == "nothing was rewritten: the program is the same"


def test_verification_switched_off_is_recorded() -> None:
    record = run_pass(DropNorm(), program_of(ConvBn()), verify=False).record
    assert record.verification is None
    assert record.as_dict()["verification"] is None
    assert record.as_dict()["rewritten"] == 1


def test_note_of_a_rewrite_and_evidence_of_a_pass_are_kept() -> None:
    @dataclass(frozen=True)
    class Telling(Swap):
        def evidence(self, before: Program, after: Program) -> Mapping[str, Any]:
            return {"nodes": (len(before.nodes), len(after.nodes))}

    result = run_pass(Telling(nn.ReLU, lambda relu: None), program_of(ConvBn()))
    assert [s.note for s in result.rewritten] == ["was at act"]
    assert result.evidence == {"nodes": (5, 5)}


def test_global_random_state_and_users_model_stay() -> None:
    model = seeded(ConvBn())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run_pass(FoldConvBn(), capture(model, image()))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert isinstance(model.norm, nn.BatchNorm2d)


# ---- wrong passes ------------------------------------------------------------------------------


def wrong_scale(conv: nn.Conv2d) -> None:
    with torch.no_grad():
        conv.weight.mul_(1 + 1e-6)


def wrong_border(conv: nn.Conv2d) -> nn.Conv2d:
    """Right inside, wrong where the padding is read."""
    other = nn.Conv2d(
        conv.in_channels, conv.out_channels, 3, padding=1, groups=conv.groups,
        padding_mode="replicate",
    )  # fmt: skip
    other.load_state_dict(conv.state_dict())
    return other.to(conv.weight.dtype)


def wrong_groups(conv: nn.Conv2d) -> None:
    """Right with one group, wrong with more."""
    with torch.no_grad():
        grouped = conv.weight.unflatten(0, (conv.groups, -1))
        conv.weight.copy_(grouped.flip(0).flatten(0, 1))


def wrong_bias_of_one_channel(conv: nn.Conv2d) -> None:
    assert conv.bias is not None
    with torch.no_grad():
        conv.bias[-1] += 1e-9


def not_a_number(conv: nn.Conv2d) -> None:
    with torch.no_grad():
        conv.weight[0, 0, 0, 0] = math.nan


@pytest.mark.parametrize(
    "change", [wrong_scale, wrong_border, wrong_bias_of_one_channel, not_a_number]
)
def test_wrong_pass_is_caught_and_the_convolution_named(change: Callable[[Any], Any]) -> None:
    class Two(nn.Module):
        """The first convolution is another class: the pass leaves it alone."""

        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(13, 13)
            self.body = nn.Conv2d(3, 4, 3, padding=1)
            self.head = nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(self.stem(x)))

    with pytest.raises(VerificationError, match=r"changed the function: .*'body' \('body'\)"):
        run_pass(Swap(nn.Conv2d, change), program_of(Two()))


def test_wrong_last_layer_is_named_too() -> None:
    with pytest.raises(VerificationError, match=r"changed the function: .*'_1' \('1'\)"):
        run_pass(
            Swap(nn.Conv2d, wrong_scale), program_of(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3)))
        )


def test_pass_that_is_wrong_for_groups_only() -> None:
    plain, grouped = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3, groups=3)
    run_pass(Swap(nn.Conv2d, wrong_groups), program_of(nn.Sequential(plain)))
    with pytest.raises(VerificationError, match="departs is '_0'"):
        run_pass(Swap(nn.Conv2d, wrong_groups), program_of(nn.Sequential(grouped)))


def test_deleted_norm_is_caught_and_named() -> None:
    with pytest.raises(VerificationError, match=r"changed the function: .* 'norm' \('norm'\)"):
        run_pass(DropNorm(), program_of(ConvBn()))


def test_deleted_fresh_norm_is_caught() -> None:
    model = Fresh()
    seeded(model)
    program = capture(model.reset(), image())
    with pytest.raises(VerificationError, match=r"error [45]\.\de-06 in float64.*'norm'"):
        run_pass(DropNorm(), program)


def test_deleted_fresh_norm_is_caught_behind_an_argmax() -> None:
    class Labels(Fresh):
        """Whole numbers alone come out, and they hide what is off by 5e-6."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).argmax(1)

    model = Labels()
    seeded(model)
    program = capture(model.reset(), image())
    with pytest.raises(VerificationError, match=r"'norm' \('norm'\) departs by [45]\.\de-06"):
        run_pass(DropNorm(), program)
    verification = run_pass(FoldConvBn(), program).verification
    assert verification is not None
    assert verification.method.startswith("site by site")


def test_wrong_site_among_right_ones_is_named_over_rounds() -> None:
    class WrongFold(FoldConvBn):
        def rewrite(self, site: Site, edit: Edit) -> None:
            super().rewrite(site, edit)
            if site.node == "_3":
                edit.replace_module("_2", lambda: edit.module("_0"), key="wrong")

    model = nn.Sequential(
        nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3),
        nn.BatchNorm2d(3), nn.ReLU(),
    )  # fmt: skip
    # '_3' is no value of the result any more: after both rounds its convolution holds that of '_4'
    with pytest.raises(VerificationError, match=r"departs is '_[34]' \('[34]'\)"):
        run_pass(WrongFold(), program_of(model))


def test_tensor_changed_in_place_is_refused() -> None:
    class InPlace(FoldConvBn):
        def rewrite(self, site: Site, edit: Edit) -> None:
            module: Any = edit.module("conv")
            with torch.no_grad():
                module.weight.mul_(2)

    with pytest.raises(PassError, match=r"changes 'conv\.weight' in place; modules are values"):
        run_pass(InPlace(), program_of(ConvBn()))


def test_rewrite_beyond_its_site_is_refused() -> None:
    class Beyond(DropNorm):
        def rewrite(self, site: Site, edit: Edit) -> None:
            super().rewrite(site, edit)
            edit.replace_uses("act", "conv")

    with pytest.raises(PassError, match=r"rewrites 'act' \('act'\), which is in none of its sites"):
        run_pass(Beyond(), program_of(ConvBn()))


def test_rewiring_by_hand_beyond_its_site_is_refused() -> None:
    class Beyond(DropNorm):
        def rewrite(self, site: Site, edit: Edit) -> None:
            edit.node("act").args = (edit.node("conv"),)

    with pytest.raises(PassError, match=r"rewrites 'act' \('act'\), which is in none of its sites"):
        run_pass(Beyond(), program_of(ConvBn()))


def test_right_rewrite_by_hand_is_proved() -> None:
    class Same(JoinRelus):
        """relu(relu(x)) + its own reader: the second is rewired to the first's operand."""

        def rewrite(self, site: Site, edit: Edit) -> None:
            first = edit.node(site.node).all_input_nodes[0]
            edit.node(site.node).args = first.args

    result = run_pass(Same(), program_of(nn.Sequential(nn.ReLU(), nn.ReLU())))
    assert [n.name for n in result.after.nodes] == ["input_1", "_1", "output"]


def test_values_may_change_within_a_site(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halve one convolution, double the next: the ReLU between them is not what it was."""

    @dataclass(frozen=True)
    class Balance:
        name: ClassVar[str] = "balance"
        preserves: ClassVar[Preserves] = Preserves.VALUES

        def sites(self, program: Program) -> Iterator[Site | Declined]:
            convs = [n for n in program.nodes if type(program.module(n)) is nn.Conv2d]
            if not hasattr(program.module(convs[0]), "swapped"):
                yield site(convs[0], convs[1], *convs[0].users, facts=(convs[1].name, 0.25))

        def rewrite(self, site: Site, edit: Edit) -> None:
            second, factor = site.facts
            for name, scale in ((site.node, factor), (second, 1 / factor)):
                edit.replace_module(
                    name, lambda n=name, s=scale: scaled(edit.module(n), s), key=name
                )

    def scaled(conv: nn.Module, factor: float) -> nn.Module:
        result: Any = copy.deepcopy(conv)
        result.swapped = True
        with torch.no_grad():
            result.weight.mul_(factor)
            if factor < 1:
                result.bias.mul_(factor)
        return result  # type: ignore[no-any-return]

    program = program_of(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU())
    )
    whole = run_pass(Balance(), program).verification
    monkeypatch.setattr("fxopt.proof.verify.too_large_for_double", lambda _: True)
    by_site = run_pass(Balance(), program).verification
    assert whole is not None
    assert by_site is not None
    assert whole.max_error <= 1e-13
    assert by_site.max_error <= 1e-13
    assert [error.output for error in by_site.outputs] == ["_2"]


def test_new_tensors_must_be_in_the_dtype_of_the_old() -> None:
    swap = Swap(nn.Conv2d, lambda conv: nn.Conv2d(3, 4, 3))
    with pytest.raises(
        PassError, match=r"cannot be repeated in float64.*in the dtype of those that"
    ):
        run_pass(swap, program_of(ConvBn()))


# ---- passes that keep the interface only -------------------------------------------------------


def interface(change: Callable[[Any], Any], kind: type[nn.Module] = nn.Conv2d) -> Swap:
    return Swap(kind, change, Preserves.INTERFACE)


def test_interface_pass_may_change_values_and_says_by_how_much() -> None:
    def double(conv: nn.Conv2d) -> None:
        with torch.no_grad():
            conv.weight.mul_(2)
            conv.bias.mul_(2)  # type: ignore[union-attr]

    result = run_pass(interface(double), program_of(nn.Sequential(nn.Conv2d(3, 4, 3))))
    assert result.record.preserves == "interface"
    assert result.verification is not None
    assert result.verification.max_error == pytest.approx(1)
    assert result.verification.method == "same interface and finite outputs; the values may differ"


def test_interface_pass_may_change_whole_numbers_and_what_was_zero() -> None:
    class Labels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.zero = nn.Conv2d(3, 4, 1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.conv(x).argmax(1), self.zero(x)

    def negate(conv: nn.Conv2d) -> None:
        with torch.no_grad():
            conv.weight.neg_().sub_(1)

    model: Any = seeded(Labels())
    nn.init.zeros_(model.zero.weight)
    nn.init.zeros_(model.zero.bias)
    verification = run_pass(interface(negate), capture(model, image())).verification
    assert verification is not None
    assert [error.output for error in verification.outputs] == ["output_0", "output_1"]


def test_interface_pass_must_keep_outputs_finite() -> None:
    with pytest.raises(VerificationError, match=r"makes output 'output' infinite or not a number"):
        run_pass(interface(not_a_number), program_of(nn.Sequential(nn.Conv2d(3, 4, 3))))


def test_interface_pass_must_keep_output_shapes() -> None:
    with pytest.raises(VerificationError, match=r"changed the interface: outputs .*7, 11.*9, 13"):
        run_pass(
            interface(lambda conv: nn.Conv2d(3, 4, 1)),
            program_of(nn.Sequential(nn.Conv2d(3, 4, 3))),
        )


def test_result_of_a_pass_runs_as_the_original_does() -> None:
    model = seeded(ConvBn())
    result = run_pass(FoldConvBn(), capture(model, image()))
    x = image(3, 3, 11, 8, seed=9)
    torch.testing.assert_close(to_module(result.after)(x), model(x), rtol=1e-5, atol=1e-6)
