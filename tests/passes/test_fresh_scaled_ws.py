"""bn_to_scaled_ws{init=fresh}: the nets that come out, against nets that are written by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from folding import norms_left
from seeded import image, modules_called, seeded
from torch import Tensor, nn

import fxopt
from fxopt import PipelineSpecError
from fxopt.captured import to_module
from fxopt.layers import ScaleShift, SkipInit
from fxopt.passes import BnToScaledWS
from fxopt.results import PassResult
from fxopt.scaled_ws import ScaledWS

RELU, SILU, GELU, HARDSWISH = 1.7128585504, 1.7871872220, 1.7009262433, 1.8138714737
Act = Callable[[Tensor], Tensor]
X = image(2, 3, 24, 32)


def fresh(model: nn.Module, *inputs: Tensor, **options: Any) -> PassResult:
    inputs = inputs or (image(2, 3, 24, 32),)
    return fxopt.run_pass(BnToScaledWS(init="fresh", **options), fxopt.capture(model, inputs))


def converted(model: nn.Module, *inputs: Tensor, **options: Any) -> Any:
    """The converted module in float64, with gains that are not alike."""
    result = fresh(model, *inputs, **options)
    assert (norms_left(result), result.declined) == (0, ())
    module = to_module(result.after).double().eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for each in module.modules():
            if isinstance(each, SkipInit):
                each.gain.copy_(torch.rand((), generator=generator) + 0.5)
    return module


def gammas(module: nn.Module) -> dict[str, float]:
    return {n: m.gamma for n, m in module.named_modules() if isinstance(m, ScaledWS)}


def reasons(result: PassResult) -> dict[str, str]:
    return {declined.node: declined.reason for declined in result.declined}


def notes(result: PassResult) -> dict[str, str]:
    return {site.node: site.note for site in result.rewritten}


def close(found: Tensor, expected: Tensor) -> None:
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# ---- chains ------------------------------------------------------------------------------------


ACTIVATIONS: dict[str, tuple[Any, float]] = {
    "relu": (nn.ReLU(), RELU),
    "relu6": (nn.ReLU6(), 1.7128585549),
    "silu": (nn.SiLU(), SILU),
    "gelu": (nn.GELU(), GELU),
    "gelu tanh": (nn.GELU(approximate="tanh"), 1.7009165616),
    "leaky relu": (nn.LeakyReLU(), 1.7048316271),
    "elu": (nn.ELU(), 1.2708434178),
    "selu": (nn.SELU(), 1.0),
    "sigmoid": (nn.Sigmoid(), 4.8013133736),
    "tanh": (nn.Tanh(), 1.5925374196),
    "softplus": (nn.Softplus(), 1.9191259803),
    "softsign": (nn.Softsign(), 2.3375333629),
    "hardswish": (nn.Hardswish(), HARDSWISH),
    "hardsigmoid": (nn.Hardsigmoid(), 6.0150344900),
    "mish": (nn.Mish(), 1.5920253810),
    "functional": (F.silu, SILU),
    "spelled": (lambda x: x * torch.sigmoid(x), SILU),
    "spelled, hard": (lambda x: x * F.relu6(x + 3) / 6, HARDSWISH),
    "none": (lambda x: x, 1.0),
}  # fmt: skip


class Chain(nn.Module):
    def __init__(self, act: Act, *between: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(6)
        self.act = act
        self.between = nn.Sequential(*between)
        self.second = nn.Conv2d(6, 5, 3, bias=False)
        self.norm2 = nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.first(x)))
        return self.norm2(self.second(self.between(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gamma_is_of_the_activation_that_a_layer_reads(name: str) -> None:
    act, gamma = ACTIVATIONS[name]
    model = seeded(Chain(act))
    found = gammas(to_module(fresh(model).after))
    assert found["first"] == 1.0
    assert found["second"] == pytest.approx(gamma, abs=2e-9 * gamma)


@pytest.mark.parametrize(
    "between",
    [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.ZeroPad2d((0, 1, 0, 1)), nn.Dropout(0.1), nn.Identity(),
     nn.ReflectionPad2d(1), nn.Upsample(scale_factor=2)],
    ids=lambda each: type(each).__name__,
)  # fmt: skip
def test_gamma_passes_through(between: nn.Module) -> None:
    module = converted(seeded(Chain(nn.SiLU(), between)))
    assert gammas(module)["second"] == pytest.approx(SILU)


def test_gamma_of_an_activation_with_weights_by_channel() -> None:
    """PReLU with another slope in each channel: the average of their variances."""
    slopes = torch.linspace(0, 1, 6)
    act = nn.PReLU(6)
    model = seeded(Chain(act))
    with torch.no_grad():
        act.weight.copy_(slopes)
    z = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    variance = torch.stack([F.prelu(z, s.double().view(1)).var() for s in slopes]).mean()
    assert gammas(converted(model))["second"] == pytest.approx(variance.rsqrt().item(), rel=3e-3)


def test_layers_are_drawn_anew() -> None:
    model: Any = seeded(Chain(nn.ReLU()))
    first, again, other = (fresh(model, seed=seed).after.graph_module for seed in (0, 0, 1))
    for module in (first, again, other):
        layer: Any = module.get_submodule("first")
        assert list(dict(layer.named_parameters())) == ["weight", "bias", "gain"]
        assert not layer.bias.any()
        assert layer.gain.eq(1).all()
        assert not layer.weight.equal(model.first.weight)
        assert layer.weight.var().item() == pytest.approx(1 / 27, rel=0.3)
    states = [module.state_dict() for module in (first, again, other)]
    assert all(tensor.equal(states[1][key]) for key, tensor in states[0].items())
    assert not states[0]["first.weight"].equal(states[2]["first.weight"])


def test_the_users_model_and_random_state_stay() -> None:
    model = seeded(Chain(nn.ReLU()))
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    fresh(model)
    assert torch.get_rng_state().equal(state)
    assert all(tensor.equal(before[key]) for key, tensor in model.state_dict().items())


# ---- residual blocks ---------------------------------------------------------------------------


class Post(nn.Module):
    """A bottleneck after which an activation stands: ResNet v1, SE-ResNet."""

    def __init__(self, inputs: int, outputs: int, stride: int, act: Act, se: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, 4, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.conv3 = nn.Conv2d(4, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.act = act
        self.fc1 = nn.Conv2d(outputs, 2, 1) if se else None
        self.fc2 = nn.Conv2d(2, outputs, 1) if se else None
        moves = stride != 1 or inputs != outputs
        self.down = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if moves else None
        self.down_bn = nn.BatchNorm2d(outputs) if moves else None

    def gate(self, x: Tensor) -> Tensor:
        if self.fc1 is None or self.fc2 is None:
            return torch.ones(())
        return torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))))

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.act(self.bn2(self.conv2(y)))))
        if self.fc1 is not None:
            y = y * self.gate(y)
        if self.down is not None and self.down_bn is not None:
            x = self.down_bn(self.down(x))
        return self.act(y + x)


class ResNet(nn.Module):
    """With the stem's pool in front of an identity, as in ResNet-18."""

    def __init__(self, act: Act, se: bool = False, first: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.act = act
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.blocks = nn.Sequential(
            Post(6, first, 1, act, se), Post(first, first, 1, act, se), Post(first, 8, 2, act, se),
            Post(8, 8, 1, act, se), Post(8, 8, 1, act, se),
        )  # fmt: skip
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.pool(self.act(self.bn(self.stem(x)))))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def by_hand(net: Any, x: Tensor, act: Act, *, alpha: float, skip_init: bool = True) -> Tensor:
    """Brock et al.: ``h' = shortcut + α·s·f(act(h)/β)``, a transition reads ``act(h)/β`` too."""
    h, variance = net.pool(net.stem(x)), 1.0
    for block in net.blocks.children():
        a = act(h) / variance**0.5
        y = block.conv3(act(block.conv2(act(block.conv1(a)))))
        if hasattr(block, "fc1"):
            y = 2 * y * torch.sigmoid(block.fc2(F.relu(block.fc1(y.mean((2, 3), keepdim=True)))))
        if hasattr(block, "down"):
            h, variance = block.down(a), 1.0
        h = h + alpha * (block.skip_init.gain if skip_init else 1.0) * y
        variance += alpha**2
    return net.head(act(h).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("act", [nn.ReLU(), nn.SiLU(), lambda x: x * torch.sigmoid(x)])
@pytest.mark.parametrize("se", [False, True])
@pytest.mark.parametrize("first", [6, 7])
def test_post_activation_becomes_pre_activation(act: Act, se: bool, first: int) -> None:
    """With an identity (first = 6) or a transition behind the stem's pool."""
    x = image(2, 3, 24, 32)
    module = converted(seeded(ResNet(act, se, first)), x)
    close(module(x.double()), by_hand(module, x.double(), act, alpha=0.2))
    gain = RELU if isinstance(act, nn.ReLU) else SILU
    found = gammas(module)
    assert found.pop("stem") == 1.0
    assert found == dict.fromkeys(found, pytest.approx(gain, rel=1e-9))


def test_without_gains_and_with_another_alpha() -> None:
    x = image(2, 3, 24, 32)
    module = converted(seeded(ResNet(nn.ReLU())), x, skip_init=False, alpha=0.5)
    assert not [each for each in module.modules() if isinstance(each, SkipInit)]
    expected = by_hand(module, x.double(), F.relu, alpha=0.5, skip_init=False)
    close(module(x.double()), expected)


@pytest.mark.parametrize("skip_init", [False, True])
def test_parameters_are_those_of_the_net_with_norms(skip_init: bool) -> None:
    model = seeded(ResNet(nn.ReLU(), se=True))
    counts = fresh(model, skip_init=skip_init).evidence["trainable_parameters"]
    assert counts["before"] == sum(p.numel() for p in model.parameters())
    assert counts["after"] == counts["before"] + (5 if skip_init else 0)


def test_operators_are_those_of_the_net_by_hand() -> None:
    """No pool, activation or sum more than before; two factors a block at most."""
    model = seeded(ResNet(nn.ReLU()))
    result = fresh(model)
    kinds = [
        [type(program.module(node)).__name__ for node in program.nodes if node.op == "call_module"]
        for program in (result.before, result.after)
    ]
    for kind in ("MaxPool2d", "ReLU", "Linear"):
        assert kinds[0].count(kind) == kinds[1].count(kind)
    assert kinds[1].count("ScaledWSConv2d") == kinds[0].count("Conv2d")
    assert kinds[1].count("SkipInit") == 5


def test_expected_variances_of_blocks() -> None:
    """β² before and after each block."""
    said = [
        note for note in notes(fresh(seeded(ResNet(nn.ReLU())))).values() if "residual b" in note
    ]
    spans = [note.split("variance ")[1] for note in said]
    assert spans == ["1 to 1.04", "1.04 to 1.08", "1.08 to 1.04", "1.04 to 1.08", "1.08 to 1.12"]


class Pre(nn.Module):
    """Pre-activation; the shortcut's convolution reads the activated value, or the raw one."""

    def __init__(self, inputs: int, outputs: int, stride: int, raw: bool, late: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        moves = stride != 1 or inputs != outputs
        self.pool = nn.AvgPool2d(stride) if moves and late else nn.Identity()
        self.down = (
            nn.Conv2d(inputs, outputs, 1, 1 if late else stride, bias=False) if moves else None
        )
        self.raw = raw

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.down is not None and self.raw:
            shortcut = self.down(self.pool(x))
        a = F.gelu(self.norm1(x))
        if self.down is not None and not self.raw:
            shortcut = self.down(self.pool(a))
        y: Tensor = self.conv2(F.gelu(self.norm2(self.conv1(a))))
        return y + shortcut


class PreNet(nn.Module):
    def __init__(self, raw: bool, pools: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 1, 1)
        self.blocks = nn.Sequential(
            Pre(6, 6, 1, raw, pools), Pre(6, 8, 2, raw, pools), Pre(8, 8, 1, raw, pools)
        )
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.norm(self.blocks(self.stem(x))))


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("pools", [False, True])
def test_pre_activation(raw: bool, pools: bool) -> None:
    x = image(2, 3, 24, 32)
    module = converted(seeded(PreNet(raw, pools)), x)
    h, variance = module.stem(x.double()), 1.0
    for block in module.blocks.children():
        a = F.gelu(h) / variance**0.5
        y = block.conv2(F.gelu(block.conv1(a)))
        if hasattr(block, "down"):
            h, variance = block.down(F.avg_pool2d(a, 2) if pools else a), 1.0
        h, variance = h + 0.2 * block.skip_init.gain * y, variance + 0.04
    close(module(x.double()), F.gelu(h))
    found = gammas(module)
    assert found.pop("stem") == 1.0
    assert found == dict.fromkeys(found, pytest.approx(GELU, rel=1e-9))


class Normed(nn.Module):
    """The norm and the activation of the whole block come first, the identity reads them too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.conv1 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a = F.silu(self.norm1(x))
        return a + self.conv2(F.silu(self.norm2(self.conv1(a))))  # type: ignore[no-any-return]


def test_identity_that_reads_what_is_normed_and_activated() -> None:
    """As in RegNet-V: the sum is activated, behind a norm that goes."""
    model = seeded(
        nn.Sequential(nn.Conv2d(3, 6, 3), Normed(), Normed(), nn.BatchNorm2d(6), nn.SiLU())
    )
    module = converted(model, X)
    h, variance = module.get_submodule("0")(X.double()), 1.0
    for block in (module.get_submodule(str(place)) for place in (1, 2)):
        y = block.conv2(F.silu(block.conv1(F.silu(h) / variance**0.5)))
        h, variance = h + 0.2 * block.skip_init.gain * y, variance + 0.04
    close(module(X.double()), F.silu(h))


class Inverted(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, ratio: int = 3) -> None:
        super().__init__()
        hidden = inputs * ratio
        self.expand = nn.Conv2d(inputs, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.fc1, self.fc2 = nn.Linear(hidden, 2), nn.Linear(2, hidden)
        self.project = nn.Conv2d(hidden, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.bn1(self.expand(x)))
        y = F.silu(self.bn2(self.depthwise(y)))
        squeezed = self.fc2(F.silu(self.fc1(y.mean((2, 3)))))
        y = y * F.hardsigmoid(squeezed)[:, :, None, None]
        y = self.bn3(self.project(y))
        return y + x if y.shape == x.shape else y


def test_inverted_residuals_have_a_linear_stream() -> None:
    """No activation on the stream: γ is 1 where the expansion reads it; gates are doubled."""
    model = seeded(
        nn.Sequential(Inverted(3, 4, 1), Inverted(4, 4, 1), Inverted(4, 4, 1), Inverted(4, 6, 2))
    )
    x = image(2, 3, 24, 32)
    module = converted(model, x)
    h, variance = x.double(), 1.0
    for block in (module.get_submodule(str(place)) for place in range(4)):
        y = F.silu(block.depthwise(F.silu(block.expand(h / variance**0.5))))
        gate = F.hardsigmoid(block.fc2(F.silu(block.fc1(y.mean((2, 3))))))
        y = block.project(2 * y * gate[:, :, None, None])
        identity = y.shape == h.shape
        h = h + 0.2 * block.skip_init.gain * y if identity else y
        variance = variance + 0.04 if identity else 1.0
    close(module(x.double()), h)
    for name, gamma in gammas(module).items():
        assert gamma == pytest.approx(1.0 if "expand" in name else SILU, rel=1e-9)


class Activated(nn.Module):
    """The branch ends in an activation, the sum does not (DarkNet); a drop stands between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(F.leaky_relu(self.norm(self.conv(x))))


def test_branches_that_end_in_an_activation_are_brought_to_variance_one() -> None:
    x = image(2, 3, 24, 32)
    module = converted(seeded(nn.Sequential(Activated(), Activated())), x)
    h = x.double()
    for place, variance in enumerate((1.0, 1.04)):
        block: Any = module.get_submodule(str(place))
        y = F.leaky_relu(block.conv(h / variance**0.5))
        h = h + 0.2 * 1.7048316271 * block.skip_init.gain * y
    torch.testing.assert_close(module(x.double()), h, rtol=1e-8, atol=1e-8)


# ---- other graphs ------------------------------------------------------------------------------


class Meeting(nn.Module):
    """Two layers whose results are added, or put side by side, before one that reads both."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.norm1, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.last = nn.Conv2d(8 if how == "cat" else 4, 4, 1)
        self.norm3 = nn.BatchNorm2d(4)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.relu(self.norm1(self.first(x))), self.norm2(self.second(x))
        y = a + b if self.how == "add" else a * b if self.how == "mul" else torch.cat((a, b), 1)
        return self.norm3(self.last(y))  # type: ignore[no-any-return]


RELU_VARIANCE, RELU_MEAN = (1 - 1 / torch.pi) / 2, (2 * torch.pi) ** -0.5


@pytest.mark.parametrize(
    ("how", "variance"),
    [
        ("add", RELU_VARIANCE + 1),
        ("cat", (RELU_VARIANCE + 1) / 2),
        ("mul", RELU_VARIANCE + RELU_MEAN**2),
    ],
)
def test_gamma_where_several_meet_is_of_the_variance(how: str, variance: float) -> None:
    found = gammas(converted(seeded(Meeting(how))))
    assert found["last"] == pytest.approx(variance**-0.5)


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 + 2 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(4 + 2 * i, 2, 3, padding=1) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        return torch.cat(features, 1)


def test_growing_concatenations_are_declined() -> None:
    """The first norm reads the stem's features alone, as a list of one."""
    result = fresh(seeded(Dense()))
    grows = "it normalises a concatenation that grows from layer to layer, as in DenseNets"
    assert set(reasons(result).values()) == {grows}
    assert norms_left(result) == len(result.declined) >= 2
    assert gammas(to_module(result.after))["convs.2"] == pytest.approx(RELU)


def test_norm_of_the_input_becomes_fixed() -> None:
    result = fresh(seeded(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))))
    (node,) = modules_called(result.after, ScaleShift)
    scale: Any = result.after.module(node)
    assert not scale.weight.requires_grad
    assert norms_left(result) == 0


