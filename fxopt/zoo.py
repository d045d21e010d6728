"""MODEL as text: ``torchvision:resnet18``, ``timm:mobilenetv2_100``, ``path/to/file.py:Net``."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fxopt.errors import ModelSpecError
from fxopt.weights import load_weights


def load_model(
    spec: str,
    *,
    weights: str | Path | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """The model that ``spec`` names, in eval mode.

    Args:
        spec: ``torchvision:NAME``, ``timm:NAME``, or ``FILE.py:NAME`` where NAME is a class, a
            function that returns a module, or a module. The file's directory is put on
            ``sys.path``, as ``python FILE.py`` does.
        weights: a file with a state_dict; without it the weights are random, never downloaded.
        seed: of the random weights. The global random state stays as it is.
        dtype: what floating-point parameters are converted to.

    Raises:
        ModelSpecError: there is no such model, file or callable, a package is missing, the
            callable raises or returns no module, or the weights do not fit.
    """
    family, _, name = spec.partition(":")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "torchvision":
            model = _torchvision_model(name)
        elif family == "timm":
            model = _timm_model(name)
        else:
            model = _model_from_file(spec)
    if weights is not None:
        load_weights(model, Path(weights))
    if dtype is not None:
        model = model.to(dtype)
    return model.eval()


def _torchvision_model(name: str) -> nn.Module:
    models = _import("torchvision.models", f"torchvision:{name}")
    known = models.list_models()
    if name not in known:
        raise _unknown("torchvision", name, known)
    accepted = inspect.signature(models.get_model_builder(name)).parameters
    options = {key: None for key in ("weights", "weights_backbone") if key in accepted}
    return _built(f"torchvision:{name}", lambda: models.get_model(name, **options))


def _timm_model(name: str) -> nn.Module:
    timm = _import("timm", f"timm:{name}")
    # `timm.is_model` answers yes for a name with a tag; a hub address would be downloaded.
    if "/" in name or not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    return _built(f"timm:{name}", lambda: timm.create_model(name, pretrained=False))


def _import(package: str, spec: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ModelSpecError(
            f"'{spec}' needs the package {package.split('.')[0]} ({error}); "
            "pip install 'fxopt[zoo]' installs it"
        ) from error


def _unknown(family: str, name: str, known: Iterable[str]) -> ModelSpecError:
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}?" if close else f"see {family}'s own list_models()"
    return ModelSpecError(f"{family} has no model '{name}'; {hint}")


def _built(spec: str, build: Callable[[], Any]) -> nn.Module:
    try:
        with warnings.catch_warnings():
            # Both libraries warn of defaults that matter to training alone.
            warnings.simplefilter("ignore")
            model = build()
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ModelSpecError(
            f"'{spec}' cannot be built: {type(error).__name__}: {reason}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelSpecError(f"'{spec}' gives a {type(model).__name__}, not an nn.Module")
    return model


def _model_from_file(spec: str) -> nn.Module:
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if path.suffix != ".py" or not name:
        raise ModelSpecError(
            f"cannot read the model '{spec}'; write torchvision:NAME, timm:NAME or "
            "path/to/file.py:NAME"
        )
    if not path.is_file():
        raise ModelSpecError(f"there is no file '{file}' (for the model '{spec}')")
    module = _run_file(path)
    found = getattr(module, name, None)
    if not callable(found):
        there_are = ", ".join(_callables(module)) or "none"
        what = "has no callable" if found is None else f"has a {type(found).__name__}, no callable,"
        raise ModelSpecError(f"'{file}' {what} '{name}'; callables there: {there_are}")
    if isinstance(found, nn.Module):
        return found
    try:
        model = found()
    except Exception as error:
        raise ModelSpecError(f"{name}() raised {_told(error, path)}") from error
    if not isinstance(model, nn.Module):
        raise ModelSpecError(f"{name}() in '{file}' gives {_a(model)}, not an nn.Module")
    return model


def _a(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _run_file(path: Path) -> ModuleType:
    directory = str(path.resolve().parent)
    if directory not in sys.path:
        sys.path.insert(0, directory)
    # A name of its own: a user's `resnet.py` must not hide, or be hidden by, another `resnet`.
    name = f"_fxopt_model_{path.stem}"
    description = importlib.util.spec_from_file_location(name, path)
    assert description is not None
    assert description.loader is not None
    module = importlib.util.module_from_spec(description)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    try:
        description.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ModelSpecError(f"'{path}' cannot be run: {_told(error, path)}") from error
    return module


def _told(error: BaseException, path: Path) -> str:
    """``ValueError: no width (net.py:12)``: the innermost line that is in the user's file."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, SyntaxError):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).name == path.name]
    return f"{text} ({path.name}:{lines[-1]})" if lines else text


def _callables(module: ModuleType) -> list[str]:
    """What could have been meant: public callables that the file defines, and modules in it."""
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (
            isinstance(value, nn.Module)
            or (callable(value) and getattr(value, "__module__", None) == module.__name__)
        )
    )
