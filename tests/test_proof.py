"""The proof: the float64 copy, what counts as evidence, the shipped program, site by site."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from seeded import ConvBn, image, seeded
from test_rewrite import DropNorm, Swap
from torch import nn

from fxopt.capture import capture
from fxopt.errors import VerificationError
from fxopt.passes import FoldConvBn
from fxopt.program import Program
from fxopt.proof.double import run_double, to_double
from fxopt.proof.evidence import input_attempts, largest_error, output_errors, verification_shapes
from fxopt.proof.running import run
from fxopt.results import Verification
from fxopt.rewrite import Pass, run_pass


class After(nn.Module):
    """A norm to fold, and something done to what comes out: ``then``."""

    def __init__(self, then: Any = None) -> None:
        super().__init__()
        self.body = ConvBn()
        self.then = then

    def forward(self, x: torch.Tensor) -> Any:
        return self.then(self.body(x)) if self.then else self.body(x)


def program_of(model: nn.Module, *inputs: torch.Tensor) -> Program:
    return capture(seeded(model), inputs or (image(),))


def proof(program: Program, which: Pass | None = None, **options: Any) -> Verification:
    verification = run_pass(which or FoldConvBn(), program, **options).verification
    assert verification is not None
    return verification


@pytest.fixture
def short_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxopt.proof.verify.too_large_for_double", lambda program: True)


# ---- the float64 copy --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_double_copy_has_no_narrow_tensor_and_leaves_the_program(dtype: torch.dtype) -> None:
    program = capture(seeded(ConvBn()).to(dtype), image(dtype=dtype))
    double = to_double(program)
    module = double.graph_module
    assert {t.dtype for t in (*module.parameters(), *module.buffers())} == {
        torch.float64, torch.int64,
    }  # fmt: skip
    assert {t.dtype for t in program.graph_module.parameters()} == {dtype}
    assert {kind.dtype for kind in double.types.values()} == {torch.float64}
    assert run_double(double, [image(dtype=dtype)])[0].dtype == torch.float64


@pytest.mark.parametrize(
    "then",
    [
        lambda x: x.float() * 3,
        lambda x: x.half().float(),
        lambda x: x.bfloat16().to(torch.float32),
        lambda x: x.to(torch.float16) + torch.ones(1, dtype=torch.float16),
        lambda x: x * torch.eye(x.shape[-1], x.shape[-1])[0],
        lambda x: x * torch.arange(x.shape[-1], dtype=torch.float32),
        lambda x: torch.softmax(x, 1, dtype=torch.float32),
        lambda x: x.to(torch.complex64).abs(),
        lambda x: torch.view_as_real(torch.fft.rfft2(x)),
        lambda x: x.type(torch.float32),
        lambda x: torch.zeros_like(x, dtype=torch.float32) + x,
    ],
    ids=["float", "half", "bfloat16", "to", "eye", "arange", "softmax", "complex", "fft", "type",
         "zeros_like"],
)  # fmt: skip
def test_casts_do_not_round_in_the_proof(then: Any) -> None:
    verification = proof(program_of(After(then)))
    assert verification.max_error <= 1e-13
    assert verification.method == "whole program"


@pytest.mark.parametrize(
    "then",
    [
        lambda x: x.half().float(),
        lambda x: x.to(torch.float16).to(dtype=torch.float32),
        lambda x: x.type(torch.bfloat16).type(torch.float32),
        lambda x: x.to(torch.complex64).real,
    ],
    ids=["method", "to", "type", "complex"],
)
def test_double_copy_computes_as_if_there_were_no_casts(then: Any) -> None:
    (plain,) = run_double(to_double(program_of(After())), [image()])
    (cast,) = run_double(to_double(program_of(After(then))), [image()])
    assert torch.equal(cast, plain)


def test_cast_to_half_within_widens_the_bound_on_what_ships() -> None:
    epsilon = torch.finfo(torch.float16).eps
    verification = proof(program_of(After(lambda x: x.half().mul(3).float())))
    assert verification.shipped_error <= verification.shipped_bound
    assert verification.original_error > 256 * torch.finfo(torch.float32).eps / 2
    assert 16 * epsilon <= verification.shipped_bound <= 20 * epsilon


class Numpy(nn.Module):
    """Leaves torch: no tracer follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.dtype == torch.float32
        y = np.tanh(x.detach().cpu().numpy())
        return torch.from_numpy(y).to(x.device) * self.scale


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = ConvBn()
        self.leaf = Numpy()
        self.head = ConvBn(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.leaf(self.body(x)))


