"""What capture refuses: the message says where and what to do."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.distributed as dist
from capture.checks import assert_same, code, image, net, seeded
from torch import Tensor, nn

from fxopt.capture import capture
from fxopt.captured import to_module
from fxopt.errors import CaptureError


def refused(forward: Any, *inputs: Any, match: str = "", **members: Any) -> None:
    with pytest.raises(CaptureError, match=match) as caught:
        capture(net(forward, **members), inputs or image())
    assert len(str(caught.value)) > 40


LINE = r"at test_refusals.py:\d+; move that part into a submodule"


def test_refuses_branch_on_values_naming_the_line() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x

    refused(forward, match=LINE)


@pytest.mark.parametrize(
    "expression",
    [
        "x * x.sum().item()", "x * float(x.mean())", "x[: int(x.sum())]", "x * (2 if (x > 0).all() else 3)",
        "x * x.tolist()[0][0][0][0]", "torch.from_numpy(x.numpy())", "x[x > 0].mean()", "x.nonzero().sum()",
        "torch.masked_select(x, x > 0)", "x if torch.equal(x, x) else -x", "x if torch.allclose(x, x) else -x",
        "x.unique()", "x * max(x.flatten())", "x * (1.0 in x)", "torch.tensor([x.sum(), 2.0])",
        "torch.tensor(x)", "F.one_hot(x.long().abs())", "torch.repeat_interleave(x, x[0, 0, 0].long().abs(), 3)",
        "torch.arange(x.abs().sum())", "torch.zeros(x.long()[0, 0, 0].tolist())", "x * bool(x[0, 0, 0, 0])",
        "sorted(x[0, 0, 0])[0]", "x * complex(x.sum()).real", "torch.bincount(x.flatten().long().abs())",
        "x * x.flatten()[0].__index__()", "[v for v in x.flatten() if v > 0][0]", "f'{x.sum():.2f}' and x * x.sum().item()",
        "x.argwhere()", "torch.where(x > 0)[0]", "x.data_ptr() and x", "x.stride()[0] * x", "x * x.storage_offset()",
        "torch.nn.utils.rnn.pack_padded_sequence(x[0], [3] * 10).data", "x * torch.rand(1).item()",
        "torch.is_nonzero(x.sum()) and x", "x.histogram(4)[0] if bool(x.any()) else x", "x * torch.linalg.matrix_rank(x).item()",
        "x.__deepcopy__({}) * x.sum().item()", "x.to_sparse().values() * x.sum().item()",
    ],
)  # fmt: skip
def test_refuses_decision_by_values(expression: str) -> None:
    model = net(code(f"lambda self, x: {expression}"))
    with pytest.raises(CaptureError, match="cannot be captured: "):
        capture(model, image())


def test_refuses_submodule_with_a_convolution_that_decides_by_values() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if x.mean() > 0 else x

    with pytest.raises(
        CaptureError, match=r"'gate' cannot be traced .*test_refusals.py:\d+.*hides 'gate.conv'"
    ):
        capture(net(lambda self, x: self.gate(x), gate=Gate()), image())


def test_refuses_opaque_submodule_with_much_of_the_parameters() -> None:
    def gate(self: Any, x: Tensor) -> Tensor:
        return x * self.weight if x.mean() > 0 else x

    gated = net(gate, weight=nn.Parameter(torch.rand(7)))
    with pytest.raises(
        CaptureError, match=r"'gate' cannot be traced .* and holds \d+% of the parameters"
    ):
        capture(net(lambda self, x: self.gate(x), gate=gated), image())


def test_refuses_lazy_layer_until_it_was_run() -> None:
    model = nn.Sequential(OrderedDict(conv=nn.LazyConv2d(4, 3)))
    with pytest.raises(
        CaptureError, match=r"'conv.weight' is not initialised yet .* run the model once"
    ):
        capture(model, image())
    model(image())
    assert_same(model, image())


def test_refuses_model_that_cannot_be_copied() -> None:
    class Uncopied:
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("no copies")

    with pytest.raises(CaptureError, match="cannot be copied .*no copies.*copy.deepcopy"):
        capture(net(lambda self, x: x * 2, handle=Uncopied()), image())


def test_refuses_list_of_images_of_several_sizes_or_guards_it() -> None:
    def forward(self: Any, images: list[Tensor]) -> list[Tensor]:
        return [self.conv(x[None]) for x in images]

    model = net(forward, conv=nn.Conv2d(3, 4, 3))
    images = [image(3, 8, 6), image(3, 9, 5)]
    assert_same(model, (images,), batch_fixed=True)


def test_refuses_wrong_channels_naming_the_layer() -> None:
    model = seeded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)))
    with pytest.raises(
        CaptureError,
        match=r"refuses the example input of shape \(2, 4, 10, 7\) float32: '0' \(Conv2d\)",
    ):
        capture(model, image(2, 4, 10, 7))


def test_refuses_input_that_a_later_layer_cannot_take_naming_it() -> None:
    model = seeded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 9))))
    with pytest.raises(CaptureError, match=r"'1.1' \(Conv2d\) raises RuntimeError"):
        capture(model, image())


def test_refuses_input_that_the_forward_itself_cannot_take() -> None:
    refused(lambda self, x: x.view(5, 5), match="its forward raises RuntimeError")


def test_users_own_exception_is_passed_on_in_one_line() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        raise ValueError("needs\n 16 channels")

    refused(forward, match="ValueError: needs 16 channels")


def test_refuses_model_without_a_word_on_its_input() -> None:
    with pytest.raises(CaptureError, match="does not say what it takes"):
        capture(nn.Sequential(nn.Linear(3, 4)))


def test_assumes_an_image_with_a_warning_that_states_the_shape() -> None:
    with pytest.warns(UserWarning, match=r"assuming one of shape \(1, 3, 224, 224\)"):
        capture(seeded(nn.Sequential(nn.Conv2d(3, 2, 3, stride=8))))


def test_takes_the_input_that_the_model_declares() -> None:
    model = net(lambda self, x: x * 2)
    model.example_input_array = image()
    assert capture(model).inputs()["x"].shape == (2, 3, 10, 7)
    timm = net(lambda self, x: self.conv(x), conv=nn.Conv2d(3, 4, 3))
    timm.pretrained_cfg = {"input_size": (3, 12, 14)}
    assert capture(timm).inputs()["x"].shape == (1, 3, 12, 14)


def test_refuses_tensor_that_was_computed_elsewhere() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            hidden = x + 1
        return hidden * 2

    refused(forward, match="computed where the tracer cannot follow")


def test_refuses_change_of_shape_in_place() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = x * 1
        y.unsqueeze_(0)
        return y

    refused(forward, match="unsqueeze_ changes the shape of a tensor in place")


def test_refuses_assignment_to_the_data_of_a_tensor() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = x * 1
        y.data = x * 2
        return y

    refused(forward, match="assigns to the .data of a tensor")


def test_refuses_backward_in_forward() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.conv(x).sum(), x)
        return gradient

    refused(forward, conv=nn.Conv2d(3, 4, 3))


def test_refuses_gradient_hook_in_forward() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.conv(x)
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient * 2)
        return y

    model = net(forward, conv=nn.Conv2d(3, 4, 3))
    with pytest.raises(
        CaptureError, match=r"asks autograd for something \(register_hook\) at test_refusals"
    ):
        capture(model, image())


def test_refuses_functional_transform_in_forward() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.func.grad(lambda y: (y**3).sum())(x)

    model = net(forward)
    with pytest.raises(CaptureError, match="sets requires_grad"):
        capture(model, image())


def test_follows_functional_call() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        doubled = {k: v * 2 for k, v in self.conv.named_parameters()}
        return torch.func.functional_call(self.conv, doubled, (x,))

    model = net(forward, conv=nn.Conv2d(3, 4, 3))
    assert_same(model, image())


def test_follows_weight_swapped_in_forward() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        weight = self.conv.weight
        del self.conv.weight
        self.conv.weight = weight * 2
        result = self.conv(x)
        del self.conv.weight
        self.conv.weight = weight
        return result

    model = net(forward, conv=nn.Conv2d(3, 4, 3))
    assert torch.equal(to_module(capture(model, image()))(image()), model(image()))


def test_refuses_layer_attribute_changed_in_forward() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.pool.kernel_size = 2
        a = self.pool(x)
        self.pool.kernel_size = 3
        return a.mean() + self.pool(x)

    model = net(forward, pool=nn.AvgPool2d(2, stride=2))
    with pytest.raises(CaptureError, match="has shape .* and should have"):
        capture(model, image())


def test_refuses_layer_mode_changed_in_forward() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.drop.eval()
        a = self.drop(x)
        self.drop.train()
        return a + self.drop(x)

    model = net(forward, drop=nn.Dropout(0.5))
    with pytest.raises(CaptureError, match="does not compute what the model does"):
        capture(model, image())


def test_refuses_closure_that_counts_calls() -> None:
    calls: list[int] = []

    def forward(self: Any, x: Tensor) -> Tensor:
        calls.append(1)
        return x * len(calls)

    refused(forward, match="it changes 'forward.*' in every call at test_refusals.py")


def test_refuses_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    def forward(self: Any, x: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(lambda: self.conv(x) * 2).result()

    model = net(forward, conv=nn.Conv2d(3, 4, 3))
    with pytest.raises(CaptureError, match="where the tracer cannot follow"):
        capture(model, image())


def test_distributed_calls_are_left_out_where_they_do_nothing() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(x)
        return x * 2

    assert_same(net(forward), image())


def test_printing_and_asserting_shapes_is_no_obstacle() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        print(x.shape, x.dtype)
        assert x.shape[1] == 3, f"got {x.shape}"
        torch._assert(x.shape[1] == 3, "channels")
        return x * 2

    assert_same(net(forward), image())


def test_printing_a_tensor_is_harmless() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        text = f"{x}"
        return x * 2 if text else x

    model = net(forward)
    assert_same(model, image())


def test_refused_model_stays_as_it_was() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.conv.weight.data.mul_(2)
        return self.conv(x) if x.sum() > 0 else x

    model = net(forward, conv=nn.Conv2d(3, 4, 3)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    call = nn.Module.__call__
    with pytest.raises(CaptureError):
        capture(model, image())
    assert nn.Module.__call__ is call
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.is_grad_enabled()
