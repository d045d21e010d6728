"""The command ``fxopt qas-ratio``."""

from __future__ import annotations

from typing import Any

import click

from fxopt.cli_options import (
    captured,
    model_options,
    no_verify_option,
    passes_option,
    print_result,
    progress,
)


@click.command()
@model_options
@passes_option(required=False)
@click.option("--data", metavar="FILE.pt", help="Inputs, or batches with labels.  "
              "[default: unit normal]")  # fmt: skip
@click.option("--granularity", type=click.Choice(["channel", "tensor"]),
              help="Of weights, where MODEL is not quantised yet.  [default: channel]")  # fmt: skip
@click.option("--plot", metavar="FILE", help="Draw it tensor by tensor: .svg or .png.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@no_verify_option
def qas_ratio(
    passes: tuple[str, ...],
    data: str | None,
    granularity: Any,
    plot: str | None,
    as_json: bool,
    no_verify: bool,
    **model: Any,
) -> None:
    """Compare the norms of MODEL's weights with their gradients': fp32, int8, int8 with QAS.

    MODEL is quantised on the data, unless it, or a pass, is so already.
    """
    from fxopt.calibration import Calibration
    from fxopt.pipeline import resolve_passes, run_pipeline
    from fxopt.plot import check_plot
    from fxopt.qas_plot import plot_qas_ratio
    from fxopt.qas_ratio import qas_ratio as qas_ratio_of
    from fxopt.qas_report import qas_ratio_json, qas_ratio_text

    if plot is not None:
        check_plot(plot)
    resolved = resolve_passes(passes)
    inputs = None if data is None else Calibration(data)
    with progress("load", "capture", "rewrite", "measure") as begin:
        program = captured(**model, verify=not no_verify, begin=begin)
        begin()
        results = run_pipeline(program, resolved, verify=not no_verify)
        after = results[-1].after if results else program
        begin()
        found = qas_ratio_of(after, inputs, granularity=granularity, verify=not no_verify)
    if plot is not None:
        plot_qas_ratio(plot, found)
    print_result((qas_ratio_json if as_json else qas_ratio_text)(found))
