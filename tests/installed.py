"""Packages that look installed: a directory on ``sys.path`` with the metadata that pip writes."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parent / "data" / "fxopt-relu-once"


def install(site: Path, name: str, passes: dict[str, str], **modules: str) -> None:
    """The distribution ``name``, with its entry points for fxopt and its modules' source."""
    metadata = site / f"{name.replace('-', '_')}-0.1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
    lines = [f"{key} = {value}" for key, value in passes.items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[fxopt.passes]", *lines, ""]))
    for module, source in modules.items():
        (site / f"{module}.py").write_text(source)


def install_project(site: Path) -> None:
    """The project in ``tests/data``, as pip would install it."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    install(site, project["name"], project["entry-points"]["fxopt.passes"])
    for module in PROJECT.glob("*.py"):
        shutil.copy(module, site)
