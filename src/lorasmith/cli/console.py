"""What the terminal shows: progress bars on standard error, tables and summaries on standard output."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from lorasmith.progress import Advance
from lorasmith.visible import is_visible, visible

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.table import Table

    from lorasmith.records.base import Record

TELL_SECONDS = 30.0
"""Between two lines on how far it is, where no bar can be drawn."""


def console(*, stderr: bool = False) -> Console:
    """A console that keeps long lines whole when its output goes to a file or a pipe.

    All that it prints goes through `visible`, tables and progress bars included: names of files and tensors,
    texts of rows, values of configs and what other machines say come from outside.
    """
    from rich.console import Console
    from rich.errors import MarkupError
    from rich.segment import Segment
    from rich.text import Text

    class VisibleConsole(Console):
        def render(self, renderable: Any, options: ConsoleOptions | None = None) -> Iterator[Segment]:
            # Segments are the last form before rich adds escape sequences of its own, which `control` marks.
            for segment in super().render(renderable, options):
                if segment.control or is_visible(segment.text):
                    yield segment
                else:
                    yield Segment(visible(segment.text), segment.style)

        def render_str(self, text: str, **options: Any) -> Text:
            try:
                return super().render_str(text, **options)
            except MarkupError:  # a name with brackets
                return Text(text)

        def on_broken_pipe(self) -> NoReturn:
            # rich would end the process with 1, which is an answer.
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    stream = sys.stderr if stderr else sys.stdout
    return VisibleConsole(stderr=stderr, highlight=False, width=None if stream.isatty() else 110)


def say(line: str, *, stderr: bool = False) -> None:
    """Print a line, or several, with nothing in it that steers the terminal."""
    stream = sys.stderr if stderr else sys.stdout
    stream.write(visible(line) + "\n")
    stream.flush()


def say_piece(text: str) -> None:
    """Print a part of a line at once."""
    sys.stdout.write(visible(text))
    sys.stdout.flush()


@contextmanager
def bar(label: str, *, total: int, unit: str) -> Iterator[Advance]:
    """A progress bar with rate and time left: `lorasmith.progress.Progress` for a terminal.

    Where standard error is no terminal, as on another machine, a line every half minute tells how far it is,
    and one at the end what was done and how fast.
    """
    import time

    if not total:  # nothing to do, nothing to tell
        yield lambda amount: None
        return

    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    screen = console(stderr=True)
    began = told = time.monotonic()
    done = 0

    class Rate(ProgressColumn):
        def render(self, task: object) -> Text:
            speed = getattr(task, "speed", None) or getattr(task, "finished_speed", None)
            return Text(f"{_amount(speed or 0, unit)}/s" if speed else "", style="dim")

    if not screen.is_terminal:

        def count(amount: int) -> None:
            nonlocal done, told
            done += amount
            now = time.monotonic()
            if now - told >= TELL_SECONDS and 0 < done < total:
                told = now
                left = (now - began) * (total - done) / done
                screen.print(
                    f"  {label}: {done / total:.0%}, {_amount(done, unit)}, about {_span(left)} left"
                )

        yield count
        seconds = max(time.monotonic() - began, 1e-9)
        screen.print(
            f"  {label}: {_amount(done, unit)} in {seconds:.1f} s ({_amount(done / seconds, unit)}/s)"
        )
        return

    with Progress(
        TextColumn("  {task.description}"),
        BarColumn(bar_width=32),
        TextColumn("{task.percentage:>3.0f}%"),
        Rate(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=screen,
    ) as shown:
        task = shown.add_task(label, total=total)
        yield lambda amount: shown.advance(task, amount)


def _amount(count: float, unit: str) -> str:
    from lorasmith.machine.resources import human_bytes

    if unit == "B":
        return human_bytes(count)
    return f"{count:,.0f} {unit}" if count >= 10 or isinstance(count, int) else f"{count:.1f} {unit}"


def _span(seconds: float) -> str:
    """`70 s`, `25 min`, `4.4 h`: as exact as a guess of what is left deserves."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A plain table: the first column to the left, all others to the right.

    Cells may hold rich's markup: what a person or a file has named goes through `plain` first.
    """
    from rich import box
    from rich.table import Table

    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def plain(text: str) -> str:
    """A name or a text on one line of a table or a message, shown as it is, whatever brackets it holds."""
    from rich.markup import escape

    return escape(visible(text, one_line=True))


def show_json(text: str) -> None:
    """A JSON document on standard output, in ASCII where that takes no UTF-8."""
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "")
    if encoding != "utf8":
        text = json.dumps(json.loads(text), indent=2)
    say(text.rstrip("\n"))


def show_record(record: Record) -> None:
    """The record as JSON on standard output, for programs (`--json`)."""
    show_json(record.to_json().decode())


def show_records(**records: Record) -> None:
    """Several records as one JSON object, each under its name."""
    bodies = {name: json.loads(record.to_json()) for name, record in records.items()}
    show_json(json.dumps(bodies, indent=2, ensure_ascii=False))
