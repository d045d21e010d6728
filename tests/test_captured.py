"""The captured module: copied, saved, switched between modes, with its history."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capture.checks import captured, image, net, seeded
from torch import Tensor, nn

import fxopt
from fxopt.capture import capture
from fxopt.captured import CapturedModule, history, program_of, to_module
from fxopt.errors import CaptureError, GuardError


def small() -> Any:
    layers = [
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(True),
        nn.Dropout(0.4),
        nn.Conv2d(4, 2, 1),
    ]
    return seeded(nn.Sequential(*layers))


def saved(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def output(module: nn.Module, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return module(image())  # type: ignore[no-any-return]


COPIES = pytest.mark.parametrize("copied", [copy.deepcopy, saved], ids=["deepcopy", "pickle"])


@COPIES
@pytest.mark.parametrize("training", [False, True])
def test_copy_computes_the_same_in_its_mode(copied: Any, training: bool) -> None:
    module = captured(small(), image()).train(training)
    twin = copied(module)
    assert isinstance(twin, CapturedModule)
    assert twin.training is training
    assert [m.training for m in twin.modules()] == [m.training for m in module.modules()]
    assert torch.equal(output(module), output(twin))


@COPIES
def test_copy_has_parameters_and_statistics_of_its_own(copied: Any) -> None:
    module = captured(small(), image())
    twin = copied(module)
    before = output(twin.eval())
    with torch.no_grad():
        module.get_submodule("0").weight.zero_()
    module.train()(image())
    assert torch.equal(output(twin), before)


@COPIES
def test_copy_keeps_ties(copied: Any) -> None:
    first, second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    second.weight = first.weight
    twin = copied(captured(net(lambda self, x: self.b(self.a(x)), a=first, b=second), image()))
    assert twin.a.weight is twin.b.weight


@COPIES
def test_copy_keeps_guards_modes_and_structure(copied: Any) -> None:
    def forward(self: Any, x: Tensor, *, scale: int = 2) -> Any:
        y = self.conv(x) * scale
        return {"out": y if x.shape[3] > 5 else y * 2, "n": None}

    twin = copied(captured(net(forward, conv=nn.Conv2d(3, 4, 3)), image()))
    assert set(twin(image())) == {"out", "n"}
    with pytest.raises(GuardError, match="scale=3"):
        twin(image(), scale=3)
    with pytest.raises(GuardError, match=r"x.shape\[3\] > 5"):
        twin(image(2, 3, 9, 5))


@COPIES
def test_copy_of_a_borrowed_layer_follows_its_owner(copied: Any) -> None:
    model = net(lambda self, x: nn.functional.conv2d(x, self.kernel),
                kernel=nn.Parameter(torch.randn(4, 3, 3, 3)))  # fmt: skip
    twin = copied(captured(model, image()))
    assert list(twin.state_dict()) == ["kernel"]
    with torch.no_grad():
        twin.kernel.zero_()
    assert output(twin).abs().sum() == 0


@COPIES
def test_copy_of_an_eval_only_module_is_eval_only(copied: Any) -> None:
    model = net(lambda self, x: x * 2 if self.training else x)
    twin = copied(captured(model, image()))
    with pytest.raises(CaptureError, match="for evaluation only"):
        twin.train()


@COPIES
def test_copy_keeps_its_history(copied: Any) -> None:
    module = fxopt.transform(small().eval(), ["fold_conv_bn"], image())
    twin = copied(module)
    assert history(twin) == history(module)
    assert [record.name for record in history(twin)] == ["fold_conv_bn"]


@COPIES
def test_copy_of_a_copy(copied: Any) -> None:
    module = captured(small(), image()).eval()
    assert torch.equal(output(copied(copied(module))), output(module))


def test_saved_to_a_file_without_the_models_class(tmp_path: Path) -> None:
    module = captured(net(lambda self, x: self.conv(x), conv=nn.Conv2d(3, 4, 3)), image())
    torch.save(module, tmp_path / "module.pt")
    loaded = torch.load(tmp_path / "module.pt", weights_only=False)
    assert torch.equal(output(loaded), output(module))


def test_history_of_other_modules_is_empty() -> None:
    assert history(nn.ReLU()) == ()
    assert history(captured(small(), image())) == ()


def test_program_of_other_modules_is_none() -> None:
    assert program_of(nn.ReLU()) is None


def test_program_of_a_module_has_its_present_weights() -> None:
    module = captured(small(), image())
    with torch.no_grad():
        module.get_submodule("0").weight.fill_(0.5)
    program = program_of(module)
    assert program is not None
    assert torch.equal(output(to_module(program).eval()), output(module.eval()))
    with torch.no_grad():
        module.get_submodule("0").weight.zero_()
    assert program.graph_module.get_submodule("0").weight.min() == 0.5


def test_eval_only_refuses_training_and_allows_evaluation() -> None:
    module = captured(net(lambda self, x: x * 2 if self.training else x).train(), image())
    assert not module.training
    with pytest.raises(
        CaptureError, match="for evaluation only.*training runs mul where evaluation"
    ):
        module.train()
    assert module.eval() is module
    assert module.train(False) is module


def test_train_returns_the_module_and_reaches_every_layer() -> None:
    module = captured(small().eval(), image())
    assert module.train() is module
    assert all(m.training for m in module.modules())
    assert not any(m.training for m in module.eval().modules())


def test_frozen_layer_stays_frozen_in_copies() -> None:
    class Frozen(nn.Sequential):
        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self[1].eval()
            return self

    model = seeded(Frozen(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    for module in (captured(model, image()), saved(captured(model, image()))):
        assert not module.train().get_submodule("1").training


def test_capture_without_verification_gives_the_same_graph() -> None:
    codes = [to_module(capture(small(), image(), verify=v)).code for v in (True, False)]
    assert codes[0] == codes[1]


def test_conversion_of_the_captured_module() -> None:
    model = small().eval()
    module = captured(model, image()).double()
    assert torch.equal(module(image().double()), copy.deepcopy(model).double()(image().double()))


def test_code_can_be_read() -> None:
    assert "def forward(self, input" in captured(small(), image()).code


def test_module_with_guards_and_computed_sizes_is_pickled() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = F.max_pool2d(x, 2)
        return y + torch.zeros(x.shape[0], 1, 1, 1) if y.shape[2] > 3 else y

    module = captured(net(forward), image())
    again = pickle.loads(pickle.dumps(module))
    assert torch.equal(again(image(3, 3, 10, 7)), module(image(3, 3, 10, 7)))
    with pytest.raises(GuardError, match=r"max_pool2d\.shape\[2\] > 3"):
        again(image(2, 3, 6, 7))


def test_module_with_an_operator_of_another_library_is_pickled() -> None:
    ops = pytest.importorskip("torchvision").ops
    model = net(lambda self, x: self.deform(x, self.offset(x)), deform=ops.DeformConv2d(3, 4, 3),
                offset=nn.Conv2d(3, 18, 3))  # fmt: skip
    module = captured(model, image())
    assert torch.equal(pickle.loads(pickle.dumps(module))(image()), module(image()))
