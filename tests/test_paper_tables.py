"""The published memory figures, by the command that prints them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parent.parent / "tools" / "paper_tables.py"


def test_patching_figures_are_met() -> None:
    pytest.importorskip("torchvision")
    sys.path.insert(0, str(TOOL.parent))
    import paper_tables
    import patch_tables

    checked = paper_tables.Checked()
    rows = list(patch_tables.grids(paper_tables.mobilenet(1.0, 224), checked.row))
    assert checked.wrong == 0, rows


def test_memory_figures_are_met() -> None:
    pytest.importorskip("torchvision")
    done = subprocess.run(
        [sys.executable, str(TOOL), "memory"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "DIFFERS" not in done.stdout
    for figure in ("1,404,928", "1,505,280", "290,304", "229,376", "311,040", "245,760", "128.62"):
        assert figure in done.stdout
