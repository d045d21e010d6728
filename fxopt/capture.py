"""A user's module and example inputs become a :class:`~fxopt.program.Program`."""

from __future__ import annotations

import contextlib
import keyword
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from fxopt.tracing import canonical
from fxopt.tracing.check import check_capture
from fxopt.graphs import assemble
from fxopt.tracing.copies import private_copy, sharing_copy
from fxopt.errors import CaptureError
from fxopt.tracing.examples import example_call
from fxopt.guards import Guards, Violation
from fxopt.infer import module_to_meta
from fxopt.interface import Call, Interface, names_of_leaves
from fxopt.isolation import isolated
from fxopt.tracing.lift import Lifting, baked_flag, build_tree, lift
from fxopt.tracing.modes import first_difference, layers_with_a_mode
from fxopt.program import ModeContract, Program, has_effect
from fxopt.tracing.tracer import Tracer
from fxopt.tracing.writer import Trace, Untraceable


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
    call = example_call(model, example_inputs, dict(example_kwargs or {}))
    with isolated():
        private = private_copy(model)
        traces = _trace_both(private, call)
        program = _with_batch_note(_program(model, private, call, traces))
        if _on_meta(private, call):
            note = "the model is on the meta device: its values were not compared"
            return replace(program, notes=(*program.notes, note))
        if verify:
            check_capture(program, private, call)
    return program


def _on_meta(model: nn.Module, call: Call) -> bool:
    return any(t.is_meta for t in (*model.parameters(), *model.buffers(), *call.tensors))


@dataclass(frozen=True)
class _Traces:
    evaluation: Trace
    training: Trace | None
    eval_only: str
    leaves: Mapping[str, str]
    opaque: Mapping[str, str]


def _trace_both(private: nn.Module, call: Call) -> _Traces:
    """Trace in eval and in train mode; modules that cannot be traced become leaves, and again."""
    leaves: dict[str, str] = {}
    opaque: dict[str, str] = {}
    while True:
        try:
            evaluation = _trace(private, call, leaves, training=False)
        except Untraceable as error:
            path = _innermost(error, leaves)
            if path is None:
                raise _refusal(private, error) from error
            leaves[path] = opaque[path] = f"{error} ({error.line})"
            continue
        outcome = _trace_training(private, call, leaves, evaluation)
        if isinstance(outcome, dict):
            leaves.update(outcome)
            continue
        training, reason = outcome
        if training is not None:
            _share_guards(evaluation, training)
        _check_opaque(private, opaque)
        return _Traces(evaluation, training, reason, leaves, opaque)


def _share_guards(evaluation: Trace, training: Trace) -> None:
    """A decision taken in one mode is guarded in both; the two traces have the same nodes."""
    for condition, guard in training.guards.items():
        evaluation.guards.setdefault(condition, guard)
    for dimension, size in training.sizes.items():
        evaluation.sizes.setdefault(dimension, size)
    evaluation.layouts.update(training.layouts)
    evaluation.dtype_was_read |= training.dtype_was_read


def _trace_training(
    private: nn.Module, call: Call, leaves: Mapping[str, str], evaluation: Trace
) -> dict[str, str] | tuple[Trace | None, str]:
    """New leaves, or the training trace and the reason for which there is no training mode."""
    try:
        training = _trace(private, call, leaves, training=True)
    except (Untraceable, CaptureError) as error:
        return None, f"its training forward cannot be captured: {error}"
    difference = first_difference(evaluation, training)
    if difference is None:
        return training, ""
    kept = layers_with_a_mode(private, difference, evaluation, training)
    new = {path: reason for path, reason in kept.items() if path not in leaves}
    return new or (None, str(difference))


def _trace(private: nn.Module, call: Call, leaves: Mapping[str, str], *, training: bool) -> Trace:
    model = sharing_copy(private)
    model.train(training)
    tracer = Tracer(model, leaves)
    try:
        return tracer.run(call)
    except Untraceable:
        raise
    except Exception as error:
        if training and "more than 1 value per channel" in str(error):
            return _trace(private, _wider(call), leaves, training=True)
        failure = tracer.failure
        path = failure[1] if failure is not None and failure[0] is error else ""
        raise _input_refused(private, call, path, error) from error


def _wider(call: Call) -> Call:
    """The call with its batch doubled: a norm over one value per channel cannot train."""
    values = tuple(
        torch.cat([v, v]) if leaf.is_tensor and v.dim() else v
        for leaf, v in zip(call.leaves, call.values, strict=True)
    )
    return replace(call, values=values)


def _innermost(error: Untraceable, leaves: Mapping[str, str]) -> str | None:
    return next((p for p in reversed(error.paths) if p and p not in leaves), None)


def _refusal(model: nn.Module, error: Untraceable) -> CaptureError:
    where = f" at {error.line}" if error.line else ""
    return CaptureError(
        f"{type(model).__name__} cannot be captured: {error}{where}; move that part into a "
        "submodule of its own, which is then run as it is, or out of the model"
    )


