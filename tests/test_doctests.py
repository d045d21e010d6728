"""The examples in docstrings run. Modules are imported by name: ``passes/`` is ``fxopt.passes``."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import fxopt
import fxopt.passes

MODULES = sorted(
    name
    for package in (fxopt, fxopt.passes)
    for _, name, _ in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_of(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0
