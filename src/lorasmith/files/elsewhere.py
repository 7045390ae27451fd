"""What other processes and machines took for a stage that runs here, as far as they tell."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from lorasmith.files.meter import Usage


@dataclass
class Elsewhere:
    """Of one stage."""

    cpu_seconds: float = 0.0
    peak_rss_bytes: int | None = None
    """Of the largest of the processes; None where there is none, or none tells."""
    machines: list[Usage | None] = field(default_factory=list)
    """Each machine's devices; None for one that was lost with its counts."""

    def with_these(self, here: Usage) -> Usage:
        """All devices together: of each figure the sum of those that tell it.

        None where a machine was lost: the sum of the others would look like the whole.
        """
        known = [one for one in self.machines if one is not None]
        if not self.machines:
            return here
        if len(known) < len(self.machines):
            return Usage()
        found = Usage()
        for name in vars(found):
            values = [value for one in (here, *known) if (value := getattr(one, name)) is not None]
            setattr(found, name, round(sum(values), 3) if values else None)
        return found


_open: list[Elsewhere] = []
"""Of the stages under way, the innermost last."""


@contextmanager
def counted() -> Iterator[Elsewhere]:
    """What is noted within the block."""
    _open.append(Elsewhere())
    try:
        yield _open[-1]
    finally:
        _open.pop()


def note_process(cpu_seconds: float, peak_rss_bytes: int | None) -> None:
    """Another process took so much more for the stage, and had at most so much memory."""
    for stage in _open[-1:]:
        stage.cpu_seconds += cpu_seconds
        if peak_rss_bytes is not None:
            stage.peak_rss_bytes = max(stage.peak_rss_bytes or 0, peak_rss_bytes)


def note_machine(usage: Usage | None) -> None:
    """Devices of another machine took so much; None for a machine that was lost."""
    for stage in _open[-1:]:
        stage.machines.append(usage)
