"""A SHA-256 that is taken in a thread of its own, while the caller compresses and writes."""

from __future__ import annotations

import hashlib
from queue import Queue
from threading import Thread
from types import TracebackType
from typing import Self

_WAITING = 8
"""Pieces that may wait: the memory that they take, against a thread that idles."""


class HashBeside:
    """Give it the pieces of a stream in order; after the block it knows their SHA-256.

    hashlib lets go of the interpreter's lock, so that hashing and compressing share the cores: with fast
    compressors it is the hashes that packing waits for (benches/package.py).
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._pieces: Queue[bytes | None] = Queue(_WAITING)
        self._thread = Thread(target=self._work, name="lorasmith-hash", daemon=True)

    def update(self, piece: bytes) -> None:
        """Take the next piece; waits where too many wait already. The piece must not change any more."""
        self._pieces.put(piece)

    def hexdigest(self) -> str:
        """Of all pieces; only after the block."""
        return self._digest.hexdigest()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pieces.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (piece := self._pieces.get()) is not None:
            self._digest.update(piece)