def test_what_stays_is_listed() -> None:
    model = seeded(
        nn.Sequential(
            nn.ConvTranspose2d(3, 4, 2, 2), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 4, 1, groups=4), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4),
            nn.Softmax(1), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1),
        )
    )  # fmt: skip
    result = fresh(model)
    found = {name.lstrip("_"): reason for name, reason in reasons(result).items()}
    assert {name: reason.split(":")[0] for name, reason in found.items()} == {
        "1": "a standardised weight is not defined for '0' (ConvTranspose2d)",
        "4": "the filters of '3' (Conv2d) have one weight each, and standardised that is zero",
        "7": "it normalises each sample by its own values (GroupNorm)",
        "12": "the variance of what '11' (Conv2d) reads is not known",
    }
    assert "Softmax" in found["12"]
    assert sorted(gammas(to_module(result.after))) == ["13", "6", "8"]


def test_norms_of_skip_stay() -> None:
    model = seeded(Chain(nn.ReLU()))
    result = fresh(model, skip="norm1")
    assert reasons(result) == {"norm1": "it is of skip=norm1"}
    module = to_module(result.after)
    assert gammas(module) == {"second": pytest.approx(RELU)}
    assert type(module.get_submodule("first")) is nn.Conv2d


class Shared(nn.Module):
    """One layer that is called on the raw input and on an activated value."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(F.relu(self.norm(self.conv(x)))))  # type: ignore[no-any-return]


def test_shared_layers_stay_shared() -> None:
    x = image(2, 3, 24, 32)
    module: Any = converted(seeded(Shared()), x)
    assert len(list(module.parameters())) == 3
    conv = module.conv
    assert conv.gamma == 1.0
    hidden = conv(x.double())
    torch.testing.assert_close(
        module(x.double()), conv(RELU * F.relu(hidden)), rtol=1e-8, atol=1e-8
    )


def test_layer_that_cannot_be_converted_at_one_call_stays_at_all() -> None:
    class Twice(Shared):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(torch.softmax(self.norm(self.conv(x)), 1)))  # type: ignore[no-any-return]

    result = fresh(seeded(Twice()))
    assert norms_left(result) == 2
    (reason,) = set(reasons(result).values())
    assert reason.startswith("its layer is shared, and at 'conv' (conv_1) stays: the variance of")


def test_linear_layers_with_a_norm_are_standardised_and_classifiers_are_not() -> None:
    model = seeded(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Linear(8, 3)))
    module: Any = converted(model, image(4, 6))
    assert gammas(module) == {"0": 1.0}
    assert not module.get_submodule("3").bias.any()


def test_training_goes_on_in_the_converted_net() -> None:
    torch.manual_seed(0)
    module = to_module(fresh(seeded(ResNet(nn.ReLU(), se=True))).after).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    x, target = image(8, 3, 24, 32), torch.arange(8) % 3
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(module(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# ---- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("init=fresh,alpha=0", "alpha is positive and finite, not 0.0"),
        ("init=fresh,alpha=nan", "alpha is positive and finite, not nan"),
        ("init=fresh,keep_mean=true", "keep_mean goes with init=preserve"),
        ("alpha=0.3", "alpha, skip_init and seed go with init=fresh"),
        ("skip_init=false", "alpha, skip_init and seed go with init=fresh"),
        ("init=fresh,seed=x", "option 'seed' of 'bn_to_scaled_ws' takes int, not 'x'"),
        ("init=other", "takes preserve|fresh, not 'other'"),
    ],
)
def test_refuses_options(spec: str, message: str) -> None:
    with pytest.raises(PipelineSpecError) as error:
        fxopt.transform(Chain(nn.ReLU()), f"bn_to_scaled_ws{{{spec}}}", image())
    assert message in str(error.value)


# ---- graphs that were once got wrong -----------------------------------------------------------


class Written(nn.Module):
    """Layers and a forward as arguments; ``pair`` is a convolution with its norm."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        self.written = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.written(self, x)


