"""Aliases and writes as they stand in research code: loops, accumulators, buffers, blocks."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from capture.checks import assert_same, image, net, seeded
from torch import Tensor, nn

from fxopt.capture import capture


def check(function: Any, **expectation: Any) -> None:
    assert_same(net(lambda self, x: function(x)), image(2, 4, 6, 5), **expectation)


def test_bit_reversal_in_place() -> None:
    def function(x: Tensor) -> Any:
        y = x.clone()
        y[..., 1:] = y[..., :-1].clone()
        y[..., 0] = 0
        return y

    check(function)


def test_increment_of_list_elements() -> None:
    def function(x: Tensor) -> Any:
        maps = list(x.split(1, 1))
        maps = [m * 1 for m in maps]
        older = maps[0]
        maps[0] += maps[1]
        maps[2] *= 2
        return older, torch.cat(maps, 1)

    check(function)


def test_increment_of_dict_values() -> None:
    def function(x: Tensor) -> Any:
        d = {"a": x * 1, "b": x * 2}
        alias = d["a"]
        for k in d:
            d[k] += 1
        d["a"] -= d["b"]
        return alias, d

    check(function)


def test_write_into_a_transposed_then_sliced_then_flattened_view() -> None:
    def function(x: Tensor) -> Any:
        y = x * 1
        y.transpose(1, 2)[:, 1:3].add_(1)
        y.permute(2, 0, 3, 1)[0, :, 1:].zero_()
        return y

    check(function)


def test_write_by_a_mask_with_a_scalar_tensor() -> None:
    def function(x: Tensor) -> Any:
        y = x.clone()
        y[y < 0] = y.mean()
        y[:, 0][y[:, 0] > 1] = 1.0
        return y

    check(function, input_gradients=False)


def test_write_by_mask_over_leading_dimensions() -> None:
    def function(x: Tensor) -> Any:
        y = x.clone()
        y[x.mean((1, 2, 3)) > 0] = 0.0
        y[:, torch.tensor([True, False, True, False])] += 1
        return y

    check(function)


def test_write_by_indices_made_of_ranges() -> None:
    def function(x: Tensor) -> Any:
        y = torch.zeros_like(x)
        b = torch.arange(x.shape[0])
        idx = x.mean((2, 3)).argmax(1)
        y[b, idx] = x[b, idx]
        y[b[:, None], torch.tensor([0, 2])] += 1
        return y

    check(function)


def test_index_put_with_accumulation() -> None:
    def function(x: Tensor) -> Any:
        y = x.clone()
        i = torch.tensor([0, 0, 1])
        y.index_put_((torch.zeros(3, dtype=torch.long), i), x[0, :3], accumulate=True)
        return y

    check(function)


def test_one_hot_by_scatter() -> None:
    def function(x: Tensor) -> Any:
        return torch.zeros(x.shape[0], 5).scatter_(
            1, x.mean((1, 2))[:, :1].argmax(1, keepdim=True), 1.0
        )

    check(function)


def test_top_k_mask_by_scatter() -> None:
    def function(x: Tensor) -> Any:
        flat = x.flatten(1)
        _, i = flat.topk(3, dim=1)
        mask = torch.zeros_like(flat)
        mask.scatter_(1, i, 1.0)
        mask = mask.bool()
        return flat.masked_fill(~mask, float("-inf")).softmax(1)

    check(function)


def test_histogram_by_scatter_add() -> None:
    def function(x: Tensor) -> Any:
        bins = (x.sigmoid() * 8).long().clamp(0, 7).flatten(1)
        h = torch.zeros(x.shape[0], 8)
        h.scatter_add_(1, bins, torch.ones_like(bins, dtype=h.dtype))
        return h

    check(function)


def test_scatter_reduce_in_place() -> None:
    def function(x: Tensor) -> Any:
        i = torch.zeros(x.shape, dtype=torch.long)
        y = x.clone()
        y.scatter_reduce_(1, i, x, reduce="amax", include_self=False)
        return y

    check(function)


def test_write_to_an_expanded_view_of_a_clone() -> None:
    def function(x: Tensor) -> Any:
        y = x[:, :1].expand(-1, 4, -1, -1).clone()
        y[:, 1:] *= 2
        return y

    check(function)


def test_write_through_flatten_of_a_slice() -> None:
    def function(x: Tensor) -> Any:
        y = x * 1
        y[0].flatten().add_(1)
        y.view(-1)[::2].mul_(3)
        return y

    check(function)


def test_standardise_in_place_by_channel() -> None:
    def function(x: Tensor) -> Any:
        x = x.clone()
        x.sub_(torch.tensor([0.4, 0.5, 0.6, 0.7])[:, None, None]).div_(
            torch.tensor([0.2, 0.3, 0.2, 0.1])[:, None, None]
        )
        return x

    check(function)


def test_channels_normalised_one_by_one_as_in_googlenet() -> None:
    def function(x: Tensor) -> Any:
        a = torch.unsqueeze(x[:, 0], 1) * 0.458 - 0.03
        b = torch.unsqueeze(x[:, 1], 1) * 0.448 - 0.088
        return torch.cat((a, b), 1)

    check(function)


def test_roll_by_writes() -> None:
    def function(x: Tensor) -> Any:
        y = x.clone()
        last = y[..., -1:].clone()
        y[..., 1:] = x[..., :-1]
        y[..., :1] = last
        return y

    check(function)


def test_padding_by_write_into_zeros() -> None:
    def function(x: Tensor) -> Any:
        b, c, h, w = x.shape
        out = x.new_zeros(b, c, h + 2, w + 4)
        out[:, :, 1 : h + 1, 2 : w + 2] = x
        out[:, :, 1:-1, 2:-2].relu_()
        return out

    check(function)


def test_sum_accumulated_into_a_slice_in_a_loop() -> None:
    def function(x: Tensor) -> Any:
        out = torch.zeros(x.shape[0], 2, *x.shape[2:])
        for i in range(x.shape[1]):
            out[:, i % 2] += x[:, i]
        return out

    check(function)


def test_window_overlap_added_in_place() -> None:
    def function(x: Tensor) -> Any:
        out = torch.zeros_like(x)
        norm = torch.zeros_like(x)
        for i in range(0, x.shape[2] - 2, 2):
            out[:, :, i : i + 3] += x[:, :, i : i + 3] * 2
            norm[:, :, i : i + 3] += 1
        return out / norm.clamp(min=1)

    check(function)


def test_dynamic_programming_over_rows() -> None:
    def function(x: Tensor) -> Any:
        d = torch.zeros_like(x)
        d[:, :, 0] = x[:, :, 0]
        for t in range(1, x.shape[2]):
            d[:, :, t] = torch.maximum(d[:, :, t - 1] * 0.9, x[:, :, t])
        return d

    check(function, batch_fixed=False)


def test_cumulative_sum_written_in_place_over_slices() -> None:
    def function(x: Tensor) -> Any:
        y = x.clone()
        for i in range(1, 4):
            y[:, i] = y[:, i] + y[:, i - 1]
        return y

    check(function)


def test_assignment_of_a_tensor_to_an_element() -> None:
    def function(x: Tensor) -> Any:
        out = torch.zeros(2, 4)
        for i in range(2):
            for j in range(4):
                out[i, j] = x[i, j].mean() * (i + j)
        return out

    check(function, batch_fixed=True)


def test_shallow_copy_of_a_list_shares_its_tensors() -> None:
    def function(x: Tensor) -> Any:
        maps = [x * 1, x * 2]
        other = copy.copy(maps)
        other[0] += 1
        other[1] = other[1] + 1
        return maps, other

    check(function)


def test_inplace_relu_over_the_block_input_read_by_the_shortcut() -> None:
    class Block(nn.Module):
        def __init__(self, c: int) -> None:
            super().__init__()
            self.bn, self.relu, self.conv = (
                nn.BatchNorm2d(c),
                nn.ReLU(inplace=True),
                nn.Conv2d(c, c, 3, padding=1),
            )

        def forward(self: Any, x: Tensor) -> Any:
            out = self.relu(x)
            out = self.conv(self.bn(out))
            out += x
            return out

    assert_same(seeded(nn.Sequential(nn.Conv2d(3, 4, 1), Block(4), Block(4))), image())


def test_inplace_relu_on_concatenation_parts() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        a, b = self.a(x), self.b(x)
        cat = torch.cat([a, b], 1)
        self.relu(a)
        return cat + torch.cat([a, b], 1)

    assert_same(
        net(forward, a=nn.Conv2d(3, 2, 1), b=nn.Conv2d(3, 2, 1), relu=nn.ReLU(True)), image()
    )


def test_inplace_relu_on_chunk_of_a_convolution() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        y = self.conv(x)
        a, b = y[:, :2], y[:, 2:]
        a = self.relu(a)
        return y * 2, a, b

    assert_same(
        net(forward, conv=nn.Conv2d(3, 4, 1), relu=nn.ReLU(True)), image(), same_strides=False
    )


def test_inplace_after_identity_layers() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        y = self.conv(x)
        z = self.drop(self.id(y))
        z = self.relu(z)
        return y + z

    assert_same(
        net(
            forward,
            conv=nn.Conv2d(3, 4, 1),
            id=nn.Identity(),
            drop=nn.Dropout(0.0),
            relu=nn.ReLU(True),
        ),
        image(),
    )


def test_transposed_parameter_tied_to_another() -> None:
    lin = nn.Linear(7, 4, bias=False)
    model = net(lambda self, x: self.lin(x) @ self.back, lin=lin)
    model.back = lin.weight
    assert_same(model, image())


def test_queue_rolled_in_both_modes() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        f = x.mean((2, 3))
        with torch.no_grad():
            self.queue = torch.roll(self.queue, 2, 0)
            self.queue[:2] = f[:2]
        return f @ self.queue.t()

    assert_same(net(forward, queue=torch.randn(8, 3)), image())


def test_integer_buffer_increment_by_rebinding() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        self.n = self.n + x.shape[0]
        self.total += x.sum(0).detach()
        return x + self.total / self.n

    model = net(forward, n=torch.zeros((), dtype=torch.long), total=torch.zeros(3, 10, 7))
    assert_same(model, image())


def test_zero_grad_like_reset_of_a_buffer() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        self.acc.zero_()
        for i in range(3):
            self.acc += x[:, i].mean().detach()
        return x * self.acc

    assert_same(net(forward, acc=torch.ones(())), image())


def test_running_maximum_by_out_argument() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        with torch.no_grad():
            torch.maximum(self.m, x.abs().amax(), out=self.m)
        return x / self.m

    model = net(forward, m=torch.ones(()))
    assert_same(model, image())


def test_quantisation_observer() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        if self.training:
            lo, hi = torch.aminmax(x.detach())
            self.lo.copy_(torch.min(self.lo, lo))
            self.hi.copy_(torch.max(self.hi, hi))
        s = (self.hi - self.lo) / 255
        return torch.fake_quantize_per_tensor_affine(
            x, s, torch.zeros((), dtype=torch.int32), 0, 255
        )

    model = net(forward, lo=torch.tensor(-1.0), hi=torch.tensor(1.0))
    eval_only = bool(capture(model, image()).modes.eval_only)
    assert_same(model, image(), eval_only=eval_only)


def test_vector_quantiser_with_moving_average_of_codes() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        flat = x.permute(0, 2, 3, 1).reshape(-1, 3)
        d = (flat**2).sum(1, keepdim=True) - 2 * flat @ self.codes.t() + (self.codes**2).sum(1)
        i = d.argmin(1)
        one = F.one_hot(i, 5).float()
        q = (
            F.embedding(i, self.codes)
            .view(x.shape[0], x.shape[2], x.shape[3], 3)
            .permute(0, 3, 1, 2)
        )
        if self.training:
            with torch.no_grad():
                self.size.mul_(0.9).add_(one.sum(0), alpha=0.1)
                self.codes.mul_(0.9).add_(one.t() @ flat / (self.size[:, None] + 1e-5), alpha=0.1)
        return x + (q - x).detach(), i

    model = net(forward, codes=torch.randn(5, 3), size=torch.ones(5))
    eval_only = bool(capture(model, image()).modes.eval_only)
    assert_same(model, image(), eval_only=eval_only)
