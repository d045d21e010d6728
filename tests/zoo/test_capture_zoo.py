"""The nets that people use, captured: nothing tells the captured module from the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from capture.checks import assert_same, image, seeded
from torch import nn

from fxopt.captured import to_module
from fxopt.errors import CaptureError


def vision(name: str, **options: Any) -> nn.Module:
    models = pytest.importorskip("torchvision").models
    return models.get_model(name, weights=None, **options)  # type: ignore[no-any-return]


def timm(name: str, **options: Any) -> nn.Module:
    return pytest.importorskip("timm").create_model(name, **options)  # type: ignore[no-any-return]


def calmed(model: nn.Module) -> Any:
    """Seeded, in the scale that initialisation gave: deep nets must neither vanish nor explode."""
    model = seeded(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                fan = module.weight[0].numel()
                noise = torch.randn(module.weight.shape, generator=generator)
                module.weight.copy_(noise * (1.0 / fan) ** 0.5)
    return model


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Images are tiny: on a busy machine a second thread costs ten times what it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _same_initial_weights() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


TRAINABLE = [
    (vision, "resnet50"), (vision, "mobilenet_v2"), (vision, "mobilenet_v3_large"),
    (vision, "efficientnet_b0"), (vision, "efficientnet_v2_s"), (vision, "regnet_y_400mf"),
    (vision, "densenet121"), (vision, "shufflenet_v2_x1_0"), (vision, "convnext_tiny"),
    (timm, "efficientnet_b0"), (timm, "tf_efficientnet_lite0"), (timm, "nf_resnet50"),
    (timm, "ghostnet_100"),
]  # fmt: skip


@pytest.mark.parametrize(("library", "name"), TRAINABLE, ids=lambda value: getattr(value, "__name__", value))  # fmt: skip
def test_classifier_is_captured_in_both_modes(
    library: Callable[[str], nn.Module], name: str
) -> None:
    model = calmed(library(name))
    program = assert_same(model, image(2, 3, 96, 64), tolerance=1e-5, brief=True)
    assert not program.opaque


def test_segmentation_net_is_captured_in_both_modes() -> None:
    model = vision("deeplabv3_mobilenet_v3_large", weights_backbone=None, num_classes=5)
    program = assert_same(calmed(model), image(2, 3, 96, 64), tolerance=1e-5, brief=True)
    assert not program.opaque


@pytest.mark.parametrize(
    ("name", "shape"), [("googlenet", (2, 3, 96, 64)), ("inception_v3", (2, 3, 107, 83))]
)
def test_net_with_auxiliary_heads_is_eval_only(name: str, shape: tuple[int, ...]) -> None:
    model = calmed(vision(name, init_weights=False))
    program = assert_same(model, image(*shape), eval_only=True, tolerance=1e-5, brief=True)
    assert not program.opaque
    with pytest.raises(CaptureError, match="for evaluation only"):
        to_module(program).train()
