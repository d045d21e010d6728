"""Edit: a pass's changes to a copy, paths, sharing, and what is said of untied tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from seeded import ConvBn, image, seeded, text
from torch import nn

from fxopt.capture import capture
from fxopt.captured import to_module
from fxopt.edit import Edit, Untied
from fxopt.errors import InvalidProgramError
from fxopt.program import Program


def convolution(scale: float = 1.0, channels: int = 3) -> nn.Conv2d:
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    with torch.no_grad():
        conv.weight.fill_(scale)
    return conv


class Shared(nn.Module):
    """One convolution called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = convolution()
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.act(self.conv(x)))


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = convolution()
        self.b = convolution()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


class Owner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.ones(4, 3, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.kernel)


def program_of(model: nn.Module) -> Program:
    return capture(seeded(model), image())


def program_module(program: Program, path: str) -> nn.Module:
    return program.graph_module.get_submodule(path)


def new_scale(program: Program, node: str) -> float:
    """What :func:`convolution` was filled with in the module that ``node`` calls."""
    module: Any = program.module(program.node(node))
    return float(module.weight[0, 0, 0, 0].detach())


def keys(program: Program) -> list[str]:
    return list(to_module(program).state_dict())


def test_program_stays_as_it_is() -> None:
    program = program_of(Shared())
    before, module = text(program), program.graph_module.get_submodule("conv")
    edit = Edit(program)
    edit.replace_module("conv", lambda: convolution(2), key=1)
    edit.replace_uses("act", "conv")
    edit.commit()
    assert text(program) == before
    assert program.graph_module.get_submodule("conv") is module
    program.check()


def test_commit_without_a_change_gives_the_same_text_types_and_tensors() -> None:
    program = program_of(ConvBn())
    after = Edit(program).commit()
    assert text(after) == text(program)
    assert after.types == program.types
    theirs = dict(program.graph_module.named_parameters())
    assert all(p is theirs[name] for name, p in after.graph_module.named_parameters())


def test_new_module_stands_at_one_call_and_the_other_call_keeps_the_old_one() -> None:
    program = program_of(Shared())
    edit = Edit(program)
    edit.replace_module("conv", lambda: convolution(2), key=1)
    after = edit.commit()
    assert [str(n.target) for n in after.nodes if n.op == "call_module"] == [
        "conv_1",
        "act",
        "conv",
    ]
    assert keys(after) == ["conv.weight", "conv.bias", "conv_1.weight", "conv_1.bias"]
    assert edit.untied() == (Untied("conv.weight", 3 * 3 * 9 * 4), Untied("conv.bias", 12))


def test_calls_under_one_key_share_the_new_module_at_the_old_path() -> None:
    program = program_of(Shared())
    edit = Edit(program)
    made = []
    for name in ("conv", "conv_1"):
        edit.replace_module(name, lambda: made.append(convolution(2)) or made[-1], key="same")
    after = edit.commit()
    assert len(made) == 1
    assert keys(after) == ["conv.weight", "conv.bias"]
    assert after.module(after.node("conv")) is after.module(after.node("conv_1")) is made[0]
    assert edit.untied() == ()


def test_two_keys_untie_and_the_first_takes_the_old_path() -> None:
    program = program_of(Shared())
    edit = Edit(program)
    edit.replace_module("conv", lambda: convolution(2), key=1)
    edit.replace_module("conv_1", lambda: convolution(3), key=2)
    after = edit.commit()
    assert new_scale(after, "conv") == 2
    assert new_scale(after, "conv_1") == 3
    assert str(after.node("conv").target) == "conv"
    assert edit.untied() == (Untied("conv.weight", 3 * 3 * 9 * 4), Untied("conv.bias", 12))


def test_a_call_replaced_twice_keeps_the_last_module_and_nothing_of_the_first() -> None:
    program = program_of(Chain())
    edit = Edit(program)
    edit.replace_module("a", lambda: convolution(2), key=1)
    edit.replace_module("a", lambda: convolution(3), key=2)
    after = edit.commit()
    assert keys(after) == ["a.weight", "a.bias", "b.weight", "b.bias"]
    assert new_scale(after, "a") == 3


def test_replace_uses_removes_the_old_node_and_its_module() -> None:
    program = program_of(ConvBn())
    edit = Edit(program)
    edit.replace_uses("norm", "conv")
    after = edit.commit()
    assert text(after) == "input x\nconv = conv(x)\nact = act(conv)\nreturn act"
    assert keys(after) == ["conv.weight", "conv.bias"]
    assert edit.stands_for == {"norm": "conv"}


