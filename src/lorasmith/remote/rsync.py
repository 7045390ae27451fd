"""Files by the system's rsync: continued where an earlier attempt broke off, with progress in bytes."""

from __future__ import annotations

import re
import shlex
from typing import IO

from lorasmith.remote.process import piped
from lorasmith.remote.transport import OnBytes

BROKEN = {10, 12, 30, 35, 255, -13, -1}
"""Exit codes for a broken or silent connection; 255 is ssh's own."""
FULL = 11
"""Exit code for an error in file I/O: often all that comes back when the receiving disk is full."""


def copy(
    ssh: list[str], source: str, target: str, files: list[str], silence: int, on_bytes: OnBytes
) -> tuple[int, str]:
    """Copy `files` below `source` to the same places below `target`; exit code and messages.

    `ssh`: how to reach the other end. `silence`: seconds without a byte after which it is given up.
    """
    command = ["rsync", "-e", shlex.join(ssh), "--secluded-args", "--recursive", "--copy-links", "--times"]
    # Partial files are continued in place; whether the result is right, SHA-256 decides afterwards.
    command += ["--partial", "--append-verify", f"--timeout={silence}", "--info=progress2"]
    command += ["--no-inc-recursive", "--from0", "--files-from=-", source, target]
    with piped(command, "\0".join(files).encode()) as child:
        _watch(child.output, on_bytes)
        code = child.wait()
    return code, child.messages


def _watch(pipe: IO[bytes], on_bytes: OnBytes) -> None:
    """rsync's progress: bytes moved, at the beginning of each line that a carriage return ends."""
    rest = b""
    while piece := pipe.read1(4096) if hasattr(pipe, "read1") else pipe.read(4096):
        *lines, rest = re.split(rb"[\r\n]", rest + piece)
        for line in lines:
            number = line.split(b"%")[0].rsplit(b" ", 1)[0].strip().replace(b",", b"").replace(b".", b"")
            if number.isdigit():
                on_bytes(int(number))