def test_opaque_leaves_run_in_their_own_dtype() -> None:
    program = program_of(Opaque())
    assert list(program.opaque) == ["leaf"]
    verification = proof(program)
    assert "1 opaque leaves ran in their own dtype" in verification.remarks
    (found,) = run_double(to_double(program), [image()])
    assert found.dtype == torch.float64
    assert torch.allclose(found.float(), run(program, [image()])[0], atol=1e-5)


def test_wrong_pass_before_an_opaque_leaf_is_caught() -> None:
    with pytest.raises(VerificationError, match=r"'body_norm' \('body\.norm'\)"):
        proof(program_of(Opaque()), DropNorm())


def test_right_pass_under_a_network_that_enlarges_rounding_is_proved_by_its_sites() -> None:
    program = program_of(After(lambda x: (x * 1e4).sin()))
    verification = proof(program)
    assert verification.method == "site by site on recorded inputs: it enlarges rounding"
    assert [error.output for error in verification.outputs] == ["body_norm"]
    assert verification.max_error <= 1e-13
    assert "the whole program's error is" in verification.remarks[0]
    # its own error in float32 is far beyond 256 ε, and eight times that is allowed
    assert verification.original_error > 256 * torch.finfo(torch.float32).eps
    assert verification.shipped_error <= verification.shipped_bound


def test_wrong_pass_under_a_network_that_enlarges_rounding_is_caught() -> None:
    def off(conv: nn.Conv2d) -> None:
        with torch.no_grad():
            conv.weight *= 1 + 1e-11
            conv.bias *= 1 + 1e-11  # type: ignore[operator]

    program = program_of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh()))
    with pytest.raises(
        VerificationError, match=r"'_0' \('0'\) departs by (9\.\de-12|1\.\de-11) in"
    ):
        proof(program, Swap(nn.Conv2d, off))


class Chaotic(nn.Module):
    """One output that is what it was told, and one that makes 0.1 of a rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.body = ConvBn()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.body(x)
        return y, (y.flatten(1) * 1e14).sin()


def test_how_much_a_network_enlarges_rounding_is_measured() -> None:
    verification = proof(program_of(Chaotic()))
    assert verification.method == "site by site on recorded inputs: it enlarges rounding"
    assert verification.max_error <= 1e-13


def test_what_one_output_makes_of_rounding_excuses_no_other() -> None:
    def off(by: float) -> Any:
        def change(conv: nn.Conv2d) -> None:
            with torch.no_grad():
                conv.weight[1:] *= 1 + by

        return change

    def coarse(conv: nn.Conv2d) -> None:
        with torch.no_grad():
            if conv.weight.dtype == torch.float32:
                conv.weight.copy_(conv.weight.bfloat16())

    class Hidden(nn.Module):
        """A channel that is 1e14 times the others, which a site's error is relative to."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            scale = torch.tensor([1e14, 1.0, 1.0, 1.0]).view(-1, 1, 1)
            y = self.conv(x) * scale
            return y / scale, (y.mean((1, 2, 3)) * 10).sin()

    with pytest.raises(VerificationError, match="changed the function"):
        proof(program_of(Hidden()), Swap(nn.Conv2d, off(1.0)))

    class Both(Hidden):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.conv(x)
            return y, (y.mean((1, 2, 3)) * 1e12).sin()

    with pytest.raises(VerificationError, match="in float32: output 'output_0' is off"):
        proof(program_of(Both()), Swap(nn.Conv2d, coarse))


