"""The command line: it parses, calls, prints. Everything that it can say, Python can get.

Results go to stdout, progress, warnings and errors to stderr. Exit status: 0 done, 1 the answer is
no, 2 the user's input, 70 a bug in fxopt.
"""

from __future__ import annotations

import dataclasses
import os
import traceback
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from fxopt.cli_memory import memory, pack, schedule
from fxopt.cli_options import (
    Form,
    captured,
    form_options,
    model_options,
    no_verify_option,
    passes_option,
    print_result,
    progress,
)
from fxopt.cli_patch import patch
from fxopt.cli_qas import qas_ratio
from fxopt.cli_quantize import quantize
from fxopt.cli_signal import signal
from fxopt.errors import FxoptError

if TYPE_CHECKING:
    from fxopt.onnx_report import OnnxReport
    from fxopt.pt2 import Pt2Report

BUG = 70


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line with ``arguments`` (default: the process's own); its exit status."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            status = commands.main(arguments, prog_name="fxopt", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        click.echo("fxopt: interrupted", err=True)
        return 130
    except FxoptError as error:
        click.echo(f"fxopt: error: {error}", err=True)
        _trace()
        return error.exit_code
    except Exception as error:
        reason = " ".join(str(error).split())
        click.echo(
            f"fxopt: this is a bug in fxopt: {type(error).__name__}: {reason} "
            "(FXOPT_TRACEBACK=1 shows where)",
            err=True,
        )
        _trace()
        return BUG
    return status or 0


def _trace() -> None:
    if os.environ.get("FXOPT_TRACEBACK") == "1":
        traceback.print_exc()


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Ours in one line; the libraries' own are about their code, not about the user's."""
    if category is UserWarning:
        click.echo(f"fxopt: warning: {message}", err=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fxopt")
def commands() -> None:
    """Rewrite convolutional networks as torch.fx graphs, with proof that nothing changed.

    MODEL is torchvision:resnet18, timm:mobilenetv2_100, path/to/file.py:callable_or_class or
    package.module:callable_or_class, its weights random unless --weights names a file; or a file
    that holds both: saved.pt2 (of --save, or torch.export.save) or pickled.pt (with
    --trust-pickle). A .pt2 too is code: load only those that you would run.
    """


@commands.command()
def passes() -> None:
    """List the passes: what each does, its options with types and defaults."""
    from fxopt.pipeline import available_passes, broken_passes

    lines = [_pass_help(name, kind) for name, kind in available_passes().items()]
    print_result("\n".join([*lines, *(f"note: {broken}" for broken in broken_passes())]))


def _pass_help(name: str, kind: type[Any]) -> str:
    from fxopt.options import option_types, type_text

    summary = next(iter((kind.__doc__ or "").strip().splitlines()), "")
    types = option_types(kind)
    options = [
        f"    {field.name}: {type_text(types[field.name])} = {field.default}"
        for field in dataclasses.fields(kind)
        if field.init
    ]
    return "\n".join((f"{name}  {summary}", *options))


@commands.command()
@model_options
@form_options
def report(form: Form, depth: int | None, **model: Any) -> None:
    """Count MODEL's parameters, MACs and bytes, per operator or module."""
    from fxopt.report import report as report_of

    with progress("load", "capture", "count") as begin:
        program = captured(**model, verify=True, begin=begin)
        begin()
        result = report_of(program)
    shown = {"json": result.json, "markdown": result.markdown, "text": result.text}
    print_result(shown[form](depth))


@commands.command()
@model_options
@passes_option(required=True)
@click.option("--onnx", metavar="FILE", help="Also write the result as ONNX.")
@click.option("--save", metavar="FILE.pt2", help="Also write it with torch.export, to be a MODEL.")
@no_verify_option
@form_options
def transform(
    passes: tuple[str, ...],
    onnx: str | None,
    save: str | None,
    no_verify: bool,
    form: Form,
    depth: int | None,
    **model: Any,
) -> None:
    """Rewrite MODEL by the passes, in order, and say what changed."""
    from fxopt.export import export_onnx
    from fxopt.files import check_path
    from fxopt.pipeline import resolve_passes, run_pipeline
    from fxopt.pt2 import check_suffix, export_pt2
    from fxopt.render import fenced
    from fxopt.report import TransformReport
    from fxopt.report import report as report_of
    from fxopt.schema import to_json

    for file in (onnx, save):
        if file is not None:
            check_path(file)
    if save is not None:
        check_suffix(save)
    resolved = resolve_passes(passes)
    with progress("load", "capture", "rewrite", "export") as begin:
        program = captured(**model, verify=not no_verify, begin=begin)
        begin()
        results = run_pipeline(program, resolved, verify=not no_verify)
        after = results[-1].after
        records = tuple(done.record for done in results)
        result = TransformReport(report_of(program), report_of(after), records)
        begin()
        written: dict[str, OnnxReport | Pt2Report] = {}
        if onnx is not None:
            written["onnx"] = export_onnx(after, onnx, verify=not no_verify)
        if save is not None:
            written["pt2"] = export_pt2(after, save, verify=not no_verify)
    if form == "json":
        extra = {name: file.to_dict() for name, file in written.items()}
        print_result(to_json({**result.to_dict(depth), **extra}))
        return
    markdown = form == "markdown"
    parts = [result.markdown(depth) if markdown else result.text(depth)]
    parts += [fenced(file.text()) if markdown else file.text() for file in written.values()]
    print_result("\n".join(parts))


@commands.command()
@model_options
@click.argument("file")
@passes_option(required=False)
@no_verify_option
def export(file: str, passes: tuple[str, ...], no_verify: bool, **model: Any) -> None:
    """Write MODEL to FILE as ONNX, rewritten by the passes if there are any."""
    from fxopt.export import export_onnx
    from fxopt.files import check_path
    from fxopt.pipeline import resolve_passes, run_pipeline

    check_path(file)
    resolved = resolve_passes(passes)
    with progress("load", "capture", "rewrite", "export") as begin:
        program = captured(**model, verify=not no_verify, begin=begin)
        begin()
        results = run_pipeline(program, resolved, verify=not no_verify)
        begin()
        written = export_onnx(results[-1].after if results else program, file, verify=not no_verify)
    print_result(written.text())


@commands.command()
def demo() -> None:
    """Fold a trained EfficientNet-Lite0, classify a photograph, write ONNX to ./fxopt-demo/."""
    from fxopt.demo import run_demo

    print_result(run_demo(say=lambda step: click.echo(f"fxopt: {step}", err=True)).text())


commands.add_command(memory)
commands.add_command(schedule)
commands.add_command(pack)
commands.add_command(patch)
commands.add_command(signal)
commands.add_command(quantize)
commands.add_command(qas_ratio)
