"""Impatience must not cost money: the first Ctrl-C ends the work, no other one the cleaning up."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_STOPS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def one_stop(say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Let one SIGINT or SIGTERM through to its handler, and answer all others with what is going on.

    Call what it yields where even the first must not come through any more. In another thread than the main
    one, which alone such signals reach, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = {number: signal.getsignal(number) for number in _STOPS}
    stopped = False

    def stop() -> None:
        nonlocal stopped
        stopped = True

    def answer(number: int, frame: FrameType | None) -> None:
        handler = before[signal.Signals(number)]
        if stopped:
            say("destroying the machine first (Ctrl-\\ ends this at once: then run `lorasmith remote reap`)")
        elif callable(handler):
            stop()  # before the handler raises: nothing may come in between
            handler(number, frame)
        elif handler == signal.SIG_DFL:
            stop()
            raise SystemExit(128 + number)

    for number in _STOPS:
        signal.signal(number, answer)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
