"""What the commands have in common: the options of a model, of passes and of reports; output."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import click

if TYPE_CHECKING:
    from fxopt.program import Program

Form = Literal["text", "json", "markdown"]

BROKEN_PIPE = 141  # what a shell reports of a program that SIGPIPE ended


def print_result(text: str) -> None:
    try:
        click.echo(text.rstrip("\n"))
    except BrokenPipeError:
        # The reader has enough. What Python would still flush at exit goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(BROKEN_PIPE) from None


@contextmanager
def progress(*steps: str) -> Iterator[Callable[[], None]]:
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


def model_options(command: Callable[..., None]) -> Callable[..., None]:
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


def passes_option(required: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(
        "-p",
        "--pass",
        "passes",
        metavar="SPEC",
        multiple=True,
        required=required,
        help="A pass: NAME or NAME{option=value,...}; repeatable, in order.",
    )


no_verify_option = click.option(
    "--no-verify", is_flag=True, help="Compare nothing with the original."
)


def form_options(command: Callable[..., None]) -> Callable[..., None]:
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


def captured(
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
