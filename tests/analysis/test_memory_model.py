"""What a memory model accepts, and what the presets say."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from fxopt.analysis.memory_model import PRESETS, MemoryModel, MemoryModelError
from fxopt.errors import FxoptError

# Columns: epilogues, add, padding, elementwise, as written, depthwise, its scratch.
TABLE = {
    "tflm": (True, False, True, False, False, False, False),
    "tinyengine": (True, True, True, True, False, True, False),
    "tinyengine_exact": (True, True, True, True, False, True, True),
    "pytorch": (False, False, False, False, True, False, False),
}


@pytest.mark.parametrize("name", TABLE)
def test_presets_are_the_published_conventions(name: str) -> None:
    model = MemoryModel.preset(name)
    found = (
        model.fuse_epilogues, model.fuse_add, model.fuse_padding, model.inplace_elementwise,
        model.inplace_as_written, model.inplace_depthwise, model.inplace_depthwise_scratch,
    )  # fmt: skip
    assert found == TABLE[name]
    assert (model.bytes_per_element, model.input_resident, model.alignment) == (None, True, 16)
    assert tuple(PRESETS) == tuple(TABLE)


def test_without_options_nothing_is_fused_or_overwritten() -> None:
    fields = dataclasses.asdict(MemoryModel())
    assert [name for name, value in fields.items() if value is True] == ["input_resident"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bytes_per_element": 0}, "bytes_per_element is 0 bytes; the least is 1"),
        ({"alignment": 0}, "alignment is 0 bytes; the least is 1"),
        ({"alignment": -16}, "alignment is -16 bytes; the least is 1"),
        (
            {"inplace_depthwise_scratch": True},
            "inplace_depthwise_scratch is what inplace_depthwise needs; set both or neither",
        ),
    ],
)
def test_refuses_a_model_of_no_device(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MemoryModelError) as error:
        MemoryModel(**options)
    assert str(error.value) == message
    assert isinstance(error.value, FxoptError)
    assert isinstance(error.value, ValueError)


def test_refuses_an_unknown_preset_and_lists_those_that_exist() -> None:
    with pytest.raises(MemoryModelError) as error:
        MemoryModel.preset("tvm")
    assert str(error.value) == (
        "no preset is called 'tvm'; there are tflm, tinyengine, tinyengine_exact, pytorch"
    )


def test_presets_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        PRESETS["tflm"] = MemoryModel()  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        MemoryModel.preset("tflm").alignment = 1  # type: ignore[misc]


def test_does_not_import_torch() -> None:
    code = "import sys, fxopt.analysis.memory_model; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
