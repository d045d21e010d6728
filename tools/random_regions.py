"""Random regions patched at random: ``python tools/random_regions.py 0 500``.

Each seed is one network of ``tests/random_regions.py`` and up to three of its values as ends: the
rewrite is proven in float64, the peak that the choice says is that of the plan, and the plan is
executed in its arena. Exit status 1 if anything differs.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path

import click
import torch
from tqdm import tqdm

import fxopt
from fxopt.analysis.memory_model import PRESETS
from fxopt.execution.compare import compare_in_arena
from fxopt.passes.patch_execution import PatchExecution

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from random_regions import RandomRegion
from seeded import image, seeded


@click.command(help=__doc__)
@click.argument("first", type=int)
@click.argument("last", type=int)
def main(first: int, last: int) -> None:
    torch.set_num_threads(1)
    outcomes: Counter[str] = Counter()
    for seed in tqdm(range(first, last), leave=False):
        net = RandomRegion(seed)
        program = fxopt.capture(seeded(net), image(*net.shape), verify=False)
        for which in passes(program, random.Random(seed)):
            outcome = result_of(program, which)
            outcomes[outcome.partition(":")[0]] += 1
            if outcome not in ("equal", "refused"):
                tqdm.write(f"{seed} {which}: {outcome}")
    click.echo(", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()))
    sys.exit(outcomes.keys() - {"equal", "refused"} != set())


def passes(program: fxopt.Program, rng: random.Random) -> list[PatchExecution]:
    called = [node.name for node in program.nodes if node.op.startswith("call")]
    maps = [name for name in called if len(getattr(program.types[name], "shape", ())) == 4]
    found = []
    for end in rng.sample(maps, min(3, len(maps))):
        height, width = program.types[end].shape[2:]
        rows, cols = rng.randint(1, min(6, height)), rng.randint(1, min(6, width))
        preset, resident = rng.choice(sorted(PRESETS)), rng.random() < 0.5
        if rows * cols > 1:
            grid = f"{rows}x{cols}"
            found.append(PatchExecution(end, grid, preset=preset, input_resident=resident))
    return found


def result_of(program: fxopt.Program, which: PatchExecution) -> str:
    try:
        result = fxopt.run_pass(which, program)
    except fxopt.PreconditionError as error:
        return "refused" if "cannot reach" in str(error) else f"error: {error}"
    except fxopt.FxoptError as error:
        return f"error: {error}"
    plan = fxopt.plan_memory(result.after, memory_model=which.memory_model())
    said = result.evidence["choice"]["peak_bytes"]
    if plan.peak_bytes != said:
        return f"peak: {plan.peak_bytes}, the choice says {said}"
    execution = compare_in_arena(result.after, plan)
    return "equal" if execution.equal else f"departs: {execution.sentence()}"


if __name__ == "__main__":
    main()
