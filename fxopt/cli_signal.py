"""The command ``fxopt signal``."""

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
@click.option("--data", metavar="FILE.pt", help="Inputs to measure on.  [default: unit normal]")
@click.option("--own-gains", is_flag=True, help="Leave skip gains as they are, not 1.")
@click.option("--plot", metavar="FILE", help="Draw it by depth: .svg or .png.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@no_verify_option
def signal(
    passes: tuple[str, ...],
    data: str | None,
    own_gains: bool,
    plot: str | None,
    as_json: bool,
    no_verify: bool,
    **model: Any,
) -> None:
    """Measure how the variance of activations goes through MODEL, block by block.

    Beside it: the variances that are expected, those of MODEL before the passes, and those of
    MODEL with its BatchNorms deleted.
    """
    from fxopt.analysis.signal import signal_propagation
    from fxopt.calibration import Calibration
    from fxopt.norms import batch_norms
    from fxopt.pipeline import resolve_passes, run_pipeline
    from fxopt.plot import check_plot
    from fxopt.signal_plot import plot_signal
    from fxopt.signal_report import signal_json, signal_text

    if plot is not None:
        check_plot(plot)
    resolved = resolve_passes(passes)
    inputs = None if data is None else Calibration(data)
    with progress("load", "capture", "rewrite", "measure") as begin:
        program = captured(**model, verify=not no_verify, begin=begin)
        begin()
        results = run_pipeline(program, resolved, verify=not no_verify)
        begin()
        after = results[-1].after if results else program
        gain = None if own_gains else 1.0
        found = signal_propagation(after, inputs, skip_gain=gain)
        beside = {}
        if results:
            beside["before"] = signal_propagation(program, inputs, skip_gain=gain)
        if batch_norms(program):
            deleted = signal_propagation(program, inputs, norms="deleted", skip_gain=gain)
            beside["BatchNorm deleted"] = deleted
    if plot is not None:
        plot_signal(plot, {"after" if results else found.model: found, **beside})
    print_result((signal_json if as_json else signal_text)(found, beside))
