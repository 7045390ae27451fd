"""Work that must not take longer than is paid for."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


class OutOfTime(BaseException):
    """The time is over: unwinds the stack as Ctrl-C does, so that no handler of errors takes it for one."""


@contextmanager
def stop_after(seconds: float | None) -> Iterator[None]:
    """Raise `OutOfTime` within the block once so many seconds have passed; None for no end.

    By the system's alarm, which reaches the main thread alone: elsewhere the block runs to its end.
    """
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    if seconds <= 0:
        raise OutOfTime

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