def _input_refused(
    model: nn.Module, call: Call, path: str, error: Exception
) -> CaptureError | Untraceable:
    """Whose fault an exception during tracing is: if the model itself runs, it is ours."""
    shapes = ", ".join(f"{tuple(t.shape)} {str(t.dtype)[6:]}" for t in call.tensors)
    entered: list[str] = []
    try:
        args, kwargs = call.arguments([t.detach().clone() for t in call.tensors])
        twin = sharing_copy(model).eval()
        with torch.no_grad(), _entered_modules(twin) as entered:
            twin(*args, **kwargs)
    except Exception as own:
        path = next(filter(None, reversed(entered)), "")
        layer = f"'{path}' ({type(model.get_submodule(path)).__name__})" if path else "its forward"
        return CaptureError(
            f"{type(model).__name__} refuses the example input of shape {shapes}: {layer} raises "
            f"{type(own).__name__}: {' '.join(str(own).split())}; give inputs that it takes"
        )
    untraceable = Untraceable(f"{type(error).__name__} while tracing: {error}")
    untraceable.paths = (path,)
    return untraceable


@contextlib.contextmanager
def _entered_modules(model: nn.Module) -> Iterator[list[str]]:
    """Paths of the modules whose forward is running, outermost first."""
    paths = {id(module): path for path, module in model.named_modules()}
    entered: list[str] = []

    def enter(module: nn.Module, args: Any) -> None:
        entered.append(paths.get(id(module), ""))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        entered.pop()

    handles = register_module_forward_pre_hook(enter), register_module_forward_hook(leave)
    try:
        yield entered
    finally:
        for handle in handles:
            handle.remove()


_OPAQUE_SHARE = 0.05


def _check_opaque(model: nn.Module, opaque: Mapping[str, str]) -> None:
    """Opaque leaves may hold little, and no convolution, linear layer or norm."""
    total = sum(p.numel() for p in model.parameters())
    for path, reason in opaque.items():
        module = model.get_submodule(path)
        hidden = [n for n, m in module.named_modules() if type(m) in canonical.LEAVES
                  and any(True for _ in m.parameters())]  # fmt: skip
        if hidden and module.__module__.startswith("torch.nn."):
            hidden = []
        share = sum(p.numel() for p in module.parameters()) / max(total, 1)
        if hidden or share >= _OPAQUE_SHARE:
            what = f"hides '{path}.{hidden[0]}'" if hidden else f"holds {share:.0%} of the parameters"
            raise CaptureError(
                f"'{path}' cannot be traced ({reason}) and {what}; rewrite that part of its forward,"
                " or move it into a small submodule of its own"
            )


# ---- from traces to a program ----------------------------------------------------------------


def _program(model: nn.Module, private: nn.Module, call: Call, traces: _Traces) -> Program:
    trace = traces.evaluation
    initial = {path: m.training for path, m in private.named_modules(remove_duplicate=False)}
    private.eval()
    lifting = lift(private, trace, traces.training)
    line = baked_flag(lifting)
    if line:
        reason = f"a functional norm at {line} follows the mode and fits no standard layer"
        traces = replace(traces, training=None, eval_only=reason)
    tree = build_tree(lifting, traces.leaves)
    _check_names(tree, trace.graph)
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


def _check_names(tree: nn.Module, graph: fx.Graph) -> None:
    """Refuse members whose names a graph module, or the code of its forward, cannot have."""
    taken = {*dir(fx.GraphModule({}, fx.Graph())), "facts", "records", "flat_forward"}
    for name in (*tree._modules, *tree._parameters, *tree._buffers):
        if name in taken - set(dir(nn.Module())):
            raise CaptureError(
                f"the model's member '{name}' has a name that graph modules use for themselves; "
                "rename it, or put the model into a module that calls it"
            )
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            word = next((w for w in str(node.target).split(".") if keyword.iskeyword(w)), None)
            if word is not None:
                raise CaptureError(
                    f"'{node.target}' has a Python keyword in its name, '{word}', which generated "
                    "code cannot; rename it"
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
        texts=tuple(leaf.text for leaf in call.leaves if leaf.is_tensor),
        probe=module_to_meta(graph_module) if guarded else None,  # type: ignore[arg-type]
        sizes=trace.sizes,
        example=tuple(tuple(t.shape) for t in call.tensors),
        layouts=tuple(trace.layouts),
    )


def _contract(
    model: nn.Module, lifting: Lifting, traces: _Traces, initial: Mapping[str, bool]
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


def _with_batch_note(program: Program) -> Program:
    """``program`` with a note for the report if a decision fixes its batch size."""
    types = program.inputs().values()
    larger = [torch.empty((t.shape[0] + 1, *t.shape[1:]), dtype=t.dtype, device="meta")
              if t.shape else torch.empty((), dtype=t.dtype, device="meta") for t in types]  # fmt: skip
    for broken in program.guards.violations(larger):
        if isinstance(broken, Violation):
            note = f"the batch size is fixed: {broken.guard}"
            return replace(program, notes=(*program.notes, note))
    return program


def _notes(trace: Trace) -> tuple[str, ...]:
    return tuple(
        f"the model's forward overwrites its input '{name}' ({line}); the captured module does not"
        for name, line in trace.overwritten_inputs.items()
    )



