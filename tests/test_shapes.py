"""Shape numbers: arithmetic is recorded, decisions are told to the recorder."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxopt.shapes import (
    Dimension,
    Operation,
    ShapeFloat,
    ShapeInt,
    dimensions_of,
    evaluate,
    shape_number,
)


@dataclass
class Decisions:
    """A recorder that keeps what it is told."""

    taken: list[str] = field(default_factory=list)

    def assume(self, condition: Operation) -> None:
        assert evaluate(condition, lambda d: SIZES[d]) is True, condition
        self.taken.append(str(condition))


HEIGHT, WIDTH = Dimension("x", 2), Dimension("x", 3)
SIZES = {HEIGHT: 10, WIDTH: 7}


def sizes() -> tuple[Any, Any, Decisions]:
    recorder = Decisions()
    return (
        shape_number(HEIGHT, 10, recorder),
        shape_number(WIDTH, 7, recorder),
        recorder,
    )


@pytest.mark.parametrize(
    "arithmetic",
    [
        lambda h, w: h + w, lambda h, w: h - 2 * w, lambda h, w: 100 // h, lambda h, w: -(-h // 3),
        lambda h, w: h % 3 + w**2, lambda h, w: 2**w, lambda h, w: abs(w - h), lambda h, w: h & 6,
        lambda h, w: (h | 1) ^ w, lambda h, w: (h << 1) + (w >> 1), lambda h, w: round(w * 1.5),
        lambda h, w: math.ceil(h / 4), lambda h, w: math.floor(w / 2), lambda h, w: math.trunc(h / 3),
        lambda h, w: divmod(h, 3)[1], lambda h, w: sum([h, w, 1]), lambda h, w: +h,
    ],
)  # fmt: skip
def test_integer_arithmetic_is_recorded_without_a_decision(arithmetic: Callable[..., Any]) -> None:
    h, w, recorder = sizes()
    result = arithmetic(h, w)
    assert isinstance(result, ShapeInt)
    assert result.value == arithmetic(10, 7)
    assert evaluate(result.expression, lambda d: SIZES[d]) == arithmetic(10, 7)
    assert evaluate(result.expression, lambda d: SIZES[d] + 5) == arithmetic(15, 12)
    assert recorder.taken == []


def test_division_gives_a_float_that_stays_symbolic() -> None:
    h, w, recorder = sizes()
    ratio = h / w
    assert isinstance(ratio, ShapeFloat)
    assert str(ratio.expression) == "x.shape[2] / x.shape[3]"
    assert recorder.taken == []


@pytest.mark.parametrize(
    ("decide", "answer", "condition"),
    [
        (lambda h, w: h > 4, True, "x.shape[2] > 4"),
        (lambda h, w: h < 4, False, "x.shape[2] >= 4"),
        (lambda h, w: h == w, False, "x.shape[2] != x.shape[3]"),
        (lambda h, w: h != 10, False, "x.shape[2] == 10"),
        (lambda h, w: bool(h % 2), False, "x.shape[2] % 2 == 0"),
        (lambda h, w: h in (3, 10), True, "x.shape[2] == 10"),
        (lambda h, w: bool(h == np.int64(10)), True, "x.shape[2] == 10"),
        (lambda h, w: bool(np.int64(10) == h), True, "x.shape[2] == 10"),
        (lambda h, w: h - w >= 3, True, "x.shape[2] - x.shape[3] >= 3"),
    ],
)
def test_comparison_is_a_decision(decide: Callable[..., Any], answer: bool, condition: str) -> None:
    h, w, recorder = sizes()
    assert decide(h, w) is answer
    assert recorder.taken[-1] == condition


@pytest.mark.parametrize(
    "use",
    [
        int, float, hash, str, range, lambda h: f"{h}", lambda h: [0] * h, lambda h: {h: 1},
        lambda h: "abcdefghijkl"[h], lambda h: math.sqrt(h), lambda h: math.gcd(h, 4),
    ],
)  # fmt: skip
def test_use_of_the_plain_value_is_a_decision(use: Callable[..., Any]) -> None:
    h, _, recorder = sizes()
    use(h)
    assert "x.shape[2] == 10" in recorder.taken


def test_looking_at_it_is_no_decision() -> None:
    h, _, recorder = sizes()
    assert repr(h) == "x.shape[2]=10"
    assert h != "10"
    assert recorder.taken == []


def test_numbers_without_a_dimension_are_plain() -> None:
    assert type(shape_number(5, 5, Decisions())) is int


def test_dimensions_are_listed_in_reading_order() -> None:
    h, w, _ = sizes()
    assert dimensions_of((w * 2 + h).expression) == (WIDTH, HEIGHT)


_OPERATORS = st.sampled_from(["add", "sub", "mul", "floordiv", "mod"])


def _trees() -> st.SearchStrategy[Any]:
    leaves = st.sampled_from([HEIGHT, WIDTH]) | st.integers(1, 9)
    return st.recursive(leaves, lambda inner: st.tuples(_OPERATORS, inner, inner), max_leaves=8)


def _computed(tree: Any, leaf: Callable[[Any], Any]) -> Any:
    if not isinstance(tree, tuple):
        return leaf(tree)
    name, left, right = tree
    a, b = _computed(left, leaf), _computed(right, leaf)
    return {
        "add": lambda: a + b, "sub": lambda: a - b, "mul": lambda: a * b,
        "floordiv": lambda: a // b, "mod": lambda: a % b,
    }[name]()  # fmt: skip


@given(_trees(), st.integers(1, 50), st.integers(1, 50))
def test_recorded_expression_gives_what_python_gives(tree: Any, height: int, width: int) -> None:
    recorder = Decisions()
    other = {HEIGHT: height, WIDTH: width}
    try:
        plain = _computed(tree, lambda leaf: other.get(leaf, leaf))
        known = _computed(
            tree,
            lambda leaf: shape_number(leaf, SIZES[leaf], recorder) if leaf in SIZES else leaf,
        )
    except ZeroDivisionError:
        return
    expression = known.expression if isinstance(known, ShapeInt) else known
    assert evaluate(expression, lambda d: other[d]) == plain
    assert recorder.taken == []
