"""The `lorasmith` command: its list of subcommands, and the one place where errors become exit codes."""

from __future__ import annotations

import errno
import io
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn, TextIO

import typer

import lorasmith
from lorasmith.cli import COMMANDS, GROUPS
from lorasmith.cli.flags import CommandGroup, add_command
from lorasmith.errors import ExitCode, LorasmithError, UsageError, os_errors
from lorasmith.visible import visible

_ISSUES = "https://github.com/lorasmith/lorasmith/issues"

app = typer.Typer(
    name="lorasmith",
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help costs two thirds of the time of a framed one
    pretty_exceptions_enable=False,
    help="Validate a LoRA adapter, merge it, prove the merge, and package model and evidence.",
    epilog="Start with: lorasmith demo --output demo-output",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lorasmith {lorasmith.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Options before the subcommand."""


for _name, _function in COMMANDS:
    add_command(app, _name, _function)
for _name, _help, _commands in GROUPS:
    _group = typer.Typer(cls=CommandGroup, help=_help, no_args_is_help=True, rich_markup_mode=None)
    for _inner, _function in _commands:
        add_command(_group, _inner, _function)
    app.add_typer(_group, name=_name)


class Terminated(BaseException):
    """SIGTERM: unwinds the stack as Ctrl-C does, so that temporary files are removed."""


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not disturb the cleaning up
    raise Terminated


def main() -> None:
    """Run the command line and exit with a code of `ExitCode`."""
    signal.signal(signal.SIGTERM, _terminate)
    # OpenMP threads that spin while they wait take the processor from each other where it is shared: training
    # took 3 times as long beside other work. It must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _prepare_streams()
    sys.exit(run(sys.argv[1:]))


def _prepare_streams() -> None:
    """Make sure that printing alone cannot fail: closed descriptors, and terminals that are not UTF-8."""
    # The first file to be opened would take the number of a closed descriptor, and get what is printed.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (open as long as the process)
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def run(arguments: list[str]) -> int:
    """Run the command line with `arguments`; returns the exit code."""

    def work() -> int:
        for argument in arguments:
            # Before any work: records are UTF-8 and hold paths, and so do the libraries that open models.
            if any("\ud800" <= letter <= "\udfff" for letter in argument):
                raise _not_utf8(argument)
        return _typed(arguments)

    return guarded(work)


def _not_utf8(name: str) -> UsageError:
    return UsageError(
        "this name is not UTF-8, so that no record can hold it",
        where=name,
        remedy="rename the file or folder, or give a link to it that has another name",
    )


def _typed(arguments: list[str]) -> int:
    streams = sys.stdout, sys.stderr
    try:
        app(arguments, prog_name="lorasmith")
    except SystemExit as ended:
        # Usage errors, --help and typer.Exit end here, with typer's own message.
        cause = ended.__context__
        if isinstance(cause, BrokenPipeError):  # typer ends with 1, which is an answer
            sys.stdout, sys.stderr = streams
            raise cause from None
        code = ended.code if isinstance(ended.code, int) else ExitCode.OK
        if isinstance(cause, typer.Abort):  # nobody answered a question
            return ExitCode.BAD_INPUT
        if code == ExitCode.INTERRUPTED:
            _complain("interrupted; give the same command again to continue", kind="stopped")
        return code
    return ExitCode.OK


def guarded(work: Callable[[], int]) -> int:
    """Do the work and return its exit code, or that of what went wrong, which is then on standard error.

    0 and 1 come from `work` alone, or from an error that stands for a negative answer.
    """
    try:
        code = work()
        with os_errors("standard output", "write"):
            sys.stdout.flush()
        return code
    except LorasmithError as error:
        _complain(error.message())
        _drop_unwritten(sys.stdout)
        return error.exit_code
    except Terminated:
        _complain("terminated; give the same command again to continue", kind="stopped")
        return ExitCode.TERMINATED
    except KeyboardInterrupt:
        _complain("interrupted; give the same command again to continue", kind="stopped")
        return ExitCode.INTERRUPTED
    except MemoryError:
        _complain(
            "out of memory\n  to do:    use smaller batches (--batch-tokens), or a machine with more memory"
        )
        return ExitCode.MACHINE
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            _drop_unwritten(sys.stdout, sys.stderr)
            return ExitCode.OUTPUT_CLOSED
        if error.errno in _OF_THE_MACHINE:
            _drop_unwritten(sys.stdout)
            failed = error
            return guarded(lambda: _say_what_failed(failed))
        return _report_bug()
    except UnicodeEncodeError as error:
        if not "\ud800" <= error.object[error.start] <= "\udfff":
            return _report_bug()
        # Half a surrogate pair: what Python makes of a file's name that is not UTF-8.
        _complain(_not_utf8(error.object[max(0, error.start - 60) : error.end + 60]).message())
        return ExitCode.BAD_INPUT
    except Exception:
        return _report_bug()


_OF_THE_MACHINE = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EIO,
    errno.ELOOP,
    errno.EMFILE,
    errno.ENAMETOOLONG,
    errno.ENFILE,
    errno.ENOSPC,
    errno.EPERM,
    errno.EROFS,
}
"""Errors that say what is wrong with a place or the machine, wherever in the code they were met."""


def _say_what_failed(error: OSError) -> NoReturn:
    with os_errors(error.filename or "a file or the standard output", "go on"):
        raise error


def _reader_is_gone() -> bool:
    """Whether a broken pipe is that of our own output: one to another process would be a bug."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            watch = select.poll()
            watch.register(stream.fileno(), select.POLLOUT)
            if any(event & (select.POLLERR | select.POLLHUP) for _, event in watch.poll(0)):
                return True
    return False


def _drop_unwritten(*streams: TextIO) -> None:
    """Let go of what cannot be written: the interpreter would try again at its end, and exit with 120."""
    for stream in streams:
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                descriptor = os.open(os.devnull, os.O_WRONLY)
                os.dup2(descriptor, stream.fileno())
                os.close(descriptor)
                stream.flush()


def _report_bug() -> int:
    _complain(
        f"{traceback.format_exc().rstrip()}\n"
        f"This is a bug in lorasmith {lorasmith.__version__}, or in a library that it uses.\n"
        f"  to do:    please report it with the lines above at {_ISSUES}",
        kind="bug",
    )
    return ExitCode.BUG


def _complain(message: str, kind: str = "error") -> None:
    with suppress(OSError, ValueError):  # where nobody can be told, the exit code still tells
        sys.stderr.write(f"{kind}: {visible(message)}\n")
        sys.stderr.flush()


if __name__ == "__main__":
    main()
