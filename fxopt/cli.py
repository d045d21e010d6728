"""The command line: it parses, calls, prints. Everything that it can say, Python can get.

Results go to stdout, progress, warnings and errors to stderr. Exit status: 0 done, 1 the answer is
no, 2 the user's input, 70 a bug in fxopt.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import click

from fxopt.errors import FxoptError

if TYPE_CHECKING:
    from fxopt.onnx_report import OnnxReport
    from fxopt.program import Program
    from fxopt.pt2 import Pt2Report

Form = Literal["text", "json", "markdown"]

BUG = 70
BROKEN_PIPE = 141  # what a shell reports of a program that SIGPIPE ended


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


def _print(text: str) -> None:
    try:
        click.echo(text.rstrip("\n"))
    except BrokenPipeError:
        # The reader has enough. What Python would still flush at exit goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(BROKEN_PIPE) from None


@contextmanager
def _progress(*steps: str) -> Iterator[Callable[[], None]]:
    """A bar on stderr if that is a terminal; the function that it yields begins the next step."""
    from tqdm import tqdm

    names = iter(steps)
    with tqdm(
        total=len(steps), disable=None, leave=False, bar_format="{desc} {bar} {n}/{total}"
    ) as bar:

        def begin() -> None:
            bar.set_description_str(next(names))
            bar.update()

        yield begin


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fxopt")
def commands() -> None:
    """Rewrite convolutional networks as torch.fx graphs, with proof that nothing changed.

    MODEL is torchvision:resnet18, timm:mobilenetv2_100, path/to/file.py:callable_or_class or
    package.module:callable_or_class, its weights random unless --weights names a file; or a file
    that holds both: saved.pt2 (of --save, or torch.export.save) or pickled.pt (with
    --trust-pickle). A .pt2 too is code: load only those that you would run.
    """


def _model_options(command: Callable[..., None]) -> Callable[..., None]:
    options = (
        click.argument("model"),
        click.option(
            "--input",
            "inputs",
            metavar="SHAPE",
            multiple=True,
            help="An example input: 1x3x160x224, or NAME=1x3x64x64[:int64]; repeatable.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(["float16", "bfloat16", "float32", "float64"]),
            help="Convert the model and the inputs that do not say theirs.",
        ),
        click.option("--weights", metavar="FILE", help="A state_dict to load."),
        click.option("--seed", default=0, show_default=True, help="Of weights and example inputs."),
        click.option(
            "--trust-pickle", is_flag=True, help="Load a pickled MODEL, which runs its code."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _passes_option(required: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(
        "-p",
        "--pass",
        "passes",
        metavar="SPEC",
        multiple=True,
        required=required,
        help="A pass: NAME or NAME{option=value,...}; repeatable, in order.",
    )


_no_verify = click.option("--no-verify", is_flag=True, help="Compare nothing with the original.")


def _form_options(command: Callable[..., None]) -> Callable[..., None]:
    """How a report is shown, checked before there is one: ``form`` and ``depth`` are passed on."""

    @functools.wraps(command)
    def checked(
        as_json: bool, markdown: bool, group_by: str | None, depth: int | None, **rest: Any
    ) -> None:
        if as_json and markdown:
            raise click.UsageError("--json and --markdown exclude each other")
        if depth is not None and group_by is None:
            raise click.UsageError("--depth is for --group-by module")
        form = "json" if as_json else "markdown" if markdown else "text"
        command(form=form, depth=(depth or 1) if group_by else None, **rest)

    options = (
        click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout."),
        click.option("--markdown", is_flag=True, help="GitHub's Markdown, for a pull request."),
        click.option("--group-by", type=click.Choice(["module"]), help="Sums by module path."),
        click.option(
            "--depth",
            type=click.IntRange(min=1),
            help="Names of a module path that --group-by keeps.  [default: 1]",
        ),
    )
    for option in reversed(options):
        checked = option(checked)
    return checked


def _captured(
    model: str,
    inputs: tuple[str, ...],
    dtype: str | None,
    weights: str | None,
    seed: int,
    trust_pickle: bool,
    *,
    verify: bool,
    begin: Callable[[], None],
) -> Program:
    from fxopt.capture import capture
    from fxopt.inputs import example_tensors, parse_dtype, parse_input
    from fxopt.zoo import load_model

    kind = None if dtype is None else parse_dtype(dtype)
    args, kwargs = example_tensors([parse_input(text) for text in inputs], kind, seed)
    begin()
    module = load_model(model, weights=weights, seed=seed, dtype=kind, trust_pickle=trust_pickle)
    begin()
    return capture(module, args, kwargs, verify=verify)


@commands.command()
def passes() -> None:
    """List the passes: what each does, its options with types and defaults."""
    from fxopt.pipeline import available_passes, broken_passes

    lines = [_pass_help(name, kind) for name, kind in available_passes().items()]
    _print("\n".join([*lines, *(f"note: {broken}" for broken in broken_passes())]))


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
@_model_options
@_form_options
def report(form: Form, depth: int | None, **model: Any) -> None:
    """Count MODEL's parameters, MACs and bytes, per operator or module."""
    from fxopt.report import report as report_of

    with _progress("load", "capture", "count") as begin:
        program = _captured(**model, verify=True, begin=begin)
        begin()
        result = report_of(program)
    shown = {"json": result.json, "markdown": result.markdown, "text": result.text}
    _print(shown[form](depth))


@commands.command()
@_model_options
@_passes_option(required=True)
@click.option("--onnx", metavar="FILE", help="Also write the result as ONNX.")
@click.option("--save", metavar="FILE.pt2", help="Also write it with torch.export, to be a MODEL.")
@_no_verify
@_form_options
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
    with _progress("load", "capture", "rewrite", "export") as begin:
        program = _captured(**model, verify=not no_verify, begin=begin)
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
        _print(to_json({**result.to_dict(depth), **extra}))
        return
    markdown = form == "markdown"
    parts = [result.markdown(depth) if markdown else result.text(depth)]
    parts += [fenced(file.text()) if markdown else file.text() for file in written.values()]
    _print("\n".join(parts))


@commands.command()
@_model_options
@click.argument("file")
@_passes_option(required=False)
@_no_verify
def export(file: str, passes: tuple[str, ...], no_verify: bool, **model: Any) -> None:
    """Write MODEL to FILE as ONNX, rewritten by the passes if there are any."""
    from fxopt.export import export_onnx
    from fxopt.files import check_path
    from fxopt.pipeline import resolve_passes, run_pipeline

    check_path(file)
    resolved = resolve_passes(passes)
    with _progress("load", "capture", "rewrite", "export") as begin:
        program = _captured(**model, verify=not no_verify, begin=begin)
        begin()
        results = run_pipeline(program, resolved, verify=not no_verify)
        begin()
        written = export_onnx(results[-1].after if results else program, file, verify=not no_verify)
    _print(written.text())


@commands.command()
def demo() -> None:
    """Fold a trained EfficientNet-Lite0, classify a photograph, write ONNX to ./fxopt-demo/."""
    from fxopt.demo import run_demo

    _print(run_demo(say=lambda step: click.echo(f"fxopt: {step}", err=True)).text())