def test_rounding_of_an_opaque_leaf_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where two float64 values 1e-16 apart round to float32 neighbours, the leaf tells 6e-8."""

    def run_and_round(program: Program, inputs: list[torch.Tensor]) -> tuple[Any, ...]:
        (output,) = run_double(program, inputs)
        return (
            output * (1 + 1e-7 * (program.graph_module.get_submodule("body.conv") is not conv)),
        )

    program = program_of(Opaque())
    double = to_double(program)
    conv = double.graph_module.get_submodule("body.conv")
    monkeypatch.setattr("fxopt.proof.verify.to_double", lambda _: double)
    monkeypatch.setattr("fxopt.proof.verify.run_double", run_and_round)
    verification = proof(program)
    assert verification.method.endswith("opaque leaves round to their own dtype")
    assert [error.output for error in verification.outputs] == ["body_norm", "head_norm"]
    assert verification.max_error <= 1e-13


def test_buffers_that_forward_writes_are_put_back() -> None:
    class Counter(ConvBn):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return super().forward(x) * self.calls

    program = program_of(Counter())
    assert proof(program).max_error <= 1e-13
    assert float(program.graph_module.calls) == 1
    with pytest.raises(VerificationError, match="'norm'"):
        proof(program, DropNorm())
    assert float(program.graph_module.calls) == 1


@pytest.mark.parametrize("then", [F.dropout, lambda x: x + torch.randn_like(x)])
def test_program_that_draws_random_numbers_is_proved_under_one_seed(then: Any) -> None:
    program = program_of(After(then))
    verification = proof(program)
    assert verification.max_error <= 1e-13
    assert verification.shipped_error <= 16 * torch.finfo(torch.float32).eps
    assert "draws random numbers" in verification.remarks[0]
    with pytest.raises(VerificationError, match=r"body\.norm"):
        proof(program, DropNorm())


def test_dropout_that_acts_in_evaluation_acts_in_the_proof() -> None:
    program = program_of(After(lambda x: F.dropout(x + 10, 0.5)))
    (found,) = run(program, [image()])
    assert 0.3 < (found == 0).float().mean() < 0.7


# ---- evidence ----------------------------------------------------------------------------------


def errors(reference: list[Any], found: list[Any]) -> list[tuple[float | None, str]]:
    tensors = [[torch.tensor(value) for value in values] for values in (reference, found)]
    names = [str(index) for index in range(len(reference))]
    return [(error.error, error.remark) for error in output_errors(names, *tensors)]


def test_errors_are_relative_to_each_outputs_own_largest_value() -> None:
    assert errors([[4.0, 0.0], [1000.0]], [[4.0, 1.0], [1001.0]]) == [(0.25, ""), (0.001, "")]


def test_all_zero_reference_is_no_evidence_unless_the_result_is_not_zero() -> None:
    assert errors([[0.0, 0.0]], [[0.0, 0.0]]) == [(None, "the reference is all zero: no evidence")]
    assert errors([[0.0]], [[1e-30]]) == [
        (math.inf, "the reference is all zero, the result is not")
    ]
    assert errors([[0.0]], [[math.nan]]) == [
        (math.inf, "the reference is all zero, the result is not")
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_reference_is_no_evidence(value: float) -> None:
    assert errors([[value, 1.0]], [[value, 1.0]]) == [
        (None, "the reference is not finite: no evidence")
    ]


def test_result_that_is_not_a_number_is_the_largest_error() -> None:
    reference = [torch.ones(2), torch.ones(1)]
    found = [torch.tensor([1.0, math.nan]), torch.full((1,), 3.0)]
    bad, large = output_errors(["a", "b"], reference, found)
    assert math.isnan(largest_error([bad, large]))
    assert math.isnan(largest_error([large, bad]))


def test_empty_and_misshapen_and_exact_outputs() -> None:
    assert errors([[]], [[]]) == [(None, "the reference is empty: no evidence")]
    assert errors([[1.0]], [[1.0, 2.0]]) == [(math.inf, "shape (2,) instead of (1,)")]
    assert errors([[1, 2], [True]], [[1, 3], [True]]) == [
        (math.inf, "compared exactly"), (0.0, "compared exactly"),
    ]  # fmt: skip


def test_complex_outputs_are_compared() -> None:
    (error,) = output_errors(["z"], [torch.tensor([3 + 4j])], [torch.tensor([3 + 4.5j])])
    assert error.error == pytest.approx(0.1)


def test_outputs_that_are_zero_on_normal_inputs_are_tried_on_positive_ones() -> None:
    class Late(ConvBn):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * torch.relu(x.min() + 0.5)

    program = program_of(Late())
    normal, uniform = input_attempts(program, [(2, 3, 9, 13)], None)
    assert not run(program, normal)[0].any()
    assert run(program, uniform)[0].any()
    assert proof(program).method == "whole program"
    with pytest.raises(VerificationError, match="'norm'"):
        proof(program, DropNorm())


@pytest.mark.parametrize("then", [lambda x: x * 0, lambda x: x / 0], ids=["zero", "infinite"])
def test_program_without_evidence_is_verified_site_by_site(then: Any) -> None:
    program = program_of(After(then))
    verification = proof(program)
    assert verification.method == (
        "site by site on recorded inputs: every output is all zero, not finite or not floating"
    )
    assert [error.output for error in verification.outputs] == ["body_norm"]
    with pytest.raises(VerificationError, match=r"'body_norm' \('body\.norm'\) departs by"):
        proof(program, DropNorm())


def test_program_without_any_evidence_is_refused() -> None:
    model: Any = seeded(ConvBn(bias=False))
    nn.init.zeros_(model.norm.weight)
    nn.init.zeros_(model.norm.bias)
    with pytest.raises(VerificationError, match=r"cannot be verified: .* give the model other"):
        proof(capture(model, image()))
    assert run_pass(FoldConvBn(), capture(model, image()), verify=False).verification is None


def test_one_output_without_evidence_is_said_beside_the_others() -> None:
    program = program_of(After(lambda x: {"mask": x * 0, "map": x, "label": x.argmax(1)}))
    mask, values, label = proof(program).outputs
    assert (mask.error, mask.remark) == (None, "the reference is all zero: no evidence")
    assert (values.error, values.remark) == (pytest.approx(0, abs=1e-13), "")
    assert (label.error, label.remark) == (0, "compared exactly")


# ---- inputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "verified"), [(1, 2), (2, 2), (5, 2)])
def test_batch_of_two_is_verified(batch: int, verified: int) -> None:
    program = program_of(ConvBn(), image(batch, 3, 9, 13))
    assert proof(program).batch == verified


def test_input_without_a_batch_keeps_its_size() -> None:
    program = program_of(nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU()), image(3, 9))
    assert verification_shapes(program) == [(3, 9)]
    assert proof(program, Swap(nn.ReLU, lambda relu: None)).max_error == 0


def test_guarded_batch_keeps_its_size() -> None:
    program = program_of(After(lambda x: x * 2 if x.shape[0] == 1 else x), image(1, 3, 9, 13))
    assert verification_shapes(program) == [(1, 3, 9, 13)]


def test_inputs_of_two_batches_keep_their_sizes() -> None:
    class Two(ConvBn):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return super().forward(x).sum() + y

    program = program_of(Two(), image(1, 3, 9, 13), image(4, 2))
    assert verification_shapes(program) == [(1, 3, 9, 13), (4, 2)]
    assert proof(program).max_error <= 1e-13


def test_given_example_is_what_is_run() -> None:
    program = program_of(ConvBn())
    assert proof(program, example=[image(4, 3, 7, 8)]).batch == 4


# ---- the shipped program -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_shipped_program_is_held_to_its_bound(dtype: torch.dtype) -> None:
    program = capture(seeded(ConvBn()).to(dtype), image(dtype=dtype))
    verification = proof(program)
    epsilon = torch.finfo(dtype).eps
    assert verification.shipped_dtype == str(dtype).removeprefix("torch.")
    assert verification.max_error <= 1e-13
    assert verification.shipped_error <= verification.shipped_bound
    assert (verification.original_error > 0) == (dtype is not torch.float64)
    assert verification.original_error < 8 * epsilon
    assert verification.shipped_bound == pytest.approx(
        max(2 * verification.original_error + 16 * epsilon, 1e-12)
    )


def test_float64_program_is_held_to_the_bound_of_the_proof() -> None:
    """It is its own reference; rounding that later layers enlarge is no loss of precision."""
    model = seeded(After(lambda x: (x * 1e2).sin())).double()
    verification = proof(capture(model, image(dtype=torch.float64)))
    assert verification.original_error == 0
    assert verification.shipped_error > 16 * torch.finfo(torch.float64).eps
    assert verification.shipped_bound == 1e-12


def test_loss_of_precision_is_caught_though_float64_is_right() -> None:
    class Detour(nn.Module):
        """(x + 1024) − 1024 is off by 1e-13 in float64 and by 6e-5 in float32."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1024.0 - 1024.0

    program = program_of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6()))
    relu6 = Swap(nn.ReLU6, lambda old: nn.Sequential(Detour(), nn.ReLU6()))
    with pytest.raises(VerificationError, match=r"right in float64 but loses precision in float32"):
        proof(program, relu6)


