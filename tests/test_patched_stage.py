"""Stages: the same values tile by tile, whatever operators, sizes and grids."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from seeded import image, seeded
from torch import Tensor, nn

import fxopt
from fxopt import PassError, Program
from fxopt.passes.patch_execution import PatchExecution
from fxopt.patching.stage import PatchedStage


class Net(nn.Module):
    """``function`` of an image and its parts, then a convolution that stays outside."""

    def __init__(self, function: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts, self.end = function, nn.ModuleList(parts), nn.Identity()
        self.head = nn.LazyConv2d(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(torch.relu(self.function(x, *self.parts)))
        return result


def layers(*parts: nn.Module) -> Net:
    return Net(lambda x, *each: nn.Sequential(*each)(x), *parts)


def conv(inputs: int = 3, outputs: int = 4, kernel: Any = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **options)


def shuffled(x: Tensor) -> Tensor:
    samples, channels, height, width = x.size()
    x = x.view(samples, 2, channels // 2, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(samples, -1, height, width)


def same_padded(x: Tensor) -> Tensor:
    """For a kernel of 3 and a stride of 2, as TensorFlow pads: more below and to the right."""
    down, across = (max((-(size // -2) - 1) * 2 + 3 - size, 0) for size in x.size()[-2:])
    return F.pad(x, [across // 2, across - across // 2, down // 2, down - down // 2])


class Turned(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(2, 3)


def halves(x: Tensor, one: nn.Module, other: nn.Module) -> Tensor:
    first, second = other(x).chunk(2, dim=1)
    return torch.cat([first, one(second), x[:, 1:]], 1)


NETS: dict[str, Callable[[], nn.Module]] = {
    "convolutions": lambda: layers(conv(padding=1), conv(4, 5, (3, 2), stride=(1, 2))),
    "even kernels": lambda: layers(conv(kernel=(2, 4), padding=(1, 2)), conv(4, 4, 6, padding=4)),
    "dilation": lambda: layers(conv(padding=4, dilation=(2, 3)), conv(4, 3, dilation=2)),
    "stride beyond the kernel": lambda: layers(conv(kernel=1, stride=2), conv(4, 4, 2, stride=3)),
    "groups": lambda: layers(conv(3, 6, padding=1, groups=3), conv(6, 6, 5, padding=2, groups=6)),
    "same": lambda: layers(conv(kernel=(4, 3), padding="same"), conv(4, 4, 2, padding="same")),
    "valid": lambda: layers(conv(padding="valid"), conv(4, 4, padding="valid")),
    "functional": lambda: Net(
        lambda x, c: F.max_pool2d(F.conv2d(x, c.weight * 2, None, 1, (2, 0)), 3, 2, 1), conv()
    ),
    "norms": lambda: layers(conv(padding=1), nn.BatchNorm2d(4), nn.PReLU(4), conv(4, 4)),
    "asymmetric pads": lambda: Net(lambda x, c: c(F.pad(x, (0, 1, 2, 3), value=0.5)), conv(stride=2)),
    "TF's same": lambda: Net(
        lambda x, c, d: d(same_padded(c(same_padded(x)))), conv(stride=2), conv(4, 4, stride=2)
    ),
    "pads that cut": lambda: Net(lambda x, c: c(F.pad(x, (-1, 2, 0, -2))), conv(padding=1)),
    "zero pads": lambda: layers(nn.ZeroPad2d((1, 0, 2, 1)), conv(), nn.ConstantPad2d(2, -1.0)),
    "max pools": lambda: layers(
        nn.MaxPool2d(3, 2, 1, ceil_mode=True), conv(padding=1), nn.MaxPool2d(2, 1, 1, dilation=2)
    ),
    "mean pools": lambda: layers(
        nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), conv(padding=1),
        nn.AvgPool2d((3, 2), 1, 1), nn.AvgPool2d(2, divisor_override=3, ceil_mode=True),
    ),
    "functional mean pool": lambda: Net(
        lambda x, c: F.avg_pool2d(c(x), 3, 2, 1, True, False), conv(padding=1)
    ),
    "nearest": lambda: Net(
        lambda x, c, d: d(F.interpolate(c(x), scale_factor=2.0)), conv(stride=2), conv(4, 4, padding=1)
    ),
    "upsample": lambda: layers(conv(stride=3), nn.Upsample(scale_factor=3), nn.ReLU6(), conv(4, 4)),
    "residual": lambda: Net(lambda x, a, b: a(x) + b(a(x)), conv(padding=1), conv(4, 4, padding=1)),
    "cropped branch": lambda: Net(
        lambda x, a, b: torch.cat([F.pad(b(a(x)), (1, 1, 1, 1)), a(x)], 1), conv(), conv(4, 4)
    ),
    "nested diamonds": lambda: Net(
        lambda x, a, b, c: (y := a(x)) * torch.sigmoid(b(y)) + torch.cat([(z := c(y)), z], 1).relu(),
        conv(padding=1), conv(4, 4, 5, padding=2), conv(4, 2, 1),
    ),
    "channel halves": lambda: Net(halves, conv(2, 2, padding=1), conv(3, 4, padding=1)),
    "channel shuffle": lambda: Net(lambda x, c: c(shuffled(c(x))), conv(4, 4, padding=1)),
    "shuffle layer": lambda: layers(conv(padding=1), nn.ChannelShuffle(2), conv(4, 4, padding=1)),
    "scalars": lambda: Net(lambda x, c: (c(x) * 2 + 1).clamp(-1, 1) / 3, conv(padding=1)),
    "channels last": lambda: Net(
        lambda x, c, n, a, b: c(x) + b(F.gelu(a(n(c(x).permute(0, 2, 3, 1))))).permute(0, 3, 1, 2),
        conv(padding=1), nn.LayerNorm(4), nn.Linear(4, 9), nn.Linear(9, 4),
    ),
    "axes exchanged": lambda: Net(lambda x, c: c(c(x).transpose(2, 3).relu().mT), conv(3, 3, 3)),
    "casts": lambda: Net(lambda x, c: c(x.double().relu().to(torch.float32)), conv(padding=1)),
    "large kernel": lambda: layers(conv(kernel=(11, 9), padding=(5, 4)), conv(4, 4, 7, padding=3)),
}  # fmt: skip


def shape_of(name: str) -> tuple[int, ...]:
    return (2, 4, 17, 23) if name == "channel shuffle" else (2, 3, 17, 23)


def program_of(name: str) -> Program:
    net, x = NETS[name](), image(*shape_of(name))
    net(x)
    return fxopt.capture(seeded(net), x, verify=False)


def end_of(program: Program) -> str:
    """The value that the head's ReLU reads: all before it runs tile by tile."""
    relu = [node for node in program.nodes if node.name.startswith("relu")][-1]
    return relu.all_input_nodes[0].name


