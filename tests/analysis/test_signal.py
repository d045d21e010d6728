"""Signal propagation: what is measured, what is expected, what is refused, how it is shown."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from seeded import ConvBn, image, seeded
from test_cli import Run, run  # noqa: F401  (a fixture)
from torch import Tensor, nn

import fxopt
from fxopt import PreconditionError, signal_propagation
from fxopt.analysis.expectation import Expectation
from fxopt.analysis.signal import SignalRow
from fxopt.flow import Flow
from fxopt.layers import SkipInit
from fxopt.scaled_ws import ScaledWSConv2d


class Block(nn.Module):
    """``x + α·s·branch``, by hand."""

    def __init__(self, channels: int, gain: float = 0.0) -> None:
        super().__init__()
        self.conv1 = ScaledWSConv2d(channels, channels, 3, padding=1, gamma=1.7128585504)
        self.conv2 = ScaledWSConv2d(channels, channels, 3, padding=1, gamma=1.7128585504)
        self.skip = SkipInit(0.5, gain)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.skip(self.conv2(F.relu(self.conv1(F.relu(x)))))  # type: ignore[no-any-return]


class Net(nn.Module):
    def __init__(self, gain: float = 0.0) -> None:
        super().__init__()
        self.stem = ScaledWSConv2d(3, 32, 3)
        self.blocks = nn.Sequential(Block(32, gain), Block(32, gain))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x))  # type: ignore[no-any-return]


def captured(model: nn.Module, *shape: int) -> fxopt.Program:
    return fxopt.capture(model.eval(), image(*(shape or (2, 3, 24, 32))))


def net(gain: float = 0.0) -> fxopt.Program:
    torch.manual_seed(0)
    return captured(Net(gain))


def test_rows_are_blocks_and_layers_outside_of_them() -> None:
    found = signal_propagation(net())
    assert [(row.path, row.kind) for row in found.rows] == [
        ("stem", "layer"), ("blocks.0", "block"), ("blocks.1", "block")
    ]  # fmt: skip
    assert found.inputs == "unit normal 8x3x24x32"
    assert [row.path for row in found.blocks] == ["blocks.0", "blocks.1"]


def test_measures_what_a_hook_sees() -> None:
    torch.manual_seed(0)
    model: Any = Net(gain=0.7).eval()
    seen: dict[str, Tensor] = {}
    model.blocks[0].register_forward_hook(lambda *a: seen.update(block=a[2]))
    model.blocks[0].conv2.register_forward_hook(lambda *a: seen.update(branch=a[2]))
    data = image(6, 3, 24, 32, seed=4)
    with torch.no_grad():
        model(data)
    torch.manual_seed(0)
    row = signal_propagation(captured(Net(0.7)), data, skip_gain=None).blocks[0]
    block, branch = seen["block"].double(), seen["branch"].double()
    assert row.variance == pytest.approx(block.var((0, 2, 3), correction=0).mean().item(), rel=1e-5)
    assert row.squared_mean == pytest.approx(block.mean((0, 2, 3)).square().mean().item(), rel=1e-5)
    measured = branch.var((0, 2, 3), correction=0).mean().item()
    assert row.branch_variance == pytest.approx(measured, rel=1e-5)


def test_several_batches_are_one_set() -> None:
    data = image(6, 3, 24, 32, seed=4)
    whole = signal_propagation(net(), [data])
    parts = signal_propagation(net(), [data[:1], data[1:]])
    for one, other in zip(whole.rows, parts.rows, strict=True):
        assert one.variance == pytest.approx(other.variance, rel=1e-5)
    assert signal_propagation(net(), data).inputs == "a tensor of shape (6, 3, 24, 32)"


def test_gains_are_set_and_the_program_stays() -> None:
    program = net()
    state = copy.deepcopy(program.graph_module.state_dict())
    torch.manual_seed(5)
    before = torch.get_rng_state()
    at_one, own = (signal_propagation(program, skip_gain=gain) for gain in (1.0, None))
    assert torch.get_rng_state().equal(before)
    assert at_one.blocks[0].variance > 1.1 * own.blocks[0].variance
    assert own.blocks[0].variance == pytest.approx(own.rows[0].variance, rel=1e-6)
    assert (at_one.blocks[0].beta_squared, own.blocks[0].beta_squared) == (
        pytest.approx(1.25, rel=1e-6), pytest.approx(1.0, rel=1e-6)
    )  # fmt: skip
    assert all(t.equal(state[k]) for k, t in program.graph_module.state_dict().items())


def test_measured_is_near_expected() -> None:
    for row in signal_propagation(net(), batch=16).rows:
        assert row.ratio == pytest.approx(1.0, abs=0.15)


def test_norms_by_batch_or_deleted() -> None:
    """Statistics that the norms have are not used, and stay."""
    program = captured(seeded(ConvBn(bias=False)))
    norm: Any = program.graph_module.get_submodule("norm")
    mean = norm.running_mean.clone()
    by_batch, deleted = (signal_propagation(program, norms=how) for how in ("batch", "deleted"))  # type: ignore[arg-type]
    assert norm.running_mean.equal(mean)
    assert norm.num_batches_tracked == 0
    expected = norm.weight.square().mean().item()
    assert by_batch.rows[0].variance == pytest.approx(expected, rel=1e-3)
    assert by_batch.rows[0].expected == pytest.approx(expected, rel=1e-6)
    conv: Any = program.graph_module.get_submodule("conv")
    squares = conv.weight.square().sum((1, 2, 3)).mean().item()
    assert deleted.rows[0].variance == pytest.approx(squares, rel=0.1)
    assert deleted.rows[0].expected is None


class Odd(nn.Module):
    """One expression of a convolution's result at a time."""

    def __init__(self, function: Any, channels: int = 16) -> None:
        super().__init__()
        self.conv = ScaledWSConv2d(3, 16, 3)
        self.other = ScaledWSConv2d(3, 16, 3)
        self.last = ScaledWSConv2d(channels, 8, 1)
        self.scale = nn.Parameter(torch.linspace(0.5, 2, 16).view(1, 16, 1, 1))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        y = self.function(self, self.conv(x), self.other(x))
        return self.last(y)  # type: ignore[no-any-return]


