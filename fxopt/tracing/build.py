"""Two traces of a model become its program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from fxopt.errors import CaptureError
from fxopt.graphs import assemble
from fxopt.guards import Guards, Violation
from fxopt.infer import module_to_meta
from fxopt.interface import Call, Interface, names_of_leaves
from fxopt.program import ModeContract, Program, has_effect
from fxopt.tracing.both import Traces
from fxopt.tracing.lift import Lifting, baked_flag, build_tree, lift
from fxopt.tracing.trace import Trace


def build_program(model: nn.Module, private: nn.Module, call: Call, traces: Traces) -> Program:
    """The program of ``traces``; ``private`` is the copy of ``model`` whose tensors it takes."""
    trace = traces.evaluation
    initial = {path: m.training for path, m in private.named_modules(remove_duplicate=False)}
    private.eval()
    lifting = lift(private, trace, traces.training)
    line = baked_flag(lifting)
    if line:
        reason = f"a functional norm at {line} follows the mode and fits no standard layer"
        traces = replace(traces, training=None, eval_only=reason)
    tree = build_tree(lifting, traces.leaves)
    _check_names(tree)
    graph_module = assemble(tree, trace.graph, fx.GraphModule)
    guards = _guards(trace, call, graph_module)
    _remove_dead(graph_module)
    graph_module.recompile()
    graph_module.eval()
    names = {node.name for node in trace.graph.nodes}
    interface = Interface(
        call.signature, call.in_spec, call.leaves, trace.out_spec,
        names_of_leaves(_unflatten(trace), "output"),
    )  # fmt: skip
    return Program(
        graph_module=graph_module,
        types={n: t for n, t in trace.types.items() if n in names},
        origins={n: o for n, o in trace.origins.items() if n in names},
        interface=interface,
        guards=guards,
        modes=_contract(model, lifting, traces, initial),
        opaque={
            n.name: traces.opaque[n.target]
            for n in trace.graph.nodes
            if n.op == "call_module" and n.target in traces.opaque
        },
        notes=_notes(trace),
        name=type(model).__name__,
    ).check()


def _check_names(tree: nn.Module) -> None:
    """Refuse members whose names a graph module has for itself."""
    taken = {*dir(fx.GraphModule({}, fx.Graph())), "facts", "records", "flat_forward"}
    for name in (*tree._modules, *tree._parameters, *tree._buffers):
        if name in taken - set(dir(nn.Module())):
            raise CaptureError(
                f"the model's member '{name}' has a name that graph modules use for themselves; "
                "rename it, or put the model into a module that calls it"
            )


def _unflatten(trace: Trace) -> Any:
    return torch.utils._pytree.tree_unflatten(list(range(len(trace.out_leaves))), trace.out_spec)


def _remove_dead(graph_module: fx.GraphModule) -> None:
    for node in reversed(list(graph_module.graph.nodes)):
        if not node.users and not has_effect(node, graph_module):
            graph_module.graph.erase_node(node)


def _guards(trace: Trace, call: Call, graph_module: fx.GraphModule) -> Guards:
    """The guards, with a probe of the whole trace: a size may be of a value that is not used."""
    read = trace.dtype_was_read
    guarded = trace.guards or trace.layouts
    return Guards(
        shapes=tuple(trace.guards.values()),
        ranks=tuple(t.dim() for t in call.tensors),
        dtypes=tuple(t.dtype if read else None for t in call.tensors),
        devices=tuple(t.device if trace.device_was_read else None for t in call.tensors),
        texts=tuple(leaf.text for leaf in call.leaves if leaf.is_tensor),
        probe=module_to_meta(graph_module) if guarded else None,  # type: ignore[arg-type]
        sizes=trace.sizes,
        example=tuple(tuple(t.shape) for t in call.tensors),
        layouts=tuple(trace.layouts),
    )


def _contract(
    model: nn.Module, lifting: Lifting, traces: Traces, initial: Mapping[str, bool]
) -> ModeContract:
    fixed = {p: flags for p, flags in lifting.flags.items() if flags != (False, True)}
    training = model.training
    deviating = {}
    for path in lifting.flags:
        given = initial.get(path, training)
        follows = fixed.get(path, (False, True))[training]
        if given != follows:
            deviating[path] = given
    return ModeContract(fixed, traces.eval_only, training, deviating)


def with_batch_note(program: Program) -> Program:
    """``program`` with a note for the report if a decision fixes its batch size."""
    types = program.inputs().values()
    shapes = [(t.shape[0] + 1, *t.shape[1:]) if t.shape else () for t in types]
    larger = [
        torch.empty(shape, dtype=t.dtype, device="meta")
        for shape, t in zip(shapes, types, strict=True)
    ]
    for broken in program.guards.violations(larger):
        if isinstance(broken, Violation):
            note = f"the batch size is fixed: {broken.guard}"
            return replace(program, notes=(*program.notes, note))
    return program


def _notes(trace: Trace) -> tuple[str, ...]:
    overwritten = [
        f"the model's forward overwrites its input '{name}' ({line}); the captured module does not"
        for name, line in trace.overwritten_inputs.items()
    ]
    return (*overwritten, *(f"{note} ({line})" for note, line in trace.notes.items()))
