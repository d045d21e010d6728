"""What a graph's values look like (shape and dtype), found by running it on the meta device.

Nothing is computed and nothing is allocated: a convolution over a whole batch costs microseconds.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils import _pytree as pytree

META = torch.device("meta")


def to_meta(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape, strides and dtype that holds no values."""
    return tensor if tensor.device == META else meta_twin(tensor)


def meta_twin(tensor: torch.Tensor) -> torch.Tensor:
    """As :func:`to_meta`, but never ``tensor`` itself, which a write to the twin leaves alone."""
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=META)


class MetaTwins:
    """Meta copies of tensors and modules, made once each.

    A module's twin is kept as long as the module lives and is used for shapes only.
    """

    def __init__(self) -> None:
        self._modules: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()

    def module(self, module: nn.Module) -> nn.Module:
        """The twin of ``module``, in the mode that the module is in."""
        if module not in self._modules:
            self._modules[module] = module_to_meta(module)
        twin = self._modules[module]
        if twin.training != module.training:
            twin.train(module.training)
        return twin


def module_to_meta(module: nn.Module) -> nn.Module:
    """A copy of ``module`` whose parameters and buffers are on the meta device."""

    def twin_of(tensor: torch.Tensor) -> torch.Tensor:
        twin = meta_twin(tensor.detach())
        return nn.Parameter(twin, False) if isinstance(tensor, nn.Parameter) else twin

    if not module._modules and type(module).__module__.startswith("torch.nn."):
        return with_tensors(module, twin_of)
    tensors = (*module.parameters(), *module.buffers())
    return copy.deepcopy(module, {id(tensor): twin_of(tensor) for tensor in tensors})


def with_tensors(
    layer: nn.Module, replacement: Callable[[torch.Tensor], torch.Tensor]
) -> nn.Module:
    """A layer with the settings of ``layer``, which are shared, and other tensors."""
    result = copy.copy(layer)
    for members in ("_parameters", "_buffers"):
        given = getattr(layer, members)
        new = {k: None if t is None else replacement(t) for k, t in given.items()}
        result.__dict__[members] = new
    result.__dict__["_modules"] = dict(layer._modules)
    return result


_DEVICE_TYPES = frozenset({"cpu", "cuda", "mps", "xpu", "hpu", "mtia", "meta"})


def _is_device(argument: object) -> bool:
    if isinstance(argument, str):
        return argument.split(":")[0] in _DEVICE_TYPES
    return isinstance(argument, torch.device)


def on_meta(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """``function(*args, **kwargs)`` with every tensor, given or made, on the meta device."""
    keywords: dict[str, Any] = {
        k: v if isinstance(v, str) and k != "device" else _move(v) for k, v in kwargs.items()
    }
    arguments = tuple(map(_move, args))
    if function is F.batch_norm and _plainly_normalised(*arguments, **keywords):
        return torch.empty_like(arguments[0])
    with torch.no_grad():
        try:
            result = function(*arguments, **keywords)
        except NotImplementedError:
            result = _without_kernel(function, *arguments)
            if result is None:
                raise
    if isinstance(result, torch.Tensor):
        return to_meta(result)
    return pytree.tree_map_only(torch.Tensor, to_meta, result)


def _move(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        return to_meta(argument)
    if type(argument) in (tuple, list, dict):
        return pytree.tree_map(_move, argument)
    return META if _is_device(argument) else argument


def _without_kernel(function: Callable[..., Any], *arguments: Any) -> torch.Tensor | None:
    """The result of an operator for which PyTorch has no meta kernel, where fxopt knows it."""
    name = getattr(function, "__name__", "")
    tensor = arguments[0] if arguments else None
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        return None
    if name in ("fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine"):
        return torch.empty_like(tensor)
    if name in ("cov", "corrcoef"):
        return tensor.new_empty(tensor.shape[:1] * 2 if tensor.dim() == 2 else ())
    return None


def _plainly_normalised(
    tensor: torch.Tensor, *statistics: Any, training: bool = False, **others: Any
) -> bool:
    """Whether ``F.batch_norm`` of these keeps shape, strides and dtype, with nothing to refuse.

    torch's meta kernel goes through a Python decomposition that takes milliseconds.
    """
    given = [t for t in (*statistics, *others.values()) if isinstance(t, torch.Tensor)]
    return (
        tensor.dim() >= 2
        and tensor.is_contiguous()
        and (tensor.numel() > tensor.shape[1] or not (training or True in statistics[4:5]))
        and len(given) in (2, 4)
        and all(t.shape == tensor.shape[1:2] and t.dtype == tensor.dtype for t in given)
    )


_POINTWISE: frozenset[type[nn.Module]] = frozenset(
    {nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid,
     nn.Tanh, nn.LeakyReLU, nn.ELU, nn.SELU, nn.Softplus, nn.Mish}
)  # fmt: skip


def _shortcut(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The result of a layer that plainly keeps shape and dtype, or None."""
    if len(args) != 1 or kwargs or not isinstance(args[0], torch.Tensor):
        return None
    (tensor,) = args
    if not tensor.is_floating_point():
        return None
    if type(module) in _POINTWISE:
        return tensor if getattr(module, "inplace", False) else torch.empty_like(tensor)
    if type(module) is nn.BatchNorm2d and module.affine and tensor.dim() == 4:
        tensors = (module.running_mean, module.running_var, module.weight, module.bias)
        if _plainly_normalised(tensor, *tensors, training=module.training):
            return torch.empty_like(tensor)
    return None


def run_module(module: nn.Module, twin: nn.Module, args: Any, kwargs: Any) -> Any:
    """What a leaf module gives for meta inputs.

    A module that cannot run on the meta device (it goes through NumPy, say) runs as it is, on ones:
    its shapes are what is wanted. If that fails too, the module takes no such input.
    """
    known = _shortcut(twin, args, kwargs)
    if known is not None:
        return known
    try:
        return on_meta(twin, args, kwargs)
    except Exception as error:
        try:
            return _run_on_ones(module, args, kwargs)
        except Exception:
            raise error from None


def _run_on_ones(module: nn.Module, args: Any, kwargs: Any) -> Any:
    real_args, real_kwargs = pytree.tree_map_only(
        torch.Tensor, lambda t: torch.ones_like(t, device="cpu"), (tuple(args), dict(kwargs))
    )
    with torch.no_grad():
        result = copy.deepcopy(module).cpu()(*real_args, **real_kwargs)
    return pytree.tree_map_only(torch.Tensor, to_meta, result)


class MetaInterpreter(fx.Interpreter):
    """Runs a graph module on the meta device; ``env`` keeps every node's value."""

    def __init__(self, graph_module: fx.GraphModule, twins: MetaTwins) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.twins = twins

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return on_meta(target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        return on_meta(getattr(torch.Tensor, target), args, kwargs)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        return run_module(module, self.twins.module(module), args, kwargs)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return to_meta(value) if isinstance(value, torch.Tensor) else value