ODD: dict[str, tuple[Any, float]] = {
    "sum": (lambda self, a, b: a + b, 2.0),
    "difference": (lambda self, a, b: a - b, 2.0),
    "product": (lambda self, a, b: a * b, 1.0),
    "sum with itself": (lambda self, a, b: a + a, 4.0),
    "multiple": (lambda self, a, b: 3 * a - 1, 9.0),
    "by channel": (lambda self, a, b: a * self.scale, (torch.linspace(0.5, 2, 16) ** 2).mean().item()),
    "average pool": (lambda self, a, b: F.avg_pool2d(a, 2), 0.25),
    "max pool": (lambda self, a, b: F.max_pool2d(a, 3), 0.3573735),
    "global mean": (lambda self, a, b: a.mean((2, 3), keepdim=True), 1 / (22 * 30)),
    "enlarged": (lambda self, a, b: F.interpolate(a, scale_factor=2), 1.0),
    "rectified, of variance 4": (lambda self, a, b: F.relu(2 * a), 4 * 0.3408450569),
    "squared": (lambda self, a, b: a.square(), 2.0),
    "gated": (lambda self, a, b: a * torch.sigmoid(b.mean((2, 3), keepdim=True)), 0.25),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_expected_and_measured_of_expressions(name: str) -> None:
    function, expected = ODD[name]
    torch.manual_seed(0)
    program = captured(Odd(function))
    expectation = Expectation(Flow(program))
    expectation.run()
    (read,) = (n.all_input_nodes[0] for n in program.nodes if n.target == "last")
    found = expectation.of(read)
    assert found is not None
    assert found.variance == pytest.approx(expected, rel=1e-3)
    row = signal_propagation(program, batch=16).rows[-1]
    assert row.expected == pytest.approx(expected, rel=1e-3)
    assert row.ratio == pytest.approx(1.0, abs=0.25)


UNKNOWN: dict[str, Any] = {
    "softmax": lambda self, a, b: a.softmax(1),
    "maximum of two": lambda self, a, b: torch.maximum(a, b),
    "by place": lambda self, a, b: a * torch.rand(22, 30),
    "matrix product": lambda self, a, b: a @ b.transpose(2, 3),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_cannot_be_expected_is_none(name: str) -> None:
    torch.manual_seed(0)
    row = signal_propagation(captured(Odd(UNKNOWN[name]))).rows[-1]
    assert (row.expected, row.ratio) == (None, None)
    assert row.variance > 0


def test_weights_that_the_forward_computes() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            centred = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return F.conv2d(x, centred / centred.flatten(1).norm(dim=1).view(-1, 1, 1, 1))

    torch.manual_seed(0)
    row = signal_propagation(captured(Standardised(3, 8, 3))).rows[0]
    assert row.expected == pytest.approx(1.0, rel=1e-6)


def test_transposed_convolutions_see_parts_of_filters() -> None:
    torch.manual_seed(0)
    row = signal_propagation(captured(nn.ConvTranspose2d(3, 32, 4, 2, 1))).rows[0]
    assert row.ratio == pytest.approx(1.0, abs=0.1)


# ---- refusals ----------------------------------------------------------------------------------


def test_refuses_meta() -> None:
    with torch.device("meta"):
        program = fxopt.capture(nn.Conv2d(3, 4, 3).eval(), torch.zeros(1, 3, 8, 8), verify=False)
    with pytest.raises(PreconditionError, match="Conv2d is on the meta device"):
        signal_propagation(program)


def test_refuses_a_net_without_layers() -> None:
    with pytest.raises(PreconditionError, match="ReLU has no convolution or linear layer"):
        signal_propagation(captured(nn.ReLU()))


@pytest.mark.parametrize(
    ("data", "message"),
    [(torch.zeros(2, 4, 8, 8), "does not fit the model"), (torch.zeros(0, 3, 24, 32), "empty"),
     (torch.full((1, 3, 24, 32), float("nan")), "not finite")],
)  # fmt: skip
def test_refuses_data(data: Tensor, message: str) -> None:
    with pytest.raises(PreconditionError, match=message):
        signal_propagation(net(), data)


# ---- the command -------------------------------------------------------------------------------

MODEL = """
from torch import nn
class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))
"""


@pytest.fixture
def spec(tmp_path: Path) -> str:
    path = tmp_path / "model.py"
    path.write_text(MODEL)
    return f"{path}:Net"


def test_command_shows_both_nets(spec: str, run: Run, tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("matplotlib")
    plot = tmp_path / "signal.svg"
    status, out, _ = run(
        "signal", spec, "--input", "1x3x16x20", "-p", "bn_to_scaled_ws{init=fresh}", "--plot",
        str(plot),
    )  # fmt: skip
    assert status == 0
    assert "Net on unit normal 8x3x16x20, skip gains their own" in out
    for word in ("squared mean", "variance", "expected", "before", "BatchNorm deleted"):
        assert word in out
    drawn = plot.read_text()
    for text in ("average channel variance", "residual branch variance", "before"):
        assert text in drawn


def test_command_as_json(spec: str, run: Run, tmp_path: Path) -> None:  # noqa: F811
    data = tmp_path / "data.pt"
    torch.save(image(4, 3, 16, 20), data)
    status, out, _ = run("signal", spec, "--input", "1x3x16x20", "--data", str(data), "--json")
    document = json.loads(out)
    assert (status, document["schema"]) == (0, "fxopt.signal/1")
    assert document["inputs"] == str(data)
    assert list(document["beside"]) == ["BatchNorm deleted"]
    keys = {
        "beta_squared",
        "node",
        "path",
        "kind",
        "squared_mean",
        "variance",
        "branch_variance",
        "expected",
        "ratio",
    }
    assert [set(row) for row in document["rows"]] == [keys, keys]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "missing.pt"), "there is no calibration file 'missing.pt'"),
        (("--plot", "signal.txt"), "the name ends in .svg or .png"),
        (("-p", "nothing"), "unknown pass 'nothing'"),
    ],
)
def test_command_refuses(spec: str, run: Run, arguments: tuple[str, ...], message: str) -> None:  # noqa: F811
    status, _, err = run("signal", spec, "--input", "1x3x16x20", *arguments)
    assert (status, message in err) == (2, True)


