"""Text of files, models and other machines as it may be shown: nothing in it steers the terminal.

Escape sequences move the cursor, rename the window, write to the clipboard and hide what stands before them;
marks that turn the direction of writing show `gnp.exe` as `exe.png`. Both appear here as what they are.
"""

from __future__ import annotations

import re

TURNING = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
"""Marks that change the direction of writing, as a range of a regular expression."""
# Halves of surrogate pairs (a name that is not UTF-8) cannot be written at all; U+2028 and U+2029 end lines.
_HIDDEN = re.compile(f"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029{TURNING}\ud800-\udfff]")
_LINES = re.compile("[\t\n]")


def is_visible(text: str) -> bool:
    """Whether `visible` would leave the text as it is."""
    return _HIDDEN.search(text) is None


def visible(text: str, *, one_line: bool = False) -> str:
    r"""The text with every character that is not shown as it is spelled out, such as `\u001b`.

    JSON and TOML read that spelling as the same character. With `one_line` so are tabs and line breaks, which
    could otherwise begin a line that looks like ours.
    """
    shown = _HIDDEN.sub(_spelled, text)
    return _LINES.sub(_spelled, shown) if one_line else shown


def _spelled(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"
