"""The commands ``fxopt memory`` and ``fxopt schedule``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from fxopt.analysis.memory_model import PRESETS, MemoryModel
from fxopt.cli_options import captured, model_options, passes_option, print_result, progress
from fxopt.sizes import SizeError, parse_size

DOES_NOT_FIT = 1


def _bytes(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """The size of an option, as a callback of it."""
    try:
        return None if value is None else parse_size(value)
    except SizeError as error:
        raise click.BadParameter(str(error), context, parameter) from error


def _kernel_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """An option for every field of the memory model that is a yes or a no."""
    for field in reversed(dataclasses.fields(MemoryModel)):
        if field.type == "bool" and field.name != "input_resident":
            name = field.name.replace("_", "-")
            command = click.option(f"--{name}/--no-{name}", default=None)(command)
    return command


_time_limit = click.option(
    "--time-limit",
    metavar="S",
    type=click.FloatRange(min=0, min_open=True),
    help="Seconds for the search of an order; the best so far counts.  [default: 25]",
)
_as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")


@contextmanager
def _searching() -> Iterator[Callable[[int, int], None]]:
    """A line on stderr, if that is a terminal and the search takes long."""
    from tqdm import tqdm

    with tqdm(disable=None, leave=False, delay=1.0, bar_format="{desc} {elapsed}") as bar:

        def told(peak: int, bound: int) -> None:
            said = f"searching: {peak:,} bytes found, no order below {bound:,}; Ctrl-C takes it"
            bar.set_description_str(said)

        yield told


@click.command()
@model_options
@passes_option(required=False)
@click.option(
    "--preset", type=click.Choice(list(PRESETS)), default="tinyengine", show_default=True,
    help="Whose kernels: a memory model; the options below change it.",
)  # fmt: skip
@click.option(
    "--bytes-per-element", metavar="N", type=click.IntRange(min=1),
    help="What if floating-point elements took N bytes: 1 is int8.  [default: the model's dtype]",
)  # fmt: skip
@click.option("--order", type=click.Choice(["optimal", "program"]), default="optimal")
@click.option(
    "--input-resident/--input-streamed", default=None,
    help="Whether inputs are in memory from the first step, or take no bytes.",
)  # fmt: skip
@click.option("--alignment", metavar="N", type=click.IntRange(min=1), help="Of every offset.")
@_kernel_options
@click.option("--sram", metavar="SIZE", callback=_bytes, help="Fits? 256kB, 256KiB; exit 1 if not.")
@click.option("--depth", type=click.IntRange(min=1), help="Names of a module path to a bar.")
@_time_limit
@_as_json
@click.pass_context
def memory(
    context: click.Context,
    /,
    passes: tuple[str, ...],
    preset: str,
    order: Any,
    sram: int | None,
    depth: int | None,
    time_limit: float | None,
    as_json: bool,
    **rest: Any,
) -> None:
    """Plan MODEL's memory: the least peak, where it is, an arena, and whether it fits."""
    from fxopt.analysis.schedule import TIME_LIMIT
    from fxopt.memory import plan_memory
    from fxopt.pipeline import resolve_passes, run_pipeline

    names = {field.name for field in dataclasses.fields(MemoryModel)}
    changes = {k: v for k, v in rest.items() if k in names and v is not None}
    model = {key: value for key, value in rest.items() if key not in names}
    conventions = MemoryModel.preset(preset, **changes)
    resolved = resolve_passes(passes)
    with progress("load", "capture", "rewrite") as begin:
        program = captured(**model, verify=True, begin=begin)
        begin()
        results = run_pipeline(program, resolved)
    with _searching() as told:
        plan = plan_memory(
            results[-1].after if results else program,
            memory_model=conventions,
            order=order,
            time_limit=time_limit or TIME_LIMIT,
            progress=told,
        )
    print_result(plan.json(sram, depth) if as_json else plan.text(sram, depth))
    if sram is not None and not plan.fit(sram).fits:
        context.exit(DOES_NOT_FIT)


@click.command()
@click.argument("graph", metavar="GRAPH.json")
@_time_limit
@_as_json
def schedule(graph: str, time_limit: float | None, as_json: bool) -> None:
    """Find the order of a dataflow graph (node-link JSON) that needs the least memory."""
    from fxopt.analysis.graph import load_graph
    from fxopt.analysis.schedule import TIME_LIMIT
    from fxopt.analysis.schedule import schedule as schedule_of
    from fxopt.schedule_report import schedule_json, schedule_text

    dataflow = load_graph(graph)
    with _searching() as told:
        found = schedule_of(dataflow, time_limit or TIME_LIMIT, told)
    print_result(schedule_json(found) if as_json else schedule_text(found))
