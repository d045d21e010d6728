"""Proof that a program computes what another does, by running both.

A pass that preserves values is repeated on a float64 copy. There a right fold measures 1e-15 to
4e-14 and a wrong one, even a deleted fresh BatchNorm, 5e-6 or more, so the bound of 1e-12 tells
them apart. Some networks enlarge rounding beyond it (untrained and deep ones do; how much is
measured by a rounding of their inputs): their sites are compared one by one. The program as it
ships is then held against the float64 outputs, beside the original.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from fxopt.errors import VerificationError
from fxopt.program import Program, ValueType, tensor_types
from fxopt.proof.double import DoubleInterpreter, default_double, run_double, to_double, widened
from fxopt.proof.evidence import (
    SEED,
    floating,
    has_evidence,
    input_attempts,
    largest_error,
    output_errors,
    verification_shapes,
)
from fxopt.proof.rounding import RUNS, is_rounding, worst_of_runs
from fxopt.proof.running import last_run_drew, run
from fxopt.proof.sitewise import BOUND, Rewriting, Round, too_large_for_double, verify_sites
from fxopt.results import OutputError, Verification

PROOF_BOUND = BOUND
_TWO_DRAWS = 4.0
"""How far apart the largest errors of two programs may be that enlarge rounding alike.

Measured on networks whose own error is over 64 ε: up to 2.4.
"""


def verify_values(
    pass_name: str,
    before: Program,
    after: Program,
    rounds: Sequence[Round],
    example: Sequence[Any] | None,
) -> Verification:
    """Prove that ``after`` computes what ``before`` does.

    Args:
        rounds: what was done to ``before``, to be done again to a float64 copy.
        example: flat tensors to run, instead of seeded ones.

    Raises:
        VerificationError: it does not, or no output is evidence; the first departing node is named.
    """
    started = time.perf_counter()
    if not rounds:
        return _nothing_done(after)
    if too_large_for_double(before):
        why = "the float64 model does not fit in memory"
        return verify_sites(pass_name, rounds, why, example)
    double = to_double(before)
    rewriting = _repeat(rounds, double)
    names = before.interface.output_names
    for inputs in input_attempts(before, verification_shapes(before), example):
        reference = run_double(double, inputs)
        errors = output_errors(names, reference, run_double(rewriting.program, inputs))
        if has_evidence(floating(errors)):
            break
    else:
        why = "every output is all zero, not finite or not floating"
        return verify_sites(pass_name, rounds, why, example)
    error = largest_error(errors)
    method, remarks = "whole program", _remarks(before)
    slack = dict.fromkeys(names, 16 * _epsilon(before))
    departing = [e for e in errors if e.error is not None and not e.error <= PROOF_BOUND]
    if departing and (before.opaque or is_rounding(departing, double, inputs, reference)):
        cause = (
            "opaque leaves round to their own dtype" if before.opaque else "it enlarges rounding"
        )
        remarks = (*remarks, f"the whole program's error is {error:.1e}")
        by_site = verify_sites(pass_name, rounds, cause, example)
        slack |= {each.output: _enlarged(before, each) for each in departing}
        method, errors, error = by_site.method, by_site.outputs, by_site.max_error
    if not error <= PROOF_BOUND:
        culprit = _first_departure(double, rewriting, inputs)
        raise VerificationError(
            f"pass '{pass_name}' changed the function: error {error:.1e} in float64, where at most "
            f"{PROOF_BOUND:.0e} is rounding; the first value that departs is {culprit}"
        )
    own_outputs = run(before, inputs)
    draws = last_run_drew()
    if draws:
        slack = {name: max(each, 256 * _epsilon(before)) for name, each in slack.items()}
        reference = own_outputs
        remarks = (*remarks, "the program draws random numbers, other ones in float64: as it ships "
                   "it is compared with the original under the same seed")  # fmt: skip
    own = output_errors(names, reference, own_outputs)
    shipped = output_errors(names, reference, run(after, inputs))
    factor = 2.0
    if not draws and not _is_close(before, own, shipped, slack, factor):
        # where a network enlarges rounding, the error of a single run is a matter of luck
        own, shipped = worst_of_runs(before, after, double, inputs, (own, shipped))
        factor = _TWO_DRAWS
        remarks = (*remarks, f"as shipped: the largest errors of {RUNS + 1} runs on inputs that "
                   "are a rounding apart")  # fmt: skip
    bound = _check_shipped(pass_name, before, own, shipped, slack, factor)
    return Verification(
        dtype="float64",
        max_error=error,
        bound=PROOF_BOUND,
        outputs=errors,
        shipped_dtype=_dtype_name(before),
        shipped_error=largest_error(floating(shipped)),
        original_error=largest_error(floating(own)),
        shipped_bound=bound,
        batch=_batch(inputs),
        seconds=time.perf_counter() - started,
        method=method,
        remarks=remarks,
    )


def _enlarged(before: Program, output: OutputError) -> float:
    """Eight times the roundings that the network makes of one in float64, in its own dtype."""
    assert output.error is not None
    own = _epsilon(before)
    return max(16 * own, 8 * own * output.error / torch.finfo(torch.float64).eps)


def _repeat(rounds: Sequence[Round], copy: Program) -> Rewriting:
    stands_for: dict[str, str] = {}
    changed: frozenset[str] = frozenset()
    for one in rounds:
        rewriting = one.apply(copy, range(len(one.sites)))
        copy = rewriting.program
        later = rewriting.stands_for
        stands_for = {old: later.get(new, new) for old, new in stands_for.items()}
        stands_for.update(later)
        changed |= rewriting.changed
    return Rewriting(copy, stands_for, changed)


def _nothing_done(program: Program) -> Verification:
    outputs = tuple(OutputError(name, 0.0) for name in program.interface.output_names)
    return Verification(
        "float64", 0.0, PROOF_BOUND, outputs, _dtype_name(program), 0.0, 0.0, 0.0, 0, 0.0,
        method="nothing was rewritten: the program is the same",
    )  # fmt: skip


def _check_shipped(
    pass_name: str, before: Program, own: Sequence[OutputError], shipped: Sequence[OutputError],
    slack: Mapping[str, float], factor: float,
) -> float:  # fmt: skip
    """The bound on the shipped program, which keeps it."""
    bound = 0.0
    found = _against_bounds(before, own, shipped, slack, factor)
    for original, rewritten, allowed in found:
        bound = max(bound, allowed)
        if not rewritten.error <= allowed:  # type: ignore[operator]
            raise VerificationError(
                f"pass '{pass_name}' is right in float64 but loses precision in "
                f"{_dtype_name(before)}: output '{rewritten.output}' is off by "
                f"{rewritten.error:.1e}, the original by {original.error:.1e}, and at most "
                f"{allowed:.1e} is allowed; run the pass on a float32 model, or leave it out"
            )
    return bound


def _is_close(
    before: Program, own: Sequence[OutputError], shipped: Sequence[OutputError],
    slack: Mapping[str, float], factor: float,
) -> bool:  # fmt: skip
    found = _against_bounds(before, own, shipped, slack, factor)
    return all(rewritten.error <= allowed for _, rewritten, allowed in found)  # type: ignore[operator]


def _against_bounds(
    before: Program, own: Sequence[OutputError], shipped: Sequence[OutputError],
    slack: Mapping[str, float], factor: float,
) -> Iterator[tuple[OutputError, OutputError, float]]:  # fmt: skip
    """Errors of the original and of the rewritten program, and how large the latter may be.

    ``factor`` times the original's own distance (twice where that is under 64 ε, however often it
    ran) and the output's ``slack``, which is 16 ε, under 256 ε in all; as many ε as the network
    makes of one in float64 where it enlarges rounding; 256 ε for a program that draws random
    numbers, whose own distance is not known. In float64 the program is its own reference, which
    the proof's bound is for.
    """
    epsilon = _epsilon(before)
    for original, rewritten in zip(floating(own), floating(shipped), strict=True):
        if original.error is None or not math.isfinite(original.error):
            continue  # the original overflows: nothing to hold the rewritten program against
        assert rewritten.error is not None
        times = factor if original.error > 64 * epsilon else 2.0
        allowed = times * original.error + slack[original.output]
        measures = slack[original.output] <= 16 * epsilon and original.error <= 256 * epsilon
        if measures and epsilon == torch.finfo(torch.float32).eps:
            allowed = min(allowed, 256 * epsilon)
        yield original, rewritten, max(allowed, PROOF_BOUND)


def _epsilon(program: Program) -> float:
    """Machine epsilon of the coarsest floating type that the program computes with."""
    dtypes = {t.dtype for kind in program.types.values() for t in tensor_types(kind)}
    dtypes |= {t.dtype for t in program.graph_module.parameters()}
    found = [torch.finfo(d).eps for d in dtypes if d.is_floating_point or d.is_complex]
    return max(found, default=torch.finfo(torch.float32).eps)


def _dtype_name(program: Program) -> str:
    for tensor in (*program.graph_module.parameters(), *program.graph_module.buffers()):
        if tensor.is_floating_point():
            return str(tensor.dtype).removeprefix("torch.")
    return "float32"


def _batch(inputs: Sequence[torch.Tensor]) -> int:
    return next((int(t.shape[0]) for t in inputs if t.dim()), 1)


def _remarks(program: Program) -> tuple[str, ...]:
    if not program.opaque:
        return ()
    return (f"{len(program.opaque)} opaque leaves ran in their own dtype",)


def _first_departure(double: Program, rewriting: Rewriting, inputs: Sequence[torch.Tensor]) -> str:
    """The first node of the original whose value the rewritten program does not reproduce."""
    with torch.no_grad(), default_double():
        runs = []
        for program in (double, rewriting.program):
            torch.manual_seed(SEED)
            interpreter = DoubleInterpreter(program)
            interpreter.garbage_collect_values = False
            interpreter.run(*map(widened, inputs))
            runs.append({node.name: value for node, value in interpreter.env.items()})
    reference, found = runs
    replaced = set(rewriting.stands_for.values())
    for node in double.nodes:
        twin = rewriting.stands_for.get(node.name, node.name)
        if twin == node.name and node.name in rewriting.changed & replaced:
            continue  # it has the value of another node now
        pair = reference.get(node.name), found.get(twin)
        if all(isinstance(value, torch.Tensor) for value in pair):
            (error,) = output_errors([node.name], [pair[0]], [pair[1]])
            if error.error is not None and not error.error <= PROOF_BOUND:
                return f"'{node.name}' ({double.where(node)})"
    return "an output"


def verify_interface(
    pass_name: str, before: Program, after: Program, example: Sequence[Any] | None
) -> Verification:
    """Check that inputs and outputs have the same types and that outputs are finite.

    Raises:
        VerificationError: they have not, or are not where the original's are.
    """
    started = time.perf_counter()
    if before.inputs() != after.inputs() or _output_types(before) != _output_types(after):
        raise VerificationError(
            f"pass '{pass_name}' changed the interface: outputs {_output_types(before)} became "
            f"{_output_types(after)}"
        )
    inputs = next(input_attempts(before, verification_shapes(before), example))
    names = before.interface.output_names
    reference, found = run(before, inputs), run(after, inputs)
    for name, expected, value in zip(names, reference, found, strict=True):
        if _is_finite(expected) and not _is_finite(value):
            raise VerificationError(
                f"pass '{pass_name}' makes output '{name}' infinite or not a number on seeded "
                "inputs"
            )
    errors = output_errors(names, reference, found)
    change = largest_error(floating(errors))
    return Verification(
        _dtype_name(before), change, float("inf"), errors, _dtype_name(before),
        change, 0.0, float("inf"), _batch(inputs), time.perf_counter() - started,
        method="same interface and finite outputs; the values may differ",
    )  # fmt: skip


def _is_finite(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) or bool(torch.isfinite(value).all())


def _output_types(program: Program) -> tuple[ValueType, ...]:
    return tuple(program.types.get(str(a), a) for a in program.output_node().args[0])  # type: ignore
