"""The command ``fxopt patch``."""

from __future__ import annotations

from typing import Any

import click

from fxopt.cli_memory import NO, size_of
from fxopt.cli_options import captured, model_options, print_result, progress


@click.command()
@model_options
@click.option("--until", metavar="PATH", help="Where the patched part ends: a module, inclusive.")
@click.option("--grid", metavar="RxC", help="Rows and columns of tiles.")
@click.option("--halo", type=click.Choice(["recompute"]), default="recompute", show_default=True)
@click.option("--sram", metavar="SIZE", callback=size_of, help="The least overhead that fits.")
@click.option(
    "--max-overhead", metavar="F", type=click.FloatRange(min=0),
    help="The least peak within so many more MACs, as a fraction of all.  [default: 0.15]",
)  # fmt: skip
@click.option("--preset", metavar="P", default="tinyengine", show_default=True, help="Kernels.")
@click.option("--bytes-per-element", metavar="N", type=click.IntRange(min=1), help="What if.")
@click.option("--input-resident/--input-streamed", default=None, help="Whether the image counts.")
@click.option("--onnx", metavar="FILE", help="Write the patched network, run in onnxruntime.")
@click.option("--plot", metavar="FILE", help="Draw both plans: .svg or .png.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.pass_context
def patch(
    context: click.Context,
    /,
    onnx: str | None,
    plot: str | None,
    as_json: bool,
    halo: str,
    until: str | None,
    grid: str | None,
    sram: int | None,
    max_overhead: float | None,
    preset: str,
    bytes_per_element: int | None,
    input_resident: bool | None,
    **model: Any,
) -> None:
    """Run the memory-hungry part of MODEL tile by tile: the same result at a lower peak."""
    from fxopt.export import export_onnx
    from fxopt.files import check_path
    from fxopt.memory import plan_memory
    from fxopt.passes.patch_execution import PatchExecution
    from fxopt.patch_report import patch_json, patch_text
    from fxopt.plot import check_plot, plot_plans
    from fxopt.rewrite import run_pass

    options: dict[str, Any] = {
        "until": until, "grid": grid, "sram": sram, "max_overhead": max_overhead, "preset": preset,
        "bytes_per_element": bytes_per_element, "input_resident": input_resident,
    }  # fmt: skip
    try:
        chosen = PatchExecution(**{k: v for k, v in options.items() if v is not None})
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if plot is not None:
        check_plot(plot)
    if onnx is not None:
        check_path(onnx)
    with progress("load", "capture", "choose") as begin:
        program = captured(**model, verify=True, begin=begin)
        begin()
        result = run_pass(chosen, program)
    conventions = chosen.memory_model()
    before, after = (
        plan_memory(each, memory_model=conventions) for each in (program, result.after)
    )
    written = None
    if result.record.rewritten and onnx is not None:
        written = export_onnx(result.after, onnx)
    if result.record.rewritten and plot is not None:
        plot_plans(plot, {"before": before, "after": after})
    print_result((patch_json if as_json else patch_text)(result, before, after, written))
    fits = sram is not None and after.arena.size_bytes <= sram
    if not result.record.rewritten and not fits:
        context.exit(NO)
