"""Functions and modules that graphs contain and torch does not have."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn


def assign_item(base: torch.Tensor, index: Any, value: Any) -> torch.Tensor:
    """What ``base`` holds after ``base[index] = value``; ``base`` itself stays."""
    result = base.clone()
    result[index] = value
    return result


def applied(base: torch.Tensor, method: str, *args: Any, **kwargs: Any) -> torch.Tensor:
    """What ``base`` holds after its in-place ``method``; ``base`` itself stays.

    For methods without a pure twin (``bernoulli_``); it draws the same random numbers.
    """
    result = base.clone()
    getattr(result, method)(*args, **kwargs)
    return result


def initialised(base: torch.Tensor, name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
    """What ``base`` holds after ``torch.nn.init``'s function ``name``; ``base`` itself stays."""
    result = base.detach().clone()
    getattr(nn.init, name)(result, *args, **kwargs)
    return result


def assign_view(
    base: torch.Tensor, value: torch.Tensor, view: str, index: Any, args: Any, kwargs: Any
) -> torch.Tensor:
    """What ``base`` holds after its ``view`` (or the piece ``index`` of it) became ``value``."""
    result = base.clone()
    function = getattr(torch, view, None) or getattr(torch.Tensor, view)
    made = function(result, *args, **kwargs)
    (made if index is None else made[index]).copy_(value)
    return result


