"""Guards: what they let pass, and what they say when they do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from capture.checks import captured, image, net
from torch import Tensor, nn

import fxopt
from fxopt.capture import capture
from fxopt.errors import GuardError
from fxopt.guards import Violation


def branching() -> Any:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.conv(x)
        if y.shape[-1] > 4:
            y = y[..., :4]
        return y * 2 if x.shape[0] < 10 else y

    return net(forward, conv=nn.Conv2d(3, 4, 3))


def test_error_names_condition_line_and_both_values() -> None:
    module = captured(branching(), image())
    with pytest.raises(
        GuardError,
        match=r"conv.shape\[3\] > 4 \(decided at test_guards.py:\d+\): captured with "
        r"conv.shape\[3\] = 5, called with conv.shape\[3\] = 3; capture the model again",
    ):
        module(image(2, 3, 10, 5))


def test_guard_error_is_an_error_of_fxopt_with_the_exit_code_of_bad_input() -> None:
    assert issubclass(GuardError, fxopt.FxoptError)
    assert GuardError.exit_code == 2


def test_other_sizes_that_fall_the_same_way_pass() -> None:
    model = branching()
    module = captured(model, image())
    for shape in ((1, 3, 10, 7), (9, 3, 31, 64), (2, 3, 3, 8)):
        assert torch.equal(module(image(*shape)), model(image(*shape)))


def test_every_broken_guard_is_listed() -> None:
    guards = capture(branching(), image()).guards
    broken = guards.violations([image(12, 3, 10, 4)])
    assert [str(b.guard.condition) for b in broken if isinstance(b, Violation)] == [
        "conv.shape[3] > 4",
        "x.shape[0] < 10",
    ]
    assert guards.violations([image()]) == ()


def test_program_without_decisions_has_no_guards() -> None:
    model = net(lambda self, x: self.conv(x).relu(), conv=nn.Conv2d(3, 4, 3))
    guards = capture(model, image()).guards
    assert guards.shapes == ()
    assert guards.layouts == ()


def test_each_condition_is_held_once() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        for _ in range(3):
            if x.shape[3] > 2:
                x = x * 2
        return x

    guards = capture(net(forward), image()).guards
    assert [str(g.condition) for g in guards.shapes].count("x.shape[3] > 2") == 1


def test_input_that_no_operator_takes_raises_and_names_the_reason() -> None:
    module = captured(branching(), image())
    with pytest.raises((GuardError, RuntimeError), match="channels|takes no inputs"):
        module(image(2, 4, 10, 7))


def test_batch_note_tells_that_the_batch_is_fixed() -> None:
    model = net(lambda self, x: torch.stack([s * 2 for s in x]))
    notes = capture(model, image()).notes
    assert any("the batch size is fixed: x.shape[0] == 2" in note for note in notes)


def test_layout_that_decides_whether_memory_is_shared_is_guarded() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = x + 0
        y.contiguous().add_(1)
        return y

    module = captured(net(forward), image())
    assert torch.equal(module(image()), image() + 1)
    with pytest.raises(GuardError, match="shares the memory of add' was True"):
        module(image().to(memory_format=torch.channels_last))


def test_layout_that_decides_nothing_is_not_guarded() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.relu(self.conv(x).contiguous().flatten(1))

    model = net(forward, conv=nn.Conv2d(3, 4, 3), relu=nn.ReLU(inplace=True))
    program = capture(model, image())
    assert program.guards.layouts == ()
