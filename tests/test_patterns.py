"""Inverted residual blocks are found by structure, however they are written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from inverted import Block, Net, swish
from seeded import image, seeded
from torch import Tensor, nn

import fxopt
from fxopt.blocks import InvertedResidual, NearMiss
from fxopt.patterns import inverted_residuals


def found(*blocks: nn.Module, last: int = 6) -> tuple[InvertedResidual | NearMiss, ...]:
    return inverted_residuals(fxopt.capture(seeded(Net(blocks, last=last)), image(2, 3, 9, 13)))


def only(block: nn.Module, last: int = 6) -> InvertedResidual:
    (it,) = found(block, last=last)
    assert isinstance(it, InvertedResidual), it.reason
    return it


def miss(block: nn.Module, last: int = 6) -> str:
    (it,) = found(block, last=last)
    assert isinstance(it, NearMiss)
    return it.reason


@pytest.mark.parametrize("act", [F.relu6, nn.SiLU(), swish, nn.PReLU(18), F.hardswish, torch.tanh])
def test_any_activation(act: Any) -> None:
    block = only(Block(act=act))
    assert block.expand is not None
    assert block.inner
    assert block.activation
    assert block.residual is not None


def test_parts_of_a_whole_block() -> None:
    block = only(Block(se=True, act=swish))
    assert block.kind == "MBConv"
    assert block.path == "blocks.0"
    assert str(block.expand and block.expand.conv.target) == "blocks.0.expand"
    assert str(block.spatial.norm and block.spatial.norm.target) == "blocks.0.norm2"
    assert block.gate is not None
    assert block.gate.product.target is torch.mul
    assert block.project is not None
    assert str(block.end.target) == "blocks.0.norm3"
    assert block.obstacle == ""


def test_without_norms_and_without_activations() -> None:
    block = only(Block(norm=False, act=lambda x: x))
    assert block.inner == block.activation == ()
    assert block.spatial.norm is None


class Handwritten(nn.Module):
    """Parameters of its own, functional layers, a residual in place, SE by average pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(12, 6, 1, 1))
        self.spread = nn.Parameter(torch.randn(12, 1, 3, 3))
        self.down = nn.Parameter(torch.randn(6, 12, 1, 1))
        self.squeeze, self.excite = nn.Conv2d(12, 3, 1), nn.Conv2d(3, 12, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (12, 12, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.norms[0](F.conv2d(x, self.up)))
        y = F.leaky_relu(self.norms[1](F.conv2d(y, self.spread, padding=1, groups=12)))
        pooled = F.avg_pool2d(y, y.shape[2:])  # type: ignore[arg-type]
        y = self.excite(F.relu(self.squeeze(pooled))).sigmoid() * y
        y = self.norms[2](F.conv2d(y, self.down))
        y += x
        return y


def test_a_block_by_hand() -> None:
    block = only(Handwritten())
    assert block.gate is not None
    assert block.residual is not None
    assert block.path == "blocks.0"
    program = fxopt.capture(seeded(Net([Handwritten()])), image(2, 3, 9, 13))
    for weights in ("random", "linearize", "compose"):
        result = fxopt.run_pass(fxopt.passes.FuseMBConv(weights=weights), program)  # type: ignore[arg-type]
        assert len(result.rewritten) == 1


class BatchFromTheInput(nn.Module):
    """Reads the batch size where the model begins and uses it in the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(se=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        block = self.block
        y = block.act(block.norm1(block.expand(x)))
        y = block.act(block.norm2(block.depthwise(y)))
        gate = torch.sigmoid(block.restore(F.relu(block.reduce(y.mean((2, 3))))))
        y = block.norm3(block.project(y * gate.view(batch, -1, 1, 1))) + x
        logits: Tensor = self.head(y.mean((2, 3)))
        return logits


def test_a_batch_size_from_elsewhere_binds_nothing() -> None:
    program = fxopt.capture(seeded(BatchFromTheInput()), image(2, 6, 9, 13))
    (block,) = inverted_residuals(program)
    assert isinstance(block, InvertedResidual)
    assert block.gate is not None
    assert block.residual is not None


def test_ratio_1_after_a_projection_is_no_expansion() -> None:
    first, second, third = found(Block(ratio=1), Block(ratio=1), Block(6, 8, ratio=1), last=8)
    for block in (first, second, third):
        assert isinstance(block, InvertedResidual)
        assert block.expand is None
    assert isinstance(third, InvertedResidual)
    assert [b.stage for b in (first, second, third)] == [1, 1, 2]  # type: ignore[union-attr]


def test_stages_begin_where_no_residual_can_be() -> None:
    blocks = found(
        Block(), Block(), Block(6, 6, stride=2), Block(), Block(6, 8), Block(8, 8, ratio=1), last=8
    )
    assert [block.stage for block in blocks if isinstance(block, InvertedResidual)] == [
        1,
        1,
        2,
        2,
        3,
        3,
    ]


class Dropped(Block):
    """Stochastic depth between the projection and the sum, and a layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout2d(0.3)
        self.scale = nn.Parameter(torch.full((6, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.drop(self.norm3(self.project(self.inside(x)))) * self.scale + x
        return y


def test_stochastic_depth_and_layer_scale_are_of_the_residual() -> None:
    assert only(Dropped()).residual is not None


def test_a_flat_model_names_blocks_by_their_convolution() -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU(),
                   nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU(),
                   nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)]  # fmt: skip
    program = fxopt.capture(seeded(nn.Sequential(*layers)), image(2, 3, 9, 13))
    assert [b.path for b in inverted_residuals(program)] == ["5", "13"]  # type: ignore[union-attr]


# ---- fused ---------------------------------------------------------------------------------


class Fused(nn.Module):
    def __init__(self, ratio: int) -> None:
        super().__init__()
        hidden = 6 * ratio
        self.conv = nn.Conv2d(6, hidden, 3, padding=1)
        self.norm = nn.BatchNorm2d(hidden)
        self.project = nn.Conv2d(hidden, 6, 1) if ratio > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(F.silu(self.norm(self.conv(x)))) + x
        return y


@pytest.mark.parametrize("ratio", [1, 4])
def test_fused_blocks_as_they_are_written(ratio: int) -> None:
    block = only(Fused(ratio))
    assert block.kind == "Fused-MBConv"
    assert (block.project is None) == (ratio == 1)


def test_a_bottleneck_is_no_fused_block() -> None:
    class Bottleneck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, 1)
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.up(F.relu(self.conv(F.relu(self.down(x))))) + x)

    assert found(Bottleneck()) == ()