def pair(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class SE(nn.Module):
    """A gate on any number of axes, from the mean or from mean and maximum (CBAM)."""

    def __init__(self, conv: Any, channels: int, both: bool = False) -> None:
        super().__init__()
        self.fc1, self.fc2 = conv(channels, 2, 1), conv(2, channels, 1)
        self.both = both

    def factors(self, x: Tensor) -> Tensor:
        axes = tuple(range(2, x.dim()))
        z = self.fc2(F.relu(self.fc1(x.mean(axes, keepdim=True))))
        if self.both:
            z = z + self.fc2(F.relu(self.fc1(x.amax(axes, keepdim=True))))
        return torch.sigmoid(z)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors(x)


@pytest.mark.parametrize("first", [False, True])
def test_users_own_factors_stay(first: bool) -> None:
    """A product by 2 of the user's beside the gate's own."""

    def forward(self: Any, x: Tensor) -> Any:
        y = self.gate(F.silu(self.a(x)))
        return (y * 2.0, self.b(y)) if first else (self.b(y), y * 2.0)

    module = converted(seeded(Written(forward, a=pair(3, 8), gate=SE(nn.Conv2d, 8), b=pair(8, 8))))
    h = F.silu(module.get_submodule("a.0")(X.double()))
    gate = module.get_submodule("gate")
    z = gate.fc2(F.relu(gate.fc1(h.mean((2, 3), keepdim=True))))
    gated = 2 * h * torch.sigmoid(z)
    found = dict(
        zip(
            ("doubled", "layer") if first else ("layer", "doubled"), module(X.double()), strict=True
        )
    )
    close(found["doubled"], 2 * gated)
    close(found["layer"], module.get_submodule("b.0")(gated))


def test_users_own_division_by_beta_stays() -> None:
    """It comes after the layer that the pass divides for."""
    factor = 1 / (1 + 0.2**2) ** 0.5

    def forward(self: Any, x: Tensor) -> Any:
        h = self.stem(x)
        h = h + self.b(F.relu(self.a(h)))
        return self.last(h), h * factor

    model = Written(forward, stem=pair(3, 6), a=pair(6, 6), b=pair(6, 6), last=pair(6, 4))
    module = converted(seeded(model))
    layer, value = module(X.double())
    close(layer, module.get_submodule("last.0")(value))


@pytest.mark.parametrize("early", [False, True])
def test_activation_that_the_branch_does_not_read(early: bool) -> None:
    """A sigmoid of the entry for another output: the shortcut reads the entry as the branch does."""

    def forward(self: Any, x: Tensor) -> Any:
        h = self.stem(x)
        aside = torch.sigmoid(h) if early else None
        total = self.b(F.relu(self.a(h))) + self.down(h)
        return total, aside if early else torch.sigmoid(h)

    model = Written(forward, stem=pair(3, 6), a=pair(6, 6), b=pair(6, 8), down=pair(6, 8))
    module = converted(seeded(model))
    h = module.get_submodule("stem.0")(X.double())
    a, b, down = (module.get_submodule(f"{name}.0") for name in ("a", "b", "down"))
    gain = next(m.gain for m in module.modules() if isinstance(m, SkipInit))
    total, aside = module(X.double())
    close(total, 0.2 * gain * b(F.relu(a(h))) + down(h))
    close(aside, torch.sigmoid(h))


def test_pool_that_others_read_stays_activated() -> None:
    """As the identity of a sum, as the operand of a layer, and as an output."""

    def forward(self: Any, x: Tensor) -> Any:
        p = F.max_pool2d(F.relu(self.stem(x)), 2)
        q = F.max_pool2d(p, 2)
        return F.relu(q + self.b(q)), self.other(p), p

    result = fresh(seeded(Written(forward, stem=pair(3, 6), b=pair(6, 6), other=pair(6, 4))))
    assert not [each for each in result.declined if "shares" in each.reason]
    module: Any = to_module(result.after).double().eval()
    _, other, p = module(X.double())
    expected = F.max_pool2d(F.relu(module.get_submodule("stem.0")(X.double())), 2)
    close(p, expected)
    close(other, module.get_submodule("other.0")(expected))


def test_shortcut_whose_pool_others_read() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        h = F.relu(self.stem(x))
        p = F.max_pool2d(h, 2)
        first = F.relu(p + self.b(F.relu(self.a(h))))
        return first, F.relu(p + self.c(p)), self.other(p)

    model = Written(
        forward, stem=pair(3, 6), a=pair(6, 6, 2), b=pair(6, 6), c=pair(6, 6), other=pair(6, 4)
    )
    result = fresh(seeded(model))
    assert not [each for each in result.declined if "shares" in each.reason]
    module: Any = to_module(result.after).double().eval()
    pooled = F.max_pool2d(F.relu(module.get_submodule("stem.0")(X.double())), 2)
    close(module(X.double())[2], module.get_submodule("other.0")(pooled))


class Tokens(nn.Module):
    """A linear layer whose norm sees all tokens as one batch (LeViT)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(16, 16, bias=False), nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return F.relu(self.norm(x.flatten(0, 1)).reshape_as(x))


def test_norm_behind_a_view_goes_with_its_layer() -> None:
    model = seeded(nn.Sequential(Tokens(), Tokens()))
    result = fresh(model, image(4, 5, 16))
    counts = result.evidence["trainable_parameters"]
    assert (norms_left(result), result.declined, counts["after"]) == (0, (), counts["before"])
    x = image(4, 5, 16).double()
    module: Any = to_module(result.after).double().eval()
    first, second = module.get_submodule("0.linear"), module.get_submodule("1.linear")
    assert (first.gamma, second.gamma) == (1.0, pytest.approx(RELU))
    close(module(x), F.relu(second(F.relu(first(x)))))


def test_norm_over_another_axis_stays() -> None:
    result = fresh(seeded(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(5))), image(4, 5, 6))
    assert list(reasons(result).values()) == [
        "it normalises axis 1 of 3 and '0' has its channels on another"
    ]


class OptionA(nn.Module):
    """A shortcut of every second pixel and channels of zeros (ResNet, option A)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 3, 3))


