"""Labelled pictures, from a directory of them or from arrays in an ``.npz``, batch by batch."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxopt.errors import ModelSpecError, PreconditionError
from fxopt.preprocessing import Preprocessing

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")

# More digits than that are a date or a hash.
_CLASS = re.compile(r"[0-9]{1,9}")
_ENDS_IN_CLASS = re.compile(r".*_([0-9]{1,9})", re.DOTALL)


@dataclass(frozen=True)
class PictureFiles:
    """Files that are read and preprocessed when a slice of them is asked for."""

    paths: tuple[Path, ...]
    preprocessing: Preprocessing

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, part: slice) -> torch.Tensor:
        """The pictures of ``part``, float32 ``(N, C, H, W)``.

        Raises:
            PreconditionError: a file is no picture, or one of more than 8 bits a channel.
        """
        return torch.stack([_read(path, self.preprocessing) for path in self.paths[part]])


def _read(path: Path, preprocessing: Preprocessing) -> torch.Tensor:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return preprocessing(picture)
    except Exception as error:  # Pillow's readers raise whatever a broken file leads them to
        raise PreconditionError(
            f"cannot read the picture '{path}': {_reason(error)}; convert it to 8-bit RGB, or "
            "remove it"
        ) from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@dataclass(frozen=True, eq=False)
class Pictures:
    """Inputs ``(N, C, H, W)`` with their classes, where those are known, and names.

    To iterate is to go through :meth:`batches`, as often as wanted; ``Calibration`` takes it.
    """

    images: torch.Tensor | PictureFiles
    labels: tuple[int, ...] | None
    names: tuple[str, ...]
    source: str = ""
    """Where they lie."""

    def __len__(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        return f"{len(self)} pictures of '{self.source}'"

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        return self.batches()

    def batches(self, size: int = 8) -> Iterator[tuple[torch.Tensor, ...]]:
        """``(images,)`` or ``(images, labels)``: ``(size, C, H, W)`` float32, ``(size,)`` int64.

        Only one batch of files is held in memory.

        Raises:
            PreconditionError: a file cannot be read.
        """
        labels = None if self.labels is None else torch.tensor(self.labels)
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            images = self.images[part]
            yield (images,) if labels is None else (images, labels[part])


def load_pictures(path: str | os.PathLike[str], preprocessing: Preprocessing) -> Pictures:
    """The pictures in ``path``.

    Args:
        path: a directory, or an ``.npz``. Pictures that lie in the directory itself are labelled by
            the number after the last underscore, ``cat_281.jpg``, if all of them have one. In
            folders, they are of the folder's class: its name if all are numbers, else its place
            among the sorted names. Hidden files and folders are skipped; pictures are in the order
            of their paths. An ``.npz`` has ``x``, floats ``(N, C, H, W)`` that are taken as they
            are, and may have ``y``, integers ``(N,)``.
        preprocessing: what files go through when they are read.

    Raises:
        PreconditionError: there are no such files or arrays, they are not of that form, or
            pictures lie both in the directory and in folders.
        ModelSpecError: Pillow is missing.
    """
    source = Path(path)
    if source.is_dir():
        return _from_directory(source, preprocessing)
    if not source.exists():
        raise PreconditionError(
            f"there is no '{source}'; give a directory of pictures, or an .npz of inputs"
        )
    if source.suffix.lower() != ".npz":
        raise PreconditionError(
            f"'{source}' is neither a directory nor an .npz; give a directory of pictures, or "
            "write inputs with np.savez"
        )
    return _from_arrays(source)


def _from_directory(directory: Path, preprocessing: Preprocessing) -> Pictures:
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ModelSpecError(
            f"pictures need the package Pillow ({error}); pip install 'fxopt[images]' installs it"
        ) from error
    paths = sorted(_pictures_below(directory))
    if not paths:
        raise PreconditionError(
            f"there are no pictures in '{directory}'; their names end in {', '.join(SUFFIXES)}"
        )
    loose = [path for path in paths if path.parent == directory]
    if loose and len(loose) < len(paths):
        nested = next(path for path in paths if path.parent != directory)
        raise PreconditionError(
            f"'{directory}' has pictures in itself ('{loose[0].name}') and in folders "
            f"('{nested.relative_to(directory)}'); put all of them into folders, or none"
        )
    labels = _labels_by_name(paths) if loose else _labels_by_folder(directory, paths)
    names = tuple(path.relative_to(directory).as_posix() for path in paths)
    return Pictures(PictureFiles(tuple(paths), preprocessing), labels, names, str(directory))


def _pictures_below(directory: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(directory, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield Path(place, name)


def _labels_by_name(paths: list[Path]) -> tuple[int, ...] | None:
    found = [_ENDS_IN_CLASS.fullmatch(path.stem) for path in paths]
    labels = tuple(int(match[1]) for match in found if match)
    return labels if len(labels) == len(paths) else None


def _labels_by_folder(directory: Path, paths: list[Path]) -> tuple[int, ...]:
    # A class without pictures counts too: the others' numbers do not depend on it.
    names = sorted(e.name for e in directory.iterdir() if e.is_dir() and e.name[0] != ".")
    numbered = all(map(_CLASS.fullmatch, names))
    classes = {name: int(name) if numbered else place for place, name in enumerate(names)}
    return tuple(classes[path.relative_to(directory).parts[0]] for path in paths)


def _from_arrays(path: Path) -> Pictures:
    arrays = _arrays(path)
    if "x" not in arrays:
        raise PreconditionError(
            f"'{path}' has no array x; it has {', '.join(arrays) or 'none'}; "
            "write np.savez(FILE, x=inputs, y=labels)"
        )
    images = _images(path, arrays["x"])
    labels = _labels(path, arrays["y"], len(images)) if "y" in arrays else None
    names = tuple(f"x[{index}]" for index in range(len(images)))
    return Pictures(images, labels, names, str(path))


def _arrays(path: Path) -> dict[str, Any]:
    """The arrays ``x`` and ``y``, those that there are; of others None stands for the array."""
    import numpy as np

    if not zipfile.is_zipfile(path):
        raise PreconditionError(f"'{path}' is no file of np.savez; was it written to its end?")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] if key in ("x", "y") else None for key in archive.files}
    except Exception as error:
        raise PreconditionError(
            f"cannot read '{path}': {_reason(error)}; write it again with np.savez"
        ) from error


def _images(path: Path, x: Any) -> torch.Tensor:
    import numpy as np

    if x.dtype.kind != "f":
        raise PreconditionError(
            f"x in '{path}' is {x.dtype}, and is used as it is; write what the model is given, "
            "floats that are scaled and normalised: (pixels / 255 - mean) / std"
        )
    if x.ndim != 4:
        raise PreconditionError(f"x in '{path}' has shape {x.shape}; write it as (N, C, H, W)")
    if not x.size:
        raise PreconditionError(f"x in '{path}' is empty, of shape {x.shape}; give some inputs")
    with np.errstate(over="ignore"):  # what float32 cannot hold is told of below
        images = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
    finite = torch.isfinite(images).flatten(1).all(1)
    if not bool(finite.all()):
        first = int(finite.logical_not().nonzero()[0])
        raise PreconditionError(f"x[{first}] in '{path}' is not finite in float32; leave it out")
    return images


def _labels(path: Path, y: Any, count: int) -> tuple[int, ...]:
    if y.dtype.kind not in "iu":
        raise PreconditionError(f"y in '{path}' is {y.dtype}; write the classes as integers")
    if y.shape != (count,):
        raise PreconditionError(
            f"y in '{path}' has shape {y.shape} and x {count} inputs; write one class for each"
        )
    return tuple(y.tolist())
