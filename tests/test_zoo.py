"""Models and inputs by name: what loads, and one test per refusal."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterator
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
        ("resnet18", "cannot read the model 'resnet18'; write torchvision:NAME, timm:NAME, "),
        ("a-package:Net", "cannot read the model 'a-package:Net'"),
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


@pytest.fixture
def package(models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package in the current directory, as ``python -m`` finds it."""
    directory = models.parent / "my_package"
    directory.mkdir()
    (directory / "__init__.py").write_text("from my_package.parts import Net\n")
    (directory / "parts.py").write_text(MODELS)
    (directory / "broken.py").write_text("import my_package\n\nimport no_such_package\n")
    (directory / "stops.py").write_text("raise SystemExit(3)\n")
    many = "\n".join(f"def net{i}(): ..." for i in range(12))
    (directory / "many.py").write_text(many)
    monkeypatch.chdir(models.parent)
    path = list(sys.path)
    yield directory
    sys.path[:] = path
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "spec", ["my_package:Net", "my_package.parts:Net", "my_package.parts:ready"]
)
def test_loads_a_class_and_a_module_from_a_package(package: Path, spec: str) -> None:
    assert type(load_model(spec)).__name__ == "Net"


def test_a_library_is_a_package_too() -> None:
    pytest.importorskip("timm")
    assert type(load_model("timm.models:resnet18")).__name__ == "ResNet"


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("my_packag:Net", "no Python module 'my_packag' .*; did you mean my_package"),
        ("zzzzz:Net", "no Python module 'zzzzz' .*; it must be in '.*' or installed"),
        ("my_package.part:Net", "no Python module 'my_package.part' .* mean my_package.parts\\?"),
        ("my_package.zzzzz:Net", "'my_package.zzzzz' .*; it must be in 'my_package'"),
        ("my_package.parts.more:Net", "'my_package.parts' is no package"),
        ("my_package.broken:Net", r"cannot be imported: ModuleNotFoundError: .* \(broken.py:3\)"),
        ("my_package.stops:Net", r"cannot be imported: SystemExit: 3 \(stops.py:1\)"),
        ("my_package:Nets", "'my_package' has no callable 'Nets'; callables there: Net$"),
        ("my_package.many:nett5", "callables there: net5, .*, \\.\\.\\.$"),
        ("my_package.many:zzz", "callables there: net0, .*net7, \\.\\.\\.$"),
        ("my_package.parts:WIDTH", "'my_package.parts' has a int, no callable, 'WIDTH'"),
        ("my_package.parts:boom", r"boom\(\) raised ValueError: no width \(parts.py:17\)"),
        ("my_package.parts:nothing", r"nothing\(\) in 'my_package.parts' gives None"),
    ],
)
def test_refuses_a_model_of_a_package(package: Path, spec: str, reason: str) -> None:
    with pytest.raises(ModelSpecError, match=reason) as caught:
        load_model(spec)
    assert "\n" not in str(caught.value)


def test_loads_a_pickled_module_where_it_is_trusted(package: Path, tmp_path: Path) -> None:
    model = load_model("my_package:Net", seed=3)
    torch.save(model, tmp_path / "net.pt")
    again = load_model(str(tmp_path / "net.pt"), trust_pickle=True)
    assert torch.equal(again[0].weight, model[0].weight)
    torch.save(model, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert type(load_model(str(tmp_path / "old.pth"), trust_pickle=True)).__name__ == "Net"


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (pytest.fail, ("the file's code was run",))


def test_runs_no_code_of_a_pickle_that_is_not_trusted(tmp_path: Path) -> None:
    torch.save(Evil(), tmp_path / "net.pt")
    with pytest.raises(
        ModelSpecError, match="to load it is to run whatever code is in it; .*--trust"
    ):
        load_model(str(tmp_path / "net.pt"))


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            {"a.weight": torch.zeros(1)},
            "holds a state_dict, which has no code; .*--weights .*net.pt",
        ),
        ([1, 2], "holds a list, not an nn.Module"),
        ({"epoch": 3}, "holds a dict, not an nn.Module"),
    ],
)
def test_refuses_a_file_that_holds_no_module(
    tmp_path: Path, content: object, reason: str, trust: bool
) -> None:
    torch.save(content, tmp_path / "net.pt")
    with pytest.raises(ModelSpecError, match=reason):
        load_model(str(tmp_path / "net.pt"), trust_pickle=trust)


def test_refuses_a_pickle_of_another_thing_or_of_classes_that_are_gone(
    package: Path, tmp_path: Path
) -> None:
    file = tmp_path / "net.pt"
    torch.save(Path, file)
    with pytest.raises(ModelSpecError, match="holds a type, not an nn.Module"):
        load_model(str(file), trust_pickle=True)
    torch.save(load_model("my_package:Net"), file)
    (package / "parts.py").write_text("")
    (package / "__init__.py").write_text("")
    for name in ("my_package", "my_package.parts"):
        del sys.modules[name]
    with pytest.raises(ModelSpecError, match="cannot be unpickled: AttributeError: .*importable"):
        load_model(str(file), trust_pickle=True)


def test_refuses_other_formats_by_their_name(tmp_path: Path) -> None:
    file = tmp_path / "net.pt"
    with pytest.raises(ModelSpecError, match="there is no file '.*net.pt'"):
        load_model(str(file))
    file.write_bytes(b"nothing of torch's")
    with pytest.raises(ModelSpecError, match="is no file of torch.save; was it written"):
        load_model(str(file))
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("net/data.pkl", b"")
        archive.writestr("net/constants.pkl", b"")
    with pytest.raises(ModelSpecError, match="is TorchScript, which cannot be captured"):
        load_model(str(file))
    torch.export.save(torch.export.export(nn.ReLU(), (torch.zeros(2),)), tmp_path / "exported.pt2")
    (tmp_path / "exported.pt2").rename(file)
    with pytest.raises(ModelSpecError, match="is an exported program; rename it to 'net.pt2'"):
        load_model(str(file))


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