# ---- near misses ---------------------------------------------------------------------------


class Leaks(Block):
    """An inner value has a second reader."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def forward(self, x: Tensor) -> Tensor:
        raw = self.norm1(self.expand(x))  # type: ignore[misc]
        wide = F.relu6(raw)
        y = F.relu6(self.norm2(self.depthwise(wide)))
        out: Tensor = self.norm3(self.project(y)) + x
        return out + {"norm": raw, "activation": wide, "depthwise": y}[self.where].mean(
            1, keepdim=True
        )


@pytest.mark.parametrize(
    ("where", "value"), [("norm", "'blocks.0.norm1'"), ("activation", "relu6"), ("depthwise", "relu6_1")]
)  # fmt: skip
def test_a_second_reader_of_an_inner_value(where: str, value: str) -> None:
    (it,) = found(Leaks(where))
    reason = it.reason if isinstance(it, NearMiss) else it.obstacle
    assert value in reason
    assert "read by" in reason
    assert "mean" in reason


def test_an_inner_value_that_is_an_output() -> None:
    class Returned(Block):
        def forward(self, x: Tensor) -> Any:
            inside = self.inside(x)
            return self.norm3(self.project(inside)), inside

    program = fxopt.capture(seeded(Returned()), image(2, 6, 9, 13))
    (it,) = inverted_residuals(program)
    assert isinstance(it, NearMiss)
    assert it.reason == "'relu6_1' is read by 'project' and an output"


class Shuffled(Block):
    def inside(self, x: Tensor) -> Tensor:
        y = F.relu6(self.norm2(self.depthwise(F.relu6(self.norm1(self.expand(x))))))  # type: ignore[misc]
        return F.channel_shuffle(y, 2)


def test_near_misses_say_why() -> None:
    assert "'channel_shuffle' (copy), not to a linear pointwise" in miss(Shuffled())
    assert only(Block(dilation=2, padding=2)).obstacle == "its dilation is (2, 2)"


class PostActivated(Block):
    """Activated after the sum, as a ResNet is; where there is no sum, after the projection."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