def test_replaced_twice_the_first_stands_for_the_last() -> None:
    program = program_of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Sigmoid()))
    edit = Edit(program)
    edit.replace_uses("_2", "_1")
    edit.replace_uses("_1", "_0")
    assert edit.stands_for == {"_2": "_0", "_1": "_0"}
    assert [n.name for n in edit.commit().nodes] == ["input_1", "_0", "output"]


def test_nodes_put_after_another_may_read_it_through_each_other() -> None:
    """The new value is computed from the old one in two steps: neither step reads the new value."""
    program = program_of(Chain())
    edit = Edit(program)
    doubled = edit.call_function(torch.mul, (edit.node("a"), 2), after="a")
    shifted = edit.call_function(torch.add, (doubled, 1), after=doubled)
    edit.replace_uses("a", shifted)
    after = edit.commit()
    assert text(after) == (
        "input x\na = a(x)\nmul = mul(a, 2)\nadd = add(mul, 1)\nb = b(add)\nreturn b"
    )
    assert after.types["add"] == program.types["a"]
    assert after.where(after.node("add")) == "'a'"


def test_new_module_stands_beside_the_layer_that_it_follows() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Chain()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x)

    program = program_of(Nested())
    edit = Edit(program)
    for anchor in ("body_a", "body_b"):
        added = edit.call_module(nn.ReLU6(), (edit.node(anchor),), after=anchor, name="act")
        edit.replace_uses(anchor, added)
    after = edit.commit()
    targets = [str(n.target) for n in after.nodes if n.op == "call_module"]
    assert targets == ["body.a", "body.act", "body.b", "body.act_1"]