@pytest.mark.parametrize(
    ("shortcut", "after"),
    [
        (OptionA(), "1.04 to 0.56"),
        (nn.Identity(), "1.04 to 1.08"),
        (Written(lambda self, x: 0.5 * x), "1.04 to 0.3"),
    ],
)
def test_what_a_shortcut_does_counts(shortcut: nn.Module, after: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = F.relu(self.stem(x))
        h = F.relu(h + self.b(F.relu(self.a(h))))
        return F.relu(self.shortcut(h) + self.d(F.relu(self.c(h))))

    wide, stride = (12, 2) if isinstance(shortcut, OptionA) else (6, 1)
    model = Written(
        forward, stem=pair(3, 6), a=pair(6, 6), b=pair(6, 6), c=pair(6, wide, stride),
        d=pair(wide, wide), shortcut=shortcut,
    )  # fmt: skip
    said = [note for note in notes(fresh(seeded(model))).values() if note.startswith("residual")]
    assert said[1].endswith(after)


class Dropped(nn.Module):
    """Stochastic depth, by hand: in evaluation nothing happens."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * torch.bernoulli(torch.full((x.shape[0], 1, 1, 1), 0.8)) / 0.8


def test_stochastic_depth_by_hand() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.last(F.relu(h + self.drop(self.b(F.relu(self.a(h))))))  # type: ignore[no-any-return]

    model = Written(
        forward, stem=pair(3, 6), a=pair(6, 6), b=pair(6, 6), last=pair(6, 4), drop=Dropped()
    )
    result = fresh(seeded(model))
    assert (norms_left(result), result.declined) == (0, ())
    assert "residual block: branch times 0.2, variance 1 to 1.04" in notes(result).values()


def test_a_second_time_nothing_is_done() -> None:
    first = fresh(seeded(ResNet(nn.ReLU(), se=True)))
    again = fxopt.run_pass(BnToScaledWS(init="fresh"), first.after)
    assert (again.rewritten, again.declined) == ((), ())


@pytest.mark.parametrize(
    ("conv", "norm", "shape"),
    [(nn.Conv1d, nn.BatchNorm1d, (2, 3, 16)), (nn.Conv3d, nn.BatchNorm3d, (2, 3, 5, 6, 7))],
)
@pytest.mark.parametrize("both", [False, True])
def test_gates_in_one_and_three_dimensions(
    conv: Any, norm: Any, shape: tuple[int, ...], both: bool
) -> None:
    model = nn.Sequential(
        conv(3, 8, 3), norm(8), nn.SiLU(), SE(conv, 8, both), conv(8, 4, 1), norm(4)
    )
    x = image(*shape)
    module = converted(seeded(model), x)
    assert gammas(module) == {"0": 1.0, "4": pytest.approx(SILU)}
    h = F.silu(module.get_submodule("0")(x.double()))
    axes, gate = tuple(range(2, h.dim())), module.get_submodule("3")
    z = gate.fc2(F.relu(gate.fc1(h.mean(axes, keepdim=True))))
    if both:
        z = z + gate.fc2(F.relu(gate.fc1(h.amax(axes, keepdim=True))))
    close(module(x.double()), module.get_submodule("4")(2 * h * torch.sigmoid(z)))


def test_no_layer_and_norms_without_statistics() -> None:
    assert norms_left(fresh(seeded(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())))) == 0
    norm = nn.BatchNorm2d(3, track_running_stats=False)
    assert (
        norms_left(fresh(seeded(nn.Sequential(norm, nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))))) == 0
    )


def test_gains_have_the_dtype_of_their_branch() -> None:
    model = seeded(ResNet(nn.ReLU())).to(torch.bfloat16)
    model.register_parameter("phase", nn.Parameter(torch.zeros(2, dtype=torch.complex64)))
    module = to_module(fresh(model, image(2, 3, 24, 32, dtype=torch.bfloat16)).after)
    gains = [each.gain for each in module.modules() if isinstance(each, SkipInit)]
    assert {gain.dtype for gain in gains} == {torch.bfloat16}


def test_everything_that_is_drawn_is_trained() -> None:
    model = seeded(Chain(nn.ReLU())).requires_grad_(False)
    assert all(p.requires_grad for p in fresh(model).after.graph_module.parameters())
