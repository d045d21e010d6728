"""Which line of the user's code something happened at, found after the fact."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from fxopt.tracing.trace import is_users


def raised_at(traceback: TracebackType | None) -> str:
    """``file.py:12`` of the innermost frame of the user's that ``traceback`` went through."""
    line = ""
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if is_users(code.co_filename):
            line = f"{Path(code.co_filename).name}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return line


def changed_at(run: Callable[[], Any], probe: Callable[[], Any]) -> str:
    """``file.py:12`` of the user's line in ``run`` after which ``probe`` tells another value.

    Empty if it does not change. ``run`` is executed line by line, which is slow.
    """
    before = probe()
    last = found = ""

    def look(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal last, found
        if found or not is_users(frame.f_code.co_filename):
            return None
        if last and event in ("line", "return") and probe() != before:
            found = last
        last = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        return look

    previous, collects = sys.gettrace(), gc.isenabled()
    gc.disable()  # what others let it call back has lines too, which are not of the run
    sys.settrace(look)
    try:
        run()
    except Exception:  # it is run for its lines alone
        pass
    finally:
        sys.settrace(previous)
        if collects:
            gc.enable()
    return found
