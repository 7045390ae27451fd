"""One form of a text for comparing: case and spacing do not make two questions different."""

from __future__ import annotations

import re
import unicodedata

_WORD = re.compile(r"\w+")
_TOKEN = re.compile(r"\w+|[^\w\s]")


def normalise(text: str) -> str:
    """Lower case, composed characters (NFKC), single spaces.

    Punctuation stays: `x + 1` and `x - 1`, or "(" and "<" in a task on brackets, are different questions.
    """
    return " ".join(_plain(text).split())


def words(text: str) -> list[str]:
    """The words of the normalised text, as n-gram comparisons use them: letters and digits of all scripts."""
    return _WORD.findall(_plain(text))


def tokens(text: str) -> list[str]:
    """The words and every single sign of the normalised text."""
    return _TOKEN.findall(_plain(text))


def _plain(text: str) -> str:
    return text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).lower()
