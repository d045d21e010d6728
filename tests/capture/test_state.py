"""Parameters and buffers: the user's keys, ties kept, loading takes effect."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capture.checks import assert_same, captured, image, net, seeded
from torch import Tensor, nn

from fxopt.capture import capture
from fxopt.captured import to_module
from fxopt.errors import CaptureError


def test_unused_members_stay_in_the_state() -> None:
    model = net(lambda self, x: self.conv(x), conv=nn.Conv2d(3, 3, 1), unused=nn.BatchNorm2d(3),
                head=nn.Sequential(nn.Linear(2, 2)), spare=nn.Parameter(torch.rand(2)))  # fmt: skip
    program = assert_same(model, image())
    assert "head.0.weight" in to_module(program).state_dict()


def test_tied_weights_stay_tied() -> None:
    first, second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
    second.weight = first.weight
    model = net(lambda self, x: self.b(F.relu(self.a(x))), a=first, b=second)
    module = to_module(assert_same(model, image()))
    assert module.a.weight is module.b.weight


def test_weight_tied_to_its_transpose() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.linear(F.relu(self.encode(x)), self.encode.weight.t())

    assert_same(net(forward, encode=nn.Linear(7, 4)), image())


def test_module_with_two_names() -> None:
    block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model = net(lambda self, x: self.first(x) + self.second(x * 2), first=block, second=block)
    module = to_module(assert_same(model, image()))
    assert module.first is module.second


def test_module_with_two_names_called_by_the_second_only() -> None:
    block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model = net(lambda self, x: self.second(x), first=block, second=block)
    assert_same(model, image())


def test_functional_layer_of_a_module_with_two_names() -> None:
    class Own(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight, self.bias, padding=1)

    layer = Own(3, 3, 3)
    model = net(lambda self, x: self.a(x) + self.b(x * 2), a=layer, b=layer)
    assert_same(model, image())


def test_parameter_with_two_names_in_one_module() -> None:
    weight = nn.Parameter(torch.rand(7))
    assert_same(net(lambda self, x: x * self.a + self.b, a=weight, b=weight), image())


def test_parameter_list_and_dict() -> None:
    members = {"scales": nn.ParameterList([torch.rand(7), torch.rand(7)]),
               "shifts": nn.ParameterDict({"x": torch.rand(7)})}  # fmt: skip
    model = net(lambda self, x: x * self.scales[0] + self.scales[1] - self.shifts["x"], **members)
    assert_same(model, image())


def test_buffer_tied_to_a_parameter_elsewhere() -> None:
    conv = nn.Conv2d(3, 3, 1)
    model = net(lambda self, x: self.conv(x) * self.scale, conv=conv)
    model.register_buffer("scale", conv.weight.detach().mean())
    assert_same(model, image())


def test_buffers_shared_by_two_norms() -> None:
    first, second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    second.running_mean, second.running_var = first.running_mean, first.running_var
    assert_same(net(lambda self, x: self.b(self.a(x)), a=first, b=second), image())


def test_two_views_of_one_storage_as_parameters() -> None:
    storage = torch.randn(2, 7)
    model = net(
        lambda self, x: x * self.a + self.b, a=nn.Parameter(storage[0]), b=nn.Parameter(storage[1])
    )
    assert_same(model, image())


def test_names_that_python_and_fx_use() -> None:
    names = ("forward_", "training_", "call", "input", "output", "weight", "F", "torch",
             "x", "relu", "conv_1", "size", "train_", "operator")  # fmt: skip
    model = net(lambda self, x: sum(getattr(self, n)(x) for n in names) if self.names else x,
                names=names, **{n: nn.Conv2d(3, 2, 1) for n in names})  # fmt: skip
    assert_same(model, image())


@pytest.mark.parametrize(
    "name", ["graph", "code", "facts", "records", "_graph", "flat_forward", "meta"]
)
def test_refuses_member_named_like_a_graph_modules_own(name: str) -> None:
    model = net(lambda self, x: getattr(self, name)(x))
    model.add_module(name, nn.Conv2d(3, 2, 1))
    with pytest.raises(CaptureError, match=f"member '{name}' has a name that graph modules use"):
        capture(seeded(model), image())
    assert_same(nn.Sequential(model), image())


@pytest.mark.parametrize("name", ["graph", "code", "records"])
def test_refuses_parameter_named_like_a_graph_modules_own(name: str) -> None:
    model = net(lambda self, x: x * getattr(self, name))
    model.register_parameter(name, nn.Parameter(torch.rand(7)))
    with pytest.raises(CaptureError, match=f"member '{name}' has a name that graph modules use"):
        capture(model, image())


def test_member_names_with_odd_characters() -> None:
    names = ("3x3", "a-b", "_x", "ünï", "with space")
    blocks = nn.ModuleDict({name: nn.Conv2d(3, 3, 1) for name in names})

    def forward(self: Any, x: Tensor) -> Tensor:
        for block in self.blocks.values():
            x = block(x)
        return x

    assert_same(net(forward, blocks=blocks), image())


@pytest.mark.parametrize("name", ["in", "class", "None", "lambda"])
def test_member_named_by_a_keyword(name: str) -> None:
    heads = nn.ModuleDict({name: nn.Conv2d(3, 3, 1)})
    scales = nn.ParameterDict({name: torch.rand(7)})
    model = net(lambda self, x: self.heads[name](x) * self.scales[name], heads=heads, scales=scales)
    module = to_module(assert_same(model, image()))
    assert torch.equal(copy.deepcopy(module)(image()), model(image()))
    assert torch.equal(pickle.loads(pickle.dumps(module))(image()), model(image()))


def test_lifted_layer_beside_members_of_its_usual_name() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(self.relu(F.conv2d(x, self.conv2d))), 2) * self.max_pool2d

    members = {
        "relu": nn.Conv2d(4, 4, 1),
        "conv2d": nn.Parameter(torch.randn(4, 3, 1, 1)),
        "max_pool2d": 2.0,
    }
    assert_same(net(forward, **members), image())


def test_state_loaded_before_and_after_fits_the_users_keys() -> None:
    model = seeded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    module = captured(model, image())
    other = seeded(copy.deepcopy(model), seed=3)
    model.load_state_dict(module.state_dict())
    module.load_state_dict(other.state_dict())
    assert torch.equal(module.eval()(image()), other.eval()(image()))


def test_loading_wrong_keys_raises_pytorchs_own_error() -> None:
    module = captured(seeded(nn.Sequential(nn.Conv2d(3, 4, 3))), image())
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict({"1.weight": torch.rand(3)})


def test_loading_takes_effect_on_borrowed_parameters() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, padding=1) + F.linear(x, self.matrix, self.offset)

    members = {"kernel": nn.Parameter(torch.randn(3, 3, 3, 3)), "matrix": nn.Parameter(torch.randn(7, 7)),
               "offset": nn.Parameter(torch.rand(7))}  # fmt: skip
    assert_same(net(forward, **members), image())


def test_conversion_and_move_take_effect_on_borrowed_parameters() -> None:
    model = net(
        lambda self, x: F.conv2d(x, self.kernel), kernel=nn.Parameter(torch.randn(4, 3, 3, 3))
    )
    module = captured(model, image()).double()
    assert torch.equal(module(image().double()), copy.deepcopy(model).double()(image().double()))


def test_constant_tensors_follow_a_conversion() -> None:
    model = net(lambda self, x: x.double() * self.table)
    model.table = torch.rand(7)
    module = captured(model, image())
    assert module(image()).dtype == torch.float64


def test_state_of_a_custom_state_dict_hook_stays_loadable() -> None:
    model = net(lambda self, x: self.conv(x), conv=nn.Conv2d(3, 4, 3))
    model.conv.register_load_state_dict_pre_hook(lambda *args: None)
    assert_same(model, image())


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="extra state of user classes is not carried over",
)
def test_extra_state_is_kept() -> None:
    class WithExtra(nn.Conv2d):
        def get_extra_state(self) -> Any:
            return {"version": 1}

        def set_extra_state(self, state: Any) -> None:
            pass

    model = seeded(nn.Sequential(WithExtra(3, 4, 3)))
    module = captured(model, image())
    assert set(module.state_dict()) == set(model.state_dict())


def test_parameters_do_not_share_memory_with_the_models() -> None:
    model = seeded(nn.Sequential(nn.Conv2d(3, 4, 3)))
    module = captured(model, image())
    with torch.no_grad():
        module.get_submodule("0").weight.zero_()
    assert model[0].weight.abs().sum() > 0


def test_constants_do_not_share_memory_with_the_models() -> None:
    model = net(lambda self, x: x * self.table)
    model.table = torch.rand(7)
    module = captured(model, image())
    expected = module(image())
    model.table.zero_()
    assert torch.equal(module(image()), expected)


def test_global_constants_do_not_share_memory_with_the_captured_module() -> None:
    table = torch.rand(7)
    module = captured(net(lambda self, x: x * table), image())
    expected = module(image())
    table.zero_()
    assert torch.equal(module(image()), expected)


def test_model_changed_after_capture_leaves_the_program_alone() -> None:
    model = seeded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    module = captured(model, image())
    expected = module(image())
    model[0] = nn.Identity()
    assert torch.equal(module(image()), expected)


def test_two_modules_of_one_program_are_independent() -> None:
    program = capture(seeded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))), image())
    first, second = to_module(program), to_module(program)
    with torch.no_grad():
        first.get_submodule("0").weight.zero_()
    first.train()(image())
    assert second.get_submodule("0").weight.abs().sum() > 0
    assert second.get_submodule("1").num_batches_tracked == 0