@pytest.mark.parametrize(("outputs", "stride"), [(6, 1), (8, 1), (6, 2)])
def test_what_is_inverted_may_be_activated_after_all(outputs: int, stride: int) -> None:
    block = only(PostActivated(6, outputs, stride=stride), last=outputs)
    assert block.expand is not None
    assert (block.residual is not None) == (outputs == 6 and stride == 1)


def test_pointwise_and_depthwise_in_turns_are_no_block() -> None:
    """MobileNetV1: what is activated and widens no more than its projection is not inverted."""
    assert "an activation follows it" in miss(PostActivated(6, 24), last=24)
    assert "an activation follows it" in miss(PostActivated(6, 6, ratio=1, stride=2))


NOTHING = [
    lambda x: x.contiguous().clone(), lambda x: x.to(memory_format=torch.channels_last).float(),
    lambda x: x.detach(), nn.Dropout2d(0.1), nn.Identity(), lambda x: torch.maximum(x, torch.zeros_like(x)),
]  # fmt: skip


@pytest.mark.parametrize("nothing", NOTHING)
def test_what_does_nothing_may_stand_between(nothing: Any) -> None:
    assert only(Block(before=nothing)).expand is not None
    assert only(Block(act=lambda x: nothing(F.relu(x)))).activation


BETWEEN = [
    (lambda x: torch.channel_shuffle(x, 2), "'channel_shuffle' stands between its expansion 'blocks.0.expand'"),
    (lambda x: F.pad(F.pad(x, (1, 1, 0, 0)), (0, 0, 1, 1)), "'pad' stands between its expansion"),
    (lambda x: x.softmax(1), "'softmax' stands between its expansion"),
    (lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), "'permute' stands between"),
]  # fmt: skip


@pytest.mark.parametrize(("between", "reason"), BETWEEN)
def test_what_stands_between_expansion_and_depthwise(between: Any, reason: str) -> None:
    assert reason in miss(Block(before=between))


def test_expansions_of_another_kind() -> None:
    grouped = Block()
    grouped.expand = nn.Conv2d(6, 18, 1, groups=2)
    assert "'blocks.0.expand' has groups, or a weight" in miss(grouped)
    normed = Block()
    normed.expand = nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 18, 1))
    assert "a weight that the forward computes" in miss(normed)


