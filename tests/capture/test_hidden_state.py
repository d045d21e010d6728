"""State that a forward keeps beside its buffers: captured where no later call differs, or refused."""

from __future__ import annotations

import collections
import functools
import gc
import itertools
import random
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from capture.checks import assert_same, captured, code, image, net, seeded
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxopt.capture import capture
from fxopt.errors import CaptureError
from fxopt.tracing.lines import changed_at

WRITES: dict[str, tuple[str, Any]] = {
    "dict": ("self.s.update(n=self.s['n'] + 1) or x * self.s['n']", lambda: {"n": 0}),
    "list cell": ("self.s.__setitem__(0, self.s[0] + 1) or x * self.s[0]", lambda: [0]),
    "object": ("setattr(self.s, 'n', self.s.n + 1) or x * self.s.n",
               lambda: type("Steps", (), {})()),
    "threshold": ("setattr(self, 's', self.s + 1) or (x * 2 if self.s > 3 else x)", lambda: 0),
    "every second call": ("setattr(self, 's', not self.s) or (x * 2 if self.s else x)", bool),
    "every third call": ("setattr(self, 's', (self.s + 1) % 3) or x * (1 + (self.s == 0))", int),
    "iterator": ("x * next(self.s)", lambda: itertools.count(1)),
    "cycle": ("next(self.s)(x)", lambda: itertools.cycle([torch.relu, torch.tanh])),
    "deque": ("self.s.append(self.s[-1] + 1) or x * sum(self.s)",
              lambda: collections.deque([0, 0], maxlen=2)),
    "Python's generator": ("x * self.s.random()", lambda: random.Random(0)),
    "NumPy's generator": ("x + float(self.s.normal())", lambda: np.random.default_rng(0)),
    "NumPy's random state": ("x * 2 if self.s.rand() < 0.7 else x",
                             lambda: np.random.RandomState(1)),
    "growing list": ("self.s.append(x.mean((2, 3))) or torch.stack(self.s).sum(0)", list),
    "carried tensor": ("setattr(self, 's', torch.tanh(x + (0 if self.s is None else self.s)))"
                       " or self.s * 2", lambda: None),
    "carried in a dict": ("self.s.update(h=torch.tanh(x + self.s.get('h', 0))) or self.s['h']",
                          dict),
    "counter that nothing else reads": ("setattr(self, 's', self.s + 1) or x * 2", int),
}  # fmt: skip


def written(expression: str) -> Any:
    """A forward in this file, whose line a message can name."""
    value = code(f"lambda self, x: {expression}", random=random)

    def forward(self: Any, x: Tensor) -> Tensor:
        return value(self, x)  # type: ignore[no-any-return]

    return forward


@pytest.mark.parametrize("kind", WRITES)
def test_refuses_state_that_changes_from_call_to_call(kind: str) -> None:
    expression, state = WRITES[kind]
    value = state()
    if kind == "object":
        value.n = 0
    model = net(written(expression), s=value)
    message = r"it (changes|keeps) 's.* at test_hidden_state\.py:\d+; make it a buf"
    with pytest.raises(CaptureError, match=message):
        capture(model, image())


def test_names_the_line_where_the_state_changes() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = x * 2
        self.steps += 1
        return y * self.steps

    line = forward.__code__.co_firstlineno + 2
    with pytest.raises(CaptureError, match=f"'steps' in every call at test_hidden_state.py:{line}"):
        capture(net(forward, steps=0), image())


def test_counter_of_training_makes_the_program_eval_only() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        return x * min(1.0, (self.steps + 1) / 4)

    program = assert_same(net(forward, steps=0), image(), eval_only=True)
    assert "it changes 'steps' in every call" in program.modes.eval_only


@pytest.mark.parametrize("expression", ["random.random() < 0.02", "np.random.rand() < 0.02",
                                        "random.choice([1, 1, 1, 2]) > 1"])  # fmt: skip
def test_refuses_random_numbers_of_python_even_where_they_rarely_act(expression: str) -> None:
    model = net(written(f"x * 2 if {expression} else x"))
    with pytest.raises(CaptureError, match="Python or NumPy at test_hidden_state.py:.*torch"):
        capture(model, image())


