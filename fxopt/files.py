"""A file that is written appears at once and whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fxopt.errors import ExportError


def check_path(path: str | os.PathLike[str]) -> None:
    """Return if ``path`` can be written, before the work that would be lost.

    Raises:
        ExportError: it cannot.
    """
    with scratch_beside(Path(path)):
        pass


@contextlib.contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """A directory on the target's own file system, from which a file moves at once."""
    if target.is_dir():
        raise ExportError(f"cannot write '{target}': it is a directory; name a file in it")
    try:
        scratch = tempfile.TemporaryDirectory(prefix=".fxopt-", dir=target.parent)
    except OSError as error:
        raise ExportError(
            f"cannot write '{target}': {error.strerror} ('{target.parent}'); name a file in a "
            "directory that exists and may be written"
        ) from error
    with scratch as name:
        yield Path(name)