def test_blocks_of_ratio_1_after_a_transition_have_no_expansion() -> None:
    wider = nn.Sequential(nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
    blocks = found(wider, Block(8, 8, ratio=1), Block(8, 8, ratio=1), last=8)
    assert [getattr(block, "expand", "miss") for block in blocks] == [None, None]
    blocks = found(wider[:3], Block(8, 8), Block(8, 8, ratio=1), last=8)
    assert [getattr(block, "expand", "miss") is None for block in blocks] == [False, True]


def classic(self: Any, x: Tensor, expand: str = "") -> Tensor:
    """Squeeze-excite as most people write it."""
    b, c, h, w = x.size()
    y = F.adaptive_avg_pool2d(x, 1).view(b, c)
    y = torch.sigmoid(self.restore(F.relu(self.reduce(y)))).view(b, c, 1, 1)
    if expand == "as":
        return x * y.expand_as(x)
    return x * (y.expand(b, c, h, w) if expand else y)


def by_steps(self: Any, x: Tensor) -> Tensor:
    y = torch.sigmoid(self.restore(F.relu(self.reduce(x.mean(3).mean(2)))))
    return y[:, :, None, None] * x


def flattened(self: Any, x: Tensor) -> Tensor:
    y = torch.sigmoid(self.restore(F.relu(self.reduce(x.flatten(2).mean(-1)))))
    return x * y.unsqueeze(-1).unsqueeze(-1)


GATES = [
    classic, lambda self, x: classic(self, x, "as"), lambda self, x: classic(self, x, "sizes"),
    by_steps, flattened,
]  # fmt: skip


@pytest.mark.parametrize("ratio", [1, 3])
@pytest.mark.parametrize("gate", GATES)
def test_squeeze_excites_as_people_write_them(gate: Any, ratio: int) -> None:
    class Gated(Block):
        def gate(self, x: Tensor) -> Tensor:
            return gate(self, x)  # type: ignore[no-any-return]

    block = only(Gated(se=True, ratio=ratio, stride=2))
    assert block.gate is not None
    assert block.obstacle == ""
    program = fxopt.capture(seeded(Net([Gated(se=True, ratio=ratio)])), image(2, 3, 9, 13))
    for weights in ("random", "linearize", "compose", "fit"):
        for se in ("keep", "drop"):
            data = image(24, 3, 9, 13) if weights == "fit" else None
            which = fxopt.passes.FuseMBConv(weights=weights, se=se, calibration=data)  # type: ignore[arg-type]
            after = fxopt.run_pass(which, program).after
            (found,) = after.graph_module(image(3, 3, 12, 8))
            assert found.shape == (3, 5)
            assert not after.graph_module.get_submodule("blocks.0.depthwise").training


def test_a_batch_size_from_the_input_moves_with_the_gate() -> None:
    class FromInput(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = self.act(self.norm2(self.depthwise(x)))
            squeezed = self.restore(F.relu(self.reduce(y.mean((2, 3)))))  # type: ignore[misc]
            y = y * torch.sigmoid(squeezed).view(x.size(0), -1, 1, 1)
            return self.norm3(self.project(y)) + x  # type: ignore[no-any-return]

    blocks = [FromInput(se=True, ratio=1) for _ in range(8)]
    program = fxopt.capture(seeded(Net(blocks)), image(2, 3, 9, 13))
    for weights, se in (
        ("random", "keep"),
        ("linearize", "keep"),
        ("linearize", "drop"),
        ("compose", "drop"),
    ):
        which = fxopt.passes.FuseMBConv(weights=weights, se=se)  # type: ignore[arg-type]
        after = fxopt.run_pass(which, program).after
        assert after.graph_module(image(3, 3, 7, 8))[0].shape == (3, 5)


def test_a_swish_on_one_position_is_no_gate() -> None:
    class OnePosition(Block):
        def inside(self, x: Tensor) -> Tensor:
            x = F.relu(self.norm1(self.expand(x)))  # type: ignore[misc]
            return self.gate(swish(self.norm2(self.depthwise(x))))

    program = fxopt.capture(seeded(Net([OnePosition()])), image(2, 3, 1, 1))
    (block,) = inverted_residuals(program)
    assert isinstance(block, InvertedResidual)
    assert block.gate is None
    assert len(block.activation) == 2


class Blurred(Block):
    """Anti-aliasing: a depthwise convolution with a filter that is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("blur", torch.ones(18, 1, 3, 3) / 9)

    def inside(self, x: Tensor) -> Tensor:
        return F.relu6(F.conv2d(self.expand(x), self.blur, padding=1, groups=18))  # type: ignore


def test_a_fixed_filter() -> None:
    assert miss(Blurred()) == "its kernel is a buffer, a fixed filter that is not trained"


class Computed(Block):
    """A kernel that depends on the input, and groups that depend on the batch."""

    def inside(self, x: Tensor) -> Tensor:
        y = F.relu6(self.norm1(self.expand(x)))  # type: ignore[misc]
        kernels = self.depthwise.weight * x.mean((1, 2, 3)).view(-1, 1, 1, 1, 1)
        size = y.size(0) * 18
        y = F.conv2d(
            y.reshape(1, -1, y.size(2), y.size(3)), kernels.flatten(0, 1), padding=1, groups=size
        )
        return F.relu6(self.norm2(y.view(x.size(0), 18, x.size(2), x.size(3))))


def test_a_kernel_that_the_forward_computes() -> None:
    assert miss(Computed()) == "its weight is computed by the forward"


def linear_pair(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """A depthwise and a pointwise convolution with norms and no activation."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs), nn.BatchNorm2d(inputs),
        nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs),
    )  # fmt: skip


