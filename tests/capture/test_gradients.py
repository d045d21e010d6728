"""What is done to gradients beside values: followed, or refused, never dropped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from capture.checks import assert_same, captured, code, image, net, seeded
from torch import Tensor, nn
from torch.func import functional_call

from fxopt.capture import capture
from fxopt.errors import CaptureError


def _detached(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters()}


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(3, 4, 3), nn.Linear(7, 4), nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())]
)
def test_layer_called_with_detached_parameters(layer: nn.Module) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return functional_call(self.layer, _detached(self.layer), (x,)) + self.p.sum()  # type: ignore[no-any-return]

    assert_same(net(forward, layer=layer, p=nn.Parameter(torch.ones(1))), image())


def test_layer_called_with_computed_parameters() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        weights = {name: p * 2 for name, p in self.conv.named_parameters()}
        return functional_call(self.conv, weights, (x,)) + self.conv(x)  # type: ignore[no-any-return]

    assert_same(net(forward, conv=nn.Conv2d(3, 4, 3)), image())


def test_weight_exchanged_for_its_detached_self() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        weight = self.conv.weight
        del self.conv.weight
        self.conv.weight = weight.detach()
        y = self.conv(x)
        del self.conv.weight
        self.conv.weight = weight
        return y + self.p.sum()  # type: ignore[no-any-return]

    model = net(forward, conv=nn.Conv2d(3, 4, 3), p=nn.Parameter(torch.ones(1)))
    module = captured(model, image())
    for one in (model, module):
        one(image()).sum().backward()
    assert torch.equal(model(image()), module(image()))
    theirs = dict(model.named_parameters())
    for name, parameter in module.named_parameters():
        assert (parameter.grad is None) == (theirs[name].grad is None), name
    assert theirs["conv.weight"].grad is None


def test_norm_whose_statistics_forward_overwrites() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.norm.running_mean.mul_(0.5)
        return self.norm(x)  # type: ignore[no-any-return]

    assert_same(net(forward, norm=nn.BatchNorm2d(3)), image(), eval_only=True)


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("self.conv.requires_grad_(False)(x)", "sets requires_grad of 'conv.weight'"),
        ("(setattr(self.conv.bias, 'requires_grad', False), self.conv(x))[1]", "requires_grad of 'conv.bias'"),
        ("x.requires_grad_() * 2", "asks autograd to follow its input 'x'"),
        ("(setattr(x, 'requires_grad', True), x * 2)[1]", "asks autograd to follow its input 'x'"),
        ("x.detach().requires_grad_() * 2", "asks autograd to follow a tensor"),
        ("(lambda y: (y.register_hook(lambda g: g * 2), y)[1])(self.conv(x))", "autograd for something .register_hook"),
        ("(lambda y: (y[:, 1:], y.detach_()))(self.conv(x))", "detach_ of a tensor that has views"),
        ("(lambda y: (y.detach().mul_(2), y))(self.conv(x))", "view made by detach, which no gradient sees"),
        ("(lambda y: (y.data.add_(1), y))(self.conv(x))", "view made by detach, which no gradient sees"),
        ("nn.init.normal_(self.conv(x))", "nn.init.normal_ overwrites a tensor that gradients flow through"),
        ("nn.Parameter(torch.ones(7)) * x", "makes a parameter; make it when the module is made"),
        ("__import__('copy').copy(x) * 2", "copies or pickles a tensor"),
    ],
)  # fmt: skip
def test_refuses_what_changes_gradients(expression: str, reason: str) -> None:
    model = net(code(f"lambda self, x: {expression}"), conv=nn.Conv2d(3, 4, 3))
    with pytest.raises(CaptureError, match=reason + r".* at \w+.py:\d+"):
        capture(model, image())


def test_flag_set_to_what_it_is() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.conv.requires_grad_(True)
        return self.conv(x)  # type: ignore[no-any-return]

    assert_same(net(forward, conv=nn.Conv2d(3, 4, 3)), image())


def test_value_detached_in_place() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.conv(x)
        y.detach_()
        return y + self.conv(x)  # type: ignore[no-any-return]

    assert_same(net(forward, conv=nn.Conv2d(3, 4, 3)), image())


@pytest.mark.parametrize(
    "register", ["register_full_backward_hook", "register_full_backward_pre_hook"]
)
@pytest.mark.parametrize("path", ["", "1"])
def test_refuses_backward_hook_on_a_module(register: str, path: str) -> None:
    model = seeded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    getattr(model.get_submodule(path), register)(lambda *gradients: None)
    with pytest.raises(CaptureError, match="has a backward hook, which a graph does not run"):
        capture(model, image())


@pytest.mark.parametrize(
    "layer", [nn.Embedding(9, 4, max_norm=0.1), nn.EmbeddingBag(9, 4, max_norm=0.1)]
)
def test_refuses_embedding_that_rewrites_its_weight(layer: nn.Module) -> None:
    indices = torch.tensor([[1, 2], [4, 3]])
    with pytest.raises(CaptureError, match="embedding with max_norm overwrites its weight"):
        capture(net(lambda self, i: self.layer(i), layer=layer), indices)
