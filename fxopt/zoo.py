"""MODEL as text: a library's model by name, the user's code, or a file that holds a model."""

from __future__ import annotations

import difflib
import importlib
import inspect
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxopt.errors import ModelSpecError
from fxopt.pickled import SUFFIXES, load_pickled
from fxopt.saved_program import load_exported
from fxopt.sources import is_module_spec, model_from_file, model_from_module
from fxopt.weights import load_weights


def load_model(
    spec: str,
    *,
    weights: str | Path | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    trust_pickle: bool = False,
) -> nn.Module:
    """The model that ``spec`` names, in eval mode.

    Args:
        spec: ``torchvision:NAME``, ``timm:NAME``; ``FILE.py:NAME`` or ``package.module:NAME``,
            where NAME is a class, a function that returns a module, or a module; ``FILE.pt2``,
            written by ``torch.export.save``, which has no training mode; or ``FILE.pt``
            (``.pth``), a pickled module. The file's directory, or the current one, is put on
            ``sys.path``, as ``python FILE.py`` and ``python -m`` do.
        weights: a file with a state_dict; without it the weights are random, never downloaded.
        seed: of the random weights. The global random state stays as it is.
        dtype: what floating-point parameters are converted to.
        trust_pickle: whether a pickled module may be loaded, which runs its code.

    Raises:
        ModelSpecError: there is no such model, file, module or callable, a package is missing, the
            callable raises or returns no module, the file cannot be read or is not trusted, or the
            weights do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model(spec, trust_pickle)
    if weights is not None:
        load_weights(model, Path(weights))
    if dtype is not None:
        model = model.to(dtype)
    return model.eval()


def _model(spec: str, trust_pickle: bool) -> nn.Module:
    family, _, name = spec.partition(":")
    path = Path(spec)
    if family == "torchvision":
        return _torchvision_model(name)
    if family == "timm":
        return _timm_model(name)
    if path.suffix == ".pt2":
        return load_exported(path)
    if path.suffix in SUFFIXES:
        return load_pickled(path, trust=trust_pickle)
    if Path(spec.rpartition(":")[0]).suffix == ".py" and not spec.endswith(":"):
        return model_from_file(spec)
    if is_module_spec(spec):
        return model_from_module(spec)
    raise ModelSpecError(
        f"cannot read the model '{spec}'; write torchvision:NAME, timm:NAME, "
        "path/to/file.py:NAME, package.module:NAME, saved.pt2 or pickled.pt"
    )


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
