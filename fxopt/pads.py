"""A pad as a value, whether a function or a layer pads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

_MODES = {
    nn.modules.padding._ConstantPadNd: "constant",
    nn.modules.padding._ReflectionPadNd: "reflect",
    nn.modules.padding._ReplicationPadNd: "replicate",
    nn.modules.padding._CircularPadNd: "circular",
}


@dataclass(frozen=True)
class Pad:
    """What ``F.pad`` is told.

    Attributes:
        widths: left and right, top and bottom, and so on; a node where the forward computes one.
        mode: as in ``F.pad``.
        value: of the mode ``constant``.
    """

    widths: tuple[Any, ...]
    mode: str
    value: float

    @property
    def is_of_zeros(self) -> bool:
        return self.mode == "constant" and self.value == 0

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Those of ``F.pad`` after its input."""
        value = self.value if self.mode == "constant" else None
        return self.widths, self.mode, value


def pad_of(node: fx.Node, layer: nn.Module | None) -> Pad | None:
    """What ``node``, a call of ``F.pad`` or of ``layer``, pads with; None if it is neither."""
    if layer is not None:
        mode = next((mode for kind, mode in _MODES.items() if isinstance(layer, kind)), None)
        padding: Any = getattr(layer, "padding", ())
        value = getattr(layer, "value", 0.0)
        return None if mode is None else Pad(tuple(padding), mode, value)
    if node.target is not F.pad:
        return None
    given: Any = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | node.kwargs
    return Pad(tuple(given["pad"]), given.get("mode") or "constant", given.get("value") or 0.0)
