"""Tensors over the memory of a parameter: used unregistered, they would be stale copies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capture.checks import assert_same, image, net, seeded
from torch import Tensor, nn

from fxopt.capture import capture
from fxopt.errors import CaptureError


class Aliased(nn.Module):
    """Reads its convolution's weight through another tensor."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        weight = self.conv.weight.data
        ways: dict[str, Any] = {
            "data": weight,
            "detached": self.conv.weight.detach(),
            "pieces": list(weight.chunk(3)),
            "in a closure": lambda x: F.conv2d(x, weight),
        }
        self.kept = {"way": ways[how]}

    def forward(self, x: Tensor) -> Tensor:
        kept = self.kept["way"]
        if callable(kept):
            return self.conv(x) + kept(x)  # type: ignore[no-any-return]
        weight = torch.cat(kept) if isinstance(kept, list) else kept
        return self.conv(x) + F.conv2d(x, weight)  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["data", "detached", "pieces", "in a closure"])
def test_refuses_a_weight_read_through_another_tensor(how: str) -> None:
    message = r"reads 'conv\.weight' through another tensor.*test_memory\.py:\d+.*parameter itself"
    with pytest.raises(CaptureError, match=message):
        capture(seeded(Aliased(how)), image())


def test_alias_that_is_never_read_is_no_obstacle() -> None:
    model = net(lambda self, x: self.conv(x), conv=nn.Conv2d(3, 4, 3))
    model.kept = [model.conv.weight.data]
    assert_same(model, image())


def test_list_of_the_parameters_themselves_is_no_alias() -> None:
    model = net(lambda self, x: F.conv2d(x, self.all[0], self.all[1]), conv=nn.Conv2d(3, 4, 3))
    model.all = list(model.conv.parameters())
    assert_same(model, image())
