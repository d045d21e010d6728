"""What it means that a captured module is the user's: one helper that checks all of it.

``assert_same`` compares the captured module with the model itself, in both modes, at two batch
sizes, with gradients, buffers and random numbers, and again after other weights were loaded. Both
run the same operators in the same order, so values are compared exactly unless a test says why not.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxopt import structures
from fxopt.capture import capture
from fxopt.captured import CapturedModule, to_module
from fxopt.program import Program

SEED = 7
GRADIENT_TOLERANCE_IN_EPSILONS = 64
"""Autograd sums where a value has several readers, in an order that is not ours to choose."""


def net(forward: Callable[..., Any], **members: Any) -> Any:
    """A module of a class of its own, with this ``forward`` and these members, seeded.

    Plain tensors become buffers; everything else is assigned as it is.
    """
    model = type("Net", (nn.Module,), {"forward": forward})()
    for name, member in members.items():
        if isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
            model.register_buffer(name, member)
        else:
            setattr(model, name, member)
    return seeded(model)


def code(text: str, **names: Any) -> Any:
    """The function that ``text`` writes, which may name torch, F, nn, np, math and ``names``."""
    known = {"torch": torch, "F": F, "nn": nn, "np": np, "math": math, "operator": operator}
    return eval(text, known | names)


def seeded(model: nn.Module, seed: int = SEED) -> Any:
    """``model`` with seeded parameters and running statistics: a fresh norm is nearly nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.is_meta:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.1 * noise.to(parameter))
        for module in model.modules():
            mean = getattr(module, "running_mean", None)
            if isinstance(mean, Tensor) and not mean.is_meta:
                mean.copy_(torch.randn(mean.shape, generator=generator))
                variance = torch.rand(mean.shape, generator=generator) + 0.5
                module.running_var.copy_(variance)  # type: ignore[operator, union-attr]
    return model


def image(*shape: int, seed: int = SEED) -> Tensor:
    """Seeded normal numbers; a small non-square batch of two images by default."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (2, 3, 10, 7), generator=generator)


@dataclass
class Expectation:
    """What a comparison leaves out, each for a reason that the test's name tells."""

    eval_only: bool = False
    batch_fixed: bool = False
    input_gradients: bool = True
    same_strides: bool = True
    brief: bool = False
    """For large nets: gradients in training alone, the other batch size in evaluation alone."""
    tolerance: float = 0.0


def assert_same(
    model: nn.Module, inputs: Any, kwargs: dict[str, Any] | None = None, **expectation: Any
) -> Program:
    """Capture ``model`` and check that nothing tells the captured module from it.

    Checked in each mode that the program has, at the example's batch size and at another: outputs,
    their structure, dtypes and strides, gradients of parameters and inputs, buffers and the random
    state after the step; once: state_dict keys, loading, and that the model was left alone.
    """
    expected = Expectation(**expectation)
    args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    kwargs = kwargs or {}
    program = _capture_leaving_all_alone(model, args, kwargs, verify=not expected.brief)
    assert bool(program.modes.eval_only) == expected.eval_only, program.modes.eval_only
    module = to_module(program)
    _assert_same_state(model, module)
    calls = [(args, kwargs)] + ([] if expected.batch_fixed else [_other_batch(args, kwargs)])
    for call_args, call_kwargs in calls:
        once = expected.eval_only or (expected.brief and call_args is not args)
        for training in (False,) if once else (False, True):
            _assert_same_step(model, module, call_args, call_kwargs, training, expected)
    if not expected.brief:
        _assert_loading_takes_effect(model, module, args, kwargs, expected)
    return program


def _capture_leaving_all_alone(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, verify: bool
) -> Program:
    def tensors() -> list[Tensor]:
        leaves = pytree.tree_leaves((args, kwargs))
        return [t for t in (*model.parameters(), *model.buffers(), *leaves) if _is_tensor(t)]

    before = [(t, t._version, t.requires_grad, None if t.grad is None else t.grad.clone())
              for t in tensors()]  # fmt: skip
    values = [t.detach().clone() for t in tensors()]
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    random_state = torch.get_rng_state()
    grad_enabled = torch.is_grad_enabled()
    program = capture(model, args, kwargs, verify=verify)
    assert torch.equal(random_state, torch.get_rng_state()), "capture drew random numbers"
    assert torch.is_grad_enabled() == grad_enabled
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert [set(vars(m)) for m in model.modules()] == attributes
    for (tensor, version, requires_grad, grad), now, value in zip(
        before, tensors(), values, strict=True
    ):
        assert tensor is now
        assert tensor._version == version
        assert tensor.requires_grad == requires_grad
        assert (tensor.grad is None) == (grad is None)
        _assert_equal(value, tensor.detach(), "a tensor of the model or of the example")
    return program


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _assert_same_state(model: nn.Module, module: CapturedModule) -> None:
    theirs, ours = model.state_dict(), module.state_dict()
    assert list(theirs) == list(ours)
    for key, value in theirs.items():
        _assert_equal(value, ours[key], key)
        assert value.is_meta or value.numel() == 0 or value.data_ptr() != ours[key].data_ptr(), key
    assert _ties(model) == _ties(module)
    names = [n for n, _ in model.named_parameters()]
    assert names == [n for n, _ in module.named_parameters()]
    trainable = [p.requires_grad for p in model.parameters()]
    assert trainable == [p.requires_grad for p in module.parameters()]


