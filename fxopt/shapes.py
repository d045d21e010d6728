"""Numbers that remember which tensor dimensions they come from.

While a model is captured, ``x.shape[2]`` is a :class:`ShapeInt`: it has the example's value, so
control flow over shapes takes the example's way, and an :class:`Expression`, so that arithmetic
on it stays symbolic in the graph. Wherever Python takes the plain value (a comparison,
``range(n)``, ``int(n)``, ``if n:``) the recorder is told, and a guard stands for the decision.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Number
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Dimension:
    """The size of one axis of the value that graph node ``node`` computes."""

    node: str
    axis: int

    def __str__(self) -> str:
        return f"{self.node}.shape[{self.axis}]"


@dataclass(frozen=True)
class Operation:
    """``function(*operands)`` over dimensions and literals."""

    function: str
    operands: tuple[Expression, ...]

    def __str__(self) -> str:
        symbol = _SYMBOLS.get(self.function)
        if symbol is None:
            return f"{self.function}({', '.join(map(str, self.operands))})"
        left, right = self.operands
        return f"{_wrapped(left, self, -1)} {symbol} {_wrapped(right, self, 0)}"


def _wrapped(operand: Expression, outer: Operation, slack: int) -> str:
    """``operand`` as text, in parentheses where it binds no tighter than ``outer``."""
    rank = _RANKS.get(operand.function, 9) if isinstance(operand, Operation) else 9
    return f"({operand})" if rank <= _RANKS[outer.function] + slack else str(operand)


Expression = Dimension | Operation | int | float

_SYMBOLS = {
    "add": "+", "sub": "-", "mul": "*", "floordiv": "//", "truediv": "/", "mod": "%", "pow": "**",
    "and_": "&", "or_": "|", "xor": "^", "lshift": "<<", "rshift": ">>",
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
}  # fmt: skip
_RANKS = {
    **dict.fromkeys(("eq", "ne", "lt", "le", "gt", "ge"), 0), "add": 1, "sub": 1, "mul": 2,
    "floordiv": 2, "truediv": 2, "mod": 2, "pow": 3,
}  # fmt: skip
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_BINARY = (
    "add", "sub", "mul", "floordiv", "truediv", "mod", "pow",
    "and_", "or_", "xor", "lshift", "rshift",
)  # fmt: skip
_UNARY = ("neg", "abs", "ceil", "floor", "trunc", "round")


def function_named(name: str) -> Callable[..., Any]:
    """The callable of an operation, which generated code can name too."""
    if name in ("ceil", "floor", "trunc"):
        return getattr(math, name)  # type: ignore[no-any-return]
    if name in ("abs", "round", "int"):
        return getattr(builtins, name)  # type: ignore[no-any-return]
    return getattr(operator, name)  # type: ignore[no-any-return]


def evaluate(expression: Expression, size_of: Callable[[Dimension], int]) -> Any:
    """The value of ``expression`` where ``size_of`` gives the dimensions."""
    if isinstance(expression, Dimension):
        return size_of(expression)
    if isinstance(expression, Operation):
        operands = [evaluate(operand, size_of) for operand in expression.operands]
        return function_named(expression.function)(*operands)
    return expression


def dimensions_of(expression: Expression) -> tuple[Dimension, ...]:
    """Every dimension that ``expression`` reads, in reading order."""
    if isinstance(expression, Dimension):
        return (expression,)
    if isinstance(expression, Operation):
        return tuple(d for operand in expression.operands for d in dimensions_of(operand))
    return ()


class Recorder(Protocol):
    """Whoever must know that Python took a decision on a shape."""

    def assume(self, condition: Operation) -> None:
        """``condition`` holds for the example, and the graph is right only where it holds."""


class _ShapeNumber:
    """What :class:`ShapeInt` and :class:`ShapeFloat` share: value, expression, recorder."""

    expression: Expression
    value: Any
    recorder: Recorder

    def __init__(self, expression: Expression, value: Any, recorder: Recorder) -> None:
        self.expression = expression
        self.value = value
        self.recorder = recorder

    def plain(self) -> Any:
        """The bare value, which from here on is baked in: a guard says so."""
        self.recorder.assume(Operation("eq", (self.expression, self.value)))
        return self.value

    def __int__(self) -> int:
        return int(self.plain())

    def __float__(self) -> float:
        return float(self.plain())

    def __hash__(self) -> int:
        return hash(self.plain())

    def __str__(self) -> str:
        return str(self.plain())

    def __format__(self, spec: str) -> str:
        return format(self.plain(), spec)

    def __repr__(self) -> str:
        return f"{self.expression}={self.value}"

    def __bool__(self) -> bool:
        return bool(_apply("ne", self.recorder, self, 0))

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        return self // other, self % other  # type: ignore[operator]

    def __pos__(self) -> _ShapeNumber:
        return self

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        import numpy

        return numpy.array(self.plain(), dtype)

    def __copy__(self) -> _ShapeNumber:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> _ShapeNumber:
        return self


def _passes_for(kind: type) -> Any:
    """``isinstance(n, int)`` is true of the user's ``x.shape[0]``, and so it must be here."""
    return property(lambda self: kind)


