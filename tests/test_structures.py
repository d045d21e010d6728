"""Results that are objects come back as the same kind of object."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from capture.checks import assert_same, captured, image, net

from fxopt import structures


@dataclass
class Output:
    logits: Any
    loss: Any = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Frozen:
    first: Any
    count: int = 3


class Results(OrderedDict[str, Any]):
    """A dictionary whose items are attributes too, as model outputs often are."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


@pytest.mark.parametrize(
    "value",
    [
        Output(1, extra={"a": [2, 3]}), Output(Output(1, 2)), [Frozen(1), (Frozen(2, 4),)],
        SimpleNamespace(a=1, b=[SimpleNamespace()]), Results(a=1, b=Output(2)), {"plain": (1, None)},
    ],
)  # fmt: skip
def test_structure_comes_back(value: Any) -> None:
    leaves, spec = structures.flatten(value)
    assert all(leaf is None or type(leaf) is int for leaf in leaves)
    back = structures.unflatten(leaves, spec)
    assert type(back) is type(value)
    assert back == value


@pytest.mark.parametrize(
    "make",
    [
        lambda x: Output(x, [x * 2]), lambda x: (Frozen(x), x), lambda x: Results(a=x, b=x + 1),
        lambda x: SimpleNamespace(x=x, n=3), lambda x: {"out": Output(x, extra={"y": x * 2})},
    ],
)  # fmt: skip
def test_model_that_returns_objects(make: Any) -> None:
    assert_same(net(lambda self, x: make(x * 2)), image())


def test_outputs_are_named_by_field() -> None:
    module = captured(net(lambda self, x: Output(x * 2, x + 1)), image())
    assert module.facts["interface"].output_names[:2] == ("output_logits", "output_loss")
