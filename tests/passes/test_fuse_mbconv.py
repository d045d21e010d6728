"""fuse_mbconv: what becomes of blocks, in every way of carrying weights over."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from inverted import Block, Net, saturate, swish, unchanged
from seeded import image, modules_called, seeded
from torch import nn

import fxopt
from fxopt.passes import FuseMBConv
from fxopt.pipeline import resolve_passes
from fxopt.proof.double import run_double, to_double

SHAPE = (2, 3, 9, 13)


def program_of(*blocks: nn.Module, **net: int) -> fxopt.Program:
    return fxopt.capture(seeded(Net(blocks, **net)), image(*SHAPE))


def fuse(program: fxopt.Program, **options: Any) -> fxopt.PassResult:
    options.setdefault("stages", "1")
    return fxopt.run_pass(FuseMBConv(**options), program)


def distance(before: fxopt.Program, after: fxopt.Program) -> float:
    """In float64, relative to the largest output: the float64 copies of both."""
    x = image(*SHAPE, seed=5, dtype=torch.float64)
    (expected,), (found,) = run_double(to_double(before), [x]), run_double(to_double(after), [x])
    return float((found - expected).abs().max() / expected.abs().max())


def data(count: int = 24, seed: int = 3) -> torch.Tensor:
    return image(count, *SHAPE[1:], seed=seed)


# ---- structure -----------------------------------------------------------------------------


def test_a_block_becomes_a_full_convolution_norm_activation_and_projection() -> None:
    result = fuse(program_of(Block()), weights="random")
    kinds = [
        type(result.after.module(n)).__name__ for n in result.after.nodes if n.op == "call_module"
    ]
    layers = ["Conv2d", "Conv2d", "BatchNorm2d", "ReLU6", "Conv2d", "BatchNorm2d", "Linear"]
    assert kinds == layers
    fused = result.after.graph_module.get_submodule("blocks.0.depthwise")
    assert (fused.in_channels, fused.out_channels, fused.groups) == (6, 18, 1)
    assert fused.kernel_size == (3, 3)
    assert fused.bias is None
    assert len(result.rewritten) == 1
    assert result.declined == ()
    assert result.rewritten[0].note == "stage 1: 3x3, 6 to 6 channels, random"


@pytest.mark.parametrize(
    ("weights", "activations"), [("random", 1), ("linearize", 0), ("compose", 0)]
)
def test_ratio_1_becomes_one_convolution_that_is_activated_only_if_random(
    weights: str, activations: int
) -> None:
    result = fuse(program_of(Block(ratio=1, act=nn.SiLU())), weights=weights)
    assert len(modules_called(result.after, nn.Conv2d)) == 2  # the stem's, and this
    assert len(modules_called(result.after, nn.BatchNorm2d)) == 1
    assert len(modules_called(result.after, nn.SiLU)) == activations


def test_random_ratio_1_is_activated_before_the_residual_sum() -> None:
    after = fuse(program_of(Block(ratio=1, act=nn.SiLU())), weights="random").after
    (add,) = [node for node in after.nodes if node.target is torch.add]
    assert {type(after.module(node)) for node in add.all_input_nodes} == {nn.SiLU, nn.Conv2d}


def test_random_ratio_1_with_an_activation_by_hand_and_no_norms() -> None:
    blocks = Block(ratio=1, act=swish, norm=False), Block(ratio=1, act=swish, norm=False)
    result = fuse(program_of(*blocks), weights="random")
    assert len(result.rewritten) == 2
    assert sum(node.target is torch.mul for node in result.after.nodes) == 2


def test_the_gate_of_ratio_1_moves_to_the_input() -> None:
    after = fuse(program_of(Block(ratio=1, se=True)), weights="random").after
    (conv,) = [n for n in modules_called(after, nn.Conv2d) if "depthwise" in str(n.target)]
    (gated,) = conv.all_input_nodes
    assert gated.target is torch.mul
    assert gated.args[0].target == "stem"


def test_a_dropped_gate_is_gone_with_its_layers() -> None:
    after = fuse(program_of(Block(se=True)), weights="random", se="drop").after
    assert [node.target for node in modules_called(after, nn.Linear)] == ["head"]
    assert "reduce" not in str(list(after.graph_module.state_dict()))


def test_kernel_3_crops_kernel_and_padding() -> None:
    after = fuse(program_of(Block(kernel=5, stride=2)), weights="random", kernel=3).after
    conv: Any = after.graph_module.get_submodule("blocks.0.depthwise")
    assert (conv.kernel_size, conv.padding, conv.stride) == ((3, 3), (1, 1), (2, 2))


class Same(Block):
    """TensorFlow's padding by hand: computed from the size of the expanded map."""

    def inside(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.norm1(self.expand(x)))  # type: ignore[misc]
        (rows, cols), kernel = x.shape[2:], self.depthwise.kernel_size[0]
        down, along = ((-(-n // 2) - 1) * 2 + kernel - n for n in (rows, cols))
        x = F.pad(x, (along // 2, along - along // 2, down // 2, down - down // 2))
        return self.gate(self.act(self.norm2(self.depthwise(x))))


@pytest.mark.parametrize("kernel", ["keep", 3])
@pytest.mark.parametrize("weights", ["random", "linearize", "compose"])
def test_pads_computed_from_sizes_go_around_the_input(weights: str, kernel: Any) -> None:
    program = program_of(Same(kernel=5, stride=2, padding=0, se=True))
    result = fuse(program, weights=weights, kernel=kernel)
    for shape in ((2, 3, 9, 13), (1, 3, 12, 7)):
        (found,) = result.after.graph_module(image(*shape))
        assert found.shape == (shape[0], 5)
    # as many positions as before, at either size
    x = image(2, 3, 12, 7)
    sums = [_spatial(each, x) for each in (program, result.after)]
    assert sums[0].shape == sums[1].shape


def _spatial(program: fxopt.Program, x: torch.Tensor) -> torch.Tensor:
    found: dict[str, Any] = {}

    class Kept(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node) -> Any:
            found[node.name] = super().run_node(node)
            return found[node.name]

    Kept(program.graph_module).run(x)
    named = next(n.name for n in program.nodes if "depthwise" in str(n.target))
    result: torch.Tensor = found[named]
    return result


# ---- compose -------------------------------------------------------------------------------

EXACT = [
    *({"kernel": k, "stride": s} for k, s in itertools.product((2, 3, 5, (1, 5)), (1, 2))),
    {"padding": 0, "outputs": 8}, {"padding": 2}, {"padding": "same", "kernel": 3}, {"padding_mode": "reflect"},
    {"norm": False}, {"se": True}, {"ratio": 1}, {"ratio": 1, "stride": 2, "outputs": 8}, {"kernel": 1},
]  # fmt: skip


@pytest.mark.parametrize("options", EXACT, ids=str)
def test_compose_is_proved_where_nothing_nonlinear_stands_between(options: dict[str, Any]) -> None:
    last = options.get("outputs", 6)

    class Linear(Block):
        def inside(self, x: torch.Tensor) -> torch.Tensor:
            if self.expand is not None:
                return self.gate(F.relu(self.norm2(self.depthwise(self.norm1(self.expand(x))))))
            return self.norm2(self.depthwise(x))

    program = program_of(Linear(**options), last=last)
    result = fuse(program, weights="compose")
    assert result.record.preserves == "values"
    assert result.verification is not None
    assert result.verification.max_error <= 1e-12
    assert "dropped" not in result.rewritten[0].note


@pytest.mark.parametrize("options", [o for o in EXACT if o.get("norm", True)], ids=str)
def test_compose_equals_the_block_whose_inner_relu_does_nothing(options: dict[str, Any]) -> None:
    block = Block(act=nn.ReLU(), **options)
    model = saturate(seeded(Net([block], last=options.get("outputs", 6)))).double()
    program = fxopt.capture(model, image(*SHAPE, dtype=torch.float64))
    result = fuse(program, weights="compose")
    assert result.record.preserves == "interface"
    assert "what was nonlinear in between is dropped" in result.rewritten[0].note
    assert distance(program, result.after) <= 1e-12


def test_exact_blocks_among_others_are_proved_by_themselves() -> None:
    program = program_of(Block(inner=unchanged), Block(act=nn.ReLU()), Block(inner=unchanged))
    result = fuse(program, weights="compose")
    assert result.record.preserves == "interface"
    proof = result.evidence["exact_sites"]
    assert proof["proved"] == 2
    assert 0 <= proof["max_error"] <= proof["bound"] == 1e-12
    notes = [site.note.partition("compose")[2] for site in result.rewritten]
    assert notes == [", exact", "; what was nonlinear in between is dropped", ", exact"]


def test_an_exact_block_that_is_not_is_noticed_among_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fxopt.fusing import layers

    program = program_of(Block(inner=unchanged), Block(act=nn.ReLU()))
    monkeypatch.setattr(layers, "_shows", lambda *_: False)
    with pytest.raises(fxopt.VerificationError, match="fuse_mbconv"):
        fuse(program, weights="compose")


def test_compose_without_its_border_kernel_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxopt.fusing import layers

    program = fxopt.capture(saturate(seeded(Net([Block(act=nn.ReLU())]))), image(*SHAPE))
    monkeypatch.setattr(layers, "_shows", lambda *_: False)
    assert distance(program, fuse(program, weights="compose").after) > 1e-3


def test_compose_of_a_pad_before_the_depthwise() -> None:
    program = fxopt.capture(
        saturate(seeded(Net([Same(kernel=3, stride=2, padding=0, act=nn.ReLU())]))).double(),
        image(*SHAPE, dtype=torch.float64),
    )
    result = fuse(program, weights="compose")
    assert distance(program, result.after) <= 1e-12
    assert "BorderedConv2d" in str(result.after.graph_module)
    for shape in ((1, 3, 10, 15), (3, 3, 7, 8)):
        x = image(*shape).double()
        (a,), (b,) = (run_double(to_double(p), [x]) for p in (program, result.after))
        assert torch.allclose(a, b, rtol=1e-12, atol=0)


PADS = [
    (lambda x: F.pad(x, (1, 0, 2, 1)), {}), (nn.ZeroPad2d((0, 1, 0, 1)), {}), (nn.ConstantPad2d(2, 0.0), {"kernel": 5}),
    (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), {}), (nn.ReplicationPad2d(2), {"stride": 2}),
    (nn.CircularPad2d((1, 2, 0, 1)), {"padding": 1}), (nn.ReflectionPad2d(1), {"padding": "same"}),
    (nn.ZeroPad2d(1), {"padding": 1}), (nn.ZeroPad2d(1), {"padding": 1, "padding_mode": "reflect"}),
]  # fmt: skip


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize(("pad", "options"), PADS)
def test_compose_is_exact_under_any_pad(pad: Any, options: dict[str, Any], linear: bool) -> None:
    options = {"padding": 0, "before": pad, "inner": unchanged if linear else F.relu} | options
    model = seeded(Net([Block(act=F.relu, **options)])).double()
    model = model if linear else saturate(model)
    program = fxopt.capture(model, image(*SHAPE, dtype=torch.float64))
    result = fuse(program, weights="compose")
    assert result.record.preserves == ("values" if linear else "interface")
    assert distance(program, result.after) <= 1e-12


CROPPED = [
    (nn.ZeroPad2d((1, 2, 2, 1)), {}, nn.ZeroPad2d((0, 1, 1, 0)), {}),
    (lambda x: F.pad(x, (2, 2, 2, 2), mode="reflect"), {}, nn.ReflectionPad2d(1), {}),
    (nn.ZeroPad2d(2), {"padding": "valid"}, nn.ZeroPad2d(1), {}),
    # the convolution's own padding shrinks where it can, because the values of the other stay
    (nn.ReplicationPad2d(1), {"padding": 2}, nn.ReplicationPad2d(1), {"padding": 1}),
    (nn.ReplicationPad2d(3), {"padding": "same"}, nn.ReplicationPad2d(3), {"padding": "same"}),
    (nn.ZeroPad2d(1), {"padding": (1, 2)}, nn.ZeroPad2d(1), {"padding": (0, 1)}),
]  # fmt: skip


@pytest.mark.parametrize(("pad", "options", "less", "then"), CROPPED)
def test_a_cropped_kernel_is_as_if_written_so(
    pad: Any, options: dict[str, Any], less: Any, then: dict[str, Any]
) -> None:
    """The same weights in a block with a 3x3 kernel and its padding: fused, the two are equal."""
    given: dict[str, Any] = {"padding": 0, "inner": unchanged} | options
    large = seeded(Block(kernel=5, before=pad, **given))
    small = copy.deepcopy(large)
    small.before, small.depthwise = less, nn.Conv2d(18, 18, 3, groups=18, bias=False, **then)  # type: ignore
    small.depthwise.weight = nn.Parameter(large.depthwise.weight.detach()[:, :, 1:-1, 1:-1])  # type: ignore
    programs = [fxopt.capture(nn.Sequential(b).double(), image(2, 6, 9, 13, dtype=torch.float64)) for b in (large, small)]  # fmt: skip
    cropped = fuse(programs[0], weights="compose", kernel=3).after
    x = image(2, 6, 11, 9, seed=2, dtype=torch.float64)
    (found,), (expected,) = cropped.graph_module(x), programs[1].graph_module(x)
    assert torch.allclose(found, expected, rtol=1e-11, atol=1e-11)


# ---- linearize -----------------------------------------------------------------------------


def test_linearisation_is_the_regression_on_what_the_norm_says() -> None:
    """Monte Carlo by hand: slope and constant of relu6 on N(β, γ²)."""
    from fxopt.fusing.algebra import linearised, stretch

    norm: Any = seeded(nn.BatchNorm2d(3))
    found = linearised(F.relu6, stretch(norm))
    z = norm(torch.randn(400_000, 3, 1, 1) * norm.running_var.sqrt()[:, None, None]
             + norm.running_mean[:, None, None]).flatten(1).double()  # fmt: skip
    for channel in range(3):
        x, y = z[:, channel], F.relu6(z[:, channel])
        design = torch.stack((x, torch.ones_like(x)), 1)
        slope, constant = torch.linalg.lstsq(design, y).solution
        # the error of a mean over 4e5 samples is about 1/√4e5
        assert float(found.scale[channel]) == pytest.approx(float(slope), abs=8e-3)
        assert float(found.shift[channel]) == pytest.approx(float(constant), abs=8e-3)


def test_linearisation_of_the_identity_is_the_composition() -> None:
    from fxopt.fusing.algebra import linearised, stretch

    norm: Any = seeded(nn.BatchNorm2d(4))
    found = linearised(lambda z: z, stretch(norm))
    assert torch.allclose(found.scale, torch.ones(4, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(found.shift, torch.zeros(4, dtype=torch.float64), atol=1e-12)


def test_a_dead_channel_is_a_constant() -> None:
    from fxopt.fusing.algebra import linearised, stretch

    norm: Any = seeded(nn.BatchNorm2d(2))
    with torch.no_grad():
        norm.weight[0] = 0.0
    found = linearised(torch.sigmoid, stretch(norm))
    assert float(found.scale[0]) == 0
    assert float(found.shift[0]) == pytest.approx(float(torch.sigmoid(norm.bias[0])), abs=1e-7)


def affine(z: torch.Tensor) -> torch.Tensor:
    return 2 * z + 0.7


@pytest.mark.parametrize(
    "options",
    [{"padding": 0, "outputs": 8}, {"padding": 0, "outputs": 8, "se": True, "kernel": 2}, {"ratio": 1},
     {"ratio": 1, "kernel": 5, "stride": 2}, {"padding_mode": "circular", "stride": 2}],
    ids=str,
)  # fmt: skip
def test_linearisation_of_an_affine_activation_is_exact(options: dict[str, Any]) -> None:
    """Whatever the statistics: there is nothing to lose, where no zeros are padded in between."""
    model = seeded(Net([Block(act=affine, **options)], last=options.get("outputs", 6))).double()
    program = fxopt.capture(model, image(*SHAPE, dtype=torch.float64))
    assert distance(program, fuse(program, weights="linearize").after) <= 1e-12


@pytest.mark.parametrize("weights", ["compose", "linearize"])
@pytest.mark.parametrize("ratio", [1, 3])
def test_a_dropped_gate_that_was_constant_costs_nothing(ratio: int, weights: str) -> None:
    block = Block(ratio=ratio, se=True, act=(lambda z: z) if weights == "compose" else affine,
                  padding=0, outputs=8)  # fmt: skip
    model = seeded(Net([block], last=8)).double()
    with torch.no_grad():
        block.restore.weight.zero_()  # type: ignore[union-attr]
    program = fxopt.capture(model, image(*SHAPE, dtype=torch.float64))
    assert distance(program, fuse(program, weights=weights, se="drop").after) <= 1e-12


def test_a_moved_gate_pools_what_the_depthwise_would_have_given() -> None:
    """Exact where the activation is affine and the maps are the same everywhere."""
    block = Block(ratio=1, se=True, act=affine, padding=0, outputs=8)
    model = seeded(nn.Sequential(block)).double()
    x = image(2, 6, 1, 1, dtype=torch.float64).expand(2, 6, 9, 13)
    program = fxopt.capture(model, x)
    after = fuse(program, weights="linearize").after
    expected = affine(block.norm2(block.depthwise(x))).mean((2, 3))
    squeeze: Any = next(n for n in after.nodes if "squeeze" in str(n.target))
    found: dict[str, torch.Tensor] = {}
    module = after.graph_module.get_submodule(str(squeeze.target))
    module.register_forward_hook(lambda *given: found.update(value=given[2]))
    after.graph_module(x)
    assert torch.allclose(found["value"], expected, rtol=1e-10)


# ---- fit -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"se": True}, {"kernel": 5, "stride": 2}, {"ratio": 1}, {"ratio": 1, "se": True},
     {"norm": False}, {"norm": False, "ratio": 1}, {"norm": False, "ratio": 1, "se": True}, {"padding": "same"}, {"padding_mode": "reflect"}, {"act": swish}],
    ids=range(11),
)  # fmt: skip
def test_fit_is_never_worse_than_the_closed_forms_on_its_own_data(options: dict[str, Any]) -> None:
    program = program_of(Block(**options))
    errors = {}
    for weights in ("fit", "linearize", "compose"):
        try:
            evidence = fuse(program, weights=weights, calibration=data()).evidence
        except fxopt.PreconditionError:  # no norm to linearise by
            assert not options.get("norm", True)
            continue
        (errors[weights],) = evidence["block_errors"].values()
    # the ridge is 1e-6 of the mean diagonal: it may cost as much of the squared error
    assert errors["fit"] <= min(errors.values()) + 1e-3 * min(errors.values())
    assert errors["fit"] < 1


def test_fit_finds_the_least_squares_solution() -> None:
    """By hand: the very regression with torch.linalg.lstsq on unfolded inputs."""
    program = program_of(Block(norm=False))
    images = data()
    after = fuse(program, weights="fit", calibration=images).after
    stem: Any = program.graph_module.get_submodule("stem")
    read = stem(images)
    tree: Any = program.graph_module.get_submodule("blocks.0")
    target = tree.depthwise(F.relu6(tree.expand(read))).double()
    fields = F.unfold(read.double(), 3, padding=1).transpose(1, 2).flatten(0, 1)
    design = torch.cat((fields, torch.ones_like(fields[:, :1])), 1)
    solution = torch.linalg.lstsq(design, target.movedim(1, -1).flatten(0, 2)).solution
    fused: Any = after.graph_module.get_submodule("blocks.0.depthwise")
    assert torch.allclose(fused.weight.flatten(1).double(), solution[:-1].T, atol=2e-5)
    assert torch.allclose(fused.bias.double(), solution[-1], atol=2e-5)


def test_fit_goes_block_after_block_on_fused_inputs() -> None:
    """The second block is fitted to the original's values on what the first, fused, gives it."""
    program, images = program_of(Block(), Block()), data()
    together = fuse(program, weights="fit", calibration=images)
    alone = fuse(program, weights="fit", calibration=images, stages=None, blocks="blocks.1")
    names = ("blocks.1.depthwise", "blocks.1.norm2")
    mixed = copy.deepcopy(together.after.graph_module)
    with torch.no_grad():
        for name in names:  # the second block as fitted to the original's own inputs
            state = alone.after.graph_module.get_submodule(name).state_dict()
            mixed.get_submodule(name).load_state_dict(state)
        wanted = _normed(program.graph_module, images)
        errors = [
            float((_normed(module, images) - wanted).square().sum())
            for module in (together.after.graph_module, mixed)
        ]
    assert errors[0] < errors[1]


def _normed(module: torch.fx.GraphModule, x: torch.Tensor) -> torch.Tensor:
    """What the second block's norm after the spatial convolution gives."""
    kept: list[torch.Tensor] = []
    norm = module.get_submodule("blocks.1.norm2")
    handle = norm.register_forward_hook(lambda *given: kept.append(given[2]))
    module(x)
    handle.remove()
    return kept[0]


def test_a_fit_without_the_gate_multiplies_by_what_does_best_on_the_data() -> None:
    """By hand: regression through the origin, channel by channel."""
    block = Block(se=True, norm=False)
    program = program_of(block)
    after = fuse(program, weights="fit", se="drop", calibration=data()).after
    tree: Any = program.graph_module
    own = tree.get_submodule("blocks.0")
    read = F.relu6(own.depthwise(F.relu6(own.expand(tree.get_submodule("stem")(data())))))
    squeezed = own.restore(F.relu(own.reduce(read.mean((2, 3)))))
    gated = read * torch.sigmoid(squeezed)[:, :, None, None]
    factors = (gated * read).sum((0, 2, 3)) / read.square().sum((0, 2, 3))
    factors = factors.nan_to_num(1.0)  # a channel that is dead on this data
    found: Any = after.graph_module.get_submodule("blocks.0.project")
    expected = own.project.weight * factors[:, None, None]
    assert torch.allclose(found.weight, expected, rtol=1e-4)


def test_a_fit_moves_the_gate_by_the_line_of_best_fit_on_the_data() -> None:
    """By hand, and without norms: mean of what is read to mean of what the original pools."""
    block = Block(ratio=1, se=True, norm=False)
    program = program_of(block)
    after = fuse(program, weights="fit", calibration=data()).after
    tree: Any = program.graph_module
    own = tree.get_submodule("blocks.0")
    read = tree.get_submodule("stem")(data())
    x, y = (maps.mean((2, 3)).double() for maps in (read, F.relu6(own.depthwise(read))))
    x, y = x.detach(), y.detach()
    found: Any = next(m for m in after.graph_module.modules() if type(m).__name__ == "ScaleShift")
    for channel in range(6):
        design = torch.stack((x[:, channel], torch.ones(len(x), dtype=torch.float64)), 1)
        slope, constant = torch.linalg.lstsq(design, y[:, channel]).solution
        assert float(found.weight[channel]) == pytest.approx(float(slope), abs=1e-4)
        assert float(found.bias[channel]) == pytest.approx(float(constant), abs=1e-4)


class Outputs(nn.Module):
    """Gives a block's own result, the same again, a size, and something made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Block(3, 3, ratio=1), nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.block.norm3(self.block.project(self.block.inside(x)))
        return y, y, x.shape[2], self.head(y.mean((2, 3)))


def test_errors_of_every_output_are_its_own() -> None:
    program = fxopt.capture(seeded(Outputs()), image(*SHAPE))
    result = fuse(program, weights="fit", calibration=data())
    evidence = result.evidence
    errors = list(evidence["output_errors"].values())
    assert len(errors) == 3
    assert errors[0] == errors[1] == next(iter(evidence["block_errors"].values()))
    assert list(evidence["top1_agreement"]) == [list(evidence["output_errors"])[2]]
    was, now = (p.graph_module(data())[3].double() for p in (program, result.after))
    by_hand = (now - was).norm() / (was - was.mean(0)).norm()
    assert errors[2] == pytest.approx(float(by_hand), rel=1e-5)


def test_a_block_that_is_called_twice_has_two_errors() -> None:
    block = Block()
    program = fxopt.capture(seeded(Net([block, block])), image(*SHAPE))
    errors = fuse(program, weights="fit", calibration=data()).evidence["block_errors"]
    assert len(set(errors.values())) == len(errors) == 2


@pytest.mark.parametrize(
    "calibration",
    [data(), [data(10), data(14, seed=4)], [(data(), torch.zeros(24))], iter([data()]),
     torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data(), torch.arange(24)),
                                 batch_size=7, shuffle=True), [{"x": data()}], {"x": data()}],
    ids=["tensor", "list", "with labels", "iterator", "loader", "mapping", "one mapping"],
)  # fmt: skip
def test_calibration_in_all_its_forms(calibration: Any) -> None:
    evidence = fuse(program_of(Block()), calibration=calibration).evidence
    assert 0 < evidence["block_errors"]["blocks.0"] < 1
    assert evidence["output_errors"]["output"] > 0
    assert 0 <= evidence["top1_agreement"]["output"] <= 1


def test_calibration_leaves_no_data_in_the_history() -> None:
    module = fxopt.transform(Net([Block()]), [FuseMBConv(calibration=data())], image(*SHAPE))
    (record,) = fxopt.history(module)
    assert record.options["calibration"] == "a tensor of shape (24, 3, 9, 13)"


def test_the_random_state_stays() -> None:
    program = program_of(Block())
    loader = torch.utils.data.DataLoader(data(), batch_size=6, shuffle=True)
    before = torch.get_rng_state()
    fuse(program, calibration=loader)
    assert torch.equal(before, torch.get_rng_state())


# ---- what is kept --------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["random", "linearize", "compose", "fit"])
def test_the_original_stays_and_the_result_trains(weights: str) -> None:
    model = seeded(
        Net([Block(se=True), Block(6, 8, stride=2), Block(8, 8, ratio=1, se=True)], last=8)
    )
    state = copy.deepcopy(model.state_dict())
    calibration = data() if weights == "fit" else None
    which = FuseMBConv(stages="1-2", weights=weights, calibration=calibration)
    fused = fxopt.transform(model, [which], image(*SHAPE))
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    fused.train()
    fused(image(*SHAPE)).square().mean().backward()
    assert all(p.grad is not None for p in fused.parameters())
    assert copy.deepcopy(fused)(image(*SHAPE)).shape == (2, 5)


def test_frozen_weights_stay_frozen() -> None:
    model = Net([Block()]).requires_grad_(False)
    for weights in ("random", "linearize", "compose"):
        fused = fxopt.transform(model, [FuseMBConv(stages="1", weights=weights)], image(*SHAPE))
        assert not any(p.requires_grad for n, p in fused.named_parameters() if "depthwise" in n)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_models_dtype_is_kept(dtype: torch.dtype) -> None:
    model = seeded(Net([Block(se=True)])).to(dtype)
    for weights in ("random", "linearize", "compose", "fit"):
        calibration = data() if weights == "fit" else None
        which = FuseMBConv(stages="1", weights=weights, calibration=calibration)
        after = fxopt.run_pass(which, fxopt.capture(model, image(*SHAPE, dtype=dtype))).after
        assert {t.dtype for t in after.graph_module.parameters()} == {dtype}


def test_a_block_that_is_called_twice_stays_shared_but_for_the_fit() -> None:
    block = Block()
    program = fxopt.capture(seeded(Net([block, block])), image(*SHAPE))
    shared = fuse(program, weights="linearize")
    assert len(shared.rewritten) == 2
    assert len({n.target for n in shared.after.nodes if "depthwise" in str(n.target)}) == 1
    fitted = fuse(program, weights="fit", calibration=data())
    assert len({n.target for n in fitted.after.nodes if "depthwise" in str(n.target)}) == 2


def test_random_weights_are_normal_by_their_fan_out_and_repeat() -> None:
    program = program_of(Block(16, 16, ratio=6), width=16, last=16)
    first, again = (fuse(program, weights="random").after.graph_module for _ in range(2))
    weight: Any = first.get_submodule("blocks.0.depthwise").weight
    assert float(weight.std()) == pytest.approx((2 / (9 * 96)) ** 0.5, rel=0.05)
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)
    )
    norm: Any = first.get_submodule("blocks.0.norm2")
    assert bool((norm.running_var == 1).all() and (norm.running_mean == 0).all())


@pytest.mark.parametrize("weights", ["random", "linearize", "compose"])
def test_reports_tell_fused_blocks_from_plain_ones(weights: str) -> None:
    blocks = (Block(se=True), Block(ratio=1), Block(6, 8, stride=2), Block(8, 8, ratio=1, se=True))
    program = program_of(*blocks, last=8)
    after = fuse(program, weights=weights, stages=None, blocks="blocks.0,blocks.1,blocks.3").after
    found = fxopt.report(after)
    kinds = {row.path: (row.kind, row.stage) for row in found.blocks}
    assert kinds == {
        "blocks.0": ("Fused-MBConv", 1), "blocks.1": ("Fused-MBConv", 1),
        "blocks.2": ("MBConv", 2), "blocks.3": ("Fused-MBConv", 2),
    }  # fmt: skip
    assert sum(row.macs for row in found.blocks) < found.totals.macs
    shown = next(line for line in found.text().splitlines() if line.startswith("Fused-MBConv"))
    assert shown.split()[1:4] == [
        "1-2",
        "3",
        f"{sum(r.parameters for r in found.blocks if r.kind != 'MBConv'):,}",
    ]
    assert [row["kind"] for row in found.to_dict()["blocks"]] == [row.kind for row in found.blocks]


@pytest.mark.parametrize("weights", ["random", "linearize", "compose"])
def test_the_result_goes_on_to_other_passes_and_to_onnx(weights: str, tmp_path: Path) -> None:
    blocks = (Block(se=True), Block(6, 8, stride=2), Block(8, 8, ratio=1))
    model = seeded(Net(blocks, last=8))
    passes = [FuseMBConv(stages="1-2", weights=weights), "fold_conv_bn"]
    fused = fxopt.transform(model, passes, image(*SHAPE))
    assert fxopt.export_onnx(fused, tmp_path / "fused.onnx").text()
    kinds = {row.kind for row in fxopt.report(fused).blocks}
    assert kinds == {"Fused-MBConv"}
    plan = fxopt.plan_memory(fused)
    (found,) = fxopt.execute_in_arena(fxopt.capture(fused), plan, image(*SHAPE))
    assert torch.allclose(found, fused.eval()(image(*SHAPE)), atol=1e-4 * float(found.abs().max()))


def test_a_second_pass_finds_nothing_more() -> None:
    once = fuse(program_of(Block()), weights="random").after
    with pytest.raises(fxopt.PreconditionError, match="no MBConv"):
        fuse(once, weights="random")


def test_stages_keep_their_numbers_after_a_pass() -> None:
    program = program_of(Block(), Block(6, 8), Block(8, 10), last=10)
    first = fuse(program, weights="random", stages="1-2")
    second = fuse(first.after, weights="random", stages="3")
    assert [site.note[:7] for site in second.rewritten] == ["stage 3"]


class Functional(nn.Module):
    """Every layer by function, with members of its own."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"up": (12, 6, 1, 1), "spread": (12, 1, 3, 3), "down": (6, 12, 1, 1)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
            self.register_parameter(f"{name}_scale", nn.Parameter(torch.rand(shape[0]) + 0.5))
            self.register_parameter(f"{name}_shift", nn.Parameter(torch.randn(shape[0])))
            self.register_buffer(f"{name}_mean", torch.randn(shape[0]))
            self.register_buffer(f"{name}_variance", torch.rand(shape[0]) + 0.5)
        self.squeeze, self.excite = (
            nn.Parameter(torch.randn(2, 12)),
            nn.Parameter(torch.randn(12, 2)),
        )

    def layer(self, x: torch.Tensor, name: str, **options: Any) -> torch.Tensor:
        x = F.conv2d(x, getattr(self, name), **options)
        members = (
            getattr(self, f"{name}_{each}") for each in ("mean", "variance", "scale", "shift")
        )
        return F.batch_norm(x, *members, self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.layer(x, "up"))
        y = F.relu(self.layer(y, "spread", padding=1, groups=12))
        factors = F.linear(F.relu(F.linear(y.mean((2, 3)), self.squeeze)), self.excite)
        return x + self.layer(y * factors.sigmoid()[:, :, None, None], "down")


@pytest.mark.parametrize("se", ["keep", "drop"])
@pytest.mark.parametrize("weights", ["random", "linearize", "compose", "fit"])
def test_new_layers_of_a_functional_block_are_its_own(weights: str, se: Any) -> None:
    program = program_of(Functional())
    calibration = data() if weights == "fit" else None
    result = fuse(program, weights=weights, se=se, calibration=calibration)
    module = copy.deepcopy(result.after.graph_module).double().train()
    x = image(*SHAPE, dtype=torch.float64)
    module(x)[0].square().mean().backward()
    called = {str(n.target) for n in result.after.nodes if n.op == "call_module"}
    layers = {name: module.get_submodule(name) for name in called if "conv2d" in name}
    assert all(p.grad is not None for layer in layers.values() for p in layer.parameters())
    gate = 48 if se == "keep" else 0
    border = 12 * 9 if weights == "compose" else 0
    convolution, projection, norms = 12 * 6 * 9 + border, 72, 2 * (12 + 6)
    others = sum(p.numel() for n, p in program.graph_module.named_parameters() if "blocks" not in n)
    expected = others + convolution + projection + norms + gate
    assert result.evidence["parameters"]["after"] == expected


class TwoPads(nn.Module):
    """The same layers called twice, with another pad each time."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(norm=False, padding=0, inner=unchanged)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for mode in ("reflect", "constant"):
            wide = F.pad(self.block.expand(x), (1, 1, 1, 1), mode=mode)  # type: ignore[misc]
            x = x + self.block.project(F.relu(self.block.depthwise(wide)))
        return x


def test_calls_that_differ_in_their_pads_do_not_share() -> None:
    result = fuse(program_of(TwoPads()), weights="compose")
    assert len(result.rewritten) == 2
    assert result.record.preserves == "values"


# ---- what is chosen ------------------------------------------------------------------------


def test_the_first_three_stages_are_the_default() -> None:
    widths = [(6, 6), (6, 8), (8, 10), (10, 12), (12, 14)]
    program = program_of(*(Block(a, b) for a, b in widths), last=14)
    result = fxopt.run_pass(FuseMBConv(), program)
    assert [site.note[:7] for site in result.rewritten] == ["stage 1", "stage 2", "stage 3"]
    assert [d.reason for d in result.declined] == [f"stage {n}, not of stages=1-3" for n in (4, 5)]
    short = fxopt.run_pass(FuseMBConv(), program_of(Block()))
    assert len(short.rewritten) == 1


def test_blocks_by_path_and_by_what_holds_them() -> None:
    program = program_of(Block(), Block(), Block(6, 8), last=8)
    by_path = fxopt.run_pass(FuseMBConv(blocks="blocks.0,blocks.2"), program)
    assert [site.where for site in by_path.rewritten] == [
        "'blocks.0.depthwise'",
        "'blocks.2.depthwise'",
    ]
    assert by_path.declined[0].reason == "'blocks.1' is not of blocks=blocks.0,blocks.2"
    assert len(fxopt.run_pass(FuseMBConv(blocks="blocks"), program).rewritten) == 3


def test_the_spec_takes_lists() -> None:
    (found,) = resolve_passes("fuse_mbconv{blocks=a.0,b.1, c, kernel=3}")
    assert found == FuseMBConv(blocks="a.0,b.1,c", kernel=3)
    (found,) = resolve_passes("fuse_mbconv{stages=1,3-4,se=drop}")
    assert found.stages.numbers == {1, 3, 4}  # type: ignore[union-attr]


def test_measured_choice_is_saved_and_applied(tmp_path: Path) -> None:
    program = program_of(Block(), Block(6, 8, stride=2), Block(8, 8, ratio=1), last=8)
    file = str(tmp_path / "table.json")
    first = fxopt.run_pass(FuseMBConv(select="measured", measurements=file), program)
    again = fxopt.run_pass(FuseMBConv(select="measured", measurements=file), program)
    assert first.rewritten == again.rewritten
    rows = first.evidence["measurements"]
    assert [row["path"] for row in rows] == ["blocks.0", "blocks.1", "blocks.2"]
    faster = {row["node"] for row in rows if row["fused_seconds"] < row["seconds"]}
    assert {site.node for site in first.rewritten} == faster
    assert first.evidence["measured"]["rounds"] >= 7
    assert again.evidence["measurements"] == rows


def _table(tmp_path: Path, program: fxopt.Program, seconds: list[tuple[float, float]]) -> str:
    from dataclasses import replace

    from fxopt.fusing import measure

    file = str(tmp_path / "table.json")
    fxopt.run_pass(FuseMBConv(select="measured", measurements=file), program)
    table = measure.load(file)
    rows = tuple(
        replace(row, seconds=a, fused_seconds=b)
        for row, (a, b) in zip(table.rows, seconds, strict=True)
    )
    measure.save(replace(table, rows=rows), file)
    return file


def test_budgets_are_met_by_the_fastest_set_within_them(tmp_path: Path) -> None:
    program = program_of(Block(), Block(6, 8), Block(8, 10), last=10)
    file = _table(tmp_path, program, [(3.0, 1.0), (3.0, 1.5), (3.0, 2.0)])
    now = fxopt.report(program).totals

    def nodes(**budget: int) -> list[str]:
        which = FuseMBConv(select="measured", measurements=file, **budget)
        result = fxopt.run_pass(which, program)
        after = fxopt.report(result.after).totals
        assert after.parameters <= budget.get("max_params", 10**9)
        assert after.macs <= budget.get("max_macs", 10**12)
        return [site.where[1:9] for site in result.rewritten]

    assert nodes() == ["blocks.0", "blocks.1", "blocks.2"]
    # 756, 756 and 1,224 more parameters: 8·9·(6 to 24)… the budget leaves out the last
    assert nodes(max_params=now.parameters + 2000) == ["blocks.0", "blocks.1"]
    assert nodes(max_macs=now.macs) == []
    with pytest.raises(
        fxopt.PreconditionError, match=r"meets the budget: max_params can be [\d,]+ at"
    ):
        nodes(max_params=now.parameters - 1)


@pytest.mark.parametrize(
    ("block", "options"),
    [(Block(), {"weights": "compose"}), (Block(ratio=1, se=True), {"calibration": data()})],
)
def test_budgets_hold_whatever_was_measured(block: Block, options: Any, tmp_path: Path) -> None:
    """The border of a composition and the scale of a moved gate are parameters too."""
    program, file = program_of(block), str(tmp_path / "table.json")
    _table(tmp_path, program, [(3.0, 1.0)])
    free = fxopt.run_pass(FuseMBConv(select="measured", measurements=file, **options), program)
    assert len(free.rewritten) == 1
    needed = free.evidence["parameters"]["after"]
    for budget in (needed, needed - 1):
        which = FuseMBConv(select="measured", measurements=file, max_params=budget, **options)
        result = fxopt.run_pass(which, program)
        assert len(result.rewritten) == (budget == needed)
        assert result.evidence["parameters"]["after"] <= budget


def test_measurements_are_read_each_time(tmp_path: Path) -> None:
    program, file = program_of(Block()), str(tmp_path / "table.json")
    which = FuseMBConv(select="measured", measurements=file)
    for seconds in ((3.0, 1.0), (1.0, 3.0)):
        _table(tmp_path, program, [seconds])
        assert len(fxopt.run_pass(which, program).rewritten) == (seconds[0] > seconds[1])


class Placed(Block):
    """An activation that differs from place to place, and one with a scale of its own."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.rand(shape))

    def inside(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(self.expand(x)) * self.own.exp())  # type: ignore[misc]
        return F.relu(self.norm2(self.depthwise(y)))


def test_activations_with_values_of_their_own() -> None:
    scaled = program_of(Placed((18, 1, 1)))
    for options in ({"weights": "linearize"}, {"select": "measured", "stages": None}):
        fuse(scaled, **options)
    placed = program_of(Placed((18, 9, 13)))
    assert "differs from place to place; use weights=fit" in refusal(placed, weights="linearize")
    assert len(fuse(placed, calibration=data()).rewritten) == 1


# ---- refusals ------------------------------------------------------------------------------

BAD_OPTIONS = [
    ("stages=1-3,blocks=a", "give one of stages, blocks and select"),
    ("stages=3-1", "'stages' of 'fuse_mbconv' takes 1-3|none, not '3-1'"),
    ("stages=x", "takes 1-3|none, not 'x'"),
    ("kernel=5", "takes keep|3, not '5'"),
    ("se=maybe", "takes keep|drop"),
    ("weights=fit", "weights=fit needs calibration data"),
    ("weights=good", "takes fit|linearize|compose|random"),
    ("max_params=3M", "max_params goes with select=measured"),
    ("select=measured,max_macs=many", "takes COUNT|none, not 'many'"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_refuses_wrong_options(options: str, message: str) -> None:
    with pytest.raises(fxopt.PipelineSpecError) as error:
        resolve_passes(f"fuse_mbconv{{{options}}}")
    assert message in str(error.value)


def test_refuses_a_calibration_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(fxopt.PreconditionError, match="there is no calibration file '/nowhere.pt'"):
        resolve_passes("fuse_mbconv{calibration=/nowhere.pt}")
    file = tmp_path / "photo.pt"
    file.write_bytes(b"JFIF")
    with pytest.raises(fxopt.PreconditionError, match="cannot read calibration data from"):
        resolve_passes(f"fuse_mbconv{{calibration={file}}}")
    torch.save(data(), file)
    (found,) = resolve_passes(f"fuse_mbconv{{calibration={file}}}")
    assert str(found.calibration) == str(file)  # type: ignore[attr-defined]


def refusal(program: fxopt.Program, **options: Any) -> str:
    with pytest.raises(fxopt.PreconditionError) as error:
        fuse(program, **options)
    return str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"select": "fastest"}, "select is None or measured, not 'fastest'"), ({"kernel": 5}, "kernel is keep or 3, not 5"),
     ({"select": "measured", "max_params": float("inf")}, "inf is no count"), ({"stages": "1-99999999"}, "names no stages"),
     ({"calibration": torch.zeros(())}, "calibration takes a tensor")],
)  # fmt: skip
def test_refuses_wrong_values_from_python(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FuseMBConv(**options)


def test_options_may_be_given_as_python_has_them() -> None:
    given = FuseMBConv(select="measured", max_params=25e6)  # type: ignore[arg-type]
    assert given == FuseMBConv(select="measured", max_params="25M")  # type: ignore[arg-type]
    assert FuseMBConv(blocks=["a", "b.0"]) == FuseMBConv(blocks="a,b.0")  # type: ignore[arg-type]
    assert FuseMBConv(stages=2) == FuseMBConv(stages="2")  # type: ignore[arg-type]


def test_refuses_a_network_without_blocks() -> None:
    program = fxopt.capture(seeded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())), image(*SHAPE))
    assert (
        refusal(program)
        == "fuse_mbconv finds no MBConv in Sequential: it has no depthwise convolution"
    )


def test_refuses_a_stage_that_does_not_exist() -> None:
    assert refusal(program_of(Block(), Block(6, 8), last=8), stages="2-3") == (
        "fuse_mbconv: there is no stage 3; there are stages 1 to 2: 1 from 'blocks.0', 2 from 'blocks.1'"
    )


def test_refuses_a_block_that_does_not_exist() -> None:
    message = refusal(program_of(Block()), stages=None, blocks="blocks.7")
    assert message == "fuse_mbconv: no block is at 'blocks.7'; there are blocks.0"


def test_refuses_too_few_samples() -> None:
    message = refusal(program_of(Block(kernel=5)), weights="fit", calibration=data(1))
    assert "117 samples for the 151 unknowns of each output channel in 'blocks.0'" in message
    assert "at least 2 calibration images like these" in message


@pytest.mark.parametrize(
    ("calibration", "message"),
    [(torch.zeros(4, *SHAPE[1:], dtype=torch.uint8), "the calibration data for 'x' is uint8; give what the model is given, float32"),
     ({"y": data()}, "a calibration batch is a dict; the model takes x"),
     ([], r"the calibration data, a list, is empty"), (data()[:0], r"a tensor of shape \(0, 3, 9, 13\), is empty"),
     (torch.zeros(4, 1, 9, 13), r"shape \(4, 1, 9, 13\) does not fit"), ([torch.full((4, *SHAPE[1:]), torch.nan)], "not finite"),
     ([["x"]], "a calibration batch is a list; the model takes x")],
)  # fmt: skip
def test_refuses_calibration_that_is_none(calibration: Any, message: str) -> None:
    with pytest.raises(fxopt.PreconditionError, match=message):
        fuse(program_of(Block()), calibration=calibration)


def test_refuses_a_calibration_that_is_no_data() -> None:
    with pytest.raises(
        ValueError, match="calibration takes a tensor, batches or a DataLoader, not a int"
    ):
        FuseMBConv(calibration=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", "[" * 100_000, '{"schema": "fxopt.fusing/1", "rows": [{}]}']
)
def test_refuses_a_file_of_something_else(text: str, tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    file.write_text(text)
    message = refusal(program_of(Block()), stages=None, select="measured", measurements=str(file))
    assert "holds no measurements of fuse_mbconv" in message
    assert file.read_text() == text


def test_refuses_measurements_of_another_network(tmp_path: Path) -> None:
    file = str(tmp_path / "table.json")
    fuse(program_of(Block()), stages=None, select="measured", measurements=file)
    other = program_of(Block(6, 8), last=8)
    message = refusal(other, stages=None, select="measured", measurements=file)
    assert "holds no measurement of 'blocks.0' on 2x6x9x13 as 3x3, 6-18-8; measure" in message


def test_refuses_data_on_the_meta_device() -> None:
    with torch.device("meta"):
        program = fxopt.capture(Net([Block()]).eval(), torch.empty(SHAPE))
    assert "on the meta device" in refusal(program, calibration=data())


def test_on_the_meta_device_nothing_is_run_and_the_history_says_so() -> None:
    with torch.device("meta"):
        model, example = Net([Block(se=True), Block(ratio=1)]).eval(), torch.empty(SHAPE)
    for weights in ("random", "linearize", "compose"):
        fused = fxopt.transform(model, [FuseMBConv(stages="1", weights=weights)], example)
        (record,) = fxopt.history(fused)
        assert record.verified == "no (meta)"
        assert record.as_dict()["verified"] == "no (meta)"
        assert len(record.rewritten) == 2


DECLINED = [
    (Block(dilation=2, padding=2), {}, "its dilation is (2, 2)"),
    (Block(kernel=4, padding=2), {"kernel": 3}, "the middle of a kernel of (4, 4) is not 3x3"),
    (Block(kernel=5, padding=0), {"kernel": 3}, "its padding (0, 0) cannot be cropped"),
    (Block(kernel=5, padding="valid"), {"kernel": 3}, "its padding (0, 0) cannot be cropped"),
    (Block(kernel=5, padding=0, before=nn.ZeroPad2d((0, 1, 1, 1))), {"kernel": 3}, "its padding (0, 1, 1, 1) cannot be cropped"),
    (Block(norm=False), {"weights": "linearize"}, "has no BatchNorm to tell what its activation sees"),
    (Block(norm=False, se=True), {"weights": "compose", "se": "drop"}, "no BatchNorm to tell what its gate sees"),
]  # fmt: skip


class TwoPools(Block):
    """The gate of CBAM: the mean and the maximum."""

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        pooled = x.mean((2, 3)), x.amax((2, 3))
        both = [self.restore(F.relu(self.reduce(each))) for each in pooled]  # type: ignore[misc]
        return x * torch.sigmoid(both[0] + both[1]).view(x.size(0), -1, 1, 1)


class GateFirst(Block):
    """Squeeze-excite between norm and activation."""

    def inside(self, x: torch.Tensor) -> torch.Tensor:
        if self.expand is not None:
            x = self.act(self.norm1(self.expand(x)))
        return self.act(self.gate(self.norm2(self.depthwise(x))))  # type: ignore[no-any-return]


class FrozenNorm(nn.Module):
    """torchvision's frozen BatchNorm: arithmetic with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.linspace(0.5, 1.5, 18))
        self.register_buffer("mean", torch.linspace(-1, 1, 18))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean[:, None, None]) * self.weight[:, None, None]


def with_frozen_norms() -> Block:
    block = Block()
    block.norm1, block.norm2 = FrozenNorm(), FrozenNorm()
    return block


DECLINED += [
    (with_frozen_norms(), {"weights": "compose"}, "has parameters that are no BatchNorm's"),
    (TwoPools(se=True, ratio=1), {"weights": "linearize"}, "pools more than the mean"),
    (GateFirst(se=True), {"weights": "linearize", "se": "drop"}, "follows the gate that goes from"),
    (GateFirst(se=True, ratio=1), {"weights": "compose"}, "follows the gate that goes from"),
]


@pytest.mark.parametrize("block", [TwoPools(se=True), GateFirst(se=True)])
def test_other_gates_stay_where_they_are(block: nn.Module) -> None:
    for weights in ("random", "linearize", "compose"):
        assert len(fuse(program_of(block), weights=weights).rewritten) == 1
    assert len(fuse(program_of(block), weights="random", se="drop").rewritten) == 1


@pytest.mark.parametrize(("block", "options", "reason"), DECLINED)
def test_declines(block: nn.Module, options: dict[str, Any], reason: str) -> None:
    program = program_of(Block(6, 6), block)
    options = {"weights": "random"} | options
    message = refusal(program_of(block), stages=None, blocks="blocks", **options)
    assert reason in message
    if not isinstance(block.norm1, nn.Identity):
        result = fuse(program, stages=None, blocks="blocks", **options)
        assert [reason in d.reason for d in result.declined] == [True]