class Beside(nn.Module):
    """The shortcut of GhostNet's strided blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.short = linear_pair(6, 8, 2)
        self.main = nn.Conv2d(6, 8, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = F.relu(self.main(x)) + self.short(x)
        return y


class InARow(nn.Module):
    """Xception's: activations come before separable convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = linear_pair(6, 6), linear_pair(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(F.relu(self.first(F.relu(x)))) + x
        return y


def test_linear_branches_are_no_blocks() -> None:
    branch = "with the pointwise convolution it is a linear branch beside others"
    assert miss(Beside(), last=8) == branch
    activated, second = found(InARow())
    assert isinstance(activated, NearMiss)
    assert "an activation follows it" in activated.reason
    assert isinstance(second, NearMiss)
    assert second.reason == branch


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = linear_pair(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.pair(x) + x
        return y


@pytest.mark.parametrize(("block", "last"), [(linear_pair(6, 8, 2), 8), (Around(), 6)])
def test_a_linear_pair_on_the_way_is_a_block_of_ratio_1(block: nn.Module, last: int) -> None:
    assert only(block, last).expand is None


def test_a_stage_begins_where_something_else_changed_the_shape() -> None:
    blocks = found(Block(), nn.Conv2d(6, 8, 2, 2), Block(8, 8), Block(8, 8), last=8)
    assert [block.stage for block in blocks] == [1, 2, 2]  # type: ignore[union-attr]


def test_a_depth_multiplier() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Conv2d(6, 8, 1)
            self.spread = nn.Conv2d(8, 16, 3, padding=1, groups=8)
            self.down = nn.Conv2d(16, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.relu(self.spread(F.relu(self.up(x))))) + x  # type: ignore[no-any-return]

    assert only(Doubled()).obstacle == "its depth multiplier is 2; it must be 1"


def test_an_expansion_with_a_stride_makes_a_block_of_ratio_1() -> None:
    """What strides before the depthwise is no expansion; the rest is a block all the same."""

    class Strided(Block):
        def __init__(self) -> None:
            super().__init__()
            self.expand = nn.Conv2d(6, 18, 1, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm3(self.project(self.inside(x)))
            return y

    assert only(Strided()).expand is None


def test_norms_that_are_no_map() -> None:
    block = Block()
    block.norm2 = nn.GroupNorm(3, 18)
    assert (
        only(block).obstacle
        == "its norm 'blocks.0.norm2' is no fixed map per channel: it normalises each sample by its own values (GroupNorm)"
    )
    block = Block()
    block.norm1 = nn.BatchNorm2d(18, track_running_stats=False)
    assert "no running statistics" in only(block).obstacle


def test_a_pad_with_a_value() -> None:
    class Padded(Block):
        def __init__(self, **options: Any) -> None:
            super().__init__(padding=0)
            self.options = options

        def inside(self, x: Tensor) -> Tensor:
            x = F.pad(F.relu6(self.norm1(self.expand(x))), (1, 1, 1, 1), **self.options)  # type: ignore[misc]
            return F.relu6(self.norm2(self.depthwise(x)))

    assert "puts 1.0 around the expanded map" in only(Padded(value=1.0)).obstacle
    assert only(Padded()).obstacle == ""
    assert only(Padded(mode="reflect")).obstacle == ""


def test_quantised_blocks_are_told_to_be_fused_before() -> None:
    class Quantised(Block):
        def inside(self, x: Tensor) -> Tensor:
            x = F.relu6(self.norm1(self.expand(x)))  # type: ignore[misc]
            x = torch.fake_quantize_per_tensor_affine(x, 0.1, 0, 0, 255)
            return F.relu6(self.norm2(self.depthwise(x)))

    (it,) = found(Quantised())
    reason = it.obstacle if isinstance(it, InvertedResidual) else it.reason
    assert "fuse before quantising" in reason