def stage_of(module: nn.Module) -> PatchedStage:
    (stage,) = (each for each in module.modules() if isinstance(each, PatchedStage))
    return stage


@pytest.mark.parametrize("grid", ["1x2", "3x1", "2x3"])
@pytest.mark.parametrize("name", NETS)
def test_values_are_the_same(name: str, grid: str) -> None:
    program = program_of(name)
    result = fxopt.run_pass(PatchExecution(until=end_of(program), grid=grid), program)
    assert len(result.rewritten) == 1
    assert result.verification is not None
    assert result.verification.max_error is not None
    assert result.verification.max_error < 1e-14


def test_a_tile_of_each_position() -> None:
    program = program_of("max pools")
    end = end_of(program)
    rows, cols = program.types[end].shape[2:]
    result = fxopt.run_pass(PatchExecution(until=end, grid=f"{rows}x{cols}"), program)
    assert result.verification is not None
    assert result.verification.max_error < 1e-14


@pytest.mark.parametrize("seed", range(8))
def test_areas_are_what_a_tile_depends_on(seed: int) -> None:
    """Where a change of the input changes the tile, by gradients of positive weights."""
    torch.manual_seed(seed)
    net = layers(
        conv(padding=(1, 2), kernel=(3, 5), stride=(1, 2)), conv(4, 4, 3, padding=1, dilation=2),
        nn.AvgPool2d(3, 2, 1),
    )  # fmt: skip
    x = image(1, 3, 21, 34).requires_grad_()
    net(x)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.uniform_(0.5, 1)
    program = fxopt.capture(net.eval(), x.detach(), verify=False)
    end = end_of(program)
    result = fxopt.run_pass(PatchExecution(until=end, grid="3x4"), program, verify=False)
    stage = stage_of(result.after.graph_module)
    part = nn.Sequential(*net.parts)
    for tile in stage.table:
        area, entry = tile[end], tile["x"]
        whole = part(x)[..., area.rows.start : area.rows.stop, area.cols.start : area.cols.stop]
        (gradient,) = torch.autograd.grad(whole.sum(), x)
        rows, cols = gradient[0, 0].nonzero().T
        assert (rows.min(), rows.max() + 1) == (entry.rows.start, entry.rows.stop)
        assert (cols.min(), cols.max() + 1) == (entry.cols.start, entry.cols.stop)


