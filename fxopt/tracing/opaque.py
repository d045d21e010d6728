"""What a module that is run as it is does, tried out because its code is not followed.

A leaf that runs on the meta device cannot act by values. One that cannot run there may: by the
values of its input it may give another number, size, dtype or structure, return its input or a
copy, or overwrite it. It is run on several real inputs. What differs between them is refused here;
what the same code might still do for yet other values (a size that Python reads, an alias that is
overwritten) is refused by the writer where it would matter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxopt.infer import on_meta, to_meta
from fxopt.tracing.canonical import writes_input
from fxopt.tracing.trace import Untraceable
from fxopt.tracing.writer import Writer


@dataclass(frozen=True)
class Trial:
    """What a leaf gave, on the meta device; ``by_values`` if only real values could tell."""

    result: Any
    by_values: bool


def try_out(module: nn.Module, twin: nn.Module, args: Sequence[Any], kwargs: Any) -> Trial:
    """Run ``module``, whose copy on the meta device is ``twin``, on meta arguments.

    Raises:
        Untraceable: it overwrites an input, gives something else than tensors, or what it gives is
            decided by values.
    """
    if writes_input(module):
        raise Untraceable(f"{_named(module)} runs as it is and has inplace=True; set it to False")
    try:
        result, overwrites = _run(lambda *a, **k: on_meta(twin, a, k), args, kwargs)
        trial = Trial(result, by_values=False)
    except Exception as error:
        results, overwrites = _run_on_values(module, args, kwargs, error)
        _check_equal_forms(module, results)
        trial = Trial(pytree.tree_map_only(torch.Tensor, to_meta, results[0]), by_values=True)
    if overwrites:
        raise Untraceable(
            f"{_named(module)} runs as it is and overwrites its input; let it give a new tensor"
        )
    _check_tensors(module, trial.result)
    return trial


def _run(function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, bool]:
    """The result, and whether an argument was overwritten."""
    given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    versions = [t._version for t in given]
    result = function(*args, **kwargs)
    return result, versions != [t._version for t in given]


def _run_on_values(
    module: nn.Module, args: Any, kwargs: Any, error: Exception
) -> tuple[list[Any], bool]:
    results, overwrites = [], False
    for values in _VALUES:
        real_args, real_kwargs = pytree.tree_map_only(
            torch.Tensor, values, (tuple(args), dict(kwargs))
        )
        try:
            with torch.no_grad():
                result, wrote = _run(copy.deepcopy(module).cpu(), real_args, real_kwargs)
        except Exception:
            continue  # a check of the module's own may refuse these values
        results.append(result)
        overwrites |= wrote
    if not results:
        raise error
    return results, overwrites


def _ones(tensor: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(tensor, device="cpu")


def _normal(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point() or tensor.is_complex():
        return torch.randn(tensor.shape, dtype=tensor.dtype)
    return torch.randint(0, 2, tensor.shape, dtype=tensor.dtype)


def _large(tensor: torch.Tensor) -> torch.Tensor:
    floating = tensor.is_floating_point() or tensor.is_complex()
    return 100 * _normal(tensor) if floating else torch.zeros_like(tensor, device="cpu")


_VALUES = (_ones, _normal, _large)


def _check_equal_forms(module: nn.Module, results: Sequence[Any]) -> None:
    """Refuse results of another structure, number of dimensions or dtype for other values."""
    flat = [pytree.tree_flatten(result) for result in results]
    forms = [[_form(leaf) for leaf in leaves] for leaves, _ in flat]
    if any(spec != flat[0][1] for _, spec in flat) or any(form != forms[0] for form in forms):
        raise Untraceable(
            f"{_named(module)} runs as it is, and the values of its input decide the structure, "
            "number of dimensions or dtype of what it gives"
        )


def _form(leaf: Any) -> Any:
    return (leaf.dim(), leaf.dtype) if isinstance(leaf, torch.Tensor) else type(leaf)


def _check_tensors(module: nn.Module, result: Any) -> None:
    for leaf in pytree.tree_leaves(result):
        if leaf is not None and not isinstance(leaf, torch.Tensor):
            raise Untraceable(
                f"{_named(module)} runs as it is and gives a {type(leaf).__name__}, which other "
                "inputs may change; let it give tensors alone"
            )


def _named(module: nn.Module) -> str:
    return f"a {type(module).__name__}"


ALIAS = (
    "a tensor is overwritten that may be the same as another, as values decide in a module that "
    "runs as it is; clone it, or use the operator that gives a new tensor"
)


class TensorsAtStart:
    """The parameters and buffers of every module when tracing began, by identity.

    A graph calls a layer with its own tensors. If forward put others in their place, or wrote into
    them, the call computes something else.
    """

    def __init__(self, model: nn.Module) -> None:
        self._members: dict[int, Mapping[str, torch.Tensor]] = {
            id(module): {k: t for k, t in (*module._parameters.items(), *module._buffers.items())
                         if t is not None}
            for module in model.modules()
        }  # fmt: skip

    def replaced(self, module: nn.Module, writer: Writer) -> bool:
        """Whether a tensor of ``module`` is no longer that of the start, or was overwritten."""
        inner = module.modules() if module._modules else (module,)
        return any(
            (m._parameters.get(key) is not tensor and m._buffers.get(key) is not tensor)
            or writer.is_overwritten(tensor)
            for m in inner
            for key, tensor in self._members.get(id(m), {}).items()
        )
