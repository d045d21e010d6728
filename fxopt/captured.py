"""The module that users get: called as their own model is, guarded, with its history."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import fx, nn

from fxopt.errors import CaptureError
from fxopt.interface import Interface
from fxopt.program import ModeContract, Program
from fxopt.results import PassRecord


Kind = TypeVar("Kind", bound=fx.GraphModule)


class CapturedModule(fx.GraphModule):
    """A program as an ``nn.Module``.

    It takes the user's arguments and returns the user's structure, checks the guards on entry, and
    follows ``.train()`` and ``.eval()`` as the user's model does. Inside is a flat graph.
    """

    program: Program
    records: tuple[PassRecord, ...]

    def recompile(self) -> Any:
        code = super().recompile()
        cls = type(self)
        cls.flat_forward = cls.forward
        cls.forward = _guarded_forward
        return code

    def train(self, mode: bool = True) -> CapturedModule:
        """Set training or evaluation mode, as ``nn.Module.train``.

        Raises:
            CaptureError: the model's training is another graph than its evaluation.
        """
        contract = self.program.modes
        if mode and contract.eval_only:
            raise CaptureError(
                "this program is for evaluation only, because the model's training differs "
                f"({contract.eval_only}); train the original model and transform it again"
            )
        super().train(mode)
        apply_flags(self, {path: flags[mode] for path, flags in contract.fixed.items()})
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedModule:
        tree = copy_tree(self, memo)
        result = assemble(tree, copy.deepcopy(self.graph), CapturedModule)
        memo[id(self)] = result
        result.program, result.records = self.program, self.records
        result.training = self.training
        return result


def _guarded_forward(self: CapturedModule, *args: Any, **kwargs: Any) -> Any:
    interface: Interface = self.program.interface
    tensors = interface.flatten(args, kwargs)
    self.program.guards.check(tensors)
    return interface.unflatten(self.flat_forward(*tensors))


def apply_flags(module: nn.Module, flags: dict[str, bool]) -> None:
    """Set ``training`` of the modules at these paths, where they still exist."""
    members = dict(module.named_modules(remove_duplicate=False))
    for path, flag in flags.items():
        if path in members:
            members[path].training = flag


def copy_tree(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy of the members of ``module`` (ties kept), without its graph."""
    tree = nn.Module()
    for members in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
        setattr(tree, members, copy.deepcopy(getattr(module, members), memo))
    return tree


def assemble(tree: nn.Module, graph: fx.Graph, kind: type[Kind]) -> Kind:
    """A graph module over all of ``tree``, also the members that ``graph`` does not use."""
    result = kind({}, fx.Graph())
    for members in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
        setattr(result, members, getattr(tree, members))
    result.graph = graph
    return result


def to_module(program: Program, records: Sequence[PassRecord] = ()) -> CapturedModule:
    """A fresh module that computes ``program``; its parameters are its own."""
    tree = copy_tree(program.graph_module, {})
    result = assemble(tree, copy.deepcopy(program.graph_module.graph), CapturedModule)
    result.program, result.records = program, tuple(records)
    contract: ModeContract = program.modes
    if contract.training and not contract.eval_only:
        result.train()
    else:
        result.eval()
    apply_flags(result, dict(contract.initial))
    return result


def program_of(module: nn.Module) -> Program | None:
    """The program that a module returned by fxopt was made of, or None for any other module."""
    return module.program if isinstance(module, CapturedModule) else None


def history(module: nn.Module) -> tuple[PassRecord, ...]:
    """What each pass did to make ``module``, first pass first; empty for any other module."""
    return module.records if isinstance(module, CapturedModule) else ()
