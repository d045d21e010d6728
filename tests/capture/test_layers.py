"""Layers in every spelling: modules, functions, subclasses, computed weights, opaque leaves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from capture.checks import assert_same, captured, code, image, net, seeded, targets
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from fxopt.capture import capture
from fxopt.captured import to_module
from fxopt.errors import CaptureError


def test_functional_convolution_with_plain_parameters_becomes_a_layer() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, self.offset, stride=2, padding=(1, 0), groups=1)

    members = {
        "kernel": nn.Parameter(torch.randn(4, 3, 3, 3)),
        "offset": nn.Parameter(torch.rand(4)),
    }
    program = assert_same(net(forward, **members), image())
    assert isinstance(program.module(program.nodes[1]), nn.Conv2d)


def test_functional_linear_with_plain_parameters_becomes_a_layer() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix)

    program = assert_same(net(forward, matrix=nn.Parameter(torch.randn(4, 7))), image())
    assert isinstance(program.module(program.nodes[1]), nn.Linear)


def test_functional_convolution_with_a_buffer_as_weight() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.blur, stride=2, groups=3)

    assert_same(net(forward, blur=torch.rand(3, 1, 3, 3)), image())


def test_functional_norm_follows_the_mode() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.mu, self.var, self.w, self.b, training=self.training, momentum=0.3, eps=1e-3
        )

    members = {"mu": torch.randn(3), "var": torch.rand(3) + 0.5, "w": nn.Parameter(torch.rand(3)),
               "b": nn.Parameter(torch.rand(3))}  # fmt: skip
    program = assert_same(net(forward, **members), image())
    assert isinstance(program.module(program.nodes[1]), nn.BatchNorm2d)


def test_functional_norm_on_sequences_and_volumes() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        flat = F.batch_norm(x.mean((2, 3)), self.mu, self.var, self.w, self.w, self.training)
        line = F.batch_norm(x.mean(2), self.mu, self.var, None, None, self.training)
        volume = F.batch_norm(x.unsqueeze(2), self.mu, self.var, training=not self.training)
        return x + volume.squeeze(2) + line.unsqueeze(2) + flat[:, :, None, None]

    members = {"mu": torch.randn(3), "var": torch.rand(3) + 0.5, "w": nn.Parameter(torch.rand(3))}
    assert_same(net(forward, **members), image())


def test_functional_norm_frozen_in_both_modes() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mu, self.var, self.w, self.b, training=False)

    members = {"mu": torch.randn(3), "var": torch.rand(3) + 0.5, "w": nn.Parameter(torch.rand(3)),
               "b": nn.Parameter(torch.rand(3))}  # fmt: skip
    assert_same(net(forward, **members), image())


def test_one_set_of_statistics_used_in_two_modes() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.mu, self.var, training=True)
        return y + F.batch_norm(x * 2, self.mu, self.var, training=False)

    assert_same(net(forward, mu=torch.randn(3), var=torch.rand(3) + 0.5), image())


def test_norm_without_statistics() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = F.batch_norm(x, None, None, training=True)
        return self.norm(y) + F.instance_norm(x) + F.batch_norm(x, None, None, self.w, self.w, True)

    norm = nn.BatchNorm2d(3, track_running_stats=False)
    assert_same(net(forward, norm=norm, w=nn.Parameter(torch.rand(3))), image())


def test_norm_modules_of_many_kinds() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        for norm in self.norms:
            x = norm(x)
        return x

    norms = [
        nn.BatchNorm2d(4, momentum=None), nn.BatchNorm2d(4, affine=False), nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4), nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        nn.LayerNorm((6, 5)), nn.LayerNorm(5, bias=False), nn.LocalResponseNorm(2), nn.RMSNorm(5),
        nn.GroupNorm(1, 4, affine=False), nn.LayerNorm((4, 6, 5), elementwise_affine=False),
    ]  # fmt: skip
    assert_same(net(forward, norms=nn.ModuleList(norms)), image(2, 4, 6, 5))


def test_norm_subclass_with_its_own_forward() -> None:
    class LayerNorm2d(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            x = x.permute(0, 2, 3, 1)
            x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
            return x.permute(0, 3, 1, 2)

    program = assert_same(seeded(nn.Sequential(LayerNorm2d(3), nn.Conv2d(3, 4, 1))), image())
    assert "LayerNorm" in "".join(targets(program))


def test_batch_norm_subclass_with_activation() -> None:
    class NormAct(nn.BatchNorm2d):
        def __init__(self, features: int) -> None:
            super().__init__(features)
            self.act = nn.SiLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            if self.training and self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
            x = F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, self.training,
                self.momentum, self.eps,
            )  # fmt: skip
            return self.act(x)

    program = assert_same(seeded(nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4))), image())
    assert targets(program) == ["Conv2d", "BatchNorm2d", "SiLU"]


def test_batch_norm_subclass_that_scales_before_super() -> None:
    class Scaled(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * 2) + 1

    assert_same(seeded(nn.Sequential(nn.Conv2d(3, 4, 3), Scaled(4))), image())


def test_batch_norm_subclass_with_momentum_none_is_eval_only() -> None:
    class Same(nn.BatchNorm2d):
        pass

    model = seeded(nn.Sequential(nn.Conv2d(3, 4, 3), Same(4, momentum=None)))
    assert_same(model, image(), eval_only=True)


def test_convolution_subclass_with_weight_standardisation() -> None:
    class StdConv2d(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = F.batch_norm(
                self.weight.reshape(1, self.out_channels, -1), None, None, training=True, eps=1e-6
            ).reshape_as(self.weight)
            return self._conv_forward(x, weight, self.bias)

    program = assert_same(seeded(nn.Sequential(StdConv2d(3, 4, 3), nn.ReLU())), image())
    assert "conv2d" in targets(program)


def test_convolution_subclass_with_same_padding() -> None:
    class SameConv2d(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            h, w = x.size()[-2:]
            kh, kw = self.weight.size()[-2:]
            oh, ow = math.ceil(h / self.stride[0]), math.ceil(w / self.stride[1])
            ph = max((oh - 1) * self.stride[0] + kh - h, 0)
            pw = max((ow - 1) * self.stride[1] + kw - w, 0)
            if ph > 0 or pw > 0:
                x = F.pad(x, [pw // 2, pw - pw // 2, ph // 2, ph - ph // 2])
            return F.conv2d(x, self.weight, self.bias, self.stride)

    model = seeded(nn.Sequential(SameConv2d(3, 4, 3, stride=2), SameConv2d(4, 4, 5)))
    assert_same(model, image())


def test_convolution_subclass_that_only_renames_the_class() -> None:
    class Conv(nn.Conv2d):
        pass

    program = assert_same(
        seeded(nn.Sequential(Conv(3, 4, 3, padding=1, padding_mode="circular"))), image()
    )
    assert len(targets(program)) >= 1


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_convolution_with_a_padding_mode(mode: str) -> None:
    layer = nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode=mode, stride=2)
    assert_same(seeded(nn.Sequential(layer)), image())


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_convolution_with_named_padding(padding: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.conv(x) + F.conv2d(x, self.kernel, padding=padding, dilation=2)

    members = {"conv": nn.Conv2d(3, 4, 3, padding=padding, dilation=2),
               "kernel": nn.Parameter(torch.randn(4, 3, 3, 3))}  # fmt: skip
    assert_same(net(forward, **members), image())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(3, 4, 3), (2, 3, 9)), (nn.Conv3d(3, 4, 3), (2, 3, 5, 6, 7)),
        (nn.ConvTranspose1d(3, 4, 3), (2, 3, 9)), (nn.ConvTranspose2d(3, 4, 3, 2), (2, 3, 5, 4)),
        (nn.ConvTranspose3d(3, 2, 2), (2, 3, 3, 4, 5)), (nn.BatchNorm1d(3), (2, 3, 9)),
        (nn.BatchNorm1d(3), (4, 3)), (nn.BatchNorm3d(3), (2, 3, 4, 5, 6)),
        (nn.SyncBatchNorm(3), (2, 3, 4, 5)), (nn.PixelShuffle(2), (2, 4, 3, 5)),
        (nn.PixelUnshuffle(2), (2, 3, 4, 6)), (nn.Upsample(scale_factor=2), (2, 3, 4, 5)),
        (nn.Upsample(size=(7, 9), mode="bilinear", align_corners=True), (2, 3, 4, 5)),
        (nn.ReflectionPad2d(1), (2, 3, 4, 5)), (nn.ZeroPad2d((1, 0, 2, 0)), (2, 3, 4, 5)),
        (nn.Flatten(), (2, 3, 4, 5)), (nn.Unflatten(1, (3, 2)), (2, 6, 5)), (nn.Identity(), (2, 3)),
        (nn.Softmax(1), (2, 3, 4)), (nn.Softmax2d(), (2, 3, 4, 5)), (nn.PReLU(3), (2, 3, 4, 5)),
        (nn.GLU(1), (2, 4, 5)), (nn.MaxPool2d(2, return_indices=True), (2, 3, 4, 6)),
        (nn.AdaptiveAvgPool2d((3, None)), (2, 3, 7, 5)), (nn.AdaptiveMaxPool2d(2), (2, 3, 7, 5)),
        (nn.FractionalMaxPool2d(2, output_ratio=0.5), (2, 3, 8, 6)), (nn.LPPool2d(2, 2), (2, 3, 4, 6)),
        (nn.Bilinear(3, 3, 4), None), (nn.CosineSimilarity(), None), (nn.PairwiseDistance(), None),
        (nn.Fold((4, 6), 2, stride=2), (2, 12, 6)), (nn.Unfold(2), (2, 3, 4, 5)),
        (nn.ChannelShuffle(2), (2, 4, 3, 5)), (nn.RReLU(), (2, 3, 4)), (nn.Dropout1d(), (2, 3, 4)),
        (nn.Dropout3d(), (2, 3, 2, 4, 3)), (nn.FeatureAlphaDropout(), (2, 3, 4, 5)),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 5, 8)),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2), (2, 5, 8)),
        (nn.LSTM(4, 5, 2, batch_first=True, bidirectional=True, dropout=0.3), (2, 6, 4)),
        (nn.GRU(4, 5, batch_first=True), (2, 6, 4)), (nn.RNN(4, 5, batch_first=True), (2, 6, 4)),
        (nn.LSTMCell(4, 5), (2, 4)), (nn.GRUCell(4, 5), (2, 4)), (nn.CircularPad2d(1), (2, 3, 4, 5)),
        (nn.Hardtanh(-2, 3), (2, 3)), (nn.Tanhshrink(), (2, 3)), (nn.LogSigmoid(), (2, 3)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)  # fmt: skip
def test_standard_layer(layer: nn.Module, shape: tuple[int, ...] | None) -> None:
    inputs = (image(2, 3), image(2, 3, seed=1)) if shape is None else image(*shape)
    assert_same(seeded(nn.Sequential(layer) if shape else layer), inputs)


@pytest.mark.parametrize(
    "spelling",
    [
        "F.relu(x)", "x.relu()", "torch.relu(x)", "torch.relu_(x * 1)", "(x * 1).relu_()", "F.relu_(x * 1)",
        "nn.ReLU()(x)", "nn.ReLU(inplace=True)(x * 1)", "F.relu(x * 1, inplace=True)",
    ],
)  # fmt: skip
def test_every_spelling_of_relu_is_one_layer(spelling: str) -> None:
    forward = code(f"lambda self, x: {spelling}")
    program = assert_same(net(forward), image())
    assert targets(program)[-1] == "ReLU"


@pytest.mark.parametrize(
    ("spelling", "target"),
    [
        ("x + x", "add"), ("torch.add(x, x)", "add"), ("x.add(x)", "add"), ("(x * 1).add_(x)", "add"),
        ("operator.add(x, x)", "add"), ("operator.iadd(x * 1, x)", "add"), ("2 * x", "mul"),
        ("torch.multiply(x, 2)", "mul"), ("x / 2", "div"), ("torch.true_divide(x, 2)", "div"),
        ("x.view(x.size(0), -1)", "flatten"), ("x.flatten(1)", "flatten"), ("nn.Flatten()(x)", "flatten"),
        ("x.reshape(x.shape[0], -1)", "flatten"), ("torch.flatten(x, 1)", "flatten"),
        ("torch.cat([x, x], 1)", "cat"), ("torch.concat((x, x), dim=1)", "cat"), ("F.pad(x, (1, 1))", "pad"),
        ("nn.ZeroPad2d(1)(x)", "pad"), ("x - 1", "sub"), ("torch.subtract(x, 1)", "sub"),
        ("x @ x.mT", "matmul"), ("torch.matmul(x, x.mT)", "matmul"), ("x.sigmoid()", "Sigmoid"),
        ("F.silu(x)", "SiLU"), ("F.adaptive_avg_pool2d(x, 1)", "AdaptiveAvgPool2d"),
        ("F.max_pool2d(x, 2)", "MaxPool2d"), ("torch.max_pool2d(x, 2)", "MaxPool2d"),
        ("F.avg_pool2d(x, 3, 1, 1)", "AvgPool2d"), ("F.gelu(x)", "GELU"), ("x.tanh()", "Tanh"),
        ("F.hardswish(x)", "Hardswish"), ("F.leaky_relu(x, 0.2)", "LeakyReLU"),
        ("torch.sigmoid_(x * 1)", "Sigmoid"), ("F.sigmoid(x)", "Sigmoid"), ("F.elu(x)", "ELU"),
    ],
)  # fmt: skip
def test_spellings_of_an_operator_are_one(spelling: str, target: str) -> None:
    forward = code(f"lambda self, x: {spelling}")
    program = assert_same(net(forward), image())
    assert targets(program)[-1] == target


@pytest.mark.parametrize(
    "expression",
    [
        "(1 - x) / (2 + x.abs()) ** 2 + 2**x + (-x) + x % 2 + 3 / (x.abs() + 1)",
        "torch.add(x, x, alpha=2) - torch.sub(x, 1, alpha=3) + torch.rsub(x, 2, alpha=4)",
        "x.add(x, alpha=0.5) + x.sub(x * 3, alpha=2)", "torch.div(x, 0.3, rounding_mode='floor')",
        "x.div(0.3, rounding_mode='trunc')", "x.clamp(min=0) + x.clamp(-1, 1) + torch.clip(x, max=0.5)",
        "torch.where(x > 0, x, torch.zeros_like(x))", "torch.where(x > 0, x, 0.0)", "(x > 0) & (x < 1) | ~(x > 2)",
        "torch.einsum('bchw,bdhw->bcd', x, x).softmax(-1)", "torch.einsum('bchw,bdhw->bcd', [x, x])",
        "F.softmax(x, dim=1) + x.softmax(2) + torch.softmax(x, 3) + x.log_softmax(1)",
        "x.softmax(1, dtype=torch.float64)", "torch.softmax(x, dim=1, dtype=torch.float64)",
        "x.mean() + x.mean(1, keepdim=True) + x.mean((2, 3), True) + x.sum(dim=-1, keepdim=True)",
        "x.var(1, unbiased=False) + x.std(1) + torch.var_mean(x, 1)[0]", "x.norm(dim=1) + x.norm(p=1, dim=2).sum()",
        "F.normalize(x, dim=1) + F.normalize(x, p=1.0, dim=2)", "x.max(1)[0] + x.max(dim=1).values + x.amax(1)",
        "x.max(1).indices", "x.topk(2, dim=1).values", "torch.topk(x, 2, 1)[1]", "x.sort(1)[0]", "x.argmax(1)",
        "x.cumsum(2)", "x.flip(2, 3) + x.flip([2]).flip(dims=(3,))", "x.roll((1, 2), (2, 3))", "torch.rot90(x, 2, (2, 3))",
        "x.gather(1, x.argsort(1))", "torch.take_along_dim(x, x.argsort(1), 1)", "x.tile(2, 1).repeat(1, 1, 1, 2)",
        "x.tile((1, 2, 1, 1))", "x.repeat_interleave(2, 1)", "torch.stack([x, x * 2], dim=1)", "torch.hstack((x, x))",
        "F.grid_sample(x, x[..., :2].tanh(), align_corners=False)", "F.unfold(x, 3, padding=1)", "F.pixel_shuffle(x.repeat(1, 4, 1, 1), 2)",
        "F.interpolate(x, scale_factor=2)", "F.interpolate(x, (5, 6), mode='bicubic', align_corners=True)",
        "F.interpolate(x, size=9, mode='bilinear', antialias=True)", "F.upsample(x, scale_factor=2, mode='nearest')",
        "F.interpolate(x, scale_factor=1.5, mode='bilinear', recompute_scale_factor=True)",
        "F.pad(x, [1, 2, 0, 1], 'reflect') + F.pad(x, (1, 2, 0, 1), value=3.0)", "F.pad(x, (1, 2), 'constant', 0.5)",
        "F.scaled_dot_product_attention(x, x * 2, x)", "F.scaled_dot_product_attention(x, x, x, is_causal=True)",
        "torch.bmm(x[:, 0], x[:, 1].mT)", "torch.baddbmm(x[:, 0, :, :1], x[:, 0], x[:, 1, :7].mT)[..., :1] if x.shape[2] == x.shape[3] else x",
        "torch.addcmul(x, x, x, value=0.5)", "torch.lerp(x, x * 2, 0.3)", "torch.outer(x.flatten(), x.flatten())[:2]",
        "torch.cdist(x, x)", "F.cosine_similarity(x, x * 2 + 1, dim=1)", "F.one_hot(x.argmax(1), 3)", "x.nan_to_num()",
        "torch.tensordot(x, x, dims=([2], [2]))", "x.diff(dim=2)", "torch.logsumexp(x, (2, 3))", "x.logsumexp(1)",
        "torch.maximum(x, -x) + torch.minimum(x, x * 2) + torch.max(x, -x) + torch.min(x, x * 3)",
        "x.pow(2).sqrt() + x.square().rsqrt() + x.exp().log1p() + x.reciprocal()", "torch.erf(x) + x.sin() + torch.cos(x)",
        "x.floor() + x.ceil() + x.round() + x.trunc() + x.sign() + x.frac()", "torch.atan2(x, x + 1) + torch.hypot(x, x)",
        "x.bool().float() + x.int() + x.long() + x.double()", "x.to(torch.float64) + x.type(torch.float16)", "x.to(x.dtype, copy=True)",
        "x.to('cpu') + x.cpu()", "x.type_as(x.double())", "x.to(x.double())", "x.new_tensor([1.0, 2, 3])[:, None, None] + x",
        "x.new_ones(3, 1, 1) + x + x.new_zeros((1,))", "torch.full_like(x, 2) + torch.ones_like(x, dtype=torch.float64)",
        "F.local_response_norm(x, 2)", "F.instance_norm(x)", "F.group_norm(x, 3)", "F.rms_norm(x, (7,))", "F.layer_norm(x, (10, 7))",
        "F.mse_loss(x, x * 2)", "F.cross_entropy(x, x.argmax(1))", "F.smooth_l1_loss(x, x * 2, reduction='none')",
        "F.adaptive_max_pool2d(x, 2, return_indices=True)[1]", "F.max_pool2d(x, 2, return_indices=True)[0]", "F.lp_pool2d(x, 2, 2)",
        "F.adaptive_avg_pool2d(x, (None, 3))", "F.max_pool2d(x, 3, stride=2, padding=1, ceil_mode=True)", "F.avg_pool2d(x, 3, ceil_mode=True, count_include_pad=False)",
        "F.softplus(x, 2, 10) + F.threshold(x, 0.1, 2) + F.hardshrink(x) + F.softshrink(x) + F.celu(x, 2.0)", "F.glu(x.repeat(1, 2, 1, 1), 1)",
        "x[:, [2, 0]] + x[:, torch.tensor([1, 1])]", "x[:, None, ..., ::2][:, 0]", "x[..., 0, None]", "x[:, -1:, 2:-1]",
        "x[torch.arange(x.shape[0]), x.mean((2, 3)).argmax(1)]", "x.index_select(1, torch.tensor([0, 2]))", "x.take(torch.tensor([0, 5]))",
        "torch.fft.rfft2(x).abs()", "torch.fft.irfft2(torch.fft.rfft2(x), s=x.shape[-2:])", "torch.linalg.norm(x, dim=1)",
        "torch.view_as_real(torch.view_as_complex(torch.stack([x, x], -1).contiguous()) * 1j)", "torch.polar(x.abs(), x).imag",
        "sum([x, x * 2, x * 3])", "torch.stack(list(x.unbind(1)), 1)", "torch.broadcast_tensors(x, x[:1])[1]", "x.isnan().any() + x",
        "torch.block_diag(x[0, 0], x[0, 1])", "torch.cartesian_prod(x[0, 0, 0], x[0, 0, 1])", "torch.kron(x[0, 0], x[0, 1])",
        "torch.meshgrid(x[0, 0, 0], x[0, 0, 1], indexing='xy')[0]", "torch.bucketize(x, torch.tensor([-1.0, 0, 1]))",
        "torch.histc(x, 4)", "x.quantile(0.5)", "x.median(1)[0] + x.kthvalue(2, 1)[0]", "torch.det(x[:, :, :3, :3])",
        "torch.linalg.inv(x[..., :3, :3])", "torch.linalg.svd(x[..., :3, :3])[1]", "x.argsort(1, descending=True)", "x.detach() + x",
        "x.expand(x.shape).clone(memory_format=torch.channels_last)",
        "x.contiguous(memory_format=torch.channels_last)", "x.to(memory_format=torch.channels_last) + 1", "x.is_contiguous() * x",
        "F.dropout(x, 0.5, self.training) + F.dropout2d(x, 0.3, self.training)", "F.dropout(x, 0.0, True)", "F.dropout(x)",
        "F.dropout(x, training=self.training, p=0.2)", "F.alpha_dropout(x, 0.2, self.training)", "F.feature_alpha_dropout(x, 0.2, self.training)",
        "torch.dropout(x, 0.3, self.training)", "x + torch.randn_like(x) * 0.1", "x + torch.rand(x.shape)",
        "torch.bernoulli(x.sigmoid())", "x * torch.rand(x.shape[0], 1, 1, 1).ge(0.5)", "torch.normal(x, x.abs())", "F.gumbel_softmax(x, dim=1)",
        "torch.distributions.Normal(x, x.abs() + 1).log_prob(x * 2)", "x + torch.distributions.Normal(x, 1.0).rsample()",
    ],
)  # fmt: skip
def test_expression(expression: str) -> None:
    model = net(code(f"lambda self, x: {expression}"))
    assert_same(model, image(), tolerance=1e-5 if "fft" in expression else 0.0)


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("x[x > 0].sum() + x", r"size of a result depends on values: indexing by a mask .*at test_layers\.py:\d+"),
        ("x.unique()", r"size of a result depends on values: unique at test_layers\.py:\d+"),
        ("x.nonzero()", r"size of a result depends on values: nonzero .*at test_layers\.py:\d+"),
        ("torch.vmap(lambda s: s * 2)(x)", "cannot be captured: RuntimeError while tracing"),
        ("torch.func.vmap(lambda s: s.mean())(x)", "cannot be captured: RuntimeError while tracing"),
    ],
)  # fmt: skip
def test_expression_is_refused(expression: str, words: str) -> None:
    model = net(code(f"lambda self, x: {expression}"))
    with pytest.raises(CaptureError, match=words):
        capture(model, image())


def test_functional_layer_that_draws_and_follows_the_mode_otherwise_is_eval_only() -> None:
    model = net(lambda self, x: F.rrelu(x, training=self.training))
    assert_same(model, image(), eval_only=True)


def test_functional_norm_that_is_no_layer_and_follows_the_mode_is_eval_only() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mu, self.var, self.w * 2, None, self.training)

    members = {"mu": torch.randn(3), "var": torch.rand(3) + 0.5, "w": nn.Parameter(torch.rand(3))}
    program = assert_same(net(forward, **members), image(), eval_only=True)
    assert "functional norm at test_layers.py" in program.modes.eval_only


def test_floor_division_of_tensors() -> None:
    model = net(lambda self, x: x // 0.3 + 2 // (x.abs() + 1))
    assert_same(model, image(), input_gradients=False)


def test_hooks_put_on_the_captured_module_are_not_on_the_model() -> None:
    model = seeded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    module = captured(model, image())
    module.get_submodule("0").register_forward_hook(lambda *args: None)
    assert not model[0]._forward_hooks


def test_attention_written_out() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attention = (q @ k.transpose(-2, -1)) * (c // 2) ** -0.5
        attention = self.drop(attention.softmax(dim=-1))
        return self.proj((attention @ v).transpose(1, 2).reshape(b, n, c))

    members = {"qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8), "drop": nn.Dropout(0.2)}
    model = net(forward, **members)
    program = assert_same(model, image(2, 5, 8))
    assert torch.equal(to_module(program).eval()(image(3, 9, 8)), model.eval()(image(3, 9, 8)))


def test_multihead_attention_module() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        y, weights = self.attention(x, x, x, need_weights=True)
        return self.attention(y, x, x, need_weights=False)[0], weights

    assert_same(net(forward, attention=nn.MultiheadAttention(8, 2, batch_first=True, dropout=0.1)),
                image(2, 5, 8))  # fmt: skip


def test_causal_mask_made_from_the_length() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        mask = torch.triu(torch.full((x.shape[1], x.shape[1]), float("-inf"), device=x.device), 1)
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask.to(x.dtype))

    program = assert_same(net(forward), image(2, 5, 8))
    assert to_module(program)(image(2, 7, 8)).shape == (2, 7, 8)


def test_position_table_resized_to_the_input() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        table = F.interpolate(self.table, size=x.shape[-2:], mode="bilinear")
        columns = torch.arange(x.shape[-1], device=x.device, dtype=x.dtype)
        return x + table + columns / x.shape[-1]

    model = net(forward, table=nn.Parameter(torch.randn(1, 3, 7, 7)))
    program = assert_same(model, image())
    other = image(2, 3, 5, 9)
    assert torch.equal(to_module(program)(other), model(other))


def test_position_table_cut_to_the_length() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        positions = torch.arange(x.size(1)).unsqueeze(0).expand(x.size(0), -1)
        return x + self.embedding(positions) + self.table[:, : x.shape[1]]

    members = {"embedding": nn.Embedding(9, 4), "table": nn.Parameter(torch.randn(1, 9, 4))}
    model = net(forward, **members)
    program = assert_same(model, image(2, 5, 4))
    assert torch.equal(to_module(program)(image(2, 8, 4)), model(image(2, 8, 4)))


def test_coordinate_grid() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        rows, columns = torch.meshgrid(
            torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij"
        )
        grid = torch.stack([rows, columns]).expand(x.shape[0], -1, -1, -1)
        return self.conv(torch.cat([x, grid], dim=1))

    model = net(forward, conv=nn.Conv2d(5, 4, 3))
    program = assert_same(model, image())
    assert torch.equal(to_module(program)(image(1, 3, 6, 9)), model(image(1, 3, 6, 9)))


def test_class_token_expanded_to_the_batch() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        return self.norm(tokens)[:, 0]

    assert_same(
        net(forward, token=nn.Parameter(torch.randn(1, 1, 3)), norm=nn.LayerNorm(3)), image()
    )


def test_convolution_called_twice_under_two_norms() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.b(self.conv(self.a(self.conv(x))))

    members = {
        "conv": nn.Conv2d(3, 3, 3, padding=1),
        "a": nn.BatchNorm2d(3),
        "b": nn.BatchNorm2d(3),
    }
    assert_same(net(forward, **members), image())


def test_norm_called_twice_updates_its_statistics_twice() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.norm(self.conv(F.relu(self.norm(self.conv(x)))))

    assert_same(net(forward, conv=nn.Conv2d(3, 3, 3, padding=1), norm=nn.BatchNorm2d(3)), image())


def test_norm_whose_result_is_unused_updates_its_statistics() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.norm(x)
        return self.conv(x)

    assert_same(net(forward, conv=nn.Conv2d(3, 3, 1), norm=nn.BatchNorm2d(3)), image())


@pytest.mark.xfail(strict=True, reason="refused: nodes that nothing reads are dropped, draws too")
def test_random_numbers_whose_result_is_unused_are_drawn() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.drop(x)
        torch.rand(3)
        torch.randn_like(x)
        return self.drop(x)

    assert_same(net(forward, drop=nn.Dropout(0.5)), image())


def test_grouped_dilated_strided_convolutions() -> None:
    layers = [nn.Conv2d(4, 8, 3, 2, 1, 1, 4), nn.Conv2d(8, 8, 3, dilation=2, padding=2, groups=8),
              nn.Conv2d(8, 2, (1, 3), bias=False)]  # fmt: skip
    assert_same(seeded(nn.Sequential(*layers)), image(2, 4, 11, 9))


def test_submodule_method_other_than_forward() -> None:
    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def features(self, x: Tensor) -> Tensor:
            return self.conv(x).mean((2, 3))

        def classify(self, x: Tensor) -> Tensor:
            return self.head(x)

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.stem.classify(self.stem.features(x))

    assert_same(net(forward, stem=Stem()), image())


def test_forward_called_without_call() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.norm.forward(self.conv.forward(x)).relu()

    assert_same(net(forward, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)), image())


def test_lambda_as_activation() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.activation(self.conv(x))

    assert_same(
        net(forward, conv=nn.Conv2d(3, 4, 3), activation=lambda y: y * torch.sigmoid(y)), image()
    )


def test_function_and_scripted_function_as_activation() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.first(self.second(x))

    assert_same(net(forward, first=F.relu, second=torch.sigmoid), image())


@torch.jit.script
def _scripted(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x) + 1


def test_scripted_function_in_forward_is_refused() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return _scripted(self.conv(x))

    with pytest.raises(CaptureError, match=r"TorchScript.* at test_layers\.py:\d+; move that part"):
        capture(net(forward, conv=nn.Conv2d(3, 4, 3)), image())


def test_scripted_submodule_is_captured() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.scripted(self.conv(x))

    scripted = torch.jit.script(nn.Sequential(nn.ReLU(), nn.Hardtanh()))
    model = net(forward, conv=nn.Conv2d(3, 4, 3), scripted=scripted)
    assert_same(model, image())


class _Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 3


def test_custom_autograd_function_in_a_submodule_is_an_opaque_leaf() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.twice(self.conv(x))

    double = net(lambda self, x: _Doubling.apply(x))
    program = assert_same(net(forward, conv=nn.Conv2d(3, 4, 3), twice=double), image())
    assert "custom autograd function _Doubling" in program.opaque["twice"]


def test_refuses_custom_autograd_function_in_the_root() -> None:
    model = net(lambda self, x: _Doubling.apply(self.conv(x)), conv=nn.Conv2d(3, 4, 3))
    with pytest.raises(
        CaptureError, match=r"custom autograd function _Doubling at test_layers.py:\d+"
    ):
        capture(model, image())


def test_numpy_round_trip_in_a_submodule_is_an_opaque_leaf() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.numpy(self.conv(x))

    numpy = net(lambda self, x: torch.from_numpy(np.flip(x.detach().numpy(), 3).copy()))
    program = assert_same(net(forward, conv=nn.Conv2d(3, 4, 3), numpy=numpy), image())
    assert "numpy" in program.opaque


def test_submodule_that_decides_by_values_is_an_opaque_leaf() -> None:
    class Sign(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    program = assert_same(seeded(nn.Sequential(nn.Conv2d(3, 4, 3), Sign())), image())
    assert "1" in "".join(program.opaque)


def test_checkpoint() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = checkpoint(self.block, x, use_reentrant=False)
        if self.training:
            return checkpoint(self.block, x, use_reentrant=False)
        return self.block(x)

    block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.GroupNorm(1, 3), nn.ReLU())
    assert_same(net(forward, block=block), image())


def test_reentrant_checkpoint_of_an_input_without_gradient_is_refused() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=True)

    model = net(forward, block=nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()))
    with pytest.raises(
        CaptureError, match=r"use_reentrant=True .*at test_layers\.py:\d+; use use_reentrant=False"
    ):
        capture(model, image())


def test_sequential_checkpoint() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return checkpoint_sequential(self.blocks, 2, x, use_reentrant=False)

    assert_same(
        net(forward, blocks=nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(4)))), image()
    )


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_weight_norm_of_both_kinds() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.old(self.new(x))

    members = {"new": parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
               "old": nn.utils.weight_norm(nn.Conv2d(4, 4, 3))}  # fmt: skip
    assert_same(net(forward, **members), image())


def test_own_parametrization() -> None:
    class Symmetric(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight.triu() + weight.triu(1).mT

    linear = nn.Linear(7, 7)
    parametrize.register_parametrization(linear, "weight", Symmetric())
    assert_same(seeded(nn.Sequential(linear, nn.ReLU())), image())


def test_orthogonal_parametrization() -> None:
    linear = parametrizations.orthogonal(nn.Linear(7, 7), use_trivialization=False)
    assert_same(nn.Sequential(linear), image(), tolerance=1e-5)


def test_spectral_norm() -> None:
    model = seeded(nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))))
    assert_same(model, image())


def test_old_spectral_norm_is_eval_only() -> None:
    model = seeded(nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 4, 3))))
    assert_same(model, image(), eval_only=True)


def test_pruned_layer() -> None:
    from torch.nn.utils import prune

    conv = nn.Conv2d(3, 4, 3)
    prune.l1_unstructured(conv, "weight", 0.5)
    assert_same(nn.Sequential(conv, nn.ReLU()), image())


def test_forward_hook_that_changes_the_output() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.conv(x)

    model = net(forward, conv=nn.Conv2d(3, 4, 3))
    model.conv.register_forward_hook(lambda module, args, output: output * 2)
    assert_same(model, image())


def test_pre_hook_and_keyword_hook_and_root_hook() -> None:
    model = net(lambda self, x: self.conv(x), conv=nn.Conv2d(3, 4, 3))
    model.conv.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model.conv.register_forward_hook(lambda m, args, kwargs, out: out.relu(), with_kwargs=True)
    model.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model.register_forward_hook(lambda module, args, output: (output, output * 2))
    assert_same(model, image())


def test_hook_on_a_leaf_that_collects_features() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        features: list[Tensor] = []
        handle = self.conv.register_forward_hook(lambda m, i, o: features.append(o * 2))
        y = self.conv(x)
        handle.remove()
        return y, features[0]

    assert_same(net(forward, conv=nn.Conv2d(3, 4, 3)), image())


def test_modules_in_a_plain_list_without_parameters() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        for layer in self.layers[0]:
            x = layer(x)
        return x

    assert_same(net(forward, layers=([nn.ReLU(), nn.MaxPool2d(2)],)), image())


def test_refuses_modules_with_parameters_in_a_plain_list() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.layers[0](x)

    with pytest.raises(CaptureError, match="no registered submodule is called; put it into"):
        capture(net(forward, layers=(nn.Conv2d(3, 4, 3),)), image())


def test_layer_made_in_forward() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return nn.Upsample(scale_factor=2)(nn.MaxPool2d(2)(nn.ReLU()(x)))

    assert_same(net(forward), image())


def test_dropout_made_in_forward_does_not_follow_the_mode() -> None:
    """A fresh module is in training mode, whatever the model's mode is."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return nn.Dropout(0.5)(x)

    assert_same(net(forward), image())


