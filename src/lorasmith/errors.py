"""The error tree: every failure a person can cause or meet, as one message that says how to go on.

    LorasmithError
    ├── InputError               exit 2   wrong usage or input
    │   ├── UsageError                    flags that contradict each other, unknown names
    │   ├── DataError                     a test set, training file or benchmark that cannot be used
    │   ├── CheckpointError               a model folder that cannot be used
    │   └── AdapterError                  an adapter folder that cannot be used
    ├── BudgetError              exit 1   the money that was allowed is spent; resumable
    ├── DamageError              exit 1   a package that is not what its hashes say
    └── MachineError             exit 3   this machine cannot do it
        ├── DiskError                     too little space
        ├── MemoryLimitError              too little memory
        ├── AccessError                   no permission to read or write
        ├── BusyError                     another process works on the same output
        └── RemoteError                   another machine cannot be reached, or cannot do it
            ├── ConnectionLostError       the connection broke; worth another attempt
            └── ProviderError             who rents out machines refuses, or does not answer

Anything else that is raised is a bug: exit 70, with its traceback and where to report it.
A negative answer (a failed gate, `different` weights) is a result, not an error: see `ExitCode`.
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike, fspath
from typing import ClassVar

from lorasmith.visible import visible

Where = str | PathLike[str]


class ExitCode(enum.IntEnum):
    """What the process tells its caller (the table of the command-line reference).

    0 and 1 are answers. Whatever keeps a command from its answer has another code: 70 is EX_SOFTWARE of
    sysexits.h, 130, 141 and 143 are 128 and the number of SIGINT, SIGPIPE and SIGTERM, as shells count.
    """

    OK = 0
    ANSWER_IS_NO = 1
    BAD_INPUT = 2
    MACHINE = 3
    BUG = 70
    INTERRUPTED = 130
    OUTPUT_CLOSED = 141
    TERMINATED = 143


class LorasmithError(Exception):
    """What was found, where, what was expected, and what to do about it."""

    exit_code: ClassVar[ExitCode] = ExitCode.BAD_INPUT

    def __init__(
        self,
        found: str,
        *,
        where: Where | None = None,
        expected: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.found = found
        self.where = None if where is None else fspath(where)
        self.expected = expected
        self.remedy = remedy
        super().__init__(self.message())

    def message(self) -> str:
        """The whole message, one fact a line, fit for a terminal: names and texts of files stand in it.

        Further lines of a text stand behind a bar, so that none of them can pass for a fact of its own.
        """
        lines = [_shown(self.found)]
        for label, text in (("where", self.where), ("expected", self.expected), ("to do", self.remedy)):
            if text:
                lines.append(f"  {label + ':':<9} {_shown(text)}")
        return "\n".join(lines)


def _shown(text: str) -> str:
    return visible(text).rstrip("\n").replace("\n", "\n  | ")


class InputError(LorasmithError):
    """Wrong usage or input."""


class UsageError(InputError):
    """Options that contradict each other or name something that does not exist."""


class DataError(InputError):
    """A data file that cannot be used as it is."""


class CheckpointError(InputError):
    """A model folder that cannot be used as it is."""


class AdapterError(InputError):
    """An adapter folder that cannot be used as it is."""


class DamageError(LorasmithError):
    """A package that is not what its hashes say: damaged, incomplete or changed. Nothing of it is used."""

    exit_code: ClassVar[ExitCode] = ExitCode.ANSWER_IS_NO


class BudgetError(LorasmithError):
    """The budget is spent before the work is done. What is finished is kept."""

    exit_code: ClassVar[ExitCode] = ExitCode.ANSWER_IS_NO


class MachineError(LorasmithError):
    """The machine cannot do what was asked."""

    exit_code: ClassVar[ExitCode] = ExitCode.MACHINE


class DiskError(MachineError):
    """Too little space on a disk."""


class MemoryLimitError(MachineError):
    """Too little memory, on the host or on a device."""


class AccessError(MachineError):
    """No permission to read or write."""


class BusyError(MachineError):
    """Another process works on the same output."""


class RemoteError(MachineError):
    """Another machine cannot be reached, or cannot do what was asked."""


class ConnectionLostError(RemoteError):
    """The connection to another machine broke or never came about; another attempt may succeed."""


class ProviderError(RemoteError):
    """Who rents out machines refuses a request, or gives no usable answer."""


@contextmanager
def os_errors(where: Where, doing: str) -> Iterator[None]:
    """Turn the operating system's errors while `doing` something at `where` into ours."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(
            f"cannot {doing}: it does not exist", where=error.filename or where, remedy="check the path"
        ) from error
    except (NotADirectoryError, FileExistsError) as error:
        raise InputError(
            f"cannot {doing}: a part of the path is a file",
            where=error.filename or where,
            expected="a folder",
        ) from error
    except IsADirectoryError as error:
        raise InputError(f"cannot {doing}: it is a folder", where=where, expected="a file") from error
    except PermissionError as error:
        raise AccessError(
            f"cannot {doing}: permission denied",
            where=error.filename or where,
            remedy="choose a place you may use, or change its permissions",
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskError(
                f"cannot {doing}: the disk is full",
                where=where,
                remedy="free some space and give the same command again; what is finished is kept",
            ) from error
        if error.errno == errno.ENAMETOOLONG:
            raise InputError(
                f"cannot {doing}: the name is longer than the file system takes",
                where=error.filename or where,
                expected="names of at most 255 bytes",
                remedy="shorten it",
            ) from error
        if error.errno == errno.ELOOP:
            raise InputError(
                f"cannot {doing}: its links lead in a circle",
                where=error.filename or where,
                remedy="remove them",
            ) from error
        if error.errno == errno.EROFS:
            raise AccessError(f"cannot {doing}: the file system is read-only", where=where) from error
        raise MachineError(f"cannot {doing}: {error.strerror or error}", where=where) from error
