"""``transform`` and the textual pipeline spec: ``fold_conv_bn,other{option=value,on=true}``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import fx, nn

from fxopt.capture import capture
from fxopt.captured import history, program_of, to_module
from fxopt.errors import PipelineSpecError
from fxopt.options import (
    option_types,
    parse_value,
    required_options,
    takes_list,
    type_text,
)
from fxopt.plugins import BrokenPass, found_passes
from fxopt.program import Program
from fxopt.results import PassResult
from fxopt.rewrite import Pass, run_pass

PassSpec = Pass | str


def transform(
    model: nn.Module,
    passes: Sequence[PassSpec] | PassSpec,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    verify: bool = True,
) -> fx.GraphModule:
    """``model`` rewritten by ``passes``, as a fresh module; ``model`` stays as it is.

    Args:
        model: any module, or one that :func:`transform` returned.
        passes: pass instances, names, and specs (``"name{option=value}"``), freely mixed.
        example_inputs: a tensor or a tuple of positional arguments, see :func:`fxopt.capture`.
        example_kwargs: arguments by keyword.
        verify: compare the captured graph with the model and prove each pass; False is for very
            large models and is written into the history.

    Returns:
        A module that is called as ``model`` is; :func:`fxopt.history` says what each pass did.

    Raises:
        PipelineSpecError: a pass, option or value is unknown or wrong.
        CaptureError: the model cannot be captured.
        VerificationError: a pass changed what it promised to keep.
    """
    resolved = resolve_passes(passes)
    program = program_of(model)
    records = history(model)
    if program is None or example_inputs is not None or example_kwargs:
        program = capture(model, example_inputs, example_kwargs, verify=verify)
    results = run_pipeline(program, resolved, verify=verify)
    after = results[-1].after if results else program
    return to_module(after, (*records, *(result.record for result in results)))


def run_pipeline(
    program: Program,
    passes: Sequence[PassSpec] | PassSpec,
    *,
    example: Sequence[Any] | None = None,
    verify: bool = True,
) -> tuple[PassResult, ...]:
    """Run passes one after the other, each on what the last one made."""
    results: list[PassResult] = []
    for which in resolve_passes(passes):
        results.append(run_pass(which, program, example=example, verify=verify))
        program = results[-1].after
    return tuple(results)


def available_passes() -> dict[str, type[Pass]]:
    """Every pass class by name, in alphabetical order: fxopt's own, and those of entry points."""
    return dict(sorted(found_passes().usable.items()))


def broken_passes() -> tuple[BrokenPass, ...]:
    """Passes that installed packages announce and that cannot be used, with the reasons."""
    return found_passes().broken


def resolve_passes(passes: Sequence[PassSpec] | PassSpec) -> tuple[Pass, ...]:
    """Instances for instances, names and specs.

    Raises:
        PipelineSpecError: pointing at the character that is wrong.
    """
    given = [passes] if isinstance(passes, str) or not isinstance(passes, Sequence) else passes
    resolved: list[Pass] = []
    for item in given:
        if isinstance(item, str):
            resolved += parse_pipeline(item)
        elif isinstance(item, Pass) and not isinstance(item, type):
            resolved.append(item)
        else:
            raise PipelineSpecError(
                f"{_shown(item)} is no pass; give an instance, a name or a spec such as "
                f"'{next(iter(available_passes()))}'"
            )
    return tuple(resolved)


def _shown(item: Any) -> str:
    return f"the class {item.__name__}" if isinstance(item, type) else repr(item)


# ---- the grammar: name [ "{" [ key "=" value { "," key "=" value } ] "}" ] { "," ... } --------


