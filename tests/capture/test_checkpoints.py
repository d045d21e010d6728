"""Gradient checkpointing is the call that it stands for; what it leaves out is noted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from capture.checks import assert_same, captured, image, net
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from fxopt.capture import capture
from fxopt.errors import CaptureError


def block() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Dropout(0.3))


def stem_and_block(reentrant: bool, inside: nn.Module | None = None) -> Any:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.stem(x)
        return y + checkpoint(self.block, y, use_reentrant=reentrant)  # type: ignore[no-any-return]

    return net(forward, stem=nn.Conv2d(3, 3, 1), block=inside or block())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_block(reentrant: bool) -> None:
    program = assert_same(stem_and_block(reentrant), image())
    (note,) = program.notes
    assert note.startswith("gradient checkpointing is left out")
    assert "test_checkpoints.py:" in note


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_in_training_alone(reentrant: bool) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.stem(x)
        if self.training:
            return checkpoint(self.block, y, use_reentrant=reentrant)  # type: ignore[no-any-return]
        return self.block(y)  # type: ignore[no-any-return]

    assert_same(net(forward, stem=nn.Conv2d(3, 3, 1), block=block()), image())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_sequence(reentrant: bool) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return checkpoint_sequential(self.blocks, 2, self.stem(x), use_reentrant=reentrant)  # type: ignore[no-any-return]

    blocks = nn.Sequential(block(), block(), block())
    assert_same(net(forward, stem=nn.Conv2d(3, 3, 1), blocks=blocks), image())


@pytest.mark.parametrize("reentrant", [True, False])
def test_norm_in_a_checkpoint_updates_its_statistics_once(reentrant: bool) -> None:
    model = stem_and_block(
        reentrant, nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))
    )
    module = captured(model.train(), image())
    torch.manual_seed(1)
    theirs = model(image())
    assert torch.equal(theirs, module(image()))
    assert torch.equal(
        model.get_submodule("block.1").running_mean, module.get_submodule("block.1").running_mean
    )
    theirs.sum().backward()
    assert not torch.equal(
        model.get_submodule("block.1").running_mean, module.get_submodule("block.1").running_mean
    )


def test_refuses_a_reentrant_checkpoint_on_the_input() -> None:
    model = net(lambda self, x: checkpoint(self.block, x, use_reentrant=True), block=block())
    with pytest.raises(
        CaptureError, match=r"(?s)parameters then get none.*use use_reentrant=False"
    ):
        capture(model, image())
