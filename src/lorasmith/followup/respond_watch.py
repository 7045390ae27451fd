"""Who follows an extraction: it may take hours."""

from __future__ import annotations

from typing import Protocol

from lorasmith.records.base import Finding


class RespondWatcher(Protocol):
    """Hears of each row, each token, and what has to be known at once."""

    def began(self, rows: int, done: int) -> None:
        """So many rows are to be answered, of which `done` were answered by an earlier command."""

    def moved(self, rows: int, tokens: int) -> None:
        """So many more rows ended, and so many more tokens were generated."""

    def found(self, finding: Finding) -> None:
        """Something to know at once, such as a limit that cuts most rows off."""


class Unwatched:
    """Nobody looks."""

    def began(self, rows: int, done: int) -> None:
        """Nothing."""

    def moved(self, rows: int, tokens: int) -> None:
        """Nothing."""

    def found(self, finding: Finding) -> None:
        """Nothing."""