@dataclass
class _Reader:
    text: str
    position: int = 0

    def fail(self, message: str, position: int | None = None) -> NoReturn:
        at = self.position if position is None else position
        line = "".join(" " if character.isspace() else character for character in self.text)
        raise PipelineSpecError(f"{message}\n  {line}\n  {' ' * at}^")

    def skip_space(self) -> None:
        while self.position < len(self.text) and self.text[self.position].isspace():
            self.position += 1

    def peek(self) -> str:
        self.skip_space()
        return self.text[self.position] if self.position < len(self.text) else ""

    def goes_on(self) -> bool:
        """Whether what stands after a comma here is a part of the value, not another option."""
        rest = self.text[self.position + 1 :]
        end = next((place for place, each in enumerate(rest) if each in ",{}="), len(rest))
        return self.peek() == "," and rest[end : end + 1] != "="

    def until(self, stops: str) -> str:
        self.skip_space()
        start = self.position
        while self.position < len(self.text) and self.text[self.position] not in stops:
            self.position += 1
        return self.text[start : self.position].strip()


def parse_pipeline(text: str) -> tuple[Pass, ...]:
    """The passes of a spec such as ``"fold_conv_bn,other{option=value}"``.

    Raises:
        PipelineSpecError: with the spec and a mark under the character that is wrong.
    """
    reader = _Reader(text)
    passes = [_parse_pass(reader)]
    while reader.peek() == ",":
        reader.position += 1
        passes.append(_parse_pass(reader))
    if reader.peek():
        reader.fail(f"unexpected '{reader.peek()}'; passes are separated by commas")
    return tuple(passes)


def _parse_pass(reader: _Reader) -> Pass:
    reader.skip_space()
    start = reader.position
    name = reader.until("{},=")
    found = found_passes()
    known = dict(sorted(found.usable.items()))
    if not name:
        reader.fail("a pass name is missing; there are " + ", ".join(known), start)
    if name not in known:
        for broken in found.broken:
            if broken.name == name:
                reader.fail(str(broken), start)
        reader.fail(f"unknown pass '{name}'; {_suggestion(name, known)}", start)
    options: dict[str, Any] = {}
    if reader.peek() == "{":
        _parse_options(reader, name, known[name], options)
    missing = [key for key in required_options(known[name]) if key not in options]
    if missing:
        reader.fail(f"pass '{name}' needs its option '{missing[0]}'", start)
    try:
        return known[name](**options)
    except (TypeError, ValueError) as error:
        reader.fail(f"pass '{name}': {error}", start)


def _parse_options(reader: _Reader, name: str, kind: type[Pass], options: dict[str, Any]) -> None:
    reader.position += 1
    if reader.peek() != "}":
        _parse_option(reader, name, kind, options)
        while reader.peek() == ",":
            reader.position += 1
            _parse_option(reader, name, kind, options)
    if reader.peek() != "}":
        reader.fail("'}' or ',' expected")
    reader.position += 1


def _parse_option(reader: _Reader, name: str, kind: type[Pass], options: dict[str, Any]) -> None:
    reader.skip_space()
    start = reader.position
    key = reader.until("{},=")
    types_by_name = option_types(kind)
    if not key:
        reader.fail("the name of an option is missing", start)
    if key not in types_by_name:
        suggestion = _suggestion(key, types_by_name)
        reader.fail(f"pass '{name}' has no option '{key}'; {suggestion}", start)
    if key in options:
        reader.fail(f"option '{key}' is given twice", start)
    if reader.peek() != "=":
        reader.fail(f"'=' expected after option '{key}'")
    reader.position += 1
    reader.skip_space()
    value_at = reader.position
    text = reader.until(",{}")
    while takes_list(types_by_name[key]) and reader.goes_on():
        reader.position += 1
        text += "," + reader.until(",{}")
    try:
        options[key] = parse_value(text, types_by_name[key])
    except ValueError:
        expected = type_text(types_by_name[key])
        reader.fail(f"option '{key}' of '{name}' takes {expected}, not '{text}'", value_at)
    except TypeError as error:
        reader.fail(f"option '{key}' of '{name}': {error}", value_at)


def _suggestion(word: str, known: Mapping[str, Any]) -> str:
    if not known:
        return "it has none"
    close = difflib.get_close_matches(word, known, 1)
    return f"did you mean '{close[0]}'?" if close else "there are " + ", ".join(known)
