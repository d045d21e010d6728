"""Pictures of a directory or an ``.npz``: what they become, their order, labels and refusals."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fxopt.calibration import Calibration
from fxopt.capture import capture
from fxopt.errors import ModelSpecError, PreconditionError
from fxopt.model_preprocessing import preprocessing_for
from fxopt.pictures import PictureFiles, Pictures, load_pictures
from fxopt.preprocessing import INTERPOLATIONS, Preprocessing

Image = pytest.importorskip("PIL.Image")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = Preprocessing(resize=8, crop=(8, 8), mean=(0.5,), std=(0.5,))
SIZES = [(40, 40), (31, 77), (90, 33), (24, 24), (17, 19), (500, 375)]


def picture(size: tuple[int, int] = (12, 10), mode: str = "RGB", seed: int = 0) -> Any:
    """A smooth seeded picture, so that JPEG and the filters have something to keep."""
    drawn = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(drawn).resize(size, Image.Resampling.BICUBIC).convert(mode)


def fill(directory: Path, *names: str) -> Path:
    """``directory`` with a picture for each name, no two the same."""
    for seed, name in enumerate(names):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed=seed).save(path)
    return directory


def loaded(path: Path, preprocessing: Preprocessing = HALF) -> torch.Tensor:
    """All images of ``path``."""
    return torch.cat([batch[0] for batch in load_pictures(path, preprocessing)])


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("resize", "crop"), [(24, (24, 24)), (37, (32, 32)), (40, (21, 33))])
def test_equals_torchvision_bit_for_bit(
    size: tuple[int, int], resize: int, crop: tuple[int, int], interpolation: str
) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    theirs = transforms.Compose(
        [
            transforms.Resize(resize, transforms.InterpolationMode(interpolation)),
            transforms.CenterCrop(crop),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    ours = Preprocessing(resize, crop, MEAN, STD, interpolation)
    found = ours(picture(size))
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    assert torch.equal(found, theirs(picture(size)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("side", "share", "mode"),
    [(32, 0.875, "center"), (31, 0.95, "center"), (33, 1.0, "center"), (30, 0.9, "squash")],
)
def test_equals_timm_bit_for_bit(size: tuple[int, int], side: int, share: float, mode: str) -> None:
    timm_data = pytest.importorskip("timm.data")
    model = nn.Identity()
    config = {"input_size": (3, side, side), "crop_pct": share, "crop_mode": mode}
    model.pretrained_cfg = {**config, "interpolation": "bicubic", "mean": MEAN, "std": (0.5,) * 3}  # type: ignore[assignment]
    theirs = timm_data.create_transform(**timm_data.resolve_model_data_config(model))
    ours = preprocessing_for(model, "timm:any")
    assert torch.equal(ours(picture(size)), theirs(picture(size)))


@pytest.mark.parametrize(
    "name", ["resnet18", "tf_efficientnet_lite0", "efficientnet_b5", "mobilenetv3_small_100"]
)
def test_models_of_timm_get_timms_own(name: str) -> None:
    timm, data = pytest.importorskip("timm"), pytest.importorskip("timm.data")
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    theirs = data.create_transform(**data.resolve_model_data_config(model))
    ours = preprocessing_for(model, f"timm:{name}")
    for size in ((500, 375), (61, 300)):
        assert torch.equal(ours(picture(size)), theirs(picture(size)))


@pytest.mark.parametrize("name", ["mobilenet_v2", "swin_v2_t", "efficientnet_v2_s", "vit_h_14"])
def test_models_of_torchvision_get_the_preset_of_their_weights(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    theirs = models.get_model_weights(name).DEFAULT.transforms()
    ours = preprocessing_for(nn.Identity(), f"torchvision:{name}")
    for size in ((500, 375), (61, 300)):
        assert torch.equal(ours(picture(size)), theirs(picture(size)))


def test_segmentation_networks_get_the_square_of_the_side_they_resize_to() -> None:
    pytest.importorskip("torchvision")
    found = preprocessing_for(nn.Identity(), "torchvision:fcn_resnet50")
    assert found == Preprocessing(520, (520, 520), MEAN, STD)


def test_detectors_get_pictures_that_are_not_normalised() -> None:
    pytest.importorskip("torchvision")
    found = preprocessing_for(nn.Identity(), "torchvision:ssd300_vgg16")
    assert (found.mean, found.std) == ((0.0,), (1.0,))


IMAGENET = Preprocessing(256, (224, 224), MEAN, STD)


@pytest.mark.parametrize("spec", ["net.py:Net", "torchvision:of_the_user", "timm:without_config"])
def test_other_models_get_imagenets(spec: str) -> None:
    assert preprocessing_for(nn.Identity(), spec) == IMAGENET


def test_torchvision_model_without_weights_gets_imagenets(monkeypatch: pytest.MonkeyPatch) -> None:
    models = pytest.importorskip("torchvision.models")
    monkeypatch.setattr(models, "get_model_weights", lambda name: ())
    assert preprocessing_for(nn.Identity(), "torchvision:resnet18") == IMAGENET


def test_config_may_be_an_object_and_say_little() -> None:
    model = nn.Identity()
    model.pretrained_cfg = SimpleNamespace(input_size=(1, 28, 30), mean=(0.1,), std=(0.3,))  # type: ignore[assignment]
    found = preprocessing_for(model, "net.py:Net")
    assert found == Preprocessing(34, (28, 30), (0.1,), (0.3,), "bicubic", channels=1)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"resize": 300}, {"resize": 300}),
        ({"crop": 128}, {"crop": (128, 128)}),
        ({"crop": 256}, {"crop": (256, 256)}),
        ({"crop": (160, 320)}, {"crop": (160, 320), "resize": 365}),
        ({"crop": 320, "resize": 320}, {"crop": (320, 320), "resize": 320}),
        ({"mean": [0.5]}, {"mean": (0.5,)}),
        ({"std": [0.5, 0.4, 0.3]}, {"std": (0.5, 0.4, 0.3)}),
        ({"interpolation": "lanczos"}, {"interpolation": "lanczos"}),
        ({"input_shape": (3, 160, 96)}, {"crop": (160, 96), "resize": 182}),
        ({"input_shape": (3, 64, 64), "crop": 70}, {"crop": (70, 70), "resize": 73}),
        ({"input_shape": (3, 64, 64), "crop": 112}, {"crop": (112, 112), "resize": 128}),
    ],
)
def test_what_is_given_stands_in_place_of_the_default(
    given: dict[str, Any], expected: dict[str, Any]
) -> None:
    found = preprocessing_for(nn.Identity(), "net.py:Net", **given)
    usual = {"resize": 256, "crop": (224, 224), "mean": MEAN, "std": STD}
    assert found == Preprocessing(**{**usual, **expected})


def test_grey_networks_get_the_mean_of_the_usual_means() -> None:
    found = preprocessing_for(nn.Identity(), "net.py:Net", input_shape=(1, 28, 28))
    assert (found.resize, found.crop, found.channels) == (32, (28, 28), 1)
    assert found.mean == pytest.approx((0.449,), rel=1e-12)
    assert found.std == pytest.approx((0.226,), rel=1e-12)
    assert found(picture()).shape == (1, 28, 28)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"resize": 100}, "a crop of 224x224 is larger than a picture whose shorter side is 100; resize to 224 or more"),
        ({"resize": 200, "crop": (100, 201)}, "a crop of 100x201 is larger .*resize to 201"),
        ({"crop": 0}, "the crop is 0x0 pixels"),
        ({"interpolation": "cubic"}, "unknown interpolation 'cubic'; there are bicubic, bilinear, lanczos, nearest"),
        ({"mean": [0.5, 0.5]}, "the mean has 2 values and a picture 3 channels; give one value"),
        ({"std": []}, "the std has 0 values"),
        ({"mean": MEAN, "input_shape": (1, 28, 28)}, "the mean has 3 values and a picture 1 channels"),
        ({"mean": [float("nan")]}, "the mean is not finite: nan"),
        ({"std": [0.5, 0, 0.5]}, "the std is 0.5, 0, 0.5; it must be above 0"),
        ({"input_shape": (4, 64, 64)}, "takes 4 channels, and pictures have 1 or 3; give its inputs as an .npz"),
    ],
)  # fmt: skip
def test_refuses_values_of_no_use(given: dict[str, Any], message: str) -> None:
    with pytest.raises(PreconditionError, match=message):
        preprocessing_for(nn.Identity(), "net.py:Net", **given)


def test_refuses_the_pictures_that_timm_pads() -> None:
    model = nn.Identity()
    model.pretrained_cfg = {"crop_mode": "border"}  # type: ignore[assignment]
    with pytest.raises(PreconditionError, match=r"crop mode .* is 'border'.*give its inputs as an"):
        preprocessing_for(model, "timm:any")


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (("b_3.png", "a_12.JPG", "c_x_007.jpeg"), (12, 3, 7)),
        (("b_3.png", "a.png"), None),
        (("b_3.png", "12.png"), None),
        (("a_3.png", "b_20240131124500.png"), None),
        (("a_3.png", "b_-1.png"), None),
        (("10/a.png", "9/b_4.webp", "9/a.bmp"), (10, 9, 9)),
        (("dog/b.png", "cat/deeper/z.png", "ant/a.png"), (0, 1, 2)),
        (("7/a.png", "cat/a.png"), (0, 1)),
    ],
)
def test_labels(tmp_path: Path, names: tuple[str, ...], labels: tuple[int, ...] | None) -> None:
    pictures = load_pictures(fill(tmp_path, *names), HALF)
    assert pictures.labels == labels
    assert sorted(pictures.names) == sorted(names)
    assert len(pictures) == len(names)


def test_folders_are_the_classes_of_torchvision(tmp_path: Path) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    fill(tmp_path, "b/2.png", "b/1.jpg", "B/9.png", "a-b/1.png", "a/10.png", "a/deeper/2.png")
    (tmp_path / "aa").mkdir()
    theirs = datasets.ImageFolder(tmp_path, transform=HALF, allow_empty=True)
    ours = load_pictures(tmp_path, HALF)
    assert ours.labels == tuple(theirs.targets) == (0, 1, 1, 2, 4, 4)
    assert torch.equal(loaded(tmp_path), torch.stack([image for image, _ in theirs]))


def test_goes_by_sorted_path_and_skips_what_is_hidden_or_no_picture(tmp_path: Path) -> None:
    names = ("b.png", "a.png", ".hidden.png", ".folder/a.png", "c.PNG")
    pictures = load_pictures(fill(tmp_path, *names), HALF)
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "notes").mkdir()
    assert pictures.names == ("a.png", "b.png", "c.PNG")
    expected = torch.stack([HALF(picture(seed=seed)) for seed in (1, 0, 4)])
    assert torch.equal(loaded(tmp_path), expected)


def test_a_linked_folder_is_a_class(tmp_path: Path) -> None:
    fill(tmp_path / "elsewhere", "a.png")
    fill(tmp_path / "set", "1/b.png")
    (tmp_path / "set" / "0").symlink_to(tmp_path / "elsewhere")
    assert load_pictures(tmp_path / "set", HALF).labels == (0, 1)


def test_batches_have_images_and_labels_and_can_be_read_again(tmp_path: Path) -> None:
    pictures = load_pictures(fill(tmp_path, *(f"{i}_{10 + i}.png" for i in range(9))), HALF)
    sizes = [tuple(tensor.shape for tensor in batch) for batch in pictures]
    assert sizes == [((8, 3, 8, 8), (8,)), ((1, 3, 8, 8), (1,))]
    first, again = list(pictures.batches(4)), list(pictures.batches(4))
    assert [batch[1].tolist() for batch in first] == [[10, 11, 12, 13], [14, 15, 16, 17], [18]]
    assert first[0][1].dtype == torch.int64
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one[0], other[0])


def test_files_are_read_when_their_batch_is_asked_for(tmp_path: Path) -> None:
    pictures = load_pictures(fill(tmp_path, "a.png", "b.png"), HALF)
    (tmp_path / "b.png").write_bytes(b"")
    batches = pictures.batches(1)
    assert len(next(batches)) == 1
    with pytest.raises(PreconditionError, match=r"cannot read the picture '.*b.png'"):
        next(batches)


def test_is_calibration_data(tmp_path: Path) -> None:
    program = capture(nn.Conv2d(3, 2, 3).eval(), torch.randn(1, 3, 8, 8))
    pictures = load_pictures(fill(tmp_path, *(f"{i}_1.png" for i in range(9))), HALF)
    calibration = Calibration(pictures)
    for _ in range(2):
        batches = list(calibration.batches(program))
        assert [len(batch) for batch in batches] == [1, 1]
        assert torch.equal(torch.cat([batch[0] for batch in batches]), loaded(tmp_path))


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("P", "png"), ("RGBA", "png"), ("LA", "png"), ("L", "png"), ("1", "png"), ("P", "bmp"),
        ("L", "jpg"), ("CMYK", "jpg"), ("RGBA", "webp"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_every_mode(tmp_path: Path, mode: str, suffix: str, channels: int) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    path = tmp_path / f"a.{suffix}"
    picture((8, 8), mode).save(path)
    theirs = transforms.ToTensor()(Image.open(path).convert("RGB" if channels == 3 else "L"))
    plain = Preprocessing(8, (8, 8), (0.0,), (1.0,), channels=channels)
    assert torch.equal(loaded(tmp_path, plain)[0], theirs)


def test_does_not_turn_pictures_as_their_camera_says(tmp_path: Path) -> None:
    fill(tmp_path / "plain", "a.png")
    (tmp_path / "turned").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    picture().save(tmp_path / "turned" / "a.png", exif=exif)
    with Image.open(tmp_path / "turned" / "a.png") as written:
        assert written.getexif()[0x0112] == 6
    assert torch.equal(loaded(tmp_path / "plain"), loaded(tmp_path / "turned"))


def of_files(**files: bytes | None) -> Callable[[Path], Path]:
    """A directory with a file for each name (``__`` is a dot), a picture where None is given."""

    def make(directory: Path) -> Path:
        for name, content in files.items():
            path = directory / name.replace("__", ".")
            if content is None:
                fill(directory, path.name)
            else:
                path.write_bytes(content)
        return directory

    return make


def mixed(directory: Path) -> Path:
    return fill(directory, "a.png", "cats/b.png")


def truncated(directory: Path) -> Path:
    path = fill(directory, "a.jpg") / "a.jpg"
    path.write_bytes(path.read_bytes()[:-100])
    return directory


def deep(directory: Path) -> Path:
    Image.fromarray(np.full((9, 9), 40000, dtype=np.uint16)).save(directory / "a.png")
    return directory


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "missing", r"there is no '.*missing'; give a directory of pictures, or an .npz"),
        (lambda path: of_files(a__png=None)(path) / "a.png", r"a.png' is neither a directory nor an .npz; give a"),
        (of_files(), r"there are no pictures in '.*'; their names end in .bmp, .jpeg, .jpg"),
        (of_files(a__gif=None, b__txt=b"text"), r"there are no pictures in"),
        (mixed, r"has pictures in itself \('a.png'\) and in folders \('cats/b.png'\); put all"),
        (of_files(a__png=None, b__png=b"text"), r"cannot read the picture '.*b.png': cannot identify .*; convert it"),
        (truncated, r"cannot read the picture '.*a.jpg': .*truncated.*or remove it"),
        (deep, r"cannot read the picture '.*a.png': its mode is I;16, which Pillow would clip to 8 bits; convert it to 8-bit RGB"),
    ],
)  # fmt: skip
def test_refuses_what_is_no_pictures(
    tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    with pytest.raises(PreconditionError, match=message) as refusal:
        list(load_pictures(make(tmp_path), HALF))
    assert refusal.value.exit_code == 2


def test_error_without_words_is_named_by_its_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise EOFError

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(PreconditionError, match=r"a.png': EOFError; convert"):
        PictureFiles((tmp_path / "a.png",), HALF)[0:1]


def test_names_the_extra_of_missing_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "a.png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(
        ModelSpecError, match=r"need the package Pillow.*pip install 'fxopt\[images\]'"
    ):
        load_pictures(tmp_path, HALF)


def test_is_imported_without_pillow() -> None:
    code = "import sys, fxopt.pictures, fxopt.model_preprocessing; print('PIL' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


INPUTS = np.random.default_rng(1).normal(size=(3, 2, 4, 5))


def packed(directory: Path, **arrays: Any) -> Path:
    """An ``.npz`` of the arrays."""
    np.savez(directory / "inputs.npz", **arrays)
    return directory / "inputs.npz"


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_arrays_are_used_as_they_are(tmp_path: Path, dtype: str) -> None:
    given = INPUTS.astype(dtype)
    pictures = load_pictures(packed(tmp_path, x=given, y=np.array([5, 0, 7], np.uint8)), HALF)
    assert isinstance(pictures.images, torch.Tensor)
    assert pictures.images.dtype == torch.float32
    assert np.array_equal(pictures.images.numpy(), given.astype(np.float32))
    assert pictures.labels == (5, 0, 7)
    assert pictures.names == ("x[0]", "x[1]", "x[2]")
    assert [batch[1].tolist() for batch in pictures.batches(2)] == [[5, 0], [7]]


def test_arrays_need_no_labels(tmp_path: Path) -> None:
    pictures = load_pictures(packed(tmp_path, x=np.asfortranarray(INPUTS), other=[1]), HALF)
    assert pictures.labels is None
    assert [len(batch) for batch in pictures] == [1]
    assert pictures.images[0:3].is_contiguous()


def of_arrays(**arrays: Any) -> Callable[[Path], Path]:
    return lambda directory: packed(directory, **arrays)


def of_bytes(content: bytes) -> Callable[[Path], Path]:
    return lambda directory: of_files(inputs__npz=content)(directory) / "inputs.npz"


def bare_array(directory: Path) -> Path:
    with (directory / "inputs.npz").open("wb") as file:
        np.save(file, INPUTS)
    return directory / "inputs.npz"


def damaged(directory: Path) -> Path:
    path = packed(directory, x=INPUTS)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    return path


def no_arrays(directory: Path) -> Path:
    with zipfile.ZipFile(directory / "inputs.npz", "w"):
        return directory / "inputs.npz"


def with_one(value: float, dtype: str = "float32") -> np.ndarray[Any, Any]:
    """The inputs with ``value`` in the second."""
    changed = INPUTS.astype(dtype)
    changed[1, 0, 0, 0] = value
    return changed


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (of_bytes(b""), r"inputs.npz' is no file of np.savez; was it written to its end?"),
        (bare_array, r"is no file of np.savez"),
        (damaged, r"cannot read '.*inputs.npz': .*CRC.*; write it again with np.savez"),
        (of_arrays(x=np.array([None])), r"cannot read '.*inputs.npz': Object arrays cannot be loaded"),
        (no_arrays, r"has no array x; it has none; write np.savez"),
        (of_arrays(images=INPUTS, y=[1, 2, 3]), r"inputs.npz' has no array x; it has images, y; write np.savez"),
        (of_arrays(x=INPUTS.astype(np.uint8)), r"x in '.*' is uint8, and is used as it is; write .*\(pixels / 255 - mean\) / std"),
        (of_arrays(x=INPUTS > 0), r"x in '.*' is bool"),
        (of_arrays(x=INPUTS[0]), r"x in '.*' has shape \(2, 4, 5\); write it as \(N, C, H, W\)"),
        (of_arrays(x=np.float32(1)), r"x in '.*' has shape \(\);"),
        (of_arrays(x=INPUTS[:0]), r"x in '.*' is empty, of shape \(0, 2, 4, 5\)"),
        (of_arrays(x=with_one(np.nan)), r"x\[1\] in '.*' is not finite"),
        (of_arrays(x=with_one(-np.inf)), r"x\[1\] in '.*' is not finite"),
        (of_arrays(x=with_one(1e300, "float64")), r"x\[1\] in '.*' is not finite in float32; leave it out"),
        (of_arrays(x=INPUTS, y=[1, 2]), r"y in '.*' has shape \(2,\) and x 3 inputs; write one class for each"),
        (of_arrays(x=INPUTS, y=[[1], [2], [3]]), r"y in '.*' has shape \(3, 1\)"),
        (of_arrays(x=INPUTS, y=[1.0, 2.0, 3.0]), r"y in '.*' is float64; write the classes as integers"),
    ],
)  # fmt: skip
def test_refuses_arrays(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(PreconditionError, match=message) as refusal:
        load_pictures(make(tmp_path), HALF)
    assert refusal.value.exit_code == 2


def test_pictures_can_be_put_together_by_hand() -> None:
    pictures = Pictures(torch.ones(2, 3, 4, 4), None, ("first", "second"))
    assert len(pictures) == 2
    assert torch.equal(next(iter(pictures))[0], pictures.images[0:2])
