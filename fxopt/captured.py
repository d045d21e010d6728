"""The module that users get: called as their own model is, guarded, with its history."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from fxopt.errors import CaptureError
from fxopt.graphs import assemble, copy_tree, graph_from_records, graph_to_records, share_tree
from fxopt.infer import META, MetaInterpreter, MetaTwins
from fxopt.program import ModeContract, Program, ValueType, tensor_types, type_of
from fxopt.results import PassRecord


class CapturedModule(fx.GraphModule):
    """A program as an ``nn.Module``.

    It takes the user's arguments and returns the user's structure, checks the guards on entry, and
    follows ``.train()`` and ``.eval()`` as the user's model does. Inside is a flat graph. It can be
    deep-copied and pickled.
    """

    facts: Mapping[str, Any]
    """The fields of its program, the graph module excepted."""
    records: tuple[PassRecord, ...]

    def recompile(self) -> Any:
        code = super().recompile()
        cls: Any = type(self)
        cls.flat_forward = cls.forward
        cls.forward = _guarded_forward
        return code

    def train(self, mode: bool = True) -> CapturedModule:
        """Set training or evaluation mode, as ``nn.Module.train``.

        Raises:
            CaptureError: the model's training is another graph than its evaluation.
        """
        contract = self.facts["modes"]
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
        result = _made(tree, copy.deepcopy(self.graph), self.facts, self.records)
        result.training = self.training
        memo[id(self)] = result
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        tree = share_tree(self)
        tree.training = self.training
        return _unpickled, (tree, graph_to_records(self.graph), self.facts, self.records)


def _guarded_forward(self: CapturedModule, *args: Any, **kwargs: Any) -> Any:
    interface = self.facts["interface"]
    tensors = interface.flatten(args, kwargs)
    self.facts["guards"].check(tensors)
    flat_forward: Any = self.flat_forward
    return interface.unflatten(flat_forward(*tensors))


def _made(
    tree: nn.Module, graph: fx.Graph, facts: Mapping[str, Any], records: Sequence[PassRecord]
) -> CapturedModule:
    result = assemble(tree, graph, CapturedModule)
    result.facts, result.records = facts, tuple(records)
    return result


def _unpickled(
    tree: nn.Module, graph: Any, facts: Mapping[str, Any], records: Sequence[PassRecord]
) -> CapturedModule:
    result = _made(tree, graph_from_records(graph), facts, records)
    result.training = tree.training
    return result


def apply_flags(module: nn.Module, flags: Mapping[str, bool]) -> None:
    """Set ``training`` of the modules at these paths, where they still exist."""
    members = dict(module.named_modules(remove_duplicate=False))
    for path, flag in flags.items():
        if path in members:
            members[path].training = flag


def to_module(program: Program, records: Sequence[PassRecord] = ()) -> CapturedModule:
    """A fresh module that computes ``program``; its parameters are its own."""
    facts = {k: v for k, v in vars(program).items() if k != "graph_module"}
    module = program.graph_module
    with torch.inference_mode(False):
        result = _made(copy_tree(module, {}), copy.deepcopy(module.graph), facts, records)
    contract = program.modes
    if contract.training and not contract.eval_only:
        result.train()
    else:
        result.eval()
    apply_flags(result, contract.initial)
    return result


def program_of(module: nn.Module) -> Program | None:
    """The program that a module returned by fxopt computes now, or None for any other module.

    The program has copies of the module's present parameters, in their present dtype, and the
    module's present mode.
    """
    if not isinstance(module, CapturedModule):
        return None
    tree = copy_tree(module, {})
    graph_module = assemble(tree, copy.deepcopy(module.graph), fx.GraphModule)
    program = Program(graph_module=graph_module.eval(), **module.facts)
    return replace(program, modes=_present_modes(module), types=_present_types(program))


def as_program(
    model: nn.Module | Program,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> Program:
    """The program of a model, captured if need be.

    A model is captured with the example inputs (as :func:`fxopt.capture` does). A module that
    fxopt returned has its program with it, and is captured again only if example inputs are given.

    Raises:
        CaptureError: the model cannot be captured.
        TypeError: example inputs are given with a program, which has its own.
    """
    given = example_inputs is not None or example_kwargs is not None
    if not isinstance(model, Program):
        from fxopt.capture import capture

        carried = None if given else program_of(model)
        return carried or capture(model, example_inputs, example_kwargs)
    if given:
        raise TypeError("a Program has its own example inputs; leave example_inputs out")
    return model


def _present_modes(module: CapturedModule) -> ModeContract:
    contract: ModeContract = module.facts["modes"]
    follows = {path: flags[module.training] for path, flags in contract.fixed.items()}
    initial = {
        path: member.training
        for path, member in module.named_modules(remove_duplicate=False)
        if member.training != follows.get(path, module.training)
    }
    return replace(contract, training=module.training, initial=initial)


def _present_types(program: Program) -> Mapping[str, ValueType]:
    """Types after a conversion of the module (``.half()``): its inputs are then converted too."""
    for node in program.nodes:
        layer = program.module(node)
        weights = () if layer is None else layer.parameters()
        now = next((p.dtype for p in weights if p.is_floating_point()), None)
        was = next((t.dtype for t in tensor_types(program.types.get(node.name))), None)
        if now is not None and was is not None and was.is_floating_point:
            break
    else:
        return program.types
    if now == was:
        return program.types
    inputs = [
        torch.empty(t.shape, dtype=now if t.dtype == was else t.dtype, device=META)
        for t in program.inputs().values()
    ]
    interpreter = MetaInterpreter(program.graph_module, MetaTwins())
    interpreter.run(*inputs)
    return {n.name: type_of(v) for n, v in interpreter.env.items() if n.name in program.types}


def history(module: nn.Module) -> tuple[PassRecord, ...]:
    """What each pass did to make ``module``, first pass first; empty for any other module."""
    return module.records if isinstance(module, CapturedModule) else ()
