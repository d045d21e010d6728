"""Operators of research and product code, as written there."""

from __future__ import annotations

import pytest
import torch
from capture.checks import assert_same, code, image, net
from capture.later import assert_same_later
from torch import nn

from fxopt.capture import capture
from fxopt.errors import CaptureError

OPERATORS = [

    "F.grid_sample(x, F.affine_grid(self.t.expand(x.shape[0], -1, -1), x.shape, align_corners=False), align_corners=False)",
    "F.pixel_shuffle(x.repeat(1, 4, 1, 1), 2)", "F.fold(F.unfold(x, 3, padding=1), x.shape[2:], 3, padding=1)",
    "F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2, output_size=x.shape[2:])",
    "F.interpolate(x, scale_factor=(1.5, 0.7), mode='bilinear', align_corners=False, recompute_scale_factor=True)",
    "F.interpolate(x, size=x.shape[-1], mode='bicubic', antialias=True)", "torch.fft.rfft2(x, norm='ortho').abs()",
    "torch.fft.irfft2(torch.fft.rfft2(x), s=x.shape[-2:])", "torch.fft.fftshift(torch.fft.fft(x)).real",
    "torch.stft(x.flatten(1), 8, window=torch.hann_window(8), return_complex=True).abs()",
    "torch.einsum('bchw,bdhw->bcd', x, x)",
    "torch.baddbmm(x.mean(1)[:, :, :1], x[:, 0], x[:, 1].transpose(1, 2)[:, :, :10])",
    "torch.bmm(x.flatten(2), x.flatten(2).mT)", "torch.tensordot(x, x, dims=([2, 3], [2, 3]))",
    "torch.cdist(x.flatten(1), x.flatten(1))", "torch.cosine_similarity(x, x.flip(1), dim=1)",
    "torch.linalg.norm(x, dim=(2, 3))", "torch.linalg.qr(x[..., :7, :]).R",
    "torch.linalg.solve(x[..., :7, :] + 9 * torch.eye(7), x[..., :7, :])", "torch.linalg.svdvals(x)",
    "torch.linalg.eigh(x[..., :7, :] @ x[..., :7, :].mT)[0]", "torch.det(x[..., :7, :])",
    "torch.inverse(x[..., :7, :] + 9 * torch.eye(7))", "torch.linalg.slogdet(x[..., :7, :])",
    "torch.cholesky_inverse(torch.eye(7).expand(2, 7, 7)) + x.mean()", "torch.matrix_exp(x[..., :7, :] * 0.1)",
    "x.quantile(0.3, dim=1)", "x.median(1).values", "x.nanmedian(1)[0]", "x.kthvalue(2, 1).values",
    "x.mode(1).values", "x.cummax(2)[0]", "x.logcumsumexp(1)", "x.cumprod(3)", "x.diff(dim=3)",
    "torch.gradient(x, dim=3)[0]", "torch.trapezoid(x, dim=3)", "torch.bucketize(x, torch.tensor([-1.0, 0.0, 1.0]))",
    "torch.searchsorted(torch.tensor([-1.0, 0.0, 1.0]), x)", "torch.histc(x, 4)", "torch.cov(x.flatten(1))",
    "torch.corrcoef(x.flatten(1))", "torch.renorm(x, 2, 0, 1.0)", "torch.lerp(x, x * 2, 0.3)",
    "torch.addcmul(x, x, x, value=0.5)", "torch.logaddexp(x, x)", "torch.frexp(x)[0]",
    "torch.heaviside(x, torch.tensor(0.5))", "torch.nan_to_num(x / 0)", "torch.where(x > 0, x, 0.0)",
    "torch.where(x > 0, 1.0, 0.0)", "torch.clamp(x, min=torch.zeros(7))",
    "torch.isin(x.long(), torch.tensor([0, 1]))", "torch.combinations(x[0, 0, 0])",
    "torch.cartesian_prod(x[0, 0, 0], x[0, 0, 1])", "torch.block_diag(x[0, 0], x[0, 1])",
    "torch.kron(x[0, 0], x[0, 1])", "torch.vander(x[0, 0, 0])",
    "torch.meshgrid(x[0, 0, 0], x[0, 0, :, 0], indexing='xy')", "torch.atleast_2d(x[0, 0, 0])",
    "torch.dstack([x, x])", "torch.hstack([x, x])", "torch.column_stack([x[0], x[1]])", "torch.row_stack([x, x])",
    "torch.tensor_split(x, 3, dim=3)", "torch.take(x, torch.tensor([0, 3]))",
    "F.kl_div(x.log_softmax(1), x.softmax(1), reduction='batchmean')",
    "F.ctc_loss(x.flatten(2).permute(2, 0, 1).log_softmax(2), torch.tensor([[1, 2], [2, 1]]), (70, 70), (2, 2))",
    "F.binary_cross_entropy_with_logits(x, x.sigmoid().detach())", "F.smooth_l1_loss(x, x * 2)",
    "F.triplet_margin_loss(x, x * 2, -x)", "F.cosine_embedding_loss(x.flatten(1), x.flatten(1), torch.ones(2))",
    "F.pdist(x.flatten(1))", "F.multi_margin_loss(x.mean((2, 3)), torch.tensor([0, 1]))",
    "F.nll_loss(x.log_softmax(1), x.argmax(1))",
    "F.cross_entropy(x, x.argmax(1), weight=torch.ones(3), label_smoothing=0.1)",
    "F.hinge_embedding_loss(x, torch.ones_like(x))", "F.embedding_bag(x.long().abs().flatten(1), torch.ones(9, 3))",
    "F.one_hot(x.argmax(1), 3)", "F.one_hot(x.argmax(1), num_classes=x.shape[1]).permute(0, 3, 1, 2).float()",
    "F.lp_pool2d(x, 2, 2)", "F.local_response_norm(x, 2)", "F.instance_norm(x)",
    "F.instance_norm(x, use_input_stats=True)", "F.group_norm(x, 3)", "F.rms_norm(x, (7,))", "F.layer_norm(x, (7,))",
    "F.normalize(x, p=1, dim=1)", "F.softmin(x, 1)", "F.threshold(x, 0.1, 5)", "F.hardshrink(x)",
    "F.bilinear(x, x, torch.ones(2, 7, 7))", "F.unfold(x, (3, 2), stride=(2, 1))",
    "F.adaptive_max_pool2d(x, (None, 2))", "F.adaptive_avg_pool2d(x, 1).flatten(1)",
    "F.channel_shuffle(x.repeat(1, 2, 1, 1), 2) if hasattr(F, 'channel_shuffle') else x",
    "F.conv2d(x, torch.ones(3, 1, 3, 3) / 9, groups=3, padding='same')",
    "F.conv2d(x.view(1, -1, 10, 7), torch.ones(x.shape[0] * 3, 1, 3, 3), groups=x.shape[0] * 3)",
    "F.conv_transpose2d(x, torch.ones(3, 2, 2, 2), stride=2)",
    "F.conv1d(x.flatten(2), torch.ones(2, 3, 5), padding=2)", "torch.conv2d(x, torch.ones(2, 3, 3, 3))",
    "torch.convolution(x, torch.ones(2, 3, 3, 3), None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1)",
    "F.scaled_dot_product_attention(x, x, x, is_causal=True)",
    "F.scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(10, 10, dtype=torch.bool).tril(), scale=0.3)",
    "torch.polygamma(1, x.abs() + 1)", "torch.view_as_complex(x[..., :6].unflatten(3, (3, 2)).contiguous()).abs()",
    "torch.view_as_real(x + 1j).sum(-1)", "(x * (1 + 2j)).conj().real", "x.to(torch.complex64).angle()",
    "x.half().float()", "x.to(torch.int8).float()", "x.bool().float()", "x.double().sum().float()",
    "torch.sum(x, dtype=torch.float64)", "x.view(torch.int32).float()", "(x * 255).byte().float()",
    "torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127)",
    "torch.fake_quantize_per_channel_affine(x, torch.full((3,), 0.1), torch.zeros(3, dtype=torch.int32), 1, -128, 127)",
    "torch.ops.aten.add(x, x)", "x.as_strided((2, 3), (3, 1))", "x.unfold(2, 3, 2).mean(-1)",
    "x.index_add(1, torch.tensor([0]), x[:, :1])", "x.scatter_reduce(1, torch.zeros_like(x).long(), x, 'mean')",
    "torch.segment_reduce(x[0, 0, 0], 'sum', lengths=torch.tensor([3, 4]))", "x.swapaxes(1, 2)", "x.moveaxis(1, -1)",
    "torch.std_mean(x, dim=1)", "torch.aminmax(x)", "torch.count_nonzero(x, dim=1)", "x.norm(dim=1)",
    "torch.unravel_index(x.flatten(1).argmax(1), x.shape[1:])", "torch.randn(3).to(x) .sum() * 0 + x",
    "torch.chain_matmul(x[0, 0], x[0, 0].t())", "torch.linalg.multi_dot([x[0, 0], x[0, 0].t(), x[0, 0]])",
    "x.repeat_interleave(2, 1)", "torch.repeat_interleave(x, torch.tensor([1, 2, 1]), 1, output_size=4)",
    "x.sort(stable=True, dim=1)[0]", "x.masked_fill(torch.ones(10, 7).triu().bool(), -1e9).softmax(-1)",
    "torch.constant_pad_nd(x, (1, 1), 0.5)", "torch._C._nn.pad(x, (1, 1))", "torch.rms_norm(x, (7,))",
    "torch.celu(x, 2.0)", "torch.prelu(x, torch.ones(3) * 0.3)",
    "torch.nn.functional.embedding(x.long().abs(), torch.ones(9, 2))", "torch.sigmoid_(x * 1)",
    "torch.log1p_(x.abs())", "torch.squeeze(x[:, :1])", "torch.bernoulli(x.sigmoid())",
]  # fmt: skip
RANDOM = [
    "F.dropout(x, self.p, self.training)",
    "F.dropout(x, p=self.p, training=self.training, inplace=True) if False else x",
    "F.dropout2d(x, self.p, self.training)", "F.dropout3d(x[:, :, None], self.p, self.training)",
    "F.alpha_dropout(x, self.p, self.training)", "F.feature_alpha_dropout(x, self.p, self.training)",
    "torch.dropout(x, self.p, self.training)", "torch.nn.functional.dropout(x, training=self.training)",
    "F.dropout(F.dropout(x, 0.1, self.training), 0.2, self.training)", "F.rrelu(x, training=self.training)",
    "torch.alpha_dropout(x, 0.3, self.training)", "torch.feature_dropout(x, 0.3, self.training)",
    "torch.rrelu(x, 0.1, 0.3, self.training)", "x * torch.bernoulli(torch.full_like(x, 0.5))",
    "F.gumbel_softmax(x, hard=True)", "x + torch.randn_like(x) * self.training",
    "x + torch.randn(x.shape, device=x.device, dtype=x.dtype)", "x[:, torch.randperm(3)]",
    "x * torch.rand(x.shape[0], 1, 1, 1)", "torch.normal(x, 1.0)", "torch.normal(0.0, 1.0, x.shape) + x",
    "x + torch.empty_like(x).uniform_(-1, 1)", "torch.poisson(x.abs())",
    "x.gather(1, torch.multinomial(torch.ones(x.shape[0], 3), 1)[:, :, None, None].expand(-1, -1, 10, 7))",
    "x + torch.randint(0, 3, (1,))", "torch.distributions.Normal(x, 1.0, validate_args=False).rsample()",
    "torch.distributions.Normal(x, 1.0).rsample()", "torch.distributions.Categorical(logits=x.flatten(1)).entropy()",
    "torch.distributions.kl_divergence(torch.distributions.Normal(x, 1.0), torch.distributions.Normal(0.0, 1.0))",
]  # fmt: skip