def test_original_that_overflows_in_half_is_not_held_against_the_pass() -> None:
    program = capture(
        seeded(After(lambda x: (x * 30000 * 30000, x))).half(), image(dtype=torch.float16)
    )
    verification = proof(program)
    assert math.isinf(verification.original_error)
    assert verification.max_error <= 1e-13


# ---- site by site ------------------------------------------------------------------------------


class Twins(nn.Module):
    """Two pairs and a norm that follows a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a = ConvBn()
        self.b = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)) + 1


@pytest.mark.usefixtures("short_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_site_by_site_proves_every_site_of_every_round(dtype: torch.dtype) -> None:
    program = capture(seeded(Twins()).to(dtype), image(dtype=dtype))
    verification = proof(program)
    assert verification.method == (
        "site by site on recorded inputs: the float64 model does not fit in memory"
    )
    assert verification.remarks == ("the program as it ships was not run as a whole",)
    assert [error.output for error in verification.outputs] == ["a_norm", "b_1", "b_2"]
    assert 0 < verification.max_error <= 1e-13


@pytest.mark.usefixtures("short_memory")
def test_site_by_site_takes_few_sites_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their float64 copies are to fit in an eighth of what is free."""
    copies: list[int] = []

    def counted(program: Program, only: frozenset[str]) -> Program:
        copies.append(len(only))
        return to_double(program, only)

    monkeypatch.setattr("fxopt.proof.sitewise.to_double", counted)
    program = program_of(Twins())
    for free, expected in [(10**9, [4, 2]), (0, [2, 2, 2])]:
        copies.clear()
        monkeypatch.setattr("fxopt.proof.sitewise._free_bytes", lambda free=free: free)
        assert len(proof(program).outputs) == 3
        assert copies == expected


