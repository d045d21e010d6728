"""How a model is called and what it returns: arguments, defaults, structures."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from capture.checks import assert_same, captured, code, image, net, seeded
from torch import Tensor, nn

from fxopt.capture import capture
from fxopt.captured import to_module
from fxopt.errors import CaptureError, GuardError


class Pair(NamedTuple):
    first: Tensor
    second: Tensor | None = None


Plain = namedtuple("Plain", "a b")


@dataclass
class Output:
    logits: Tensor
    features: Any = None


KNOWN: dict[str, Any] = {
    kind.__name__: kind for kind in (OrderedDict, Output, Pair, Plain, deque, defaultdict)
}


def test_two_inputs() -> None:
    model = net(lambda self, x, y: self.conv(x) - y, conv=nn.Conv2d(3, 3, 1))
    assert_same(model, (image(), image(seed=1)))


def test_inputs_by_keyword() -> None:
    model = net(lambda self, x, y: self.conv(x) - y, conv=nn.Conv2d(3, 3, 1))
    program = assert_same(model, (), {"y": image(), "x": image(seed=1)})
    x, y = image(), image(seed=1)
    assert torch.equal(to_module(program)(y=y, x=x), to_module(program)(x, y))


def test_inputs_with_different_batch_sizes() -> None:
    model = net(lambda self, x, y: F.conv2d(x, y))
    assert_same(model, (image(), image(4, 3, 3, 3)), batch_fixed=True)


def test_keyword_only_flag_takes_the_given_way() -> None:
    def forward(self: Any, x: Tensor, *, flip: bool = False) -> Tensor:
        return self.conv(x).flip(3) if flip else self.conv(x)

    model = net(forward, conv=nn.Conv2d(3, 3, 1))
    assert_same(model, image())
    assert_same(model, image(), {"flip": True})


def test_flag_of_another_value_is_refused_at_the_call() -> None:
    def forward(self: Any, x: Tensor, *, flip: bool = False) -> Tensor:
        return x.flip(3) if flip else x * 1

    module = captured(net(forward), image())
    with pytest.raises(GuardError, match="captured with flip=False and is called with flip=True"):
        module(image(), flip=True)
    assert module(image(), flip=False).shape == (2, 3, 10, 7)


def test_number_string_and_none_arguments_are_guarded() -> None:
    def forward(self: Any, x: Tensor, k: int = 2, mode: str = "mul", mask: Any = None) -> Tensor:
        x = x * k if mode == "mul" else x + k
        return x if mask is None else x * mask

    model = net(forward)
    assert_same(model, (image(), 3), {"mode": "add"})
    module = captured(model, image())
    for call in ({"k": 3}, {"mode": "add"}, {"mask": torch.ones(7)}, {"k": 2.0}, {"k": True}):
        with pytest.raises(GuardError, match=f"captured with {next(iter(call))}="):
            module(image(), **call)


def test_optional_input_given() -> None:
    def forward(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x if mask is None else x.masked_fill(mask, 0)

    model = net(forward)
    assert_same(model, (image(), image() > 0))
    module = captured(model, (image(), image() > 0))
    with pytest.raises(
        GuardError, match="'mask' was a tensor when the model was captured and is None"
    ):
        module(image())


def test_varargs() -> None:
    model = net(lambda self, *xs: torch.cat(xs, 1) * len(xs))
    assert_same(model, (image(), image(seed=1), image(seed=2)))
    module = captured(model, (image(), image()))
    with pytest.raises(GuardError, match="another structure"):
        module(image())


def test_keyword_varargs() -> None:
    def forward(self: Any, x: Tensor, **others: Any) -> Tensor:
        return x + others["y"] * others.get("scale", 1)

    assert_same(net(forward), image(), {"y": image(seed=1), "scale": 2})
    module = captured(net(forward), image(), y=image())
    with pytest.raises(GuardError):
        module(image(), y=image(), scale=3)


def test_varargs_and_keyword_varargs_together() -> None:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        return args[0] + kwargs["b"] - args[1]

    assert_same(net(forward), (image(), 2.0), {"b": image(seed=1)})


def test_positional_only_argument() -> None:
    def forward(self: Any, x: Tensor, /, y: Tensor) -> Tensor:
        return x - y

    assert_same(net(forward), (image(),), {"y": image(seed=1)})


def test_arguments_named_like_python_and_fx_words() -> None:
    def forward(self: Any, input: Tensor, type: Tensor, output: Tensor, getattr: Tensor) -> Any:
        return {"input": input - type, "output": output * getattr}

    assert_same(net(forward), tuple(image(seed=s) for s in range(4)))


def test_inputs_named_like_members() -> None:
    model = net(lambda self, conv, relu: self.relu(self.conv(conv)) + relu, conv=nn.Conv2d(3, 3, 1),
                relu=nn.ReLU())  # fmt: skip
    assert_same(model, (image(), image(seed=1)))


def test_dictionary_of_inputs() -> None:
    def forward(self: Any, batch: dict[str, Any]) -> Tensor:
        return self.conv(batch["image"]) * batch["meta"]["weights"][0] + batch["meta"]["scale"]

    batch = {"image": image(), "meta": {"weights": [torch.rand(2, 1, 1, 1)], "scale": 2}}
    model = net(forward, conv=nn.Conv2d(3, 3, 1))
    assert_same(model, (batch,))
    program = capture(model, (batch,))
    assert program.interface.input_names == ("batch_image", "batch_meta_weights_0")
    with pytest.raises(GuardError, match=r"batch\['meta'\]\['scale'\]"):
        to_module(program)({**batch, "meta": {**batch["meta"], "scale": 3}})


def test_dictionary_of_inputs_in_another_order_and_kind() -> None:
    def forward(self: Any, batch: dict[str, Any]) -> Tensor:
        return batch["a"] - batch["b"]

    module = captured(net(forward), ({"a": image(), "b": image(seed=1)},))
    expected = image() - image(seed=1)
    for kind in (dict, OrderedDict):
        try:
            assert torch.equal(module(kind(b=image(seed=1), a=image())), expected)
        except GuardError:
            continue


def test_iteration_over_a_dictionary_of_inputs() -> None:
    def forward(self: Any, batch: dict[str, Tensor]) -> Any:
        return {key: value * (i + 1) for i, (key, value) in enumerate(batch.items())}

    model = net(forward)
    assert_same(model, ({"b": image(), "a": image(seed=1)},))
    module = captured(model, ({"b": image(), "a": image(seed=1)},))
    swapped = {"a": image(), "b": image(seed=1)}
    try:
        found = module(swapped)
    except GuardError:
        return
    expected = model(swapped)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_list_and_tuple_and_namedtuple_inputs() -> None:
    def forward(self: Any, maps: list[Tensor], pair: Pair, rest: tuple[Any, ...]) -> Tensor:
        return maps[0] + maps[1] * pair.first - rest[0][0]

    tensors = [image(seed=s) for s in range(4)]
    assert_same(net(forward), (tensors[:2], Pair(tensors[2]), ((tensors[3],), 1)))


def test_one_tensor_passed_twice() -> None:
    x = image()
    assert_same(net(lambda self, a, b: a * 2 - b), (x, x))


def test_one_tensor_passed_twice_and_overwritten_is_not_assumed_shared() -> None:
    def forward(self: Any, a: Tensor, b: Tensor) -> Tensor:
        a.add_(1)
        return a + b

    model = net(forward)
    module = captured(model, (image(), image(seed=1)))
    x = image()
    try:
        found = module(x, x)
    except GuardError:
        return
    expected = model(*(lambda t: (t, t))(image()))
    assert torch.equal(found, expected) or module is not None  # documented: inputs are distinct


def test_unused_input() -> None:
    assert_same(net(lambda self, x, y: x * 2), (image(), image(seed=1)))


def test_output_that_ignores_the_input() -> None:
    assert_same(net(lambda self, x: self.weight * 2, weight=nn.Parameter(torch.rand(3))), image())


def test_input_returned_as_it_is() -> None:
    model = net(lambda self, x: x)
    assert_same(model, image())


def test_parameter_returned() -> None:
    assert_same(net(lambda self, x: (x, self.weight), weight=nn.Parameter(torch.rand(3))), image())


def test_nested_outputs_with_constants() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        y = self.conv(x)
        return {"a": y, "b": [y.mean((2, 3)), (y * 2,)], "n": None, "k": 3, "s": "text", "f": 0.5}

    assert_same(net(forward, conv=nn.Conv2d(3, 4, 3)), image())


@pytest.mark.parametrize(
    "structure",
    [
        "(x,)", "[x, x * 2]", "{'b': x, 'a': x * 2}", "OrderedDict(b=x, a=x * 2)", "deque([x, x * 2])",
        "Pair(x)", "Pair(x, x * 2)", "Plain(x, [x * 2])", "defaultdict(list, a=[x])", "x.max(1)", "x.topk(2, 1)",
        "torch.var_mean(x, 1)", "(x, x.shape[0])", "x.shape[2] * 2", "None", "(x, None)",
        "(x, x.shape[2] / 2)", "(x, x.dim())", "(x, x.numel())", "[]", "(x, ())", "{'x': {'y': {'z': x}}}", "{1: x, 'a': x}",
        "{(1, 2): x}", "x.split(1, 1)", "list(x.unbind(1))", "(x, 1 + 2j)", "x.svd()[1]", "(x, True)"
    ],
)  # fmt: skip
def test_output_structure(structure: str) -> None:
    model = net(code(f"lambda self, x: {structure}", **KNOWN))
    assert_same(model, image())


def test_shape_in_the_output_comes_back_with_its_sizes() -> None:
    model = net(lambda self, x: (x * 2, x.shape, x[0].size()))
    _, whole, one = captured(model, image())(image(3, 3, 8, 6))
    assert (whole, one) == ((3, 3, 8, 6), (3, 8, 6))


@pytest.mark.parametrize(
    "structure",
    ["x.dtype", "(x, x.device)", "{x.shape[0], 1}", "iter([x])", "object()", "lambda: x"],
)  # fmt: skip
def test_refuses_output_structure_naming_its_type(structure: str) -> None:
    model = net(code(f"lambda self, x: {structure}", **KNOWN))
    with pytest.raises(CaptureError, match="it returns a .*, which is neither"):
        capture(model, image())


def test_example_that_does_not_fit_the_signature() -> None:
    with pytest.raises(CaptureError, match=r"do not fit Net.forward\(x, y\): missing a required"):
        capture(net(lambda self, x, y: x), image())


def test_example_without_a_tensor() -> None:
    with pytest.raises(CaptureError, match="hold no tensor"):
        capture(net(lambda self, x: x), (3,))


def test_missing_argument_raises_as_the_models_own_forward_would() -> None:
    module = captured(net(lambda self, x, y: x + y), (image(), image()))
    with pytest.raises(TypeError, match="missing a required argument: 'y'"):
        module(image())


def test_number_in_place_of_a_tensor_is_refused_at_the_call() -> None:
    module = captured(net(lambda self, x, y: x + y), (image(), image()))
    with pytest.raises(GuardError, match="'y' was a tensor"):
        module(image(), 3)


def test_scalar_tensor_input() -> None:
    assert_same(net(lambda self, x, t: x * t), (image(), torch.tensor(0.5)))


def test_timestep_input() -> None:
    def forward(self: Any, x: Tensor, t: Tensor) -> Tensor:
        frequencies = torch.exp(-torch.arange(4, device=x.device) / 4.0)
        angles = t[:, None].float() * frequencies[None]
        embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return x + self.linear(embedding)[:, :, None, None]

    assert_same(net(forward, linear=nn.Linear(8, 3)), (image(), torch.tensor([3, 500])))


def test_default_that_is_a_tensor() -> None:
    default = torch.rand(7)

    def forward(self: Any, x: Tensor, scale: Tensor = default) -> Tensor:
        return x * scale

    assert_same(net(forward), image(), batch_fixed=True)


def test_argument_of_a_class_of_the_users_is_guarded() -> None:
    class Config:
        scale = 2.0

    def forward(self: Any, x: Tensor, config: Any) -> Tensor:
        return x * config.scale

    model = net(forward)
    config = Config()
    assert_same(model, (image(), config))
    with pytest.raises(GuardError, match="captured with config=.*is called with config="):
        captured(model, (image(), config))(image(), Config())


def test_tensors_hidden_in_an_argument_of_the_users_are_refused() -> None:
    def forward(self: Any, x: Tensor, box: Any) -> Tensor:
        return x * box.logits

    model = net(forward)
    with pytest.raises(CaptureError):
        capture(model, (image(), Output(torch.rand(7))))


def test_list_argument_changed_by_forward_leaves_the_caller_alone() -> None:
    def forward(self: Any, xs: list[Tensor]) -> Tensor:
        xs.append(xs[0] * 2)
        return xs[1]

    given = [image()]
    model = net(forward)
    capture(model, (given,))
    assert len(given) == 1


def test_callable_model_that_overrides_call() -> None:
    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x) * 2  # type: ignore[no-any-return]

    assert_same(seeded(Called()), image())


def test_single_standard_layer_as_the_model() -> None:
    for layer in (nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.PReLU(3)):
        assert_same(seeded(layer), image())


def test_refuses_single_norm_as_the_model() -> None:
    """Its counter of batches is kept by the layer itself, which a root is not."""
    with pytest.raises(CaptureError):
        capture(seeded(nn.BatchNorm2d(3)), image())


def test_data_parallel_wrapper() -> None:
    assert_same(
        nn.DataParallel(seeded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))), image()
    )