def test_random_numbers_of_numpy_in_training_make_the_program_eval_only() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        mix = float(np.random.beta(0.2, 0.2)) if self.training else 1.0
        return self.conv(x * mix)

    assert_same(net(forward, conv=nn.Conv2d(3, 4, 3)), image(), eval_only=True)


def test_refuses_torch_random_state_that_is_put_back() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            noise = torch.randn(7)
        return x + noise

    with pytest.raises(CaptureError, match="sets the state of torch's random numbers"):
        capture(net(forward), image())


@pytest.mark.parametrize("place", ["self.count.add_(1)", "self.banks[0].add_(1)"])
def test_refuses_tensor_overwritten_that_is_no_buffer(place: str) -> None:
    model = net(code(f"lambda self, x: x * {place}"), banks=[torch.zeros(())])
    model.count = torch.zeros(())
    with pytest.raises(CaptureError, match="which is no buffer at .* register it as a buffer"):
        capture(model, image())


GLOBAL = {"n": 0}


def test_refuses_global_counter() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        GLOBAL["n"] += 1
        return x * 2 if GLOBAL["n"] > 50 else x

    with pytest.raises(CaptureError, match=r"it changes 'forward\[GLOBAL\]\['n'\]' in every call"):
        capture(net(forward), image())


def test_activations_kept_on_the_module_are_no_obstacle() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        started = time.perf_counter()
        y = self.conv(x)
        self.last, self.size = y.detach(), y.shape[2:]
        self.seen["y"] = y
        self.elapsed = time.perf_counter() - started
        return y * 2

    model = net(forward, conv=nn.Conv2d(3, 4, 3), last=None, size=None, seen={}, elapsed=0.0)
    assert_same(model, image())


def test_table_cached_in_a_dict_by_size() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        key = (x.shape[2], x.shape[3])
        if key not in self.grids:
            self.grids[key] = torch.arange(x.shape[3]).float()
        return x + self.grids[key]

    assert_same(net(forward, grids={}), image())


_GRIDS: dict[Any, Tensor] = {}


def test_table_cached_in_a_global_leaves_the_model_working() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        key = (x.shape[2], x.shape[3])
        if key not in _GRIDS:
            _GRIDS[key] = torch.arange(x.shape[3]).float()
        return x + _GRIDS[key]

    _GRIDS.clear()
    model = net(forward)
    module = captured(model, image())
    assert not any(table.is_meta for table in _GRIDS.values())
    assert torch.equal(model(image()), module(image()))


@functools.cache
def cached_mask(height: int, width: int) -> Tensor:
    return torch.tril(torch.ones(height, width))


def test_table_of_a_cached_function() -> None:
    cached_mask.cache_clear()
    assert_same(net(lambda self, x: x * cached_mask(x.shape[2], x.shape[3])), image())
    assert not cached_mask(10, 7).is_meta


def test_table_cached_on_the_class() -> None:
    class Model(nn.Module):
        table: Any = None

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            if Model.table is None:
                Model.table = torch.arange(4.0)[:, None, None]
            return self.conv(x) * Model.table  # type: ignore[no-any-return]

    assert_same(seeded(Model()), image())
    assert not Model.table.is_meta


def test_lock_as_attribute() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        with self.lock:
            return self.conv(x)  # type: ignore[no-any-return]

    assert_same(net(forward, conv=nn.Conv2d(3, 4, 3), lock=threading.Lock()), image())


class Named(dict[str, Tensor]):
    """As Hugging Face registers its outputs: without names for the parts."""


pytree.register_pytree_node(
    Named, lambda o: (list(o.values()), list(o)), lambda v, k: Named(zip(k, v, strict=True))
)


def test_result_of_a_class_registered_without_names() -> None:
    model = net(lambda self, x: Named(y=x * 2, mean=x.mean()))
    program = assert_same(model, image())
    assert program.interface.output_names == ("output_0", "output_1")


def test_refuses_buffer_that_shares_memory_with_a_parameter() -> None:
    model = net(lambda self, x: x * self.weight + self.part, weight=nn.Parameter(torch.rand(7)))
    model.register_buffer("part", model.weight.detach()[:1])
    with pytest.raises(CaptureError, match="'part' and 'weight' share memory.*one tensor"):
        capture(model, image())


