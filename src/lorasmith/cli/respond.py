"""`lorasmith respond`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli.options import AsJson

if TYPE_CHECKING:
    from lorasmith.options import ClusterOptions, ModelInput, RespondOptions
    from lorasmith.progress import Advance


def respond(
    inputs: ModelInput,
    data: Annotated[
        Path, typer.Option(help="JSONL with a prompt, question or messages in each row.", metavar="FILE")
    ],
    output: Annotated[Path, typer.Option(help="JSONL to write the responses to.", metavar="FILE")],
    *,
    options: RespondOptions,
    cluster: ClusterOptions,
    as_json: AsJson = False,
) -> None:
    """Answer every row of a file: resumable, each row once, with continuous batching.

    Exits 1 when rows failed; they lie in NAME.failed.jsonl.

    Example: `lorasmith respond --model merged --data train.jsonl --output responses.jsonl`
    """
    from lorasmith.cli.console import console, show_record
    from lorasmith.errors import ExitCode
    from lorasmith.executors.choose import make_executor
    from lorasmith.followup.responses.respond import respond as answer_all

    executor = make_executor(cluster)
    watcher = TerminalRespond(options.price_per_hour)
    record = answer_all(
        inputs.model,
        data,
        output,
        adapter=inputs.adapter,
        options=options,
        watcher=watcher,
        executor=executor,
    )
    if as_json:
        show_record(record)
    else:
        from lorasmith.cli.views.followup import show_responses

        show_responses(record, output, console())
    if record.failed:
        raise typer.Exit(ExitCode.ANSWER_IS_NO)


class TerminalRespond:
    """Rows, rows/s, tokens/s, time left and cost on standard error; a line every half minute in a log."""

    LOG_SECONDS = 30.0

    def __init__(self, price_per_hour: float | None = None) -> None:
        from lorasmith.cli.console import console

        self.price = price_per_hour
        self.screen = console(stderr=True)
        self.total = self.rows = self.tokens = 0
        self.start = self.shown = 0.0
        self.live: Any = None

    @contextmanager
    def progress(self, label: str, *, total: int, unit: str) -> Iterator[Advance]:
        """The model is loaded; a line tells how far it is until the last row has ended."""
        import time

        self.total = total
        self.start = self.shown = time.monotonic()
        if self.screen.is_terminal:
            from rich.live import Live

            self.live = Live(get_renderable=self.line, console=self.screen, refresh_per_second=2)
            self.live.start()
        try:
            yield self._ended
        finally:
            if self.live:
                self.live.stop()
            self.screen.print(f"  {self.line()}", markup=False)

    def _ended(self, rows: int) -> None:
        self.rows += rows
        self._log()

    def generated(self, tokens: int) -> None:
        """Tokens count at once: a long row takes minutes."""
        self.tokens += tokens
        self._log()

    def _log(self) -> None:
        import time

        if not self.live and time.monotonic() - self.shown >= self.LOG_SECONDS:
            self.shown = time.monotonic()
            self.screen.print(f"  {self.line()}", markup=False)

    def step(self, number: int, total: int, title: str) -> None:
        """One command has no steps."""

    def finished(self, stage: str, *, reused: bool, seconds: float) -> None:
        """The record's view says it."""

    def show(self, stage: str, record: Any) -> None:
        """A finding said at once may save hours."""
        from lorasmith.cli.views.records import show_findings

        show_findings([record], self.screen)

    def line(self) -> str:
        """`312/8000 rows · 1.4 rows/s · 380 tokens/s · 1:31:20 left · 0.42 so far`."""
        import time
        from datetime import timedelta

        seconds = max(time.monotonic() - self.start, 1e-9)
        parts = [
            f"{self.rows}/{self.total} rows",
            f"{self.rows / seconds:.2f} rows/s",
            f"{self.tokens / seconds:,.0f} tokens/s",
        ]
        if self.rows:
            left = (self.total - self.rows) * seconds / self.rows
            parts.append(f"{timedelta(seconds=round(left))} left")
        if self.price is not None:
            parts.append(f"cost {self.price * seconds / 3600:.2f} so far")
        return " · ".join(parts)