def test_plain_tensor_attribute() -> None:
    model = net(lambda self, x: (x - self.mean) / self.std)
    model.mean, model.std = torch.rand(3, 1, 1), torch.rand(3, 1, 1) + 1
    assert_same(model, image())


def test_plain_tensors_in_a_list() -> None:
    model = net(lambda self, x: x * self.scales[0] + self.scales[1])
    model.scales = [torch.rand(3, 1, 1), torch.rand(3, 1, 1)]
    assert_same(model, image())


def test_constant_made_in_forward() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
        array = torch.from_numpy(np.arange(7, dtype=np.float32))
        return (x - mean.to(x)) * array + torch.as_tensor(np.float32(2)) + torch.tensor(3)

    assert_same(net(forward), image())


def test_numpy_constant_in_arithmetic() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x * np.float32(0.5) + np.sqrt(2.0) + np.arange(3).sum() + np.int64(3)

    assert_same(net(forward), image())


def test_number_parameter_and_layer_scale() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x * self.gain + self.gamma * self.conv(x) * self.factor

    members = {"gain": nn.Parameter(torch.tensor(0.7)), "gamma": nn.Parameter(torch.rand(3, 1, 1)),
               "conv": nn.Conv2d(3, 3, 1), "factor": 0.5}  # fmt: skip
    assert_same(net(forward, **members), image())


