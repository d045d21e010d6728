"""Intervals: what a part of a result needs, beside a list of the positions that are read."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fxopt.analysis.receptive_field import Interval, Window, cut

windows = st.builds(
    Window,
    kernel=st.integers(1, 5),
    stride=st.integers(1, 4),
    dilation=st.integers(1, 3),
    before=st.integers(-2, 4),
)
intervals = st.tuples(st.integers(0, 9), st.integers(1, 5)).map(lambda t: Interval(t[0], sum(t)))


@given(windows, intervals)
def test_needs_are_the_hull_of_what_is_read(window: Window, result: Interval) -> None:
    read = [
        position * window.stride - window.before + tap * window.dilation
        for position in range(result.start, result.stop)
        for tap in range(window.kernel)
    ]
    assert window.needs(result) == Interval(min(read), max(read) + 1)


@given(st.integers(1, 4), intervals)
def test_needs_of_an_enlarged_map(scale: int, result: Interval) -> None:
    read = [position // scale for position in range(result.start, result.stop)]
    assert Window(scale=scale).needs(result) == Interval(min(read), max(read) + 1)


@given(st.integers(1, 40), st.data())
def test_a_cut_covers_the_map_evenly(size: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, size))
    parts = cut(size, count)
    assert [p for part in parts for p in range(part.start, part.stop)] == list(range(size))
    most, rest = divmod(size, count)
    assert [len(part) for part in parts] == [most + 1] * rest + [most] * (count - rest)


@given(intervals, st.integers(1, 8))
def test_within_keeps_what_is_on_the_map_and_at_least_one_position(
    part: Interval, size: int
) -> None:
    inside = part.within(size)
    on_map = [p for p in range(part.start, part.stop) if 0 <= p < size]
    assert 0 <= inside.start < inside.stop <= size
    if on_map:
        assert inside == Interval(on_map[0], on_map[-1] + 1)
    else:
        assert len(inside) == 1
