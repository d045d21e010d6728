"""What the kernels of a device can do, so far as it decides how much memory a network takes.

Published figures differ by such conventions more than by anything else: whether the activation
runs inside the convolution, whether a depthwise convolution overwrites its input, whether the
image counts. Each is a field here, and each well-known convention a preset:

``tflm``
    TensorFlow Lite Micro: the converter fuses activations, folds norms and pads; every other
    operator reads and writes tensors of its own.
``tinyengine``
    TinyEngine (Lin et al., MCUNet, 2020, section 3.2) as its papers count: besides, the residual
    add runs inside the projecting convolution, and elementwise operators and depthwise
    convolutions overwrite their input. The one channel that an in-place depthwise convolution
    needs beside it is left out, as in the published figures.
``tinyengine_exact``
    The same with that channel.
``pytorch``
    What eager PyTorch does: every operator writes a tensor, unless the user's code overwrites one
    (``inplace=True``, ``+=``). The caller keeps the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any

from fxopt.errors import FxoptError

NO_KERNEL = ("bytes_per_element", "input_resident", "alignment")
"""Fields of a memory model that say nothing of kernels; any preset goes with any of them."""


class MemoryModelError(FxoptError, ValueError):
    """A memory model that no device has, or a preset that does not exist."""


@dataclass(frozen=True)
class MemoryModel:
    """How operators use memory on a device.

    Attributes:
        bytes_per_element: size of a floating-point element, for a what-if (1: int8); None takes
            each tensor's own dtype. Integers and truth values keep their size.
        fuse_epilogues: normalisation and activation run inside the convolution or linear layer
            that produces their operand.
        fuse_add: a sum of two tensors runs inside the convolution or linear layer that produces
            one of them, the one that comes later where both could; it accumulates into the other
            one if that is not needed any more.
        fuse_padding: a constant pad read by convolutions and pools only costs nothing.
        inplace_elementwise: an elementwise operator may overwrite an operand.
        inplace_as_written: operators overwrite what the user's code overwrites, never an input.
        inplace_depthwise: a depthwise convolution may overwrite its input, plane by plane.
        inplace_depthwise_scratch: it needs one plane of its output beside it for that.
        input_resident: inputs are in memory from the first step; otherwise they are streamed and
            take no bytes.
        alignment: of every tensor's offset, in bytes.

    Raises:
        MemoryModelError: a size below 1, or scratch memory for what is not done in place.

    >>> MemoryModel.preset("tinyengine").fuse_add
    True
    >>> MemoryModel(alignment=0)
    Traceback (most recent call last):
    fxopt.analysis.memory_model.MemoryModelError: alignment is 0 bytes; the least is 1
    """

    bytes_per_element: int | None = None
    fuse_epilogues: bool = False
    fuse_add: bool = False
    fuse_padding: bool = False
    inplace_elementwise: bool = False
    inplace_as_written: bool = False
    inplace_depthwise: bool = False
    inplace_depthwise_scratch: bool = False
    input_resident: bool = True
    alignment: int = 16

    def __post_init__(self) -> None:
        for name in ("bytes_per_element", "alignment"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise MemoryModelError(f"{name} is {value} bytes; the least is 1")
        if self.inplace_depthwise_scratch and not self.inplace_depthwise:
            raise MemoryModelError(
                "inplace_depthwise_scratch is what inplace_depthwise needs; set both or neither"
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> MemoryModel:
        """The memory model called ``name``, with some fields set otherwise.

        Raises:
            MemoryModelError: there is none; the message lists those that there are.
        """
        if name not in PRESETS:
            raise MemoryModelError(f"no preset is called '{name}'; there are {', '.join(PRESETS)}")
        return replace(PRESETS[name], **changes)

    def describe(self) -> str:
        """The preset of which the kernels are, or what they can do."""
        own = replace(self, bytes_per_element=None, input_resident=True, alignment=16)
        for name, model in PRESETS.items():
            if model == own:
                return name
        names = [field.name for field in fields(self) if field.name not in NO_KERNEL]
        able = [name for name in names if getattr(self, name)]
        return f"custom: {', '.join(able) or 'nothing fused or in place'}"


_TFLM = MemoryModel(fuse_epilogues=True, fuse_padding=True)
_TINYENGINE = replace(_TFLM, fuse_add=True, inplace_elementwise=True, inplace_depthwise=True)

PRESETS: Mapping[str, MemoryModel] = MappingProxyType(
    {
        "tflm": _TFLM,
        "tinyengine": _TINYENGINE,
        "tinyengine_exact": replace(_TINYENGINE, inplace_depthwise_scratch=True),
        "pytorch": MemoryModel(inplace_as_written=True),
    }
)
"""The well-known conventions by name; the module's docstring says where each comes from."""
