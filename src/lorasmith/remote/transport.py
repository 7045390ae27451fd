"""How requests and files reach another machine: a small interface, and attempts that are worth repeating."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from lorasmith.errors import ConnectionLostError, DiskError, RemoteError

T = TypeVar("T")
OnBytes = Callable[[int], None]
"""Called with the bytes moved so far in this attempt."""


class Transport(Protocol):
    """One other machine. Every call raises `ConnectionLostError` when the connection breaks."""

    where: str
    """For messages: `user@host:port`."""

    def request(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request to `remote/there.py` and its answer."""

    def stream(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """A request with several answers, as they come; the last has `ok`."""

    def send(self, source: Path, files: list[str], target: str, on_bytes: OnBytes) -> None:
        """Copy files below `source` to the same places below `target` there; goes on with partial files."""

    def receive(self, source: str, files: list[str], target: Path, on_bytes: OnBytes) -> None:
        """The other way round."""


@dataclass(frozen=True)
class Patience:
    """How often a broken connection is tried again, with pauses that double."""

    attempts: int = 8
    """In a row without any progress."""
    first: float = 1.0
    longest: float = 30.0
    """Seconds."""
    sleep: Callable[[float], None] = time.sleep

    def over(self, attempt: Callable[[Callable[[], None]], T]) -> T:
        """The result of `attempt`, which calls what it is given when it has got further than before.

        Raises the last `ConnectionLostError` when patience is over.
        """
        failed = 0

        def moved() -> None:
            nonlocal failed
            failed = 0

        while True:
            try:
                return attempt(moved)
            except ConnectionLostError:
                failed += 1
                if failed >= self.attempts:
                    raise
                self.sleep(min(self.first * 2 ** (failed - 1), self.longest))


def ask(transport: Transport, patience: Patience, request: dict[str, Any]) -> dict[str, Any]:
    """A request that may be repeated; raises `RemoteError` for what the other machine could not do."""
    return checked(patience.over(lambda moved: transport.request(request)), transport.where)


def checked(answer: dict[str, Any], where: str) -> dict[str, Any]:
    """The answer, unless the other machine's system refused."""
    if answer.get("ok"):
        return answer
    if answer.get("errno") in (28, 122):  # no space, quota: the numbers of Linux, whatever runs here
        raise DiskError(
            f"the other machine's disk is full: {answer['error']}",
            where=where,
            remedy="free some space there, or take --folder on a larger disk; what was sent is kept",
        )
    raise RemoteError(f"the other machine cannot do it: {answer.get('error')}", where=where)
