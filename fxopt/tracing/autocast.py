"""``torch.autocast`` inside a forward, written as the casts that it makes.

Which operators run in the lower precision, and which in float32, is torch's own table for the CPU
(aten/src/ATen/autocast_mode.cpp); every other operator runs in the dtypes that it is given.
Operators that are made of several others, some of them in the table, cannot be written so: they
are refused, except ``einsum`` of two operands, where casting first is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from fxopt.tracing.trace import Untraceable

_LOWER = frozenset(
    """
    conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d linear matmul
    __matmul__ __rmatmul__ mm bmm addmm addbmm baddbmm vecdot linalg_vecdot
    scaled_dot_product_attention
""".split()
)
_FLOAT32 = frozenset(
    """
    avg_pool3d binary_cross_entropy grid_sample grid_sampler prod quantile nanquantile stft cdist
    trace view_as_complex max_pool3d max_unpool2d max_unpool3d adaptive_avg_pool3d mse_loss
    cosine_embedding_loss nll_loss hinge_embedding_loss poisson_nll_loss smooth_l1_loss
    cross_entropy l1_loss huber_loss margin_ranking_loss soft_margin_loss triplet_margin_loss
    multi_margin_loss ctc_loss kl_div binary_cross_entropy_with_logits
""".split()
)
_COMPOSED = frozenset(
    """
    lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell tensordot inner
    chain_matmul multi_dot bilinear mv addmv addr outer cosine_similarity pairwise_distance
    affine_grid_generator _transformer_encoder_layer_fwd _native_multi_head_attention
""".split()
)


@dataclass
class Autocast:
    """The autocast state of a forward: as it was on entry, and as it is now."""

    device: str
    entered_with: tuple[bool, torch.dtype | None]
    _cast: dict[int, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def entered(cls, device: str) -> Autocast:
        return cls(device, _state(device))

    def switched(self) -> bool:
        """Whether the forward is inside an ``autocast`` of its own.

        Raises:
            Untraceable: it switches off, or to another dtype, what its caller switched on; or the
                device is one whose table is not known here.
        """
        now = _state(self.device)
        if now == self.entered_with:
            self._cast.clear()
            return False
        if self.entered_with[0]:
            raise Untraceable("it changes the autocast that capture was called in")
        if self.device != "cpu":
            raise Untraceable(f"it switches autocast on for {self.device}")
        return True

    def arguments(
        self, name: str, args: Any, kwargs: Any, to: Callable[..., Any], keep: Callable[..., bool]
    ) -> tuple[Any, Any]:
        """The arguments of the operator ``name`` as autocast passes them on.

        ``to(tensor, dtype)`` casts; ``keep(tensor)`` says whose cast is made once a region.
        """
        if name in _COMPOSED:
            raise Untraceable(f"it calls {name} under autocast, which casts inside it")
        dtype = torch.get_autocast_dtype(self.device)
        if name in _LOWER or (name == "einsum" and _is_one_product(args)):
            return self._mapped(args, kwargs, torch.float32, dtype, to, keep)
        if name in _FLOAT32 or (name == "pad" and _mode_of_padding(args, kwargs) != "constant"):
            return self._mapped(args, kwargs, dtype, torch.float32, to, lambda tensor: False)
        return args, kwargs

    def _mapped(
        self, args: Any, kwargs: Any, source: torch.dtype, target: torch.dtype,
        to: Callable[..., Any], keep: Callable[..., bool],
    ) -> tuple[Any, Any]:  # fmt: skip
        def cast(value: Any) -> Any:
            if isinstance(value, (tuple, list)):
                return type(value)(map(cast, value))
            if not isinstance(value, torch.Tensor) or value.dtype != source:
                return value
            if not keep(value):
                return to(value, target)
            if id(value) not in self._cast:
                self._cast[id(value)] = to(value, target)
            return self._cast[id(value)]

        return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}


def _state(device: str) -> tuple[bool, torch.dtype | None]:
    on = device != "meta" and torch.is_autocast_enabled(device)
    return on, torch.get_autocast_dtype(device) if on else None


def _mode_of_padding(args: Any, kwargs: Any) -> Any:
    return kwargs.get("mode", args[2] if len(args) > 2 else "constant")


def _is_one_product(args: Any) -> bool:
    """Whether an ``einsum`` is one ``bmm``: it sums nothing of one operand alone before it."""
    operands = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
    if len(operands) == 1:
        return False
    terms, _, result = str(args[0]).replace(" ", "").partition("->")
    left, _, right = terms.partition(",")
    alone = (set(left) ^ set(right)) - set(result)
    if len(operands) != 2 or not isinstance(args[0], str) or not result or alone - {"."}:
        raise Untraceable(f"it calls einsum '{args[0]}' under autocast, which casts inside it")
    return True