def test_new_module_finds_a_place_where_the_users_module_is_gone() -> None:
    class Act(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    program = program_of(nn.Sequential(nn.Conv2d(3, 4, 3), Act(4)))
    edit = Edit(program)
    edit.replace_uses("batch_norm", "_0")
    bare = edit.commit()
    assert bare.where(bare.node("mul")) == "'1'"
    edit = Edit(bare)
    edit.replace_uses(
        "mul", edit.call_module(nn.ReLU(), (edit.node("mul"),), after="mul", name="r")
    )
    assert [str(n.target) for n in edit.commit().nodes if n.op == "call_module"] == ["0", "r"]


def test_dead_nodes_go_and_a_norm_that_nobody_reads_stays() -> None:
    class Watch(nn.Module):
        """The norm's statistics are wanted, its result is not."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = convolution()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            self.norm(y)
            return y

    program = program_of(Watch())
    edit = Edit(program)
    edit.call_function(torch.exp, (edit.node("conv"),), after="conv")
    assert [n.name for n in edit.commit().nodes] == ["x", "conv", "norm", "output"]


def test_module_read_elsewhere_keeps_its_path_and_the_new_one_takes_another() -> None:
    class Penalty(Chain):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return super().forward(x), (self.a.weight**2).sum()

    program = program_of(Penalty())
    edit = Edit(program)
    edit.replace_module("a", lambda: convolution(2), key=1)
    after = edit.commit()
    assert str(after.node("a").target) == "a_1"
    assert str(after.node("a_weight").target) == "a.weight"
    assert Untied("a.weight", 3 * 3 * 9 * 4) in edit.untied()


def test_module_with_two_names_is_replaced_under_both() -> None:
    class Alias(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.again = self.a

    program = program_of(Alias())
    edit = Edit(program)
    edit.replace_module("a", lambda: convolution(2), key=1)
    after = edit.commit()
    assert after.graph_module.get_submodule("again") is after.graph_module.get_submodule("a")


def test_module_called_by_two_names_is_replaced_at_one_call_only() -> None:
    class Alias(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.b = self.a

    program = program_of(Alias())
    graph_module = Edit(program).commit().graph_module
    graph_module.graph.find_nodes(op="call_module", target="a")[1].target = "b"
    program = replace(program, graph_module=graph_module).check()
    edit = Edit(program)
    edit.replace_module("a", lambda: convolution(2), key=1)
    after = edit.commit()
    assert new_scale(after, "a") == 2
    assert new_scale(after, "a_1") == new_scale(program, "a_1")


def test_borrowed_layer_goes_its_owner_stays_and_the_copy_is_said() -> None:
    program = program_of(Owner())
    edit = Edit(program)
    edit.replace_module("conv2d", lambda: nn.Conv2d(3, 4, 3), key=1)
    after = edit.commit()
    assert keys(after) == ["kernel", "conv2d.weight", "conv2d.bias"]
    assert edit.untied() == (Untied("kernel", 4 * 3 * 9 * 4),)


def test_owner_of_a_borrowed_weight_keeps_its_path() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = convolution()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) + F.conv2d(x, self.conv.weight, None, 1, 1)

    model = Both()
    program = program_of(model)
    edit = Edit(program)
    edit.replace_module("conv", lambda: convolution(0.0), key=1)
    after = edit.commit()
    x = image()
    replaced = program_module(after, "conv_1")(x)
    expected = replaced + F.conv2d(x, model.conv.weight, None, 1, 1)
    assert torch.equal(to_module(after)(x), expected)


def test_tied_parameters_of_two_modules_are_said_to_be_untied() -> None:
    class Tied(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.b.weight = self.a.weight

    program = program_of(Tied())
    edit = Edit(program)
    edit.replace_module("b", lambda: convolution(2), key=1)
    edit.commit()
    assert edit.untied() == (Untied("b.weight", 3 * 3 * 9 * 4),)


def test_members_below_a_removed_module_stay() -> None:
    class Act(nn.BatchNorm2d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            self.act = nn.PReLU()
            self.unused = nn.Linear(2, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(super().forward(x))

    program = program_of(nn.Sequential(nn.Conv2d(3, 4, 3), Act(4)))
    edit = Edit(program)
    edit.replace_uses(next(n for n in program.nodes if str(n.target) == "1"), "_0")
    after = edit.commit()
    assert keys(after) == [
        "0.weight", "0.bias", "1.act.weight", "1.unused.weight", "1.unused.bias",
    ]  # fmt: skip


def test_new_modules_own_members_win_over_the_old_ones() -> None:
    class Act(nn.BatchNorm2d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            self.act = nn.PReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(super().forward(x))

    class Composite(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.PReLU(init=7.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(x)

    program = program_of(nn.Sequential(nn.Conv2d(3, 4, 3), Act(4)))
    norm = next(n for n in program.nodes if str(n.target) == "1")
    edit = Edit(program)
    edit.replace_module(norm, Composite, key=1)
    edit.replace_uses("_1_act", norm)
    after = edit.commit()
    composite: Any = after.module(after.node(norm.name))
    assert composite.act.weight.item() == 7.0


def test_modules_that_a_new_one_holds_stay_in_it() -> None:
    program = program_of(Chain())
    edit = Edit(program)
    stage = nn.Sequential(edit.module("a"), edit.module("b"))
    edit.replace_uses("b", edit.call_module(stage, edit.node("a").args, after="b", name="stage"))
    after = edit.commit()
    x = image()
    assert len(stage) == 2
    assert torch.equal(to_module(after)(x), to_module(program)(x))


def test_new_module_follows_the_mode_as_the_old_one_did() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.norm(x))

        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self.norm.eval()
            return self

    program = program_of(Frozen())
    assert program.modes.fixed == {"norm": (False, False)}
    edit = Edit(program)
    edit.replace_module("norm", lambda: nn.BatchNorm2d(3, eps=0.1), key=1)
    after = edit.commit()
    module = to_module(after).train()
    assert [m.training for m in module.modules() if isinstance(m, nn.BatchNorm2d)] == [False, False]


def test_types_are_derived_anew_where_something_changed() -> None:
    program = program_of(Chain())
    edit = Edit(program)
    edit.replace_module("a", lambda: nn.Conv2d(3, 3, 3, stride=2), key=1)
    after = edit.commit()
    assert after.types["a"].shape == (2, 3, 4, 6)
    assert after.types["b"].shape == (2, 3, 4, 6)
    assert program.types["b"].shape == (2, 3, 9, 13)


def test_types_follow_nodes_that_were_rewired_by_hand() -> None:
    class Add(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            narrow = x.sum(1, keepdim=True)
            return x.exp(), narrow, narrow + 1

    program = program_of(Add())
    edit = Edit(program)
    edit.node("add").args = (edit.node("exp"), 1)
    after = edit.commit()
    assert after.types["add"].shape == (2, 3, 9, 13)
    assert edit.changed == {"add"}


def test_reader_of_a_replaced_value_does_not_count_as_changed() -> None:
    edit = Edit(program_of(ConvBn()))
    edit.replace_module("conv", lambda: nn.Conv2d(3, 4, 3), key=1)
    edit.replace_uses("norm", "conv")
    edit.commit()
    assert edit.changed == {"conv"}


def test_module_that_does_not_take_its_input_is_a_bug_in_the_pass() -> None:
    edit = Edit(program_of(Chain()))
    edit.replace_module("b", lambda: convolution(1, channels=5), key=1)
    with pytest.raises(
        InvalidProgramError, match=r"rewritten 'b' \('b'\) does not take .* in the pass"
    ):
        edit.commit()


def test_fresh_path_avoids_members_that_are_none() -> None:
    class Holed(Shared):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("conv_1", None)

    edit = Edit(program_of(Holed()))
    edit.replace_module("conv", lambda: convolution(2), key=1)
    assert str(edit.commit().node("conv").target) == "conv_2"
