"""Operators that give several tensors: other sizes give the model's result, or a guard refuses."""

from __future__ import annotations

import pytest
import torch
from capture.checks import captured, code, image, net

from fxopt.capture import capture
from fxopt.errors import GuardError

SIZES = ((4, 3, 10, 7), (1, 3, 10, 7), (2, 3, 10, 7), (4, 3, 11, 7), (4, 3, 12, 7), (4, 3, 5, 7))
SPLITS = {
    "x.chunk(2)": "yes no yes yes yes yes",
    "x.chunk(2, 2)": "yes yes yes yes yes yes",
    "torch.cat([x, x]).chunk(2)": "yes yes yes yes yes yes",
    "torch.chunk(input=x, chunks=3, dim=2)": "yes yes yes yes yes yes",
    "x.split(4, 2)": "yes yes yes yes yes no",
    "x.split(split_size=4, dim=2)": "yes yes yes yes yes no",
    "x.split([4, 6], 2)": "yes yes yes no no no",
    "x.split(x.shape[2] // 2, 2)": "yes yes yes no yes no",
    "x.tensor_split(3, 2)": "yes yes yes yes yes yes",
    "x.tensor_split((3, 4), 2)": "yes yes yes yes yes yes",
    "x.unbind(2)": "yes yes yes no no no",
}


@pytest.mark.parametrize("split", SPLITS)
def test_pieces_at_other_sizes(split: str) -> None:
    model = net(code(f"lambda self, x: sum(p.mean() * i for i, p in enumerate({split}))"))
    module = captured(model, image(*SIZES[0]))
    taken = []
    for size in SIZES:
        try:
            found = module(image(*size))
        except GuardError:
            taken.append("no")
        else:
            assert torch.equal(found, model(image(*size)))
            taken.append("yes")
    assert " ".join(taken) == SPLITS[split]


def test_guard_says_what_was_asked() -> None:
    program = capture(net(lambda self, x: x.split(4, 2)[2]), image())
    assert str(program.guards.shapes[0]).startswith("(x.shape[2] + 3) // 4 == 3 (decided at ")
