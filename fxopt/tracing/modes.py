"""What differs between a model's training and evaluation, found by tracing both.

A difference in the ``training`` flag of a dropout or a norm is what those layers are for. A small
submodule without parameters that does other things in training (stochastic depth) is kept whole,
as a layer with a mode of its own. Any other difference means that the two modes are two graphs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxopt.tracing.trace import Trace

TRAINING_ARGUMENT = {
    F.batch_norm: 5, F.dropout: 2, F.dropout1d: 2, F.dropout2d: 2, F.dropout3d: 2,
    F.alpha_dropout: 2, F.feature_alpha_dropout: 2,
}  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """The first place where the traces part: the nodes there, and the user's modules and line."""

    evaluation: fx.Node | None
    training: fx.Node | None
    paths: tuple[str, ...]
    line: str

    def __str__(self) -> str:
        def what(node: fx.Node | None) -> str:
            if node is None:
                return "nothing"
            return str(getattr(node.target, "__name__", node.target))

        path = next((p for p in self.paths if p), "")
        where = f"in '{path}' " if path else ""
        return (
            f"{where}at {self.line}: training runs {what(self.training)} where evaluation runs "
            f"{what(self.evaluation)}"
        )


def first_difference(evaluation: Trace, training: Trace) -> Difference | None:
    """Where the two traces part by more than ``training`` flags, or None."""
    left, right = list(evaluation.graph.nodes), list(training.graph.nodes)
    twin: dict[fx.Node, fx.Node] = {}
    for index in range(max(len(left), len(right))):
        a = left[index] if index < len(left) else None
        b = right[index] if index < len(right) else None
        if a is None or b is None or not _same(a, b, twin, evaluation, training):
            origins = [t.origins.get(n.name) for t, n in ((training, b), (evaluation, a)) if n]
            paths = tuple(origin.path for origin in origins if origin)
            return Difference(a, b, paths, next((o.line for o in origins if o and o.line), ""))
        twin[a] = b
    return None


def _same(
    a: fx.Node, b: fx.Node, twin: dict[fx.Node, fx.Node], evaluation: Trace, training: Trace
) -> bool:
    if a.op != b.op:
        return False
    if a.target in evaluation.modules and b.target in training.modules:
        same_target = _same_layer(evaluation.modules[a.target], training.modules[b.target])  # type: ignore[index]
    else:
        same_target = a.target == b.target
    constants = evaluation.constants.get(str(a.target)), training.constants.get(str(b.target))
    filled = _only_its_shape(a) and _only_its_shape(b)
    constant = a.op == "get_attr" and constants != (None, None)
    if constant and not filled and not _same_constant(*constants):
        return False
    if a.op == "output" and (evaluation.out_spec != training.out_spec):
        return False
    flag = TRAINING_ARGUMENT.get(a.target) if callable(a.target) else None  # type: ignore[arg-type]
    args = tuple(a.args)
    if flag is not None and len(b.args) == len(args):
        args = (*args[:flag], b.args[flag], *args[flag + 1 :])
    mapped = fx.node.map_arg((args, a.kwargs), lambda node: twin.get(node, node))
    return same_target and mapped == (tuple(b.args), b.kwargs)


def _same_constant(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a is b or torch.equal(a, b)


def _only_its_shape(node: fx.Node) -> bool:
    """Whether nobody reads the values of ``node``: memory that was filled after it was made."""
    return all(user.target in (torch.zeros_like, torch.full_like) for user in node.users)


def _same_layer(a: nn.Module, b: nn.Module) -> bool:
    return type(a) is type(b) and a.extra_repr() == b.extra_repr()


def layers_with_a_mode(
    model: nn.Module, difference: Difference, evaluation: Trace, training: Trace
) -> dict[str, str]:
    """Submodules to be kept whole because of ``difference``, by path with the reason; may be empty.

    They have no parameters and leave another number of operators in each mode; all of one class
    are found at once.
    """
    found: dict[str, str] = {}
    for path in _with_ancestors(difference.paths):
        module = model.get_submodule(path)
        if (
            path
            and not any(True for _ in module.parameters())
            and _differs(path, evaluation, training)
        ):
            for other, candidate in model.named_modules(remove_duplicate=False):
                if type(candidate) is type(module) and _differs(other, evaluation, training):
                    found[other] = "it acts in training only"
            break
    return found


def _differs(path: str, evaluation: Trace, training: Trace) -> bool:
    return evaluation.calls.get(path) != training.calls.get(path)


def _with_ancestors(paths: tuple[str, ...]) -> Iterator[str]:
    for path in paths:
        while path:
            yield path
            path = path.rpartition(".")[0]


def flags_of(evaluation: Trace, training: Trace | None, node: fx.Node) -> tuple[bool, bool]:
    """The ``training`` argument of a functional norm or dropout in eval and in train mode."""
    position = TRAINING_ARGUMENT[node.target]  # type: ignore[index]
    in_eval: Any = node.args[position]
    if training is None:
        return bool(in_eval), True
    twin = next(n for n in training.graph.nodes if n.name == node.name)
    return bool(in_eval), bool(twin.args[position])
