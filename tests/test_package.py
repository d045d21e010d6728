"""The package as it is installed: its members, its imports, its wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fxopt

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment or None,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_members_are_sorted_and_exist() -> None:
    assert sorted(fxopt.__all__) == fxopt.__all__
    assert dir(fxopt) == fxopt.__all__
    assert all(getattr(fxopt, name) is not None for name in fxopt.__all__)


def test_every_error_is_a_member() -> None:
    from fxopt import errors

    assert set(errors.__all__) <= set(fxopt.__all__)


def test_an_unknown_member_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'fxopt' has no attribute 'captur'"):
        _ = fxopt.captur  # type: ignore[attr-defined]


def test_importing_fxopt_does_not_import_torch(tmp_path: Path) -> None:
    assert python("import sys, fxopt; print('torch' in sys.modules)", tmp_path) == "False"


def test_passes_are_reached_without_an_import_of_their_own(tmp_path: Path) -> None:
    code = "import fxopt; print(fxopt.passes.FoldConvBn().name)"
    assert python(code, tmp_path) == "fold_conv_bn"


@pytest.mark.parametrize(
    "imports",
    [
        "import fxopt; import fxopt.capture; import fxopt.report",
        "import fxopt.report; import fxopt.capture",
        "from fxopt import report, capture; import fxopt.capture, fxopt.report",
        "from fxopt.report import Report; from fxopt.capture import capture",
    ],
)
def test_functions_are_not_hidden_by_the_modules_of_their_name(
    tmp_path: Path, imports: str
) -> None:
    check = "import fxopt; print(callable(fxopt.capture), callable(fxopt.report))"
    assert python(f"{imports}; {check}", tmp_path) == "True True"


def test_the_wheel_holds_the_passes_and_the_types(tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    ignore = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "fxopt-demo")
    shutil.copytree(ROOT, source, ignore=ignore)
    python("from setuptools import build_meta; build_meta.build_wheel('dist')", source)
    (wheel,) = (source / "dist").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(site)
    members = {str(file.relative_to(ROOT)) for file in (ROOT / "fxopt").rglob("*.py")}
    members |= {f"fxopt/passes/{file.name}" for file in (ROOT / "passes").glob("*.py")}
    assert members | {"fxopt/py.typed"} <= names
    assert not any(name.startswith(("passes/", "tests/")) for name in names)
    code = "import fxopt.passes, fxopt.analysis; print(fxopt.passes.__file__)"
    assert python(code, tmp_path, PYTHONPATH=str(site)).startswith(str(site))
