"""A model out of Python code: ``path/to/file.py:NAME`` or ``package.module:NAME``."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import pkgutil
import re
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from torch import nn

from fxopt.errors import ModelSpecError


def model_from_file(spec: str) -> nn.Module:
    """The model that ``FILE.py:NAME`` names: a class, a function or a module in the file.

    The file's directory is put on ``sys.path``, as ``python FILE.py`` does.

    Raises:
        ModelSpecError: there is no such file or callable, or running either fails.
    """
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ModelSpecError(f"there is no file '{file}' (for the model '{spec}')")
    _put_on_path(path.resolve().parent)
    return _made(_run_file(path), name, file, path)


def is_module_spec(spec: str) -> bool:
    """Whether ``spec`` reads as ``package.module:NAME``."""
    return re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:\w+", spec) is not None


def model_from_module(spec: str) -> nn.Module:
    """The model that ``package.module:NAME`` names: a class, a function or a module in the module.

    It is imported as ``python -m`` would, with the current directory on ``sys.path``.

    Raises:
        ModelSpecError: there is no such Python module or callable, or running either fails.
    """
    module_name, _, name = spec.partition(":")
    _put_on_path(Path.cwd())
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _not_imported(module_name, error) from error
        raise ModelSpecError(
            f"there is no Python module '{error.name}' (for the model '{spec}'); "
            f"{_module_hint(error.name)}"
        ) from error
    except (Exception, SystemExit) as error:
        raise _not_imported(module_name, error) from error
    file = getattr(module, "__file__", None)
    return _made(module, name, module_name, Path(file) if file else None)


def _put_on_path(directory: Path) -> None:
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))


def _run_file(path: Path) -> ModuleType:
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


def _not_imported(module_name: str, error: BaseException) -> ModelSpecError:
    return ModelSpecError(f"'{module_name}' cannot be imported: {_told(error, None)}")


def _module_hint(missing: str) -> str:
    parent, _, last = missing.rpartition(".")
    holder = sys.modules.get(parent)
    if parent and not hasattr(holder, "__path__"):
        return f"'{parent}' is no package"
    below = pkgutil.iter_modules(holder.__path__ if holder is not None else None)
    close = difflib.get_close_matches(last, [found.name for found in below], n=3)
    if close:
        return "did you mean " + ", ".join(f"{parent}.{n}" if parent else n for n in close) + "?"
    where = f"in '{parent}'" if parent else f"in '{os.getcwd()}' or installed"
    return f"it must be {where}"


def _made(module: ModuleType, name: str, where: str, path: Path | None) -> nn.Module:
    """``module.name``, called unless it is a model already."""
    found = getattr(module, name, None)
    if not callable(found):
        what = "has no callable" if found is None else f"has {_a(found)}, no callable,"
        raise ModelSpecError(
            f"'{where}' {what} '{name}'; callables there: {_shown(name, _callables(module))}"
        )
    if isinstance(found, nn.Module):
        return found
    try:
        model = found()
    except (Exception, SystemExit) as error:
        raise ModelSpecError(f"{name}() raised {_told(error, path)}") from error
    if not isinstance(model, nn.Module):
        raise ModelSpecError(f"{name}() in '{where}' gives {_a(model)}, not an nn.Module")
    return model


def _a(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _told(error: BaseException, path: Path | None) -> str:
    """``ValueError: no width (net.py:12)``: the innermost line that is in the user's file.

    Without ``path`` it is the innermost line of any file but this one.
    """
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, SyntaxError):
        return text
    lines = [
        f"{Path(frame.filename).name}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if (Path(frame.filename).name == path.name if path else _is_foreign(frame.filename))
    ]
    return f"{text} ({lines[-1]})" if lines else text


def _is_foreign(file: str) -> bool:
    return file not in (__file__, importlib.__file__) and not file.startswith("<")


_MANY = 10


def _shown(name: str, known: list[str]) -> str:
    """All of a few names; of many those that are like ``name``."""
    if len(known) <= _MANY:
        return ", ".join(known) or "none"
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return ", ".join([*(close or known[:_MANY]), "..."])


def _callables(module: ModuleType) -> list[str]:
    """What could have been meant: public callables of the module or its package, and models."""
    package = module.__name__.partition(".")[0]
    return sorted(_meant(vars(module).items(), package))


def _meant(members: Iterable[tuple[str, object]], package: str) -> Iterable[str]:
    for name, value in members:
        home = str(getattr(value, "__module__", None)).partition(".")[0]
        is_model = isinstance(value, nn.Module)
        if not name.startswith("_") and (is_model or (callable(value) and home == package)):
            yield name
