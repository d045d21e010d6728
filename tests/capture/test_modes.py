"""Training and evaluation: what the mode changes, it changes in the captured module too."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capture.checks import assert_same, captured, image, net, seeded
from torch import Tensor, nn

from fxopt.capture import capture
from fxopt.captured import to_module
from fxopt.errors import CaptureError, GuardError


def test_functional_dropout_follows_the_mode() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3, self.training) + F.dropout2d(x, p=0.2, training=self.training)

    assert_same(net(forward), image())


def test_functional_dropout_that_is_always_on() -> None:
    assert_same(net(lambda self, x: F.dropout(x, 0.5) + F.dropout(x, 0.5, True)), image())


def test_functional_dropout_that_is_always_off() -> None:
    assert_same(net(lambda self, x: F.dropout(x, 0.5, False) + x), image())


def test_functional_dropout_on_in_evaluation_only() -> None:
    assert_same(net(lambda self, x: F.dropout(x, 0.5, not self.training) + x), image())


def test_drop_rate_that_is_an_attribute() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.dropout(self.conv(x), p=self.rate, training=self.training) if self.rate > 0 else x

    assert_same(net(forward, conv=nn.Conv2d(3, 4, 3), rate=0.25), image())


def test_dropout_under_a_norm_and_between_layers() -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.3), nn.ReLU(True),
              nn.Dropout2d(0.2), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2, momentum=0.5)]  # fmt: skip
    assert_same(seeded(nn.Sequential(*layers)), image())


class DropPath(nn.Module):
    """Stochastic depth as timm writes it."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1 - self.rate
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * mask.div_(keep)


def test_stochastic_depth_follows_the_mode() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        for block, drop in zip(self.blocks, self.drops, strict=True):
            x = x + drop(block(x))
        return x

    members = {"blocks": nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(3)),
               "drops": nn.ModuleList(DropPath(rate) for rate in (0.0, 0.3, 0.6))}  # fmt: skip
    assert_same(net(forward, **members), image(8, 3, 5, 4))


def test_stochastic_depth_written_into_forward_is_eval_only() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        if self.training:
            x = x + self.conv(x) * torch.rand(x.shape[0], 1, 1, 1).ge(0.5)
        else:
            x = x + self.conv(x) * 0.5
        return x

    model = net(forward, conv=nn.Conv2d(3, 3, 1))
    program = assert_same(model, image(), eval_only=True)
    with pytest.raises(CaptureError, match=r"for evaluation only.*test_modes.py:\d+"):
        to_module(program).train()


def test_training_only_head_is_eval_only_and_names_the_difference() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        y = self.conv(x)
        return (y, self.head(y)) if self.training else y

    model = net(forward, conv=nn.Conv2d(3, 4, 3), head=nn.Conv2d(4, 2, 1))
    program = assert_same(model, image(), eval_only=True)
    with pytest.raises(CaptureError, match="training runs head where evaluation runs output"):
        to_module(program).train()


def test_mode_that_changes_the_structure_alone_is_eval_only() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        y = self.conv(x)
        return {"out": y} if self.training else [y]

    assert_same(net(forward, conv=nn.Conv2d(3, 4, 3)), image(), eval_only=True)


def test_mode_that_changes_a_constant_is_eval_only() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.conv(x) * (2.0 if self.training else 3.0)

    assert_same(net(forward, conv=nn.Conv2d(3, 4, 3)), image(), eval_only=True)


def test_mode_that_changes_an_output_constant_is_eval_only() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        return x * 2, self.training

    assert_same(net(forward), image(), eval_only=True)


def test_mode_that_changes_a_tensor_constant_is_eval_only() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x * (self.a if self.training else self.b)

    model = net(forward)
    model.a, model.b = torch.rand(7), torch.rand(7)
    assert_same(model, image(), eval_only=True)


def test_mode_that_changes_the_values_of_a_literal_tensor_is_eval_only() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x * torch.from_numpy((torch.ones(7) * (2 if self.training else 3)).numpy())

    assert_same(net(forward), image(), eval_only=True)


def test_mode_that_changes_the_drop_rate_is_eval_only() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5 if self.training else 0.2, True)

    assert_same(net(forward), image(), eval_only=True)


def test_mode_that_changes_the_momentum_is_eval_only() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        momentum = 0.1 if self.training else 0.0
        return F.batch_norm(x, self.mu, self.var, None, None, True, momentum)

    assert_same(net(forward, mu=torch.randn(3), var=torch.rand(3) + 0.5), image(), eval_only=True)


def test_mode_that_changes_the_guard_is_guarded_in_both() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        if self.training and x.shape[3] > 8:
            return x * 2
        return x * 3

    assert_same(net(forward), image())
    module = captured(net(forward), image())
    for training in (True, False):
        with pytest.raises(
            GuardError, match=r"x\.shape\[3\] <= 8 \(decided at test_modes\.py:\d+\)"
        ):
            module.train(training)(image(2, 3, 10, 9))


