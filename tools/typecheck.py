"""Run ``mypy --strict`` on the package as it is installed: ``passes/`` is ``fxopt.passes``.

Type checkers do not resolve setuptools' ``package-dir``, so they are shown a tree of symlinks
under ``build/``; paths in their output are turned back.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / "build" / "typecheck"


def link_tree() -> None:
    """Make ``build/typecheck/fxopt`` anew, a link for every member of the installed package."""
    shutil.rmtree(TREE, ignore_errors=True)
    package = TREE / "fxopt"
    package.mkdir(parents=True)
    for member in (ROOT / "fxopt").iterdir():
        if member.name != "__pycache__":
            (package / member.name).symlink_to(member)
    (package / "passes").symlink_to(ROOT / "passes")


def main() -> int:
    """The exit status of mypy."""
    link_tree()
    command = [sys.executable, "-m", "mypy", "-p", "fxopt"]
    command += ["--config-file", str(ROOT / "pyproject.toml")]
    command += ["--cache-dir", str(ROOT / ".mypy_cache")]
    done = subprocess.run(command, cwd=TREE, stdout=subprocess.PIPE, text=True, check=False)
    text = done.stdout.replace("fxopt/passes/", "passes/")
    print(text, end="")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