def test_ratio_of_nothing() -> None:
    assert SignalRow("a", "", "layer", 0.0, 1.0, None, None, 0.0).ratio is None


# ---- other layouts, and what was once measured or expected wrongly -----------------------------


class Encoder(nn.Module):
    """Tokens ``(N, L, C)`` of patches, a residual MLP on them (ViT)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Windows(nn.Module):
    """Maps ``(N, H, W, C)`` (Swin)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).permute(0, 2, 3, 1)
        return x + self.down(F.gelu(self.up(x)))


class Back(Windows):
    """Channels last in the branch, first in the sum (ConvNeXt)."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        return x + self.down(F.gelu(self.up(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)


@pytest.mark.parametrize(("model", "axis"), [(Encoder(), 2), (Windows(), 3), (Back(), 1)])
def test_channels_wherever_they_lie(model: nn.Module, axis: int) -> None:
    model = seeded(model)
    x = image(4, 3, 24, 32)
    (row,) = signal_propagation(fxopt.capture(model, x), x).blocks
    with torch.no_grad():
        value = model(x).double().movedim(axis, 0).flatten(1)
    assert row.variance == pytest.approx(value.var(1, correction=0).mean().item(), rel=1e-5)
    assert row.squared_mean == pytest.approx(value.mean(1).square().mean().item(), rel=1e-4)


MORE: dict[str, Any] = {
    "where": lambda self, a, b: torch.where(a > 0, a, 0.1 * a),
    "mask": lambda self, a, b: a * (a > 0),
    "channels of zeros": lambda self, a, b: torch.cat((a[:, :8], torch.zeros_like(a[:, :8])), 1),
    "fixed filter": lambda self, a, b: F.conv2d(F.relu(a), self.blur, groups=16),
}  # fmt: skip


@pytest.mark.parametrize("name", MORE)
def test_more_expressions(name: str) -> None:
    torch.manual_seed(0)
    model = Odd(MORE[name])
    model.register_buffer("blur", torch.full((16, 1, 2, 2), 0.25))
    row = signal_propagation(captured(model), batch=16).rows[-1]
    assert row.ratio == pytest.approx(1.0, abs=0.25)


@pytest.mark.parametrize(
    "function",
    [lambda self, a, b: F.normalize(a), lambda self, a, b: F.lp_pool2d(a, 2, 2),
     lambda self, a, b: F.avg_pool2d(a, 2, divisor_override=1),
     lambda self, a, b: F.interpolate(a, scale_factor=2, mode="bilinear"),
     lambda self, a, b: F.pad(a, (1, 1, 1, 1), value=1.0)],
)  # fmt: skip
def test_more_that_cannot_be_expected(function: Any) -> None:
    torch.manual_seed(0)
    assert signal_propagation(captured(Odd(function))).rows[-1].expected is None


def test_beta_is_that_of_the_net_where_a_filter_is_fixed() -> None:
    """A blur counts as a pool does: not at all in β², and by its weights in what is expected."""
    torch.manual_seed(0)
    model = Odd(lambda self, a, b: F.conv2d(a, self.blur, groups=16))
    model.register_buffer("blur", torch.full((16, 1, 2, 2), 0.25))
    rows = signal_propagation(captured(model), batch=16).rows
    assert [row.path for row in rows] == ["conv", "last"]
    assert (rows[-1].beta_squared, rows[-1].expected) == (pytest.approx(1.0), pytest.approx(0.25))


@pytest.mark.parametrize("apart", [False, True])
def test_zeros_around_small_maps(apart: bool) -> None:
    """Far from the border 1; on 6×6 a filter of 3×3 sees (16/18)² of its map on the average."""
    torch.manual_seed(0)
    pad = nn.ZeroPad2d(1) if apart else nn.Identity()
    conv = ScaledWSConv2d(64, 64, 3, padding=0 if apart else 1)
    model = nn.Sequential(ScaledWSConv2d(3, 64, 1), pad, conv)
    row = signal_propagation(captured(model, 2, 3, 6, 6), batch=256).rows[-1]
    assert row.beta_squared == pytest.approx(1.0, rel=1e-6)
    assert row.expected == pytest.approx((8 / 9) ** 2, rel=1e-6)
    assert row.ratio == pytest.approx(1.0, abs=0.05)


def test_zeros_around_activated_maps() -> None:
    """There the weights of a filter that are left do not add up to zero: the mean shows."""
    torch.manual_seed(0)
    conv = ScaledWSConv2d(64, 64, 3, padding=1, gamma=1.7128585504)
    model = nn.Sequential(ScaledWSConv2d(3, 64, 1), nn.ReLU(), conv)
    row = signal_propagation(captured(model, 2, 3, 6, 6), batch=256).rows[-1]
    corner, edge = 4 / 9 * 5 / 9 * 4, 6 / 9 * 3 / 9 * 16
    common = ((25 / 36 * 2 + 1) / 3) ** 2 - (8 / 9) ** 4
    uneven = ((corner + edge) / 36 - common) * 576 / 575
    mean_squared = (1 / (2 * torch.pi)) / ((1 - 1 / torch.pi) / 2)
    assert row.expected == pytest.approx((8 / 9) ** 2 + uneven * mean_squared, rel=1e-4)
    assert row.ratio == pytest.approx(1.0, abs=0.08)


def test_zeros_around_activated_maps_and_plain_filters() -> None:
    """Weights that are drawn apart: the mean shows wherever some are missing."""
    torch.manual_seed(0)
    plain = nn.Conv2d(64, 256, 3, padding=1)
    model = nn.Sequential(ScaledWSConv2d(3, 64, 1), nn.ReLU(), plain)
    assert plain.bias is not None
    row = signal_propagation(captured(model, 2, 3, 6, 6), batch=256).rows[-1]
    assert row.ratio == pytest.approx(1.0, abs=0.05)
    assert row.beta_squared is not None
    assert row.expected is not None
    assert (8 / 9) ** 2 * row.beta_squared < row.expected < row.beta_squared


def test_large_values_do_not_overflow() -> None:
    class Large(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1e25

    (row,) = signal_propagation(captured(nn.Sequential(Large(3, 4, 3), nn.Conv2d(4, 4, 1)))).rows[
        :1
    ]
    assert row.variance < 1
    row = signal_propagation(captured(nn.Sequential(Large(3, 4, 3), nn.Conv2d(4, 4, 1)))).rows[1]
    assert 1e45 < row.variance < 1e55


@pytest.mark.parametrize("options", [{"norms": "x"}, {"batch": 0}, {"skip_gain": float("nan")}])
def test_refuses_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        signal_propagation(net(), **options)


def test_own_gains_hold_for_all_that_is_beside(tmp_path: Path, run: Run) -> None:  # noqa: F811
    path = tmp_path / "model.py"
    path.write_text(
        "from torch import nn\nfrom fxopt.layers import SkipInit\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.stem, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)\n"
        "        self.conv, self.skip = nn.Conv2d(4, 4, 3, padding=1), SkipInit(0.5)\n"
        "    def forward(self, x):\n"
        "        x = self.norm(self.stem(x))\n"
        "        return x + self.skip(self.conv(x))\n"
    )
    status, out, _ = run(
        "signal",
        f"{path}:Net",
        "--input",
        "1x3x16x20",
        "--own-gains",
        "--json",
        "-p",
        "fold_conv_bn",
    )
    document = json.loads(out)
    assert (status, document["skip_gain"]) == (0, None)
    assert {other["skip_gain"] for other in document["beside"].values()} == {None}


def test_refuses_a_file_of_a_number(spec: str, run: Run, tmp_path: Path) -> None:  # noqa: F811
    path = tmp_path / "number.pt"
    torch.save(5, path)
    status, _, err = run("signal", spec, "--input", "1x3x16x20", "--data", str(path))
    assert (status, "number.pt' holds a int" in err) == (2, True)