def test_mode_of_a_child_that_is_read() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x * 2 if self.norm.training else self.norm(x)

    assert_same(net(forward, norm=nn.BatchNorm2d(3)), image(), eval_only=True)


def test_training_read_by_a_layer_made_in_forward() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return nn.Dropout(0.4).train(self.training)(x)

    assert_same(net(forward), image())


def test_norm_frozen_by_an_overridden_train() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.other = (
                nn.Conv2d(3, 4, 3),
                nn.BatchNorm2d(4),
                nn.BatchNorm2d(4),
            )

        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self.norm.eval()
            return self

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.norm(self.conv(x)))

    program = assert_same(seeded(Frozen()).train(), image())
    module = to_module(program)
    assert (module.training, module.norm.training, module.other.training) == (True, False, True)
    assert not module.eval().other.training


def test_norm_frozen_by_hand_is_given_back_frozen() -> None:
    model = seeded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).train()
    model[1].eval()
    module = captured(model, image())
    assert torch.equal(module(image()), model(image()))
    assert module.training
    assert not module.get_submodule("1").training
    assert module.train().get_submodule("1").training


@pytest.mark.parametrize("training", [False, True])
def test_captured_module_is_in_the_mode_of_the_model(training: bool) -> None:
    model = seeded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).train(training)
    module = captured(model, image())
    assert next(m.training for m in module.modules()) is training
    assert module.get_submodule("1").training is training


def test_switching_back_and_forth() -> None:
    model = seeded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)))
    module = captured(model, image())
    for training in (True, False, True, True, False):
        model.train(training)
        module.train(training)
        torch.manual_seed(1)
        theirs = model(image())
        torch.manual_seed(1)
        assert torch.equal(theirs, module(image()))


def test_frozen_backbone_keeps_requires_grad() -> None:
    model = seeded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)))
    model[0].requires_grad_(False)
    model[1].bias.requires_grad_(False)
    assert_same(model, image())


def test_gradients_of_the_model_stay() -> None:
    model = seeded(nn.Sequential(nn.Conv2d(3, 4, 3)))
    model(image()).sum().backward()
    gradient = model[0].weight.grad.clone()
    module = captured(model, image())
    module(image()).sum().backward()
    assert torch.equal(model[0].weight.grad, gradient)
    assert torch.equal(module.get_submodule("0").weight.grad, gradient)


def test_counter_in_a_buffer() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls

    program = assert_same(net(forward, calls=torch.zeros(())), image())
    assert program.nodes[-2].target == "copy_"


def test_moving_average_in_a_rebound_buffer() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.mean = self.mean * 0.9 + x.mean((0, 2, 3)) * 0.1
        return x - self.mean[:, None, None]

    assert_same(net(forward, mean=torch.rand(3)), image(), input_gradients=False)


def test_moving_average_in_training_only_is_eval_only_or_the_same() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(x.mean((0, 2, 3)), alpha=0.1)
        return x - self.mean[:, None, None]

    model = net(forward, mean=torch.rand(3))
    program = capture(model, image())
    assert_same(model, image(), eval_only=bool(program.modes.eval_only))


def test_buffer_written_through_a_view_and_by_copy() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.bank[1:].copy_(self.bank[:-1].clone())
            self.bank[0] = x.mean((0, 2, 3))
            self.steps.add_(1)
        return x + self.bank.sum(0)[:, None, None] / self.steps

    members = {"bank": torch.rand(4, 3), "steps": torch.zeros((), dtype=torch.int64)}
    assert_same(net(forward, **members), image())


def test_buffer_written_twice_and_read_between() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        before = self.total * 1
        self.total.add_(1)
        between = self.total * 1
        self.total.mul_(2)
        return x * before + between - self.total

    assert_same(net(forward, total=torch.ones(3, 1, 1)), image())


def test_buffer_returned_after_it_was_written() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        self.total.add_(1)
        return x, self.total * 1

    assert_same(net(forward, total=torch.ones(3)), image())


def test_buffer_of_a_called_twice_submodule() -> None:
    def count(self: Any, x: Tensor) -> Tensor:
        self.calls += 1
        return x / self.calls.clone()

    counter = net(count, calls=torch.ones(()))
    assert_same(net(lambda self, x: self.c(self.c(x)), c=counter), image())


def test_non_persistent_buffer_stays_so() -> None:
    model = net(lambda self, x: x * self.scale)
    model.register_buffer("scale", torch.rand(7), persistent=False)
    program = assert_same(model, image())
    assert "scale" in dict(to_module(program).named_buffers())
    assert not to_module(program).state_dict()