def test_captured_module_is_captured_again() -> None:
    model = net(lambda self, x: self.conv(x) if x.shape[3] > 4 else x, conv=nn.Conv2d(3, 3, 1))
    first = captured(model, image())
    assert capture(first, image(3, 3, 8, 6)).inputs()["x"].shape == (3, 3, 8, 6)
    with pytest.raises(CaptureError, match=r"was captured already.*x.shape\[3\] > 4"):
        capture(first, image(2, 3, 8, 4))


def test_nan_argument_can_be_given_again() -> None:
    model = net(lambda self, x, fill=0.0: x.masked_fill(x > 0, fill))
    assert captured(model, (image(), float("nan")))(image(), float("nan")).isnan().any()


def test_arguments_named_like_what_generated_code_names() -> None:
    def forward(me: Any, self: Tensor, torch: Tensor) -> Tensor:
        return self * 2 + torch

    assert_same(net(forward), (image(), image(seed=1)))


def test_refuses_traced_module_as_torchscript() -> None:
    traced = torch.jit.trace(nn.Sequential(nn.Conv2d(3, 4, 3)), image())  # type: ignore[no-untyped-call]
    with pytest.raises(CaptureError, match="is TorchScript.*capture the module that it was made"):
        capture(traced, image())


def test_cache_of_a_table_made_from_weights_is_followed_in_evaluation() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.biases = nn.Parameter(torch.ones(7))
            self.cache: dict[str, Tensor] = {}

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                return x + self.biases * 2
            key = str(x.device)
            if key not in self.cache:
                self.cache[key] = self.biases * 2
            return x + self.cache[key]

    model = seeded(nn.Sequential(Attention(), nn.Conv2d(3, 4, 3)))
    module = captured(model, image())
    for size in (2, 3):
        assert torch.equal(model(image(size, 3, 10, 7)), module(image(size, 3, 10, 7)))
    assert torch.equal(model.train()(image()), module.train()(image()))


def test_refuses_a_cache_of_what_was_computed_from_the_input() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        if "first" not in self.cache:
            self.cache["first"] = x.mean()
        return x + self.cache["first"]

    with pytest.raises(CaptureError, match=r"'cache\['first'\]', and the next call reads it"):
        capture(net(forward, cache={}), image())


def test_training_that_refuses_one_sample_leaves_the_statistics_alone() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        pieces = [self.act(self.norm(self.conv(x))) for _ in range(3)]
        return sum(self.head(piece.mean((2, 3), keepdim=True)) for piece in pieces)  # type: ignore[return-value]

    model = net(forward, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), act=nn.ReLU(inplace=True),
                head=nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))  # fmt: skip
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    program = capture(model, image(1, 3, 10, 7), verify=False)
    for name, buffer in program.graph_module.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_state_that_each_call_sets_before_it_reads_it() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.pyramid = [x]
        for _ in range(2):
            self.pyramid.append(F.avg_pool2d(self.pyramid[-1], 2))
        return sum(level.mean() for level in self.pyramid)  # type: ignore[return-value]

    assert_same(net(forward, pyramid=[]), image())


def test_model_that_was_run_and_keeps_what_it_computed() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.kept = [self.conv(x)]
        return self.kept[0].relu()  # type: ignore[no-any-return]

    model = net(forward, conv=nn.Conv2d(3, 4, 3))
    model(image())
    captured(model, image())


def test_the_line_of_a_change_is_no_callback_of_the_garbage_collector() -> None:
    """Libraries hook into the collector (hypothesis does), and it may run at any line."""
    found: list[int] = [0]

    def change() -> object:
        return found.__setitem__(0, 1), [[each] for each in range(2000)]

    def callback(phase: str, info: object) -> None:
        pass

    thresholds = gc.get_threshold()
    gc.set_threshold(1)
    gc.callbacks.append(callback)
    try:
        line = changed_at(change, lambda: found[0])
    finally:
        gc.callbacks.remove(callback)
        gc.set_threshold(*thresholds)
    start = change.__code__.co_firstlineno
    assert line == f"test_hidden_state.py:{start + 1}"
    assert gc.isenabled()