def test_weights_computed_from_parameters() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        weight = self.weight / self.weight.flatten(1).norm(dim=1)[:, None, None, None]
        return F.conv2d(x, weight * self.gain) + F.linear(x, self.matrix.T)[..., :5].mean()

    members = {"weight": nn.Parameter(torch.randn(4, 3, 3, 3)), "gain": nn.Parameter(torch.rand(4, 1, 1, 1)),
               "matrix": nn.Parameter(torch.randn(7, 6))}  # fmt: skip
    assert_same(net(forward, **members), image())


def test_weights_computed_from_the_input() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        weight = self.controller(x.mean((2, 3))).view(-1, 3, 1, 1)
        b, c, h, w = x.shape
        y = F.conv2d(x.view(1, b * c, h, w), weight, groups=b)
        return y.view(b, -1, h, w)

    assert_same(net(forward, controller=nn.Linear(3, 12)), image())


def test_mixture_of_kernels() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        routing = torch.sigmoid(self.route(x.mean((2, 3))))
        weight = (routing @ self.kernels).view(x.shape[0] * 4, 3, 3, 3)
        y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), weight, groups=x.shape[0])
        return y.view(x.shape[0], 4, y.shape[-2], y.shape[-1])

    assert_same(
        net(forward, route=nn.Linear(3, 2), kernels=nn.Parameter(torch.randn(2, 108))), image()
    )


