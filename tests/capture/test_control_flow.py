"""Python's control flow over shapes, members and arguments: followed, and guarded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capture.checks import assert_same, captured, code, image, net, seeded, targets
from torch import Tensor, nn

from fxopt.capture import capture
from fxopt.captured import to_module
from fxopt.errors import CaptureError, GuardError


def test_branch_on_width_is_guarded() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.conv(x) if x.shape[-1] > 32 else self.conv(x) * 2

    model = net(forward, conv=nn.Conv2d(3, 3, 3, padding=1))
    assert_same(model, image())
    module = captured(model, image())
    assert module(image(1, 3, 9, 32)).shape == (1, 3, 9, 32)
    with pytest.raises(
        GuardError, match=r"x\.shape\[3\] <= 32 \(decided at test_control_flow.py:\d+\)"
    ):
        module(image(1, 3, 9, 33))


def test_branch_on_inner_size_is_guarded() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = F.max_pool2d(self.conv(x), 2)
        return y if y.shape[-1] > 4 else y * 2

    model = net(forward, conv=nn.Conv2d(3, 3, 3, padding=1))
    assert_same(model, image(2, 3, 12, 10))
    with pytest.raises(GuardError, match=r"captured with max_pool2d.shape\[3\] = 5, called with"):
        captured(model, image(2, 3, 12, 10))(image(2, 3, 12, 8))


def test_truth_of_a_size_is_guarded() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x * 2 if x.shape[3] % 2 else x * 3

    model = net(forward)
    assert_same(model, image())
    with pytest.raises(GuardError, match=r"% 2"):
        captured(model, image())(image(2, 3, 10, 8))


def test_equality_of_two_sizes_is_guarded() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x if x.shape[2] == x.shape[3] else x.transpose(2, 3)

    model = net(forward)
    assert_same(model, image())
    with pytest.raises(GuardError, match=r"x.shape\[2\] != x.shape\[3\]"):
        captured(model, image())(image(2, 3, 7, 7))


def test_size_in_a_set_is_guarded() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x * 2 if x.shape[3] in {6, 7} else x

    model = net(forward)
    assert_same(model, image())
    with pytest.raises(GuardError):
        captured(model, image())(image(2, 3, 10, 6))


def test_size_as_key_of_a_dict_is_guarded() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x * {7: 2.0, 8: 3.0}[x.shape[3]]

    assert_same(net(forward), image())
    with pytest.raises(GuardError):
        captured(net(forward), image())(image(2, 3, 10, 8))


def test_whole_shape_compared_is_guarded() -> None:
    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        if x.shape != y.shape:
            y = F.interpolate(y, size=x.shape[-2:])
        return x + y

    model = net(forward)
    assert_same(model, (image(), image(2, 3, 5, 4)))
    with pytest.raises(GuardError):
        captured(model, (image(), image()))(image(), image(2, 3, 5, 4))


def test_shape_compared_with_a_tuple_is_guarded() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x * 2 if x.shape[-2:] == (10, 7) else x

    assert_same(net(forward), image())
    with pytest.raises(GuardError):
        captured(net(forward), image())(image(2, 3, 10, 8))


def test_assertion_on_the_input_size_is_guarded() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        assert x.shape[2] % 2 == 0, f"height {x.shape[2]} is odd"
        return F.max_pool2d(x, 2)

    assert_same(net(forward), image())
    with pytest.raises(GuardError):
        captured(net(forward), image())(image(2, 3, 9, 7))


def test_min_and_max_of_sizes_are_guarded() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x[:, :, : min(x.shape[2], 8), : max(x.shape[3], 3)] * x.shape[3]

    assert_same(net(forward), image())
    assert captured(net(forward), image())(image(1, 3, 9, 5)).shape == (1, 3, 8, 5)
    with pytest.raises(GuardError):
        captured(net(forward), image())(image(1, 3, 7, 7))


def test_batch_size_that_is_baked_in_is_guarded() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.stack([x[i] * (i + 1) for i in range(x.shape[0])])

    assert_same(net(forward), image(), batch_fixed=True)
    with pytest.raises(GuardError, match=r"x.shape\[0\] == 2"):
        captured(net(forward), image())(image(3, 3, 10, 7))


def test_iteration_over_the_batch_is_guarded() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.stack([self.conv(sample) for sample in x])

    model = net(forward, conv=nn.Conv2d(3, 2, 3))
    assert_same(model, image(), batch_fixed=True)
    with pytest.raises(GuardError, match=r"x.shape\[0\] == 2"):
        captured(model, image())(image(3, 3, 10, 7))


def test_unpacking_the_batch_is_guarded() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        first, second = x
        return first - second

    assert_same(net(forward), image(), batch_fixed=True)


def test_length_of_the_batch_is_guarded() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x / len(x)

    assert_same(net(forward), image(), batch_fixed=True)
    with pytest.raises(GuardError):
        captured(net(forward), image())(image(3, 3, 10, 7))


def test_range_over_the_width_is_guarded() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        total = x[..., 0]
        for column in range(1, x.size(-1)):
            total = total + x[..., column] / column
        return total

    assert_same(net(forward), image())
    with pytest.raises(GuardError):
        captured(net(forward), image())(image(2, 3, 10, 8))


def test_split_into_rows_is_guarded() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.cat([row.mean(2) for row in x.split(4, dim=2)], 1)

    assert_same(net(forward), image())
    with pytest.raises(GuardError):
        captured(net(forward), image())(image(2, 3, 13, 7))


def test_rank_of_the_input_is_guarded() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x.unsqueeze(0) if x.dim() == 3 else x

    assert_same(net(forward), image())
    with pytest.raises(GuardError, match="has 3 dimensions and was captured with 4"):
        captured(net(forward), image())(image(3, 10, 7))


def test_dtype_asked_for_is_guarded() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x if x.dtype == torch.float32 else x.float() / 255

    assert_same(net(forward), image())
    with pytest.raises(GuardError, match=r"float64 and was captured as torch.float32"):
        captured(net(forward), image())(image().double())


def test_floating_point_asked_for_is_guarded() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x * 2 if x.is_floating_point() else x / 255

    assert_same(net(forward), image())
    with pytest.raises(GuardError):
        captured(net(forward), image())(torch.ones(2, 3, 10, 7, dtype=torch.uint8))


def test_floating_point_asked_by_function_is_guarded() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x * 2 if torch.is_floating_point(x) else x / 255

    with pytest.raises(GuardError):
        captured(net(forward), image())(torch.ones(2, 3, 10, 7, dtype=torch.uint8))


def test_dtype_of_the_input_given_to_a_new_tensor_follows_or_is_guarded() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x + torch.ones(3, 1, 1, dtype=x.dtype)

    module = captured(net(forward), image())
    with suppress(GuardError):
        assert module(image().double()).dtype == torch.float64


def test_decision_by_requires_grad_is_refused() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x * 2 if x.requires_grad else x * 3

    with pytest.raises(
        CaptureError,
        match=r"decides by the \.requires_grad of a tensor at test_control_flow\.py:\d+",
    ):
        capture(net(forward), image())


def test_decision_by_the_grad_mode_is_refused() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x * 2 if torch.is_grad_enabled() else x * 3

    with pytest.raises(CaptureError, match="does not compute what the model does"):
        capture(net(forward), image())


def test_loop_over_a_module_list() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = x + block(x) * index
        return x

    assert_same(net(forward, blocks=nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(3))), image())


def test_module_dict_by_key() -> None:
    def forward(self: Any, x: Tensor, key: str = "b") -> Tensor:
        return self.heads[key](self.heads["a"](x))

    heads = nn.ModuleDict({"a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(4, 2, 1), "c": nn.Linear(2, 2)})
    assert_same(net(forward, heads=heads), image())


def test_while_loop_over_a_shrinking_map() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        while x.shape[-1] > 2:
            x = F.avg_pool2d(self.conv(x), 2)
        return x

    model = net(forward, conv=nn.Conv2d(3, 3, 3, padding=1))
    assert_same(model, image(2, 3, 16, 12))
    with pytest.raises(GuardError):
        captured(model, image(2, 3, 16, 12))(image(2, 3, 32, 24))


def test_recursion() -> None:
    def forward(self: Any, x: Tensor, depth: int = 3) -> Tensor:
        return x if depth == 0 else forward(self, self.conv(x) + x, depth - 1)

    assert_same(net(forward, conv=nn.Conv2d(3, 3, 1)), image())


def test_generators_and_comprehensions() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        def maps() -> Iterator[Tensor]:
            for block in self.blocks:
                yield block(x)

        return torch.cat([m.relu() for m in maps()], dim=1) + sum(m.mean() for m in maps())

    assert_same(net(forward, blocks=nn.ModuleList(nn.Conv2d(3, 2, 1) for _ in range(3))), image())


def test_refuses_error_of_an_operator_that_is_caught() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        try:
            return x @ x
        except RuntimeError:
            return x @ x.transpose(-1, -2)

    with pytest.raises(
        CaptureError, match=r"catches an error of an operator .*test_control_flow.py:\d+"
    ):
        capture(net(forward), image())


def test_refuses_branch_on_requires_grad() -> None:
    model = net(lambda self, x: x * 2 if x.requires_grad else x * 3)
    with pytest.raises(CaptureError, match="decides by the .requires_grad of a tensor"):
        capture(model, image())


def test_requires_grad_of_a_parameter_is_no_obstacle() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.conv(x) * self.scale
        return y if self.conv.weight.requires_grad and self.scale.requires_grad else y * 2

    assert_same(net(forward, conv=nn.Conv2d(3, 4, 1), scale=nn.Parameter(torch.rand(7))), image())


def test_contiguity_asked_for_is_guarded() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x * 2 if x.is_contiguous() else x * 3

    assert_same(net(forward), image())
    with pytest.raises(GuardError, match="'x is contiguous' was True"):
        captured(net(forward), image())(image().to(memory_format=torch.channels_last))


def test_context_manager_of_the_user() -> None:
    @contextmanager
    def nothing() -> Iterator[float]:
        yield 2.0

    def forward(self: Any, x: Tensor) -> Tensor:
        with nothing() as scale:
            return self.conv(x) * scale

    assert_same(net(forward, conv=nn.Conv2d(3, 4, 3)), image())


def test_shape_unpacked_and_recombined() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        x = x.view(b, c, h * w).transpose(1, 2).reshape(b * h, w, c)
        return x.reshape(b, h, w, c).permute(0, 3, 1, 2).contiguous()

    program = assert_same(net(forward), image())
    assert not program.guards.shapes


def test_window_partition_over_shapes() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        b, c, h, w = x.size()
        x = F.pad(x, (0, (4 - w % 4) % 4, 0, (4 - h % 4) % 4))
        hp, wp = x.shape[2], x.shape[3]
        x = x.view(b, c, hp // 4, 4, wp // 4, 4).permute(0, 2, 4, 3, 5, 1)
        windows = x.reshape(-1, 16, c)
        windows = self.linear(windows)
        x = windows.view(b, hp // 4, wp // 4, 4, 4, -1).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(b, -1, hp, wp)[:, :, :h, :w]

    model = net(forward, linear=nn.Linear(3, 5))
    assert_same(model, image())
    other = image(3, 3, 13, 18)
    assert torch.equal(captured(model, image())(other), model(other))


def test_channel_shuffle() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        b, c, h, w = x.data.size()
        return x.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, -1, h, w)

    assert_same(net(forward), image(2, 4, 10, 7))


def test_tensorflow_same_padding() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        ph = max((math.ceil(h / 2) - 1) * 2 + 3 - h, 0)
        pw = max((math.ceil(w / 2) - 1) * 2 + 3 - w, 0)
        return self.conv(F.pad(x, [pw // 2, pw - pw // 2, ph // 2, ph - ph // 2]))

    model = net(forward, conv=nn.Conv2d(3, 4, 3, stride=2))
    assert_same(model, image())
    for size in ((8, 12), (9, 11), (13, 8)):
        other = image(2, 3, *size)
        assert torch.equal(captured(model, image())(other), model(other))


def test_shape_arithmetic_stays_symbolic() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        return F.interpolate(x, size=(h * 2 - 1, int(w) + 1)) / math.sqrt(h) + (h / w) ** 0.5

    model = net(forward)
    assert_same(model, image())
    other = image(2, 3, 13, 7)
    try:
        found = captured(model, image())(other)
    except GuardError:
        return
    assert torch.equal(found, model(other))


@pytest.mark.parametrize(
    "expression",
    [
        "n // 3 + n % 3 - -n",
        "-(-n // 2)",
        "round(n * 1.5) + abs(1 - n)",
        "math.floor(n / 2) + math.ceil(n / 3) + math.trunc(n / 4)",
        "divmod(n, 3)[0] + divmod(n, 3)[1]",
        "n ** 2 - 2 ** n % 5 + 100 // n",
        "int(n / 2) + int(n * 0.75)",
        "n + 1 & ~1",
        "n << 1",
        "math.isqrt(n) + math.gcd(n, 4)",
        "max(n - 3, 0) + min(n, 5) + sum([n, n])",
        "int(math.log2(n)) + int(math.sqrt(n))",
        "float(n)",
        "complex(n).real",
        "int(f'{n}') + len(str(n))",
        "torch.Size([n, 2]).numel()",
        "n.bit_length()",
        "(n == 7) + (n != 7) + 2 * (n < 9)",
        "True * n + (n and 3) + (not n)",
        "[5, 6, 7, 8, 9, 10, 11, 12, 13][n - 5]",
        "math.prod((n, 2, n))",
    ],
)
def test_arithmetic_on_a_size_follows_or_is_guarded(expression: str) -> None:
    arithmetic = code(f"lambda n: {expression}")

    def forward(self: Any, x: Tensor) -> Tensor:
        return x * arithmetic(x.shape[3])

    model = net(forward)
    assert_same(model, image())
    module = captured(model, image())
    for width in (5, 6, 8, 9, 13):
        other = image(2, 3, 10, width)
        try:
            found = module(other)
        except GuardError:
            continue
        assert torch.equal(found, model(other)), width


@pytest.mark.parametrize(
    "function",
    [
        "x.new_zeros(x.shape[0], x.shape[3]).sum() + x", "x + torch.zeros(x.shape)",
        "x * (x.shape[3] == torch.tensor(7))",
        "x * (torch.tensor([7.0]) < x.shape[3])",
        "x + torch.ones(*x.shape[2:])", "x + x.new_full(x.size(), x.shape[3] / 2)",
        "x + torch.linspace(-1, 1, x.shape[3])", "x + torch.arange(x.shape[3]) / x.size(2)",
        "x + torch.eye(x.size(2), x.size(3))", "x + torch.tensor([x.shape[2], x.shape[3]]).sum()",
        "x + torch.tensor(x.shape[-1], dtype=x.dtype)",
        "x + torch.full((x.shape[2], 1), float(x.shape[3]))", "x.expand(2, *x.shape).sum(0)",
        "x.expand(-1, x.shape[1], -1, -1).repeat(1, 1, x.shape[3] // 4, 1)",
        "x.roll(x.shape[3] // 2, 3)", "x[:, :, x.shape[2] // 2:, :-(x.shape[3] // 4)]",
        "x[..., x.shape[3] - 1]", "x.narrow(3, 1, x.shape[3] - 2)", "x.unfold(2, 3, 2).sum(-1)",
        "x.flatten(2).unflatten(2, (x.shape[2], -1))",
        "F.adaptive_avg_pool2d(x, (x.shape[2] // 2, None))", "F.avg_pool2d(x, x.shape[2:])",
        "F.avg_pool2d(x, kernel_size=x.size()[2:])", "F.avg_pool2d(x, (x.shape[2] // 2, 1))",
        "F.max_pool2d(x, kernel_size=(x.shape[2] // 5, 2))", "F.layer_norm(x, x.shape[1:])",
        "F.layer_norm(x, x.size()[-1:])", "F.interpolate(x, scale_factor=20 / x.shape[2])",
        "x.view(*x.shape[:2], -1)", "x.reshape(x.size(0), -1)",
        "x.view((x.shape[0], x.shape[1], x.shape[2] * x.shape[3]))",
        "x.reshape(torch.Size([x.shape[0], -1]))", "torch.zeros_like(x).fill_(x.shape[3])",
        "x.index_select(3, torch.arange(x.shape[3] - 1, -1, -1))",
        "torch.meshgrid(torch.arange(x.shape[2]), torch.arange(x.shape[3]), indexing='ij')[1] + x",
        "torch.stack(torch.meshgrid(torch.arange(x.shape[2]), torch.arange(x.shape[3])))[0] + x",
        "x.masked_fill(torch.ones(x.shape[2], x.shape[3]).triu(1).bool(), 0)",
        "x / x.numel() * x.nelement() + x.ndim + x.element_size()",
        "x.split([2, x.shape[3] - 2], dim=3)[1]", "x.split(x.shape[2] // 2, dim=2)[0]",
        "torch.randperm(x.shape[3]).sum() * 0 + x",
    ],
)  # fmt: skip
def test_tensor_built_from_sizes_follows_or_is_guarded(function: str) -> None:
    model = net(code(f"lambda self, x: {function}"))
    assert_same(model, image())
    module = captured(model, image())
    for size in ((10, 9), (12, 7), (11, 6)):
        other = image(2, 3, *size)
        try:
            found = module(other)
        except GuardError:
            continue
        assert torch.equal(found, model(other)), size


def test_three_hundred_layers() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x)) + x
        return x

    layers = nn.ModuleList(nn.Conv2d(2, 2, 1) for _ in range(300))
    program = capture(net(forward, layers=layers), image(2, 2, 4, 3))
    assert targets(program).count("Conv2d") == 300


def test_three_hundred_modules_deep() -> None:
    model: nn.Module = nn.Conv2d(2, 2, 1)
    for _ in range(150):
        model = nn.Sequential(model)
    program = capture(seeded(model), image(2, 2, 4, 3))
    assert targets(program) == ["Conv2d"]
    assert torch.equal(to_module(program)(image(1, 2, 5, 4)), model(image(1, 2, 5, 4)))