EVAL_ONLY = [
    e for e in RANDOM if "rrelu" in e or "feature_dropout(x, 0.3" in e or "randn_like" in e
]


@pytest.mark.parametrize("expression", OPERATORS)
def test_operator(expression: str) -> None:
    matrix = nn.Parameter(torch.tensor([[[1.0, 0.1, 0], [0, 0.9, 0.1]]]))
    model = net(code(f"lambda self, x: {expression}"), t=matrix)
    assert_same(model, image(), batch_fixed=True, input_gradients=False, same_strides=False)
    assert_same_later(model, image(), image(seed=5) * 3)


@pytest.mark.parametrize("expression", RANDOM)
def test_operator_that_draws(expression: str) -> None:
    """Random numbers and distributions: the same ones under the same seed."""
    model = net(code(f"lambda self, x: {expression}"), p=0.3)
    eval_only = bool(capture(model, image()).modes.eval_only)
    assert eval_only == (expression in EVAL_ONLY)
    assert_same(model, image(), eval_only=eval_only, input_gradients="poisson" not in expression)


def test_distribution_that_is_told_to_validate_is_refused() -> None:
    before = torch.distributions.Distribution._validate_args
    model = net(lambda self, x: torch.distributions.Normal(x, 1.0, validate_args=True).rsample())
    with pytest.raises(CaptureError, match="decides by the values of a tensor"):
        capture(model, image())
    assert torch.distributions.Distribution._validate_args == before


def test_operator_of_another_library() -> None:
    pytest.importorskip("torchvision")
    boxes = "torch.tensor([[0.0, 0, 0, 4, 4]])"
    expression = f"torch.ops.torchvision.roi_align(x, {boxes}, 1.0, 2, 2, -1, False)"
    assert_same(net(code(f"lambda self, x: {expression}")), image())