def test_gradient_stopped_part_way() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            frozen = self.conv(x)
        return self.conv(x) + frozen + self.conv(x).detach() * 2

    assert_same(net(forward, conv=nn.Conv2d(3, 3, 3)), image())


def test_no_grad_as_decorator_and_inference_of_a_teacher() -> None:
    @torch.no_grad()
    def teach(self: Any, x: Tensor) -> Tensor:
        return self.teacher(x).softmax(1)

    def forward(self: Any, x: Tensor) -> Tensor:
        target = teach(self, x)
        with torch.set_grad_enabled(True):
            return self.student(x) - target

    assert_same(net(forward, teacher=nn.Conv2d(3, 4, 3), student=nn.Conv2d(3, 4, 3)), image())


def test_enable_grad_inside_no_grad() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            a = self.conv(x)
            with torch.enable_grad():
                b = self.conv(x)
            c = a * b
        return a + b + c

    assert_same(net(forward, conv=nn.Conv2d(3, 3, 3)), image())


def test_parameter_viewed_under_no_grad_stays_trainable() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = self.conv.weight.abs().max()
        return self.conv(x) / scale

    assert_same(net(forward, conv=nn.Conv2d(3, 3, 3)), image())


def test_straight_through_estimator() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + (torch.round(y * 4) / 4 - y).detach()

    assert_same(net(forward, conv=nn.Conv2d(3, 4, 3)), image())


