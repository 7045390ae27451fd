"""The `lorasmith` command: its list of subcommands, and the one place where errors become exit codes."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Annotated, NoReturn

import typer

import lorasmith
from lorasmith.cli import COMMANDS, GROUPS
from lorasmith.cli.flags import CommandGroup, add_command
from lorasmith.errors import ExitCode, LorasmithError

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
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run the command line with `arguments`; returns the exit code. A bug keeps its traceback."""
    try:
        app(arguments, prog_name="lorasmith")
    except SystemExit as ended:
        # Usage errors, --help and typer.Exit end here, with typer's own message.
        code = ended.code if isinstance(ended.code, int) else ExitCode.OK
        if code == ExitCode.INTERRUPTED:
            _complain("interrupted; give the same command again to continue", kind="stopped")
        return code
    except LorasmithError as error:
        _complain(error.message())
        return error.exit_code
    except Terminated:
        _complain("terminated; give the same command again to continue", kind="stopped")
        return ExitCode.TERMINATED
    except MemoryError:
        _complain(
            "out of memory\n  to do:    use smaller batches (--batch-tokens), or a machine with more memory"
        )
        return ExitCode.MACHINE
    return ExitCode.OK


def _complain(message: str, kind: str = "error") -> None:
    sys.stderr.write(f"{kind}: {message}\n")


if __name__ == "__main__":
    main()