# ---- a stage as a module ----------------------------------------------------------------------


def patched(name: str = "convolutions", grid: str = "2x3") -> tuple[nn.Module, nn.Module, Tensor]:
    """A net, the same with a stage in it, and an image."""
    net, x = NETS[name](), image(*shape_of(name))
    net(x)
    seeded(net)
    end = end_of(fxopt.capture(net, x, verify=False))
    return net, fxopt.transform(net, [PatchExecution(until=end, grid=grid)], x), x


def test_the_user_s_keys_stay() -> None:
    net, after, _ = patched("norms")
    assert after.state_dict().keys() == net.state_dict().keys()
    assert not list(stage_of(after).parameters())


def test_any_batch_size_and_one_image_size() -> None:
    net, after, _ = patched()
    for batch in (1, 5):
        x = image(batch, 3, 17, 23)
        torch.testing.assert_close(after(x), net(x))
    with pytest.raises(PassError, match=r"inputs of 3x17x23, not 3x23x17: run patch_execution"):
        stage_of(after)(image(1, 3, 23, 17), *[None] * 4)


def test_gradients_flow_through_it() -> None:
    net, after, x = patched("nested diamonds")
    x.requires_grad_()
    names = [name for name, _ in net.named_parameters()]
    expected, found = (
        torch.autograd.grad(each(x).square().sum(), [x, *map(each.get_parameter, names)])
        for each in (net, after)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_it_is_copied_pickled_and_cast() -> None:
    net, after, x = patched("residual")
    expected = after(x)
    file = io.BytesIO()
    torch.save(after, file)
    file.seek(0)
    for other in (copy.deepcopy(after), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), expected)
        assert next(other.parameters()) is not next(net.parameters())
    wide = copy.deepcopy(after).double()
    assert wide(x.double()).dtype == torch.float64
    torch.testing.assert_close(wide(x.double()).float(), expected)


def test_a_patched_module_is_captured_again() -> None:
    _, after, x = patched("norms")
    program = fxopt.capture(after, x)
    assert sum(isinstance(program.module(node), PatchedStage) for node in program.nodes) == 1
    torch.testing.assert_close(program.graph_module(x)[0], after(x))


def test_training_with_norms_is_refused() -> None:
    _, after, _ = patched("norms")
    with pytest.raises(PassError, match=r"'parts_1' \('parts.1'\) holds BatchNorms.*fold first"):
        after.train()
    _, other, _ = patched("residual")
    assert other.train().training


def test_a_net_in_training_mode_is_cut_at_its_norms() -> None:
    net, x = NETS["norms"](), image(2, 3, 17, 23)
    net(x)
    seeded(net).train()
    program = fxopt.capture(net, x, verify=False)
    with pytest.raises(
        fxopt.PreconditionError, match=r"'parts_1'.* is in training mode.*fold first"
    ):
        fxopt.run_pass(PatchExecution(until=end_of(program), grid="2x2"), program)


@pytest.mark.parametrize("dropout", [nn.Dropout(0.5), nn.Dropout2d(0.5)])
def test_dropouts_are_for_training(dropout: nn.Module) -> None:
    net, x = layers(conv(padding=1), dropout, conv(4, 4)), image(2, 3, 17, 23)
    net(x)
    program = fxopt.capture(seeded(net), x, verify=False)
    which = PatchExecution(until=end_of(program), grid="2x2")
    after = fxopt.transform(net, [which], x)
    torch.testing.assert_close(after(x), net(x))
    with pytest.raises(PassError, match="drops out at random in training"):
        after.train()
    program = fxopt.capture(net.train(), x, verify=False)
    with pytest.raises(fxopt.PreconditionError, match="drops out at random"):
        fxopt.run_pass(which, program)


