"""A program with all three pipes in use at once, which ends with the block it is used in."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO


@dataclass
class Child:
    """A running program; its messages are complete once the block has ended."""

    process: subprocess.Popen[bytes]
    output: IO[bytes]
    errors: list[bytes] = field(default_factory=list)

    def wait(self) -> int:
        """Its exit code."""
        return self.process.wait()

    @property
    def messages(self) -> str:
        """What it wrote to standard error."""
        return b"".join(self.errors).decode(errors="replace")


@contextmanager
def piped(command: Sequence[str], content: bytes) -> Iterator[Child]:
    """Start `command` with `content` on standard input; killed when the block is left before its end."""
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin and process.stdout and process.stderr  # all three are pipes
        child = Child(process, process.stdout)
        readers = [
            threading.Thread(target=_feed, args=(process.stdin, content)),
            threading.Thread(target=_drain, args=(process.stderr, child.errors)),
        ]
        for reader in readers:
            reader.start()
        try:
            yield child
        except BaseException:
            process.kill()
            raise
        finally:
            for reader in readers:
                reader.join()


def _feed(pipe: IO[bytes], content: bytes) -> None:
    # The other end may be gone already: its exit code and its messages say so.
    with contextlib.suppress(OSError), pipe:
        pipe.write(content)


def _drain(pipe: IO[bytes], into: list[bytes]) -> None:
    into.extend(pipe)
