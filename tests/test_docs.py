"""The documentation runs: the code of docs/writing-a-pass.md, with the tests that it writes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def code_of(page: Path) -> str:
    """The Python blocks of a markdown page, one after the other."""
    return "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))


@pytest.fixture(scope="module")
def namespace() -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "writing_a_pass"}
    exec(
        compile(code_of(ROOT / "docs/writing-a-pass.md"), "writing-a-pass.md", "exec", 0, True),
        names,
    )
    return names


@pytest.mark.parametrize(
    "name",
    re.findall(r"^def (test_\w+)", code_of(ROOT / "docs/writing-a-pass.md"), re.MULTILINE),
)
def test_writing_a_pass(namespace: dict[str, Any], name: str) -> None:
    namespace[name]()


def test_readme_has_exactly_two_set_up_commands() -> None:
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"^    (python3 -m venv .*)$", readme, re.MULTILINE)
    assert commands == [
        "python3 -m venv .venv && .venv/bin/pip install -e '.[demo]' && .venv/bin/fxopt demo",
        "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest",
    ]


def test_every_page_that_the_readme_links_exists() -> None:
    readme = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", readme)
    assert links
    assert all((ROOT / link).exists() for link in links)