@pytest.mark.usefixtures("short_memory")
def test_site_by_site_catches_a_deleted_fresh_norm() -> None:
    model: Any = seeded(Twins())
    model.b[1] = nn.BatchNorm2d(4).eval()
    with pytest.raises(VerificationError, match=r"'b_1' \('b\.1'\) departs by [45]\.\de-06 in"):
        proof(capture(model, image()), Swap(nn.BatchNorm2d, identity_if_fresh))


def identity_if_fresh(norm: nn.BatchNorm2d) -> nn.Module | None:
    assert norm.running_mean is not None
    return None if norm.running_mean.any() else nn.Identity()


@pytest.mark.usefixtures("short_memory")
def test_site_by_site_catches_a_module_swapped_in_place() -> None:
    def off(conv: nn.Conv2d) -> None:
        with torch.no_grad():
            conv.weight[0] *= 1 + 1e-9

    with pytest.raises(VerificationError, match=r"'a_conv' \('a\.conv'\) departs"):
        proof(program_of(Twins()), Swap(nn.Conv2d, off))


@pytest.mark.usefixtures("short_memory")
def test_site_by_site_reads_what_new_nodes_read() -> None:
    """The new value is 'norm + 0·x', and x is no operand of the site."""

    class Reader(DropNorm):
        def sites(self, program: Program) -> Any:
            if "mul" not in program.types:
                yield from super().sites(program)

        def rewrite(self, site: Any, edit: Any) -> None:
            nothing = edit.call_function(torch.mul, (edit.node("x"), 0), after="x")
            total = edit.call_function(torch.sum, (nothing,), after=nothing)
            zero = edit.call_function(torch.add, (edit.node("norm"), total), after="norm")
            edit.replace_uses("norm", zero)

    assert proof(program_of(ConvBn()), Reader()).max_error == 0


@pytest.mark.usefixtures("short_memory")
def test_site_by_site_keeps_buffers_and_random_numbers() -> None:
    class Counter(ConvBn):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return F.dropout(super().forward(x)) * self.calls

    program = program_of(Counter())
    assert proof(program).max_error <= 1e-13
    assert float(program.graph_module.calls) == 1


def test_memory_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of(ConvBn())
    elements = 3 * 4 * 9 + 4 + 4 * 4 + 1
    for available, method in [(4 * 8 * elements, "whole"), (4 * 8 * elements - 1, "site by site")]:
        memory = type("Memory", (), {"available": available})
        monkeypatch.setattr("psutil.virtual_memory", lambda memory=memory: memory)
        assert proof(program).method.startswith(method)
