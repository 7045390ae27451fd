"""Kill a run at a chosen point: a forked child counts its file operations and dies by SIGKILL at the k-th."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.truncate", "shutil.copyfile"}
"""Audit events of Python that come with a change on disk (`open` only where it writes)."""


def _writes(event: str, arguments: tuple[Any, ...]) -> bool:
    if event not in EVENTS:
        return False
    if event != "open":
        return True
    mode, flags = arguments[1], arguments[2]
    return (isinstance(mode, str) and set(mode) & set("wax+") != set()) or bool(
        isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    )


def in_child(work: Callable[[], object], *, die_at: int | None, count_to: Path | None = None) -> int:
    """Run `work` in a forked child that kills itself before its `die_at`-th write below any folder.

    Returns the child's wait status: 0 for a normal end. `count_to` receives the number of writes.
    """
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if _writes(event, arguments):
            seen += 1
            if seen == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    code = 1
    try:
        sys.addaudithook(watch)
        work()
        code = 0
        if count_to:
            total = seen
            count_to.write_text(str(total))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
    return 0


def was_killed(status: int) -> bool:
    """Whether the child died by SIGKILL."""
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
