"""Models and inputs by name: what loads, and one test per refusal."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fxopt.errors import ModelSpecError
from fxopt.inputs import InputSpec, example_tensors, parse_dtype, parse_input
from fxopt.zoo import load_model

MODELS = """
import torch
from torch import nn

import a_sibling

WIDTH = 4


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, WIDTH, 3), nn.Dropout())


def boom():
    width = None
    raise ValueError("no width")


def wants(width):
    return Net()


def nothing():
    return None


ready = Net()
"""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    (tmp_path / "a_sibling.py").write_text("")
    path = tmp_path / "nets.py"
    path.write_text(MODELS)
    return path


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        ("torchvision:resnet18", "ResNet"),
        ("torchvision:googlenet", "GoogLeNet"),
        ("torchvision:lraspp_mobilenet_v3_large", "LRASPP"),
        ("torchvision:quantized_mobilenet_v2", "QuantizableMobileNetV2"),
        ("torchvision:fasterrcnn_mobilenet_v3_large_320_fpn", "FasterRCNN"),
        ("torchvision:r3d_18", "VideoResNet"),
        ("timm:mobilenetv2_100", "EfficientNet"),
        ("timm:resnet18.a1_in1k", "ResNet"),
    ],
)
def test_loads_models_by_name_in_eval_mode(
    spec: str, kind: str, recwarn: pytest.WarningsRecorder
) -> None:
    model = load_model(spec)
    assert type(model).__name__ == kind
    assert not any(module.training for module in model.modules())
    assert list(recwarn) == []


@pytest.mark.parametrize("name", ["Net", "ready"])
def test_loads_a_class_and_a_module_from_a_file(models: Path, name: str) -> None:
    model = load_model(f"{models}:{name}")
    assert type(model).__name__ == "Net"
    assert not model[1].training


def test_the_seed_decides_and_the_random_state_stays(models: Path) -> None:
    state = torch.get_rng_state()
    one, same, other = (load_model(f"{models}:Net", seed=seed)[0].weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_converts_to_a_dtype(models: Path) -> None:
    assert load_model(f"{models}:Net", dtype=torch.float16)[0].weight.dtype == torch.float16


def test_loads_weights(models: Path, tmp_path: Path) -> None:
    wanted = load_model(f"{models}:Net", seed=7).state_dict()
    torch.save(wanted, tmp_path / "w.pt")
    model = load_model(f"{models}:Net", weights=tmp_path / "w.pt")
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("torchvision:resnet81", "torchvision has no model 'resnet81'; did you mean .*resnet18"),
        ("torchvision:zzzzz", r"no model 'zzzzz'; see torchvision's own list_models\(\)"),
        ("timm:mobilnetv2_100", "timm has no model 'mobilnetv2_100'; did you mean mobilenetv2_100"),
        ("timm:hf-hub:someone/net", "timm has no model 'hf-hub:someone/net'"),
        ("resnet18", "cannot read the model 'resnet18'; write torchvision:NAME, timm:NAME or"),
        ("nets.py", "cannot read the model 'nets.py'"),
        ("missing.py:Net", "there is no file 'missing.py'"),
        ("{models}:Nets", "has no callable 'Nets'; callables there: Net, boom, nothing, ready, wa"),
        ("{models}:WIDTH", "has a int, no callable, 'WIDTH'; callables there: Net, "),
        ("{models}:boom", r"boom\(\) raised ValueError: no width \(nets.py:17\)"),
        ("{models}:wants", r"wants\(\) raised TypeError: .*'width'"),
        ("{models}:nothing", r"nothing\(\) in '.*nets.py' gives None, not an nn.Module"),
    ],
)
def test_refuses_a_model(models: Path, spec: str, reason: str) -> None:
    with pytest.raises(ModelSpecError, match=reason) as caught:
        load_model(spec.format(models=models))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def net(:\n", r"cannot be run: SyntaxError: invalid syntax \(broken.py, line 1\)"),
        ("\nimport no_such_package\n", r"ModuleNotFoundError: .*'no_such_package' \(broken.py:2\)"),
        ("raise SystemExit(3)\n", "cannot be run: SystemExit: 3"),
    ],
)
def test_refuses_a_file_that_does_not_run(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(ModelSpecError, match=reason):
        load_model(f"{tmp_path / 'broken.py'}:net")


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_names_the_extra_of_a_missing_package(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (package, f"{package}.models"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModelSpecError, match=rf"{package} .*pip install 'fxopt\[zoo\]'"):
        load_model(f"{package}:resnet18")


def test_reports_a_model_that_a_library_cannot_build(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> nn.Module:
        raise RuntimeError("out of\nluck")

    monkeypatch.setattr("timm.create_model", fails)
    with pytest.raises(ModelSpecError, match="cannot be built: RuntimeError: out of luck"):
        load_model("timm:resnet18")
    monkeypatch.setattr("timm.create_model", lambda *_, **__: 3)
    with pytest.raises(ModelSpecError, match=r"'timm:resnet18' gives a int, not an nn\.Module"):
        load_model("timm:resnet18")


def state_dict(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor | None] = {
        "0.weight": torch.zeros(4, 3, 3, 3),
        "0.bias": torch.zeros(4),
        **{key.replace("_", "."): tensor for key, tensor in changes.items()},
    }
    return {key: tensor for key, tensor in state.items() if tensor is not None}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (state_dict(**{"0_bias": None}), r"do not fit Net: 1 missing \(0.bias\)$"),
        (state_dict(extra=torch.zeros(1)), r"do not fit Net: 1 unexpected \(extra\)$"),
        (
            state_dict(**{"0_bias": torch.zeros(5), "extra": torch.zeros(1)}),
            r"1 unexpected \(extra\); 1 of another shape \(0.bias is \(5,\), the model's \(4,\)\)$",
        ),
        ({str(i): torch.zeros(1) for i in range(9)}, r"9 unexpected \(0, 1, 2, \.\.\.\)"),
        (state_dict(**{"0_bias": "no tensor"}), "do not load: .*0.bias"),  # type: ignore[arg-type]
        ([1, 2], "holds a list, not a state_dict"),
        (nn.ReLU(), r"cannot read weights from .* \(UnpicklingError\)"),
    ],
)
def test_refuses_weights_that_do_not_fit(
    models: Path, tmp_path: Path, content: object, reason: str
) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ModelSpecError, match=reason) as caught:
        load_model(f"{models}:Net", weights=tmp_path / "w.pt")
    assert "\n" not in str(caught.value)


def test_refuses_weights_that_are_corrupt_or_missing(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelSpecError, match="there is no weights file"):
        load_model(f"{models}:Net", weights=tmp_path / "w.pt")
    (tmp_path / "w.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ModelSpecError, match="cannot read weights from"):
        load_model(f"{models}:Net", weights=tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("1x3x160x224", InputSpec((1, 3, 160, 224))),
        ("7", InputSpec((7,))),
        ("mask=1x64x64:int64", InputSpec((1, 64, 64), "mask", torch.int64)),
        ("1x2:bool", InputSpec((1, 2), None, torch.bool)),
    ],
)
def test_reads_inputs(text: str, spec: InputSpec) -> None:
    assert parse_input(text) == spec


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1,3,224,224", "cannot read the input '1,3,224,224'; write sizes with x between them"),
        ("1x3x", "cannot read the input '1x3x'"),
        ("", "cannot read the input ''"),
        ("1x-3", "cannot read the input '1x-3'"),
        ("1x3:int3", "unknown dtype 'int3'; there are bfloat16, bool, "),
        ("1x0x4", "has a size of 0"),
    ],
)
def test_refuses_an_input(text: str, reason: str) -> None:
    with pytest.raises(ModelSpecError, match=reason):
        parse_input(text)


def test_refuses_a_name_given_twice() -> None:
    with pytest.raises(ModelSpecError, match="the input 'x' is given twice"):
        example_tensors([InputSpec((1,), "x"), InputSpec((2,), "x")])


def test_draws_seeded_examples() -> None:
    specs = [InputSpec((2, 3)), InputSpec((4,), "index", torch.int64)]
    state = torch.get_rng_state()
    args, kwargs = example_tensors(specs, parse_dtype("float16"), seed=3)
    again, _ = example_tensors(specs, torch.float16, seed=3)
    assert args is not None
    assert again is not None
    assert kwargs is not None
    assert args[0].dtype == torch.float16
    assert torch.equal(args[0], again[0])
    assert set(kwargs["index"].tolist()) <= {0, 1}
    assert torch.equal(torch.get_rng_state(), state)
    assert example_tensors([]) == (None, None)
