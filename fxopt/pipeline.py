"""``transform`` and the textual pipeline spec: ``fold_conv_bn,other{option=value,on=true}``."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import enum
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import fx, nn

from fxopt.capture import capture
from fxopt.captured import history, program_of, to_module
from fxopt.errors import PipelineSpecError
from fxopt.passes import BUILT_IN
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
    """Every pass class by name, in alphabetical order."""
    return {kind.name: kind for kind in sorted(BUILT_IN, key=lambda kind: kind.name)}


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


# ---- the spec's grammar: name [ "{" [ key "=" value { "," key "=" value } ] "}" ] { "," ... } --


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
    known = available_passes()
    if not name:
        reader.fail("a pass name is missing; there are " + ", ".join(known), start)
    if name not in known:
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
    try:
        options[key] = parse_value(text, types_by_name[key])
    except ValueError:
        expected = type_text(types_by_name[key])
        reader.fail(f"option '{key}' of '{name}' takes {expected}, not '{text}'", value_at)


def _suggestion(word: str, known: Mapping[str, Any]) -> str:
    if not known:
        return "it has none"
    close = difflib.get_close_matches(word, known, 1)
    return f"did you mean '{close[0]}'?" if close else "there are " + ", ".join(known)


def option_types(kind: type[Pass]) -> dict[str, Any]:
    """Type of every option of a pass class by name."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in _options(kind)}


def required_options(kind: type[Pass]) -> tuple[str, ...]:
    """The options of a pass class that have no default."""
    no = dataclasses.MISSING
    return tuple(f.name for f in _options(kind) if f.default is no and f.default_factory is no)


def _options(kind: type[Pass]) -> list[dataclasses.Field[Any]]:
    if not dataclasses.is_dataclass(kind):
        return []
    return [field for field in dataclasses.fields(kind) if field.init]


def parse_value(text: str, kind: Any) -> Any:
    """``text`` as a value of an option's type.

    Types: ``bool``, ``int``, ``float``, ``str``, an ``Enum`` (by value), a ``Literal``, any class
    that is made from a text, and unions of these with each other and with ``None``.

    Raises:
        ValueError: it is none.
    """
    alternatives = typing.get_args(kind)
    if _is_union(kind):
        return _first_that_takes(text, alternatives)
    if typing.get_origin(kind) is typing.Literal:
        return _choice(text, {str(a): a for a in alternatives})
    if typing.get_origin(kind) is not None:
        raise TypeError(f"an option cannot be of type {kind}; make it a class with a text form")
    if kind is types.NoneType:
        return _choice(text.lower(), {"none": None})
    if kind is bool:
        return _choice(text.lower(), {"true": True, "false": False})
    if issubclass(kind, enum.Enum):
        return _choice(text, {str(member.value): member for member in kind})
    return kind(text)


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _choice(text: str, choices: Mapping[str, Any]) -> Any:
    if text not in choices:
        raise ValueError(text)
    return choices[text]


def _first_that_takes(text: str, alternatives: Sequence[Any]) -> Any:
    # None first: a str takes every text
    for kind in sorted(alternatives, key=lambda a: a is not types.NoneType):
        with contextlib.suppress(ValueError):
            return parse_value(text, kind)
    raise ValueError(text)


def type_text(kind: Any) -> str:
    """An option's type as the user reads it: ``int``, ``true|false``, ``keep|drop``."""
    alternatives = typing.get_args(kind)
    if _is_union(kind):
        return "|".join(map(type_text, alternatives))
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(map(str, alternatives))
    if kind is types.NoneType:
        return "none"
    if kind is bool:
        return "true|false"
    if issubclass(kind, enum.Enum):
        return "|".join(str(member.value) for member in kind)
    return str(kind.__name__)