class ShapeFloat(_ShapeNumber, torch.SymFloat):  # type: ignore[misc]
    """A float computed from tensor dimensions."""

    __class__ = _passes_for(float)

    def is_integer(self) -> bool:
        return float(self.plain()).is_integer()


class ShapeInt(_ShapeNumber, torch.SymInt):  # type: ignore[misc]
    """An int computed from tensor dimensions.

    It is a ``torch.SymInt`` so that torch's argument parser takes it without asking for its value.
    """

    __class__ = _passes_for(int)

    def __index__(self) -> int:
        return int(self.plain())

    def is_integer(self) -> bool:
        return True


def literal(number: Any) -> tuple[Expression, Any]:
    """``(expression, value)`` of a shape number or a plain one."""
    if isinstance(number, _ShapeNumber):
        return number.expression, number.value
    return number, number


def shape_number(expression: Expression, value: Any, recorder: Recorder) -> Any:
    """The shape number for ``value``, or ``value`` itself where nothing symbolic is left in it."""
    if not isinstance(expression, (Dimension, Operation)):
        return value
    kind = ShapeInt if isinstance(value, int) else ShapeFloat
    return kind(expression, value, recorder)


def _apply(function: str, recorder: Recorder, *operands: Any) -> Any:
    if any(isinstance(operand, torch.Tensor) for operand in operands):
        return NotImplemented
    pairs = [literal(operand) for operand in operands]
    if not all(isinstance(value, (int, float)) for _, value in pairs):
        bare = [o.plain() if isinstance(o, _ShapeNumber) else o for o in operands]
        return function_named(function)(*bare)
    value = function_named(function)(*(value for _, value in pairs))
    expression = Operation(function, tuple(expression for expression, _ in pairs))
    if function not in COMPARISONS:
        return shape_number(expression, value, recorder)
    if value:
        recorder.assume(expression)
    else:
        recorder.assume(Operation(_OPPOSITE[function], expression.operands))
    return value


_OPPOSITE = {"eq": "ne", "ne": "eq", "lt": "ge", "ge": "lt", "gt": "le", "le": "gt"}


_COMPARABLE = (Number, _ShapeNumber, torch.Tensor)  # NumPy's numbers are Numbers too


def _install(function: str) -> None:
    def forward(self: _ShapeNumber, *others: Any) -> Any:
        if function in ("eq", "ne") and not isinstance(others[0], _COMPARABLE):
            return function == "ne"
        return _apply(function, self.recorder, self, *others)

    word = function.rstrip("_")
    setattr(_ShapeNumber, f"__{word}__", forward)
    if function in _BINARY:

        def reflected(self: _ShapeNumber, other: Any) -> Any:
            return _apply(function, self.recorder, other, self)

        setattr(_ShapeNumber, f"__r{word}__", reflected)


for _function in (*_BINARY, *_UNARY, *COMPARISONS):
    _install(_function)
