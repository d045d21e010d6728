"""The commands ``fxopt memory``, ``fxopt schedule`` and ``fxopt pack``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from fxopt.analysis.memory_model import PRESETS, MemoryModel
from fxopt.cli_options import captured, model_options, passes_option, print_result, progress
from fxopt.errors import ExecutionError
from fxopt.sizes import SizeError, parse_size

if TYPE_CHECKING:
    from fxopt.memory_plan import MemoryPlan
    from fxopt.program import Program

NO = 1
"""The exit status of an answer that is no."""


def size_of(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
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


def _time_limit(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option(
        "--time-limit",
        metavar="S",
        type=click.FloatRange(min=0, min_open=True),
        help=f"Seconds for the search of {what}; the best so far counts.",
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
@click.option("--sram", metavar="SIZE", callback=size_of, help="Fits? 256kB or KiB; exit 1 if not.")
@click.option("--depth", type=click.IntRange(min=1), help="Names of a module path to a bar.")
@click.option("--execute", is_flag=True, help="Run the model in the arena; exit 1 if it differs.")
@click.option("--plot", metavar="FILE", help="Draw live bytes and the arena: .svg or .png.")
@_time_limit("an order")
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
    execute: bool,
    plot: str | None,
    time_limit: float | None,
    as_json: bool,
    **rest: Any,
) -> None:
    """Plan MODEL's memory: the least peak, where it is, an arena, and whether it fits."""
    from fxopt.analysis.schedule import TIME_LIMIT
    from fxopt.execution.compare import compare_in_arena
    from fxopt.memory import plan_memory
    from fxopt.pipeline import resolve_passes, run_pipeline
    from fxopt.plot import check_plot, plot_plans

    names = {field.name for field in dataclasses.fields(MemoryModel)}
    changes = {k: v for k, v in rest.items() if k in names and v is not None}
    model = {key: value for key, value in rest.items() if key not in names}
    conventions = MemoryModel.preset(preset, **changes)
    resolved = resolve_passes(passes)
    if plot is not None:
        check_plot(plot)
    if execute and conventions.bytes_per_element is not None:
        raise ExecutionError("what-if sizes cannot be executed: leave --bytes-per-element out")
    with progress("load", "capture", "rewrite") as begin:
        program = captured(**model, verify=True, begin=begin)
        begin()
        results = run_pipeline(program, resolved)
    final = results[-1].after if results else program

    def planned(program: Program) -> MemoryPlan:
        limit = time_limit or TIME_LIMIT
        with _searching() as told:
            return plan_memory(
                program, memory_model=conventions, order=order, time_limit=limit, progress=told
            )

    plan = planned(final)
    execution = compare_in_arena(final, plan) if execute else None
    if plot is not None:
        before = {"before": planned(program)} if results else {}
        plot_plans(plot, {**before, "after" if results else plan.model: plan})
    text = plan.json if as_json else plan.text
    print_result(text(sram, depth, execution))
    if (sram is not None and not plan.fit(sram).fits) or (execution and not execution.equal):
        context.exit(NO)


@click.command()
@click.argument("graph", metavar="GRAPH.json")
@_time_limit("an order")
@_as_json
def schedule(graph: str, time_limit: float | None, as_json: bool) -> None:
    """Find the order of a dataflow graph (node-link JSON) that needs the least memory."""
    from fxopt.analysis.graph import load_graph
    from fxopt.analysis.schedule import TIME_LIMIT
    from fxopt.analysis.schedule import schedule as schedule_of
    from fxopt.plain_report import schedule_json, schedule_text

    dataflow = load_graph(graph)
    with _searching() as told:
        found = schedule_of(dataflow, time_limit or TIME_LIMIT, told)
    print_result(schedule_json(found) if as_json else schedule_text(found))


@click.command()
@click.argument("buffers", metavar="BUFFERS.csv")
@click.option("--capacity", metavar="SIZE", callback=size_of, help="Fits? Exit 1 if not.")
@click.option("--output", "-o", metavar="FILE.csv", help="Write the buffers with their offsets.")
@_time_limit("a packing")
@_as_json
@click.pass_context
def pack(
    context: click.Context,
    /,
    buffers: str,
    capacity: int | None,
    output: str | None,
    time_limit: float | None,
    as_json: bool,
) -> None:
    """Pack buffers (CSV of id, lower, upper, size; half-open) into as few bytes as a search finds.

    The rows are those of MiniMalloc; a column alignment may be there.
    """
    from fxopt.analysis.arena import plan_arena
    from fxopt.analysis.buffers import load_buffers, save_packing
    from fxopt.analysis.validate import validate_packing
    from fxopt.files import check_path
    from fxopt.plain_report import packing_json, packing_text

    if output is not None:
        check_path(output)
    lifetimes = load_buffers(buffers)
    arena = plan_arena(lifetimes, 1, time_limit)
    validate_packing(lifetimes, arena)
    if output is not None:
        save_packing(output, lifetimes, arena)
    print_result((packing_json if as_json else packing_text)(arena, capacity))
    if capacity is not None and arena.size_bytes > capacity:
        context.exit(NO)
