"""Its place puts ``tests/`` on the path, so that tests share helpers (``from capture.checks …``)."""

from __future__ import annotations

import os

import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # workers beside each other, one thread each
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