def test_buffer_that_is_none() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x if self.mask is None else x * self.mask

    model = net(forward)
    model.register_buffer("mask", None)
    model.register_parameter("bias", None)
    assert_same(model, image())


def test_attribute_counted_by_forward_is_refused_or_constant() -> None:
    """A Python number that forward changes is no part of the graph: capture must not bake it."""

    def forward(self: Any, x: Tensor) -> Tensor:
        self.steps += 1
        return x * self.steps

    model = net(forward, steps=0)
    with pytest.raises(CaptureError):
        capture(model, image())
    assert model.steps == 0


def test_tensor_cached_on_the_module_is_refused_or_right_at_other_sizes() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        if self.cache is None or self.cache.shape[-1] != x.shape[-1]:
            self.cache = torch.arange(x.shape[-1], dtype=x.dtype)
        return x + self.cache

    model = net(forward, cache=None)
    module = captured(model, image())
    assert model.cache is None
    for width in (7, 9):
        other = image(2, 3, 10, width)
        try:
            found = module(other)
        except GuardError:
            continue
        assert torch.equal(found, model(other))


def test_python_random_numbers_are_refused() -> None:
    import random

    def forward(self: Any, x: Tensor) -> Tensor:
        return x * random.random()

    with pytest.raises(CaptureError):
        capture(net(forward), image())


def test_layer_drop_by_python_random_numbers_is_eval_only() -> None:
    import random

    def forward(self: Any, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.training and random.random() < 0.5:
                continue
            x = x + block(x)
        return x

    model = net(forward, blocks=nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(16)))
    program = assert_same(model, image(), eval_only=True)
    assert re.search(
        r"draws random numbers of Python or NumPy at test_modes\.py:\d+", program.modes.eval_only
    )


def test_layer_drop_by_torch_random_numbers_is_eval_only() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.training and torch.rand(1).item() < 0.5:
                continue
            x = x + block(x)
        return x

    model = net(forward, blocks=nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(4)))
    assert_same(model, image(), eval_only=True)


def test_batch_of_one_value_per_channel_raises_pytorchs_own_error_in_training() -> None:
    model = seeded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4)))
    program = capture(model, image(1, 3, 10, 7))
    assert not program.modes.eval_only
    module = to_module(program)
    with pytest.raises(ValueError, match="more than 1 value per channel when training"):
        module.train()(image(1, 3, 10, 7))
    torch.testing.assert_close(module.eval()(image(1, 3, 10, 7)), model.eval()(image(1, 3, 10, 7)))
    assert module.train()(image()).shape == (2, 4, 1, 1)


def test_example_batch_of_one_serves_any_batch() -> None:
    model = seeded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()))
    assert_same(model, image(1, 3, 10, 7))


def test_two_training_steps_with_an_optimiser() -> None:
    model = seeded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()))
    module = captured(model, image()).train()
    model.train()
    for net_ in (model, module):
        optimiser = torch.optim.SGD(net_.parameters(), lr=0.1, momentum=0.9)
        for step in range(3):
            optimiser.zero_grad()
            net_(image(seed=step)).square().mean().backward()
            optimiser.step()
    for (name, a), (other, b) in zip(
        model.state_dict().items(), module.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(a, b), name


def test_capture_under_no_grad_and_inference_mode() -> None:
    model = seeded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            module = captured(model, image())
        assert torch.equal(module.eval()(image()), model.eval()(image()))
        assert module.train()(image()).requires_grad


def test_capture_twice_gives_the_same_graph() -> None:
    model = seeded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    codes = [captured(model, image()).code for _ in range(2)]
    assert all(a == b for a, b in pairwise(codes))


def test_capture_of_a_captured_module() -> None:
    model = seeded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.2)))
    assert_same(captured(model, image()), image())


def test_captured_module_as_a_submodule() -> None:
    inner = captured(seeded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))), image())
    assert_same(net(lambda self, x: self.inner(x) * 2, inner=inner), image())


def test_the_two_modes_are_told_apart_by_the_users_line() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        if self.training:
            x = x * 2
        return self.conv(x)

    program = capture(net(forward, conv=nn.Conv2d(3, 4, 3)), image())
    assert re.search(r"at test_modes.py:\d+: training runs mul", program.modes.eval_only)


def test_training_forward_that_raises_makes_it_eval_only() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        if self.training:
            raise NotImplementedError("no training here")
        return self.conv(x)

    assert_same(net(forward, conv=nn.Conv2d(3, 4, 3)), image(), eval_only=True)


def test_training_target_that_is_needed_makes_it_eval_only() -> None:
    def forward(self: Any, x: Tensor, target: Tensor | None = None) -> Any:
        y = self.conv(x)
        if self.training:
            assert target is not None
            return F.mse_loss(y, target)
        return y

    assert_same(net(forward, conv=nn.Conv2d(3, 4, 3)), image(), eval_only=True)