def test_a_dropout_that_acts_in_evaluation_is_refused() -> None:
    net, x = Net(lambda x, a: F.dropout(a(x), 0.5), conv(padding=1)), image(2, 3, 17, 23)
    net(x)
    program = fxopt.capture(seeded(net), x, verify=False)
    with pytest.raises(fxopt.PreconditionError, match="drops out at random"):
        fxopt.run_pass(PatchExecution(until=end_of(program), grid="2x2"), program)


NOT_LOCAL: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "squeeze-excite": (
        lambda: Net(lambda x, c: x * c(x.mean((2, 3), keepdim=True)), conv(3, 3, 1)),
        "'mean' .* not known to work on a neighbourhood",
    ),
    "adaptive pool": (lambda: layers(nn.AdaptiveAvgPool2d(5)), "'AdaptiveAvgPool2d' is not known"),
    "reflection": (lambda: layers(conv(padding=1, padding_mode="reflect")), "padding_mode='reflect'"),
    "reflecting pad": (lambda: Net(lambda x: F.pad(x, (1, 1, 1, 1), "replicate")), "mode='replicate'"),
    "transposed": (lambda: layers(nn.ConvTranspose2d(3, 4, 2)), "'ConvTranspose2d' is not known"),
    "bilinear": (lambda: layers(nn.Upsample(scale_factor=2, mode="bilinear")), "mode='bilinear'"),
    "odd enlargement": (lambda: Net(lambda x: F.interpolate(x, size=(20, 30))), "no whole number"),
    "group norm": (lambda: layers(nn.GroupNorm(1, 3)), "'GroupNorm' is not known"),
    "statistics": (lambda: layers(nn.BatchNorm2d(3, track_running_stats=False)), "statistics of the whole"),
    "rows": (lambda: Net(lambda x: x[:, :, 1:]), "other axes than the channels"),
    "rows joined": (lambda: Net(lambda x: torch.cat([x, x], 2)), "another axis than the channels"),
    "transposition": (
        lambda: layers(Turned(), nn.Conv2d(3, 4, 3)), "rows and columns are not the last axes"
    ),
    "a turned end": (lambda: Net(lambda x: x.transpose(2, 3)), "channels come last"),
    "samples moved": (lambda: Net(lambda x: x.transpose(0, 1)), "moves the axis of the samples"),
    "rows normalised": (lambda: layers(nn.LayerNorm(23)), "statistics of the whole map"),
    "columns joined": (lambda: layers(nn.Linear(23, 5)), "joins the columns"),
    "flattened rows": (lambda: Net(lambda x: x.reshape(2, 3, 23, 17)), "not channels alone"),
    "position": (lambda: Net(lambda x: x + torch.arange(23.0)), "reads 'arange' at every position"),
    "random": (lambda: layers(nn.RReLU()), "draws random numbers"),
    "own tensor": (lambda: Net(lambda x: x.cumsum(2)), "'cumsum' is not known"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_LOCAL)
def test_what_is_not_local_is_refused_with_the_node(name: str) -> None:
    make, reason = NOT_LOCAL[name]
    net, x = make(), image(2, 3, 17, 23)
    net(x)
    program = fxopt.capture(seeded(net), x, verify=False)
    with pytest.raises(fxopt.PreconditionError, match=f"cannot reach .*({reason})"):
        fxopt.run_pass(PatchExecution(until=end_of(program), grid="2x2"), program)


def test_exported_to_onnx(tmp_path: Any) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    for name in ("mean pools", "channel halves", "upsample", "pads that cut"):
        _, after, _ = patched(name, "2x2")
        path = tmp_path / "net.onnx"
        fxopt.export_onnx(after, path)
        operators = {node.op_type for node in onnx.load(path).graph.node}
        assert "Concat" in operators
        assert not {"ScatterND", "Loop"} & operators, name


def test_a_large_export_is_announced(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    _, after, _ = patched("convolutions", "2x3")
    monkeypatch.setattr("fxopt.export.MANY", 2 * 6 - 1)  # two convolutions, six tiles
    with pytest.warns(UserWarning, match="tile by tile, here as 12 operators.* a coarser grid"):
        fxopt.export_onnx(after, tmp_path / "net.onnx")