def _ties(module: nn.Module) -> list[int]:
    """For each key of the state_dict the first key that names the same tensor."""
    tensors = [id(t) for t in module.state_dict(keep_vars=True).values()]
    return [tensors.index(t) for t in tensors]


def _assert_same_step(
    model: nn.Module, module: CapturedModule, args: Any, kwargs: Any, training: bool,
    expected: Expectation,
) -> None:  # fmt: skip
    with restored(model), restored(module):
        model.train(training)
        module.train(training)
        flags = {path: m.training for path, m in model.named_modules()}
        for path, submodule in module.named_modules():
            if path in flags and not list(submodule.children()) and path:
                assert submodule.training == flags[path], f"mode of '{path}'"
        theirs = _step(model, args, kwargs, expected)
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        ours = _step(module, args, kwargs, expected)
        own = {name: b.clone() for name, b in module.named_buffers()}
    where = f"{'train' if training else 'eval'} mode"
    assert theirs.spec == ours.spec, where
    for index, (a, b) in enumerate(zip(theirs.leaves, ours.leaves, strict=True)):
        _assert_same_leaf(a, b, f"output {index} in {where}", expected)
    assert [n for n, _ in theirs.gradients] == [n for n, _ in ours.gradients]
    for (name, a), (_, b) in zip(theirs.gradients, ours.gradients, strict=True):
        assert (a is None) == (b is None), f"gradient of {name} in {where}"
        if a is not None:
            eps = torch.finfo(a.dtype).eps * GRADIENT_TOLERANCE_IN_EPSILONS
            _assert_close(a, b, max(eps, expected.tolerance), f"gradient of {name} in {where}")
    assert torch.equal(theirs.random_state, ours.random_state), f"random numbers drawn in {where}"
    assert set(buffers) <= set(own)
    for name, buffer in buffers.items():
        _assert_close(buffer, own[name], expected.tolerance, f"buffer {name} after {where}")


@dataclass
class _Step:
    leaves: list[Any]
    spec: Any
    gradients: list[tuple[str, Tensor | None]]
    random_state: Tensor


def _step(module: nn.Module, args: Any, kwargs: Any, expected: Expectation) -> _Step:
    """One forward and, where something can be learned, one backward."""
    sources: list[Tensor] = []

    def given(leaf: Any) -> Any:
        if not _is_tensor(leaf):
            return leaf
        leaf = leaf.detach().clone()
        if not expected.input_gradients or not (leaf.is_floating_point() or leaf.is_complex()):
            return leaf
        sources.append(leaf.requires_grad_())
        return leaf.clone()  # no leaf of autograd, so that the forward may overwrite it

    args, kwargs = pytree.tree_map(given, (args, kwargs))
    torch.default_generator.manual_seed(SEED)
    with torch.set_grad_enabled(module.training or not expected.brief):
        result = module(*args, **kwargs)
    random_state = torch.get_rng_state()
    leaves, spec = structures.flatten(result)
    leaves = [x * 1 if isinstance(x, nn.Parameter) else x for x in leaves]  # it changes later
    module.zero_grad()
    loss = _loss(leaves)
    if loss is not None:
        loss.backward()  # type: ignore[no-untyped-call]
    gradients = [(n, p.grad) for n, p in module.named_parameters()]
    gradients += [(f"input {i}", t.grad) for i, t in enumerate(sources)]
    module.zero_grad()
    return _Step(leaves, spec, gradients, random_state)


def _loss(leaves: list[Any]) -> Tensor | None:
    generator = torch.Generator().manual_seed(SEED)
    terms = []
    for leaf in leaves:
        if _is_tensor(leaf) and leaf.requires_grad and not leaf.is_meta:
            flat = torch.view_as_real(leaf) if leaf.is_complex() else leaf
            weight = torch.randn(flat.shape, generator=generator).to(flat)
            terms.append((flat * weight).sum().double())
    return torch.stack(terms).sum() if terms else None


