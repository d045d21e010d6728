"""An exported program as a module that can be captured, for evaluation only.

It calls the functions that a user would write, inside the modules that they come from and on the
user's lines, with the tensors at their own paths; capture then sees a model like any other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxopt.graphs import Operand, member
from fxopt.tracing.trace import Untraceable


class Scope(nn.Module):
    """A module of the exported model: it holds its tensors, and its operators run in its name."""

    def forward(self, run: Callable[[], Any]) -> tuple[Any, Exception | None]:
        try:
            return run(), None
        except Exception as error:
            # Capture would keep the innermost module that raises as a whole, called as it is; a
            # scope cannot be called so. The root raises it.
            return None, error


@dataclass(frozen=True)
class Step:
    """One call: of what (a function, or the path of a layer), in which scope, on whose line."""

    name: str
    scope: str
    called: Callable[..., Any] | str
    args: Any
    kwargs: Any
    line: Callable[..., Any]


@dataclass(frozen=True)
class Recipe:
    """How the exported program is called, and what it does, in order."""

    signature: inspect.Signature
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    check: Callable[..., None]
    inputs: tuple[str, ...]
    tensors: Mapping[str, str]
    steps: tuple[Step, ...]
    outputs: tuple[Any, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> Recipe:
        return self

    def follow(self, root: nn.Module, args: Any, kwargs: Any) -> Any:
        """The result, in the structure of the exported model's."""
        flat = self._flat(args, kwargs)
        self.check(*flat)
        values = dict(zip(self.inputs, flat, strict=True))
        values |= {name: member(root, target) for name, target in self.tensors.items()}

        def read(tree: Any) -> Any:
            if isinstance(tree, (tuple, list)):
                return tuple(map(read, tree))
            if isinstance(tree, dict):
                return {key: read(value) for key, value in tree.items()}
            return values[tree.name] if isinstance(tree, Operand) else tree

        for step in self.steps:
            values[step.name] = _run(root, step, read(step.args), read(step.kwargs))
        return pytree.tree_unflatten([read(output) for output in self.outputs], self.out_spec)

    def _flat(self, args: Any, kwargs: Any) -> list[Any]:
        values = list(self.signature.bind(*args, **kwargs).arguments.values())
        positional, named = self.in_spec.child(0), self.in_spec.child(1)
        count = positional.num_children
        given = (tuple(values[:count]), dict(zip(named.context, values[count:], strict=True)))
        flat, spec = pytree.tree_flatten(given)
        if spec != self.in_spec:
            raise TypeError("the arguments have another structure than the exported program takes")
        return flat


def _run(root: nn.Module, step: Step, args: Any, kwargs: Any) -> Any:
    if isinstance(step.called, str):
        return step.line(root.get_submodule(step.called), args, kwargs)
    if step.scope == "":
        return step.line(step.called, args, kwargs)
    scope = root.get_submodule(step.scope)
    result, error = scope(lambda: step.line(step.called, args, kwargs))
    if error is not None:
        raise error
    return result


class ExportedModule(Scope):
    """The root, of a class of its own that bears the exported model's name and signature."""

    example_input_array: tuple[Any, ...]
    _recipe: Recipe

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Conversions (``.half()``) convert the example as well."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        example = pytree.tree_map_only(torch.Tensor, fn, self.example_input_array)
        self.example_input_array = example
        return self


def class_of(name: str, signature: inspect.Signature) -> type[ExportedModule]:
    """The class of a root called ``name``, whose forward has this signature."""

    def forward(self: ExportedModule, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            raise Untraceable("torch.export keeps one mode, and this is the evaluation")
        return self._recipe.follow(self, args, kwargs)

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    parameters = [p.replace(kind=p.POSITIONAL_OR_KEYWORD) for p in signature.parameters.values()]
    forward.__signature__ = inspect.Signature([own, *parameters])  # type: ignore[attr-defined]
    return type(name, (ExportedModule,), {"forward": forward})