def test_inference_mode_inside_is_captured() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.inference_mode():
            frozen = self.conv(x)
        return self.conv(x) + frozen.clone()

    assert_same(net(forward, conv=nn.Conv2d(3, 3, 3)), image())


def test_embedding_tied_with_linear() -> None:
    def forward(self: Any, tokens: Tensor) -> Tensor:
        return self.linear(self.embedding(tokens))

    embedding, linear = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
    linear.weight = embedding.weight
    tokens = torch.randint(0, 10, (2, 5), generator=torch.Generator().manual_seed(0))
    assert_same(net(forward, embedding=embedding, linear=linear), tokens)


def test_functional_embedding() -> None:
    def forward(self: Any, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.table, padding_idx=0) + self.table[tokens]

    tokens = torch.randint(0, 10, (2, 5), generator=torch.Generator().manual_seed(0))
    assert_same(net(forward, table=nn.Parameter(torch.randn(10, 4))), tokens)


def test_recurrent_layer_with_state() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        state = (x.new_zeros(1, x.shape[0], 5), torch.zeros(1, x.size(0), 5))
        y, (h, c) = self.lstm(x, state)
        return y, h + c

    assert_same(net(forward, lstm=nn.LSTM(4, 5, batch_first=True)), image(2, 6, 4))