def _assert_same_leaf(a: Any, b: Any, what: str, expected: Expectation) -> None:
    if not _is_tensor(a):
        assert type(a) is type(b), what
        assert a == b, what
        return
    assert a.requires_grad == b.requires_grad, f"requires_grad of {what}"
    if expected.same_strides:
        assert a.stride() == b.stride(), f"strides of {what}"
    _assert_close(a.detach(), b.detach(), expected.tolerance, what)


def _assert_equal(a: Tensor, b: Tensor, what: str) -> None:
    _assert_close(a, b, 0.0, what)


def _assert_close(a: Tensor, b: Tensor, tolerance: float, what: str) -> None:
    """Equal, NaN to NaN, to within ``tolerance`` of the largest value of ``a``."""
    assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device), what
    if a.is_meta or not a.numel():
        return
    if tolerance == 0.0 or not (a.is_floating_point() or a.is_complex()):
        assert torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True), what
        return
    error = (a.double() - b.double()).abs().max() if not a.is_complex() else (a - b).abs().max()
    assert error <= tolerance * a.abs().max(), f"{what}: off by {error:.2e}"


def _other_batch(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The call with three samples (two where it had three) and other floating values."""
    size = 2 if any(_is_tensor(t) and t.shape[:1] == (3,)
                    for t in pytree.tree_leaves((args, kwargs))) else 3  # fmt: skip
    generator = torch.Generator().manual_seed(SEED + 1)

    def other(leaf: Any) -> Any:
        if not _is_tensor(leaf) or not leaf.dim():
            return leaf
        resized = torch.cat([leaf] * size)[:size]
        if resized.is_contiguous(memory_format=torch.contiguous_format) and leaf.dim() == 4:
            layout = torch.channels_last if _is_channels_last(leaf) else torch.contiguous_format
            resized = resized.contiguous(memory_format=layout)
        if not leaf.is_floating_point() or leaf.is_meta:
            return resized
        return torch.randn(resized.shape, generator=generator).to(resized)

    other_args, other_kwargs = pytree.tree_map(other, (args, kwargs))
    return other_args, other_kwargs


def _is_channels_last(tensor: Tensor) -> bool:
    return not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def _assert_loading_takes_effect(
    model: nn.Module, module: CapturedModule, args: Any, kwargs: Any, expected: Expectation
) -> None:
    """Nothing of the weights is baked in: other weights, loaded by the user's keys, are used."""
    state = model.state_dict()
    if not state or any(v.is_meta for v in state.values()):
        return
    generator = torch.Generator().manual_seed(SEED + 2)
    other = {
        key: v * (1 + 0.5 * torch.rand(v.shape, generator=generator).to(v))
        if v.is_floating_point()
        else v
        for key, v in state.items()
    }
    module.eval()
    assert not module.load_state_dict(other, strict=True).missing_keys
    with restored(model):
        model.load_state_dict(other)
        model.eval()
        theirs = _step(model, args, kwargs, expected)
    ours = _step(module, args, kwargs, expected)
    for index, (a, b) in enumerate(zip(theirs.leaves, ours.leaves, strict=True)):
        _assert_same_leaf(a, b, f"output {index} with other weights", expected)


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Parameters, buffers and modes of ``model`` are on leaving what they were."""
    with torch.no_grad():
        parameters = [(p, p.clone()) for p in model.parameters()]
    buffers = [(m, k, b, None if b is None else b.clone())
               for m in model.modules() for k, b in m._buffers.items()]  # fmt: skip
    modes = [(m, m.training) for m in model.modules()]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in parameters:
                parameter.copy_(value)
            for module, key, buffer, saved in buffers:
                if buffer is not None and saved is not None:
                    buffer.copy_(saved)
                module._buffers[key] = buffer
        for module, mode in modes:
            module.training = mode


def captured(model: nn.Module, inputs: Any, **kwargs: Any) -> CapturedModule:
    """The captured module, in the mode that the model is in."""
    return to_module(capture(model, inputs, kwargs))


def targets(program: Program) -> list[str]:
    """Kind of every computing node: a module's class, a function's or a method's name."""
    names = []
    for node in program.nodes:
        module = program.module(node)
        if module is not None:
            names.append(type(module).__name__)
        elif node.op in ("call_function", "call_method"):
            names.append(str(getattr(node.target, "__name__", node.target)))
    return names
