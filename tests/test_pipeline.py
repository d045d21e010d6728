"""transform, and specs as text: every option type, every error under its character."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Optional

import pytest
import torch
from seeded import ConvBn, image, seeded
from torch import nn

import fxopt.plugins
from fxopt.capture import capture
from fxopt.captured import history
from fxopt.edit import Edit
from fxopt.errors import CaptureError, PipelineSpecError, VerificationError
from fxopt.options import option_types, parse_value, required_options, type_text
from fxopt.passes import FoldConvBn
from fxopt.pipeline import (
    available_passes,
    parse_pipeline,
    resolve_passes,
    run_pipeline,
    transform,
)
from fxopt.program import Program
from fxopt.results import Declined
from fxopt.rewrite import Preserves, Site


@dataclass(frozen=True)
class Nothing:
    """A pass that finds nothing."""

    name: ClassVar[str] = "nothing"
    preserves: ClassVar[Preserves] = Preserves.VALUES

    def sites(self, program: Program) -> Iterator[Site | Declined]:
        yield from ()

    def rewrite(self, site: Site, edit: Edit) -> None:
        """Never called."""


class Grid:
    """Rows and columns as text: ``3x4``."""

    def __init__(self, text: str) -> None:
        self.rows, self.columns = map(int, text.split("x"))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Grid) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


class Rounding(enum.Enum):
    UP = "up"
    DOWN = "down"


@dataclass(frozen=True)
class Every(Nothing):
    """One option of every type."""

    name: ClassVar[str] = "every"

    count: int = 1
    ratio: float = 0.5
    label: str = ""
    on: bool = False
    mode: Literal["keep", "drop"] = "keep"
    bits: Literal[4, 8] = 8
    limit: int | None = None
    either: int | float = 0
    maybe: Optional[str] = None  # noqa: UP045 - both spellings are to work
    rounding: Rounding = Rounding.UP
    grid: Grid | None = None
    path: Path = Path()
    derived: int = field(init=False, default=0)


@dataclass(frozen=True)
class Needs(Nothing):
    """An option without a default, and a check on it."""

    name: ClassVar[str] = "needs"

    size: int
    more: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, not {self.size}")


@pytest.fixture(autouse=True)
def _test_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fxopt.plugins, "BUILT_IN", (Nothing, Every, FoldConvBn, Needs))


def only(spec: str) -> Any:
    (found,) = parse_pipeline(spec)
    return found


# ---- the grammar -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("nothing", (Nothing(),)),
        (" nothing ", (Nothing(),)),
        ("nothing{}", (Nothing(),)),
        ("nothing,every", (Nothing(), Every())),
        ("every{count=3},nothing , needs{size=2}", (Every(count=3), Nothing(), Needs(2))),
        ("every { count = 3 , ratio = 0.25 }", (Every(count=3, ratio=0.25),)),
        ("\tevery{\n count=3\n}", (Every(count=3),)),
    ],
)
def test_specs(spec: str, expected: tuple[Any, ...]) -> None:
    assert parse_pipeline(spec) == expected


@pytest.mark.parametrize(
    ("text", "option", "value"),
    [
        ("count=-3", "count", -3),
        ("ratio=1e-3", "ratio", 1e-3),
        ("ratio=inf", "ratio", float("inf")),
        ("label=a b", "label", "a b"),
        ("label=", "label", ""),
        ("on=true", "on", True),
        ("on=False", "on", False),
        ("mode=drop", "mode", "drop"),
        ("bits=4", "bits", 4),
        ("limit=none", "limit", None),
        ("limit=7", "limit", 7),
        ("either=2", "either", 2),
        ("either=2.5", "either", 2.5),
        ("maybe=None", "maybe", None),
        ("maybe=x", "maybe", "x"),
        ("rounding=down", "rounding", Rounding.DOWN),
        ("grid=3x4", "grid", Grid("3x4")),
        ("grid=none", "grid", None),
        ("path=a/b.json", "path", Path("a/b.json")),
    ],
)
def test_option_of_every_type(text: str, option: str, value: Any) -> None:
    found = getattr(only(f"every{{{text}}}"), option)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("spec", "at", "message"),
    [
        ("", 0, "a pass name is missing; there are every, fold_conv_bn, needs, nothing"),
        ("nothing,", 8, "a pass name is missing"),
        ("nothing,,every", 8, "a pass name is missing"),
        ("{count=1}", 0, "a pass name is missing"),
        ("nothing, evry", 9, "unknown pass 'evry'; did you mean 'every'?"),
        ("zzz", 0, "unknown pass 'zzz'; there are every, fold_conv_bn, needs, nothing"),
        ("nothing every", 0, "unknown pass 'nothing every'"),
        ("every{}x", 7, "unexpected 'x'; passes are separated by commas"),
        ("every}", 5, "unexpected '}'"),
        ("every=3", 5, "unexpected '='"),
        ("every{cuont=3}", 6, "pass 'every' has no option 'cuont'; did you mean 'count'?"),
        ("every{zzzz=3}", 6, "pass 'every' has no option 'zzzz'; there are count, ratio"),
        ("every{derived=3}", 6, "pass 'every' has no option 'derived'"),
        ("nothing{a=1}", 8, "pass 'nothing' has no option 'a'; it has none"),
        ("every{count=3,count=4}", 14, "option 'count' is given twice"),
        ("every{count}", 11, "'=' expected after option 'count'"),
        ("every{count", 11, "'=' expected after option 'count'"),
        ("every{count=1", 13, "'}' or ',' expected"),
        ("every{count=1{", 13, "'}' or ',' expected"),
        ("every{", 6, "the name of an option is missing"),
        ("every{ ,count=1}", 7, "the name of an option is missing"),
        ("every{=1}", 6, "the name of an option is missing"),
        ("every{count=1,}", 14, "the name of an option is missing"),
        ("every{count=x}", 12, "option 'count' of 'every' takes int, not 'x'"),
        ("every{count= 1.5}", 13, "option 'count' of 'every' takes int, not '1.5'"),
        ("every{count=}", 12, "option 'count' of 'every' takes int, not ''"),
        ("every{ratio=a}", 12, "takes float, not 'a'"),
        ("every{on=yes}", 9, "takes true|false, not 'yes'"),
        ("every{mode=lose}", 11, "takes keep|drop, not 'lose'"),
        ("every{bits=5}", 11, "takes 4|8, not '5'"),
        ("every{limit=x}", 12, "takes int|none, not 'x'"),
        ("every{either=x}", 13, "takes int|float, not 'x'"),
        ("every{rounding=UP}", 15, "takes up|down, not 'UP'"),
        ("every{grid=3}", 11, "takes Grid|none, not '3'"),
        ("nothing,needs", 8, "pass 'needs' needs its option 'size'"),
        ("needs{size=0}", 0, "pass 'needs': size must be at least 1, not 0"),
    ],
)
def test_errors_point_at_the_character(spec: str, at: int, message: str) -> None:
    with pytest.raises(PipelineSpecError) as caught:
        parse_pipeline(spec)
    first, *rest = str(caught.value).split("\n")
    assert first.startswith(message) or message in first
    assert rest == [f"  {spec}", f"  {' ' * at}^"]


def test_mark_stands_under_its_character_after_tabs_and_new_lines() -> None:
    with pytest.raises(PipelineSpecError) as caught:
        parse_pipeline("nothing,\n\tevry")
    assert str(caught.value).split("\n")[1:] == ["  nothing,  evry", "            ^"]


def test_option_of_a_type_without_a_text_form_is_a_bug_in_the_pass() -> None:
    with pytest.raises(TypeError, match="make it a class with a text form"):
        parse_value("1", list[int])


def test_option_types_leave_out_what_is_no_option() -> None:
    assert list(option_types(Needs)) == ["size", "more"]
    assert "derived" not in option_types(Every)
    assert required_options(Needs) == ("size",)
    assert option_types(FoldConvBn) == {"scale_shift": bool}
    assert type_text(option_types(Every)["maybe"]) == "str|none"


def test_passes_are_listed_by_name() -> None:
    assert list(available_passes()) == ["every", "fold_conv_bn", "needs", "nothing"]


# ---- instances, names and specs ----------------------------------------------------------------


def test_instances_names_and_specs_mix() -> None:
    mixed = [Every(count=2), "nothing", "every{count=3},fold_conv_bn"]
    assert resolve_passes(mixed) == (Every(count=2), Nothing(), Every(count=3), FoldConvBn())
    assert resolve_passes(Nothing()) == (Nothing(),)  # type: ignore[arg-type]
    assert resolve_passes("nothing") == (Nothing(),)
    assert resolve_passes(()) == ()


@pytest.mark.parametrize(
    ("wrong", "shown"), [(Every, "the class Every"), (3, "3"), (nn.ReLU(), r"ReLU\(\)")]
)
def test_what_is_no_pass_is_refused(wrong: Any, shown: str) -> None:
    with pytest.raises(PipelineSpecError, match=rf"{shown} is no pass; give an instance, a name"):
        resolve_passes([wrong])


def test_wrong_spec_is_found_before_the_model_is_captured() -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("ran")

    with pytest.raises(PipelineSpecError, match="unknown pass"):
        transform(Fails(), "fold_conv", image())


# ---- transform ---------------------------------------------------------------------------------


def test_transform_records_what_each_pass_did() -> None:
    model = seeded(ConvBn())
    module = transform(model, ["every{count=2}", FoldConvBn()], image())
    first, second = history(module)
    assert (first.name, first.options["count"], first.rewritten) == ("every", 2, ())
    assert (second.name, [s.where for s in second.rewritten]) == ("fold_conv_bn", ["'norm'"])
    assert second.verification is not None
    x = image(5, 3, 6, 7)
    torch.testing.assert_close(module(x), model(x), rtol=1e-5, atol=1e-6)


def test_verify_false_is_recorded() -> None:
    module = transform(seeded(ConvBn()), "fold_conv_bn", image(), verify=False)
    assert [record.verification for record in history(module)] == [None]


def test_without_passes_the_captured_model_comes_back() -> None:
    model = seeded(ConvBn())
    module = transform(model, [], image())
    assert history(module) == ()
    assert torch.equal(module(image()), model(image()))


def test_each_pass_runs_on_what_the_last_one_made() -> None:
    first, second = run_pipeline(capture(seeded(ConvBn()), image()), "fold_conv_bn,fold_conv_bn")
    assert second.before is first.after
    assert len(first.rewritten) == 1
    assert second.rewritten == ()


def test_transformed_module_keeps_its_history() -> None:
    module = transform(seeded(ConvBn()), "every", image())
    again = transform(module, "fold_conv_bn")
    assert [record.name for record in history(again)] == ["every", "fold_conv_bn"]
    assert [record.name for record in history(module)] == ["every"]


def test_transformed_module_keeps_its_history_at_other_inputs() -> None:
    module = transform(seeded(ConvBn()), "every", image())
    again = transform(module, "fold_conv_bn", image(1, 3, 20, 10))
    assert [record.name for record in history(again)] == ["every", "fold_conv_bn"]
    assert torch.allclose(again(image()), module(image()), atol=1e-5)


def test_transformed_module_is_taken_with_its_present_weights() -> None:
    module: Any = transform(seeded(ConvBn()), [], image())
    before = module(image())
    other = seeded(ConvBn(), seed=9)
    module.load_state_dict(other.state_dict())
    again = transform(module, "fold_conv_bn")
    assert not torch.allclose(again(image()), before, atol=1e-2)
    torch.testing.assert_close(again(image()), other(image()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_transformed_module_is_taken_in_its_present_dtype(dtype: torch.dtype) -> None:
    module = transform(seeded(ConvBn()), [], image()).to(dtype)
    again = transform(module, "fold_conv_bn")
    (record,) = history(again)
    assert record.verification is not None
    assert record.verification.shipped_dtype == str(dtype).removeprefix("torch.")
    assert again(image(dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("training", [False, True])
def test_result_is_in_the_mode_that_the_module_is_in(training: bool) -> None:
    module = transform(seeded(ConvBn()), [], image()).train(training)
    assert transform(module, "nothing").training == training


def test_transforming_again_leaves_the_first_result() -> None:
    module: Any = transform(seeded(ConvBn()), [], image())
    before = {k: v.clone() for k, v in module.state_dict().items()}
    again: Any = transform(module, "fold_conv_bn")
    with torch.no_grad():
        again.conv.weight.zero_()
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_failed_verification_leaves_the_users_model() -> None:
    class Drop(FoldConvBn):
        def rewrite(self, site: Site, edit: Edit) -> None:
            edit.replace_uses(site.node, "conv")

    model = seeded(ConvBn())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(VerificationError):
        transform(model, Drop(), image())  # type: ignore[arg-type]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_model_that_refuses_its_input_is_a_capture_error() -> None:
    with pytest.raises(CaptureError, match="'conv'"):
        transform(seeded(ConvBn()), "fold_conv_bn", image(1, 5, 9, 13))


def test_keyword_arguments_are_passed_on() -> None:
    class Scaled(ConvBn):
        def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * scale

    model = seeded(Scaled())
    x, scale = image(), torch.tensor([2.0])
    module = transform(model, "fold_conv_bn", x, {"scale": scale})
    torch.testing.assert_close(module(x, scale=scale), model(x, scale=scale))
