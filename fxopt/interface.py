"""How the user calls a model: arguments to flat tensors, flat outputs to the user's structure."""

from __future__ import annotations

import inspect
import keyword
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxopt import structures
from fxopt.errors import CaptureError, GuardError


@dataclass(frozen=True)
class Leaf:
    """One leaf of the call's arguments: a tensor input, or a constant that is guarded.

    ``name`` is a Python identifier for a tensor; ``text`` is how the user would write it
    (``batch['image']``).
    """

    name: str
    text: str
    is_tensor: bool
    constant: Any = None


@dataclass(frozen=True)
class Interface:
    """The call's signature, the leaves of its arguments and the structure of its result.

    Flat outputs are the result's leaves in pytree order; ``out_constants`` are those that are not
    tensors, by position.
    """

    signature: inspect.Signature
    in_spec: pytree.TreeSpec
    leaves: tuple[Leaf, ...]
    out_spec: pytree.TreeSpec
    output_names: tuple[str, ...]

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(leaf.name for leaf in self.leaves if leaf.is_tensor)

    def flatten(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """The tensor leaves of a call.

        Raises:
            TypeError: the arguments do not fit the signature, as for the user's own forward.
            GuardError: an argument that is not a tensor, or the presence of an optional one,
                differs from what the model was captured with.
        """
        values, spec = pytree.tree_flatten(_bound_arguments(self.signature, args, kwargs))
        if spec != self.in_spec:
            raise GuardError(
                "the arguments have another structure than the captured ones: "
                f"captured {_spec_text(self.in_spec)}, now {_spec_text(spec)}; capture the model "
                "again with arguments like these"
            )
        for leaf, value in zip(self.leaves, values, strict=True):
            self._check_leaf(leaf, value)
        return [v for leaf, v in zip(self.leaves, values, strict=True) if leaf.is_tensor]

    @staticmethod
    def _check_leaf(leaf: Leaf, value: Any) -> None:
        if leaf.is_tensor:
            if not isinstance(value, torch.Tensor):
                raise GuardError(
                    f"'{leaf.text}' was a tensor when the model was captured and is {value!r} now; "
                    "capture the model again with arguments like these"
                )
        elif isinstance(value, torch.Tensor) or not same_constant(value, leaf.constant):
            shown = "a tensor" if isinstance(value, torch.Tensor) else repr(value)
            raise GuardError(
                f"the model was captured with {leaf.text}={leaf.constant!r} and is called with "
                f"{leaf.text}={shown}; capture it again with that argument"
            )

    def unflatten(self, outputs: Sequence[Any]) -> Any:
        """The user's own result structure."""
        return structures.unflatten(outputs, self.out_spec)


def same_constant(left: Any, right: Any) -> bool:
    """Whether two arguments that are not tensors would lead Python the same way."""
    if left is right:
        return True
    try:
        both_nan = left != left and right != right
        return type(left) is type(right) and bool(left == right or both_nan)
    except Exception:
        return False


def signature_of(forward: Callable[..., Any]) -> inspect.Signature:
    """The signature of ``forward``, without annotations (they may not be picklable)."""
    signature = inspect.signature(forward)
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in signature.parameters.values()
    ]
    return inspect.Signature(parameters)


def _bound_arguments(
    signature: inspect.Signature, args: Sequence[Any], kwargs: dict[str, Any]
) -> dict[str, Any]:
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def _spec_text(spec: pytree.TreeSpec) -> str:
    return str(pytree.tree_unflatten(["*"] * spec.num_leaves, spec)).replace("'*'", "*")


def identifier(text: str) -> str:
    """``text`` as a Python identifier: ``batch['image']`` becomes ``batch_image``."""
    name = re.sub(r"\W+", "_", text).strip("_") or "value"
    taken = keyword.iskeyword(name) or name in _NAMES_IN_CODE
    return f"_{name}" if name[0].isdigit() or taken else name


_NAMES_IN_CODE = frozenset({"self", "torch"})
"""What the code of a graph module calls its own module and its library."""