class ScaleShift(nn.Module):
    """``y = x·w + b`` along axis 1, with ``w`` and ``b`` of shape ``(C,)``.

    What a BatchNorm computes in evaluation, on ``(N, C)`` and ``(N, C, *)``. As there, the result
    has the dtype of ``x``.

    >>> layer = ScaleShift(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0]))
    >>> layer(torch.ones(1, 2, 1)).flatten().tolist()
    [2.0, 4.0]
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        shape = (-1, *(1,) * (input.dim() - 2))
        return (input * self.weight.reshape(shape) + self.bias.reshape(shape)).to(input.dtype)

    def extra_repr(self) -> str:
        return str(self.weight.numel())


class SkipInit(nn.Module):
    """``y = α·s·x``, the end of a residual branch, with one learned gain ``s``.

    De & Smith, "Batch normalization biases residual blocks towards the identity function in deep
    networks", NeurIPS 2020, section 4; with ``α`` as in NFNets (Brock et al., 2021).

    Args:
        alpha: α.
        gain: what ``s`` begins with.

    >>> layer = SkipInit(0.2, gain=1.0)
    >>> round(layer(torch.ones(1, 2)).sum().item(), 6)
    0.4
    """

    def __init__(self, alpha: float, gain: float = 0.0) -> None:
        super().__init__()
        self.alpha = alpha
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input * (self.gain * self.alpha)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:.6g}"


class BorderedConv2d(nn.Conv2d):
    """A convolution of its input and of a map of ones, both padded alike: ``(N, C, H, W)``.

    Away from the border the ones are one more bias; at the border they are what a pointwise
    convolution with a bias in front of a padded one makes of it. ``forward`` takes the zeros that
    come before the convolution's own padding, as ``F.pad`` does.

    The ones are the last of its ``in_channels``: its ``weight`` is ``(C_out, C_in + 1, k, k)``.
    """

    def forward(self, x: torch.Tensor, pad: tuple[int, ...] = (0, 0, 0, 0)) -> torch.Tensor:
        both = torch.cat((x, torch.ones_like(x[:, :1])), 1)
        result: torch.Tensor = super().forward(nn.functional.pad(both, pad))
        return result


class _Borrowing(nn.Module):
    """A layer whose tensors belong to another module, under that module's names.

    The user's ``self.kernel`` applied by ``F.conv2d`` becomes a ``Conv2d`` whose ``weight`` *is*
    ``owner.kernel``: the state_dict keeps the user's key alone, and what is loaded there, or
    moved, or converted, takes effect here.
    """

    _borrowed: dict[str, tuple[tuple[nn.Module], str]]

    def _load_from_state_dict(self, *args: Any) -> None:
        """Nothing is loaded here: the owner has the keys (a norm would ask for its counter)."""

    def __getattr__(self, name: str) -> Any:
        borrowed = self.__dict__.get("_borrowed", {})
        if name in borrowed:
            (owner,), attribute = borrowed[name]
            return getattr(owner, attribute)
        return super().__getattr__(name)


class BorrowedConv1d(_Borrowing, nn.Conv1d):
    """A ``Conv1d`` whose weight and bias are members of another module."""


class BorrowedConv2d(_Borrowing, nn.Conv2d):
    """A ``Conv2d`` whose weight and bias are members of another module."""


class BorrowedConv3d(_Borrowing, nn.Conv3d):
    """A ``Conv3d`` whose weight and bias are members of another module."""


class BorrowedLinear(_Borrowing, nn.Linear):
    """A ``Linear`` whose weight and bias are members of another module."""


class BorrowedBatchNorm1d(_Borrowing, nn.BatchNorm1d):
    """A ``BatchNorm1d`` whose parameters and statistics are members of another module."""


class BorrowedBatchNorm2d(_Borrowing, nn.BatchNorm2d):
    """A ``BatchNorm2d`` whose parameters and statistics are members of another module."""


class BorrowedBatchNorm3d(_Borrowing, nn.BatchNorm3d):
    """A ``BatchNorm3d`` whose parameters and statistics are members of another module."""


class BorrowedLayerNorm(_Borrowing, nn.LayerNorm):
    """A ``LayerNorm`` whose weight and bias are members of another module."""


class BorrowedGroupNorm(_Borrowing, nn.GroupNorm):
    """A ``GroupNorm`` whose weight and bias are members of another module."""


BORROWED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: BorrowedConv1d,
    nn.Conv2d: BorrowedConv2d,
    nn.Conv3d: BorrowedConv3d,
    nn.Linear: BorrowedLinear,
    nn.BatchNorm1d: BorrowedBatchNorm1d,
    nn.BatchNorm2d: BorrowedBatchNorm2d,
    nn.BatchNorm3d: BorrowedBatchNorm3d,
    nn.LayerNorm: BorrowedLayerNorm,
    nn.GroupNorm: BorrowedGroupNorm,
}


_STANDARD = {borrowed: standard for standard, borrowed in BORROWED.items()}


def standard_kind(layer: nn.Module) -> type[nn.Module]:
    """The class of ``layer``; of a borrowed layer the one in ``torch.nn``."""
    return _STANDARD.get(type(layer), type(layer))


def remade(
    layer: nn.Module, parameters: Mapping[str, torch.Tensor | None],
    buffers: Mapping[str, torch.Tensor | None] = MappingProxyType({}),
    kind: type[nn.Module] | None = None,
) -> nn.Module:  # fmt: skip
    """A standard layer with the settings of ``layer`` and these tensors, which it has for its own.

    What is no parameter yet becomes one that is as trainable as the weight of ``layer``. It is of
    the class ``kind``, by default the standard one of ``layer``.
    """
    weight: Any = layer.weight
    trains = weight is not None and weight.requires_grad
    result = nn.Module.__new__(kind or standard_kind(layer))
    nn.Module.__init__(result)
    inner = {*vars(result), "_borrowed"}
    vars(result).update({name: value for name, value in vars(layer).items() if name not in inner})
    for name, tensor in parameters.items():
        is_new = tensor is not None and not isinstance(tensor, nn.Parameter)
        given = nn.Parameter(tensor, trains) if is_new else tensor  # type: ignore[arg-type]
        result.register_parameter(name, given)  # type: ignore[arg-type]
    for name, tensor in buffers.items():
        result.register_buffer(name, tensor)
    return result.eval()


def unborrowed(layer: nn.Module) -> nn.Module:
    """``layer``, or a standard layer that has for its own what ``layer`` borrows."""
    names = layer.__dict__.get("_borrowed")
    if not names:
        return layer
    given = {name: getattr(layer, name) for name in names}
    own = {**layer._parameters, **given}
    is_buffer = {name for name in given if not isinstance(given[name], nn.Parameter)}
    parameters = {name: tensor for name, tensor in own.items() if name not in is_buffer}
    return remade(layer, parameters, {**layer._buffers, **{n: given[n] for n in is_buffer}})


def borrow(layer: nn.Module, owners: dict[str, tuple[nn.Module, str]]) -> nn.Module:
    """``layer`` with each named tensor taken from ``(owner, attribute)``.

    ``layer`` is a fresh standard layer (its own tensors are dropped) of a class in ``BORROWED``.
    """
    layer.__class__ = BORROWED[type(layer)]
    for name in owners:
        layer._parameters.pop(name, None)
        layer._buffers.pop(name, None)
    if "num_batches_tracked" in layer._buffers:
        layer._buffers["num_batches_tracked"] = None
    layer.__dict__["_borrowed"] = {
        name: ((owner,), attribute) for name, (owner, attribute) in owners.items()
    }
    return layer
