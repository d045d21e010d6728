"""Arguments to flat tensors and back: names, structures, constants."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from capture.checks import net
from torch import Tensor

from fxopt.errors import CaptureError
from fxopt.interface import bind_call, identifier, names_of_leaves, same_constant


def call(forward: Any, *args: Any, **kwargs: Any) -> Any:
    return bind_call(net(forward), args, kwargs)


X, Y = torch.zeros(2, 3), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("text", "name"),
    [("x", "x"), ("batch['image']", "batch_image"), ("xs[0]", "xs_0"), ("0", "_0"), ("class", "_class"),
     ("a.b", "a_b"), ("[]", "value")],
)  # fmt: skip
def test_text_becomes_an_identifier(text: str, name: str) -> None:
    assert identifier(text) == name


def test_leaves_have_distinct_names() -> None:
    assert names_of_leaves({"a": [X, Y], "a[0]": X}, "out") == ("out_a_0", "out_a_1", "out_a_0_1")


def test_single_tensor_is_named_by_its_root() -> None:
    assert names_of_leaves(X, "output") == ("output",)


def test_tensors_come_in_the_order_of_the_signature() -> None:
    bound = call(lambda self, a, b: a, b=Y, a=X)
    assert [leaf.name for leaf in bound.leaves] == ["a", "b"]
    assert bound.tensors[0] is X


def test_defaults_are_filled_in() -> None:
    bound = call(lambda self, a, k=3: a, X)
    assert [(leaf.name, leaf.constant) for leaf in bound.leaves if not leaf.is_tensor] == [("k", 3)]


def test_arguments_are_rebuilt_with_other_tensors() -> None:
    def forward(self: Any, a: Tensor, *rest: Any, k: Any = None, **more: Any) -> Tensor:
        return a

    args, kwargs = call(forward, X, [X, 2], k={"t": X}, z="s").arguments([Y, Y, Y])
    assert args[0] is Y
    assert args[1][0] is Y
    assert args[1][1] == 2
    assert kwargs["k"]["t"] is Y
    assert kwargs["z"] == "s"


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [(1, 1, True), (1, 1.0, False), (1, True, False), ("a", "a", True), (None, None, True), (None, 0, False),
     ((1, 2), (1, 2), True), (float("nan"), float("nan"), True), (torch.float32, torch.float32, True)],
)  # fmt: skip
def test_constants_are_the_same_if_type_and_value_are(left: Any, right: Any, same: bool) -> None:
    assert same_constant(left, right) is same


def test_refuses_arguments_that_do_not_fit() -> None:
    with pytest.raises(CaptureError, match="too many positional arguments; give example_inputs"):
        call(lambda self, a: a, X, Y)


def test_refuses_call_without_a_tensor() -> None:
    with pytest.raises(CaptureError, match="hold no tensor"):
        call(lambda self, a: a, OrderedDict(k=1))


def test_refuses_sparse_tensor() -> None:
    with pytest.raises(CaptureError, match="'a' is torch.sparse_coo; give a dense tensor"):
        call(lambda self, a: a, X.to_sparse())


def test_refuses_object_that_holds_tensors() -> None:
    class Box:
        def __init__(self) -> None:
            self.tensors = [X]

    with pytest.raises(CaptureError, match="'b' is a Box that holds tensors.*pass them in a tuple"):
        call(lambda self, a, b: a, X, Box())