def test_recurrent_layer_with_time_first() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y, _ = self.gru(x.transpose(0, 1))
        return y[-1]

    assert_same(net(forward, gru=nn.GRU(4, 5)), image(2, 6, 4))


def test_cells_unrolled_in_python() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        h, c = x.new_zeros(x.shape[0], 5), x.new_zeros(x.shape[0], 5)
        for step in x.unbind(1):
            h, c = self.cell(step, (h, c))
        return h

    assert_same(net(forward, cell=nn.LSTMCell(4, 5)), image(2, 3, 4))


def test_squeeze_excite_and_gating() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        scale = F.adaptive_avg_pool2d(x, 1)
        scale = self.expand(F.relu(self.reduce(scale), inplace=True))
        return F.hardsigmoid(scale, inplace=True) * x

    assert_same(net(forward, reduce=nn.Conv2d(3, 2, 1), expand=nn.Conv2d(2, 3, 1)), image())


def test_deformable_sampling() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        theta = self.locate(x.mean((2, 3))).view(-1, 2, 3)
        grid = F.affine_grid(theta, [b, 3, h, w], align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)

    assert_same(net(forward, locate=nn.Linear(3, 6)), image(), tolerance=1e-6)


def test_unet_with_odd_sizes() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        a = self.down(x)
        b = self.down(F.max_pool2d(a, 2))
        c = F.interpolate(b, size=a.shape[2:], mode="nearest")
        dy, dx = a.size(2) - b.size(2) * 2, a.size(3) - b.size(3) * 2
        d = F.pad(self.up(b), [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        return torch.cat([a, c, d], dim=1)

    members = {"down": nn.Conv2d(3, 3, 3, padding=1), "up": nn.ConvTranspose2d(3, 3, 2, 2)}
    assert_same(net(forward, **members), image(2, 3, 11, 9))


def test_feature_pyramid() -> None:
    def forward(self: Any, x: Tensor) -> list[Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        result = [self.lateral[-1](maps[-1])]
        for lateral, feature in zip(self.lateral[:-1][::-1], maps[:-1][::-1], strict=True):
            top = F.interpolate(result[0], size=feature.shape[-2:], mode="nearest")
            result.insert(0, lateral(feature) + top)
        return result

    members = {"stages": nn.ModuleList(nn.Conv2d(3, 3, 3, 2, 1) for _ in range(3)),
               "lateral": nn.ModuleList(nn.Conv2d(3, 2, 1) for _ in range(3))}  # fmt: skip
    assert_same(net(forward, **members), image(2, 3, 21, 17))