def _key_text(key: Any) -> str:
    if isinstance(key, pytree.SequenceKey):
        return f"[{key.idx}]"
    if isinstance(key, pytree.MappingKey):
        return f"[{key.key!r}]"
    return f".{key.name}" if isinstance(key, pytree.GetAttrKey) else str(key)


def _paths(tree: Any) -> list[tuple[Any, ...]]:
    """The way to every leaf; its number where a class's parts have no names."""
    try:
        return [path for path, _ in pytree.tree_flatten_with_path(tree)[0]]
    except ValueError:
        return [(pytree.SequenceKey(index),) for index in range(len(pytree.tree_leaves(tree)))]


def names_of_leaves(tree: Any, root: str) -> tuple[str, ...]:
    """A distinct identifier for every leaf of ``tree``."""
    names: list[str] = []
    for path in _paths(tree):
        name = base = identifier(root + "".join(map(_key_text, path)))
        count = 1
        while name in names:
            name, count = f"{base}_{count}", count + 1
        names.append(name)
    return tuple(names)


@dataclass(frozen=True)
class Call:
    """An example call, bound to the model's signature: its leaves by name, in order."""

    signature: inspect.Signature
    in_spec: pytree.TreeSpec
    leaves: tuple[Leaf, ...]
    values: tuple[Any, ...]

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [v for leaf, v in zip(self.leaves, self.values, strict=True) if leaf.is_tensor]

    def arguments(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` of this call with its tensors replaced."""
        replacements = iter(tensors)
        values = [
            next(replacements) if leaf.is_tensor else value
            for leaf, value in zip(self.leaves, self.values, strict=True)
        ]
        bound = inspect.BoundArguments(
            self.signature,
            pytree.tree_unflatten(values, self.in_spec),  # type: ignore[arg-type]
        )
        return bound.args, bound.kwargs


def bind_call(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Call:
    """The example call of ``model``.

    Raises:
        CaptureError: the example does not fit the signature, or holds no tensor.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            f"{type(model).__name__} is TorchScript, whose Python is gone; capture the module that "
            "it was made of"
        )
    signature = signature_of(model.forward)
    try:
        arguments = _bound_arguments(signature, args, kwargs)
    except TypeError as error:
        raise CaptureError(
            f"the example inputs do not fit {type(model).__name__}.forward{signature}: {error}; "
            "give example_inputs (positional) and example_kwargs (by keyword) to fit"
        ) from None
    names = names_of_leaves_of_arguments(arguments)
    values, in_spec = pytree.tree_flatten(arguments)
    leaves = tuple(
        Leaf(name, text, isinstance(value, torch.Tensor), _constant(value))
        for (name, text), value in zip(names, values, strict=True)
    )
    for leaf, value in zip(leaves, values, strict=True):
        _check_argument(leaf, value)
    if not any(leaf.is_tensor for leaf in leaves):
        raise CaptureError("the example inputs hold no tensor; give example_inputs with one")
    return Call(signature, in_spec, leaves, tuple(values))


def _check_argument(leaf: Leaf, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided:
            raise CaptureError(f"'{leaf.text}' is {value.layout}; give a dense tensor")
        return
    members = getattr(value, "__dict__", {}).values() if not isinstance(value, type) else ()
    if any(isinstance(item, torch.Tensor) for item in pytree.tree_leaves(list(members))):
        raise CaptureError(
            f"'{leaf.text}' is a {type(value).__name__} that holds tensors, which capture cannot "
            "follow; pass them in a tuple or a dict, or as arguments of their own"
        )


def _constant(value: Any) -> Any:
    return None if isinstance(value, torch.Tensor) else value


def names_of_leaves_of_arguments(arguments: dict[str, Any]) -> list[tuple[str, str]]:
    """``(identifier, user's text)`` of every leaf of the call's arguments."""
    result: list[tuple[str, str]] = []
    for argument, tree in arguments.items():
        names = names_of_leaves(tree, argument)
        result += [
            (name, argument + "".join(map(_key_text, path)))
            for name, path in zip(names, _paths(tree), strict=True)
        ]
    return result
