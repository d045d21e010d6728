"""A user's module and example inputs become a :class:`~fxopt.program.Program`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from fxopt.captured import program_of
from fxopt.errors import CaptureError, GuardError, InvalidProgramError
from fxopt.infer import MetaInterpreter, MetaTwins, to_meta
from fxopt.interface import Call
from fxopt.isolation import isolated
from fxopt.program import Program, type_of
from fxopt.tracing.both import trace_both
from fxopt.tracing.build import build_program, with_batch_note
from fxopt.tracing.check import check_capture
from fxopt.tracing.copies import private_copy
from fxopt.tracing.examples import example_call
from fxopt.tracing.gradients import check_parameters


def capture(
    model: nn.Module,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    verify: bool = True,
) -> Program:
    """Capture ``model`` as a program in canonical form.

    Args:
        model: any module; it, its mode and the random state stay as they are.
        example_inputs: a tensor, or a tuple of positional arguments. May be left out where the
            model says what it takes; else ``(1, C, 224, 224)`` is assumed with a warning, C being
            the channels of its first convolution.
        example_kwargs: arguments by keyword. Arguments that are not tensors are fixed: calling the
            captured module with others raises.
        verify: compare the captured graph with the model, in eval mode and, where it has one, in
            train mode under the same seed.

    Raises:
        CaptureError: the forward cannot be followed, the inputs do not fit, or the comparison
            failed; the message names the module, the line and the remedy.
    """
    present = program_of(model)
    if present is not None:
        return _for_example(present, example_inputs, dict(example_kwargs or {}))
    call = example_call(model, example_inputs, dict(example_kwargs or {}))
    check_parameters(model)
    with isolated():
        private = private_copy(model)
        versions = _versions(private)
        traces = trace_both(private, call)
        if _versions(private) != versions:
            raise InvalidProgramError("tracing wrote to the model's tensors")
        program = with_batch_note(build_program(model, private, call, traces))
        if _on_meta(private, call):
            note = "the model is on the meta device: its values were not compared"
            return replace(program, notes=(*program.notes, note))
        if verify:
            check_capture(program, private, call, model)
    return program


def _for_example(program: Program, inputs: Any, kwargs: dict[str, Any]) -> Program:
    """``program``, which a captured module computes, with the types that another example has."""
    if inputs is None and not kwargs:
        return program
    args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    try:
        tensors = program.interface.flatten(() if inputs is None else args, kwargs)
        program.guards.check(tensors)
    except (GuardError, TypeError) as error:
        raise CaptureError(
            f"{program.name} was captured already, and the example is another call: {error}"
        ) from error
    interpreter = MetaInterpreter(program.graph_module, MetaTwins())
    interpreter.run(*map(to_meta, tensors))
    found = {n.name: type_of(v) for n, v in interpreter.env.items() if n.name in program.types}
    return replace(program, types=found)


def _versions(model: nn.Module) -> list[int]:
    return [tensor._version for tensor in (*model.parameters(), *model.buffers())]


def _on_meta(model: nn.Module, call: Call) -> bool:
    return any(t.is_meta for t in (*model.parameters(), *model.buffers(), *call.tensors))
