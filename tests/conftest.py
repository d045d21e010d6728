"""Its place puts ``tests/`` on the path, so that tests share helpers (``from capture.checks …``).

All tests together run on several workers, where pytest-xdist is installed; ``-n0`` prevents it.
"""

from __future__ import annotations

import os

import pytest
import torch

MOST_WORKERS = 4

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ

if IS_WORKER:  # they run beside each other, on a thread each
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    everything = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    # a worker comes here too, and has none of its own
    if everything and not IS_WORKER and config.pluginmanager.hasplugin("xdist"):
        option = config.option
        if option.numprocesses is None and not option.collectonly and not option.usepdb:
            option.numprocesses = min(MOST_WORKERS, os.cpu_count() or 1)
