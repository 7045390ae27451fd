"""Names of files that somebody else chose, in an archive or a manifest: judged before any of them is used.

A name is joined to a folder, and then written, replaced or deleted. What leads out of that folder, what two
systems read as different files, and what no file system takes is refused for all of them alike, so that a
package or a manifest means the same wherever it is opened.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from lorasmith.errors import DamageError, Where
from lorasmith.visible import is_visible

_PART_BYTES = 255
"""Longest name of one file or folder: NAME_MAX of every common file system, counted in bytes there."""
_NAME_BYTES = 2048
"""Longest whole name: half of PATH_MAX, so that the folder it is put in has room as well."""
_UNPRINTED = {"Cc", "Cs", "Zl", "Zp"}
"""Control characters, halves of surrogate pairs, and separators of lines and paragraphs."""
_SHOWN = 120
"""Characters of a refused name that a message repeats."""


def unsafe_name(name: object) -> str | None:
    """Why this is no plain relative name with forward slashes, as half a sentence; None for one that is."""
    if not isinstance(name, str) or not name:
        return "is empty or no text"
    for character in name:
        if unicodedata.category(character) in _UNPRINTED or not is_visible(character):
            return f"holds the character U+{ord(character):04X}, which is not shown as it is"
    if "\\" in name or ":" in name:
        # On Windows the one divides folders and the other follows a drive's letter or precedes a stream.
        return "holds a backslash or a colon, which lead elsewhere on another system"
    if name.startswith("/"):
        return "is absolute"
    parts = name.split("/")
    if "" in parts:
        return "has an empty part"
    if "." in parts or ".." in parts:
        return "climbs out of its folder or points at it"
    if len(name.encode()) > _NAME_BYTES or any(len(part.encode()) > _PART_BYTES for part in parts):
        return f"is longer than {_PART_BYTES} bytes a part or {_NAME_BYTES} in all"
    return None


def safe_member(name: object, *, where: Where | None = None, below: str | None = None) -> str:
    """The name itself, once it is known to be plain; raises `DamageError` for any other.

    `below`: the folder that it has to lie in, itself relative and plain.
    """
    problem = unsafe_name(name)
    if problem is None and below is not None and not str(name).startswith(f"{below}/"):
        problem = f"does not lie below {below}/"
    if problem is not None:
        raise DamageError(
            f"a listed name {problem}: {ascii(name)[:_SHOWN]}",
            where=where,
            expected=f"plain names below {below}/" if below else "plain names within the folder",
            remedy="do not use what this came from before you know why; nothing of it was taken",
        )
    assert isinstance(name, str)  # anything else has a problem
    return name


def safe_members(
    names: Iterable[object], *, where: Where | None = None, below: str | None = None
) -> list[str]:
    """All names, each safe (see `safe_member`), none twice, and none a file that another needs as a folder.

    Names count as equal where a file system may take them so: in any case, composed or not.
    """
    known: list[str] = []
    files: set[str] = set()
    folders: set[str] = set()
    for name in names:
        plain = safe_member(name, where=where, below=below)
        same = unicodedata.normalize("NFC", unicodedata.normalize("NFC", plain).casefold())
        parts = same.split("/")
        above = {"/".join(parts[:count]) for count in range(1, len(parts))}
        if same in files or same in folders or above & files:
            raise DamageError(
                f"the names collide at {ascii(plain)[:_SHOWN]}",
                where=where,
                expected="each name once, in any spelling of its case, and no file where a folder is needed",
                remedy="do not use what this came from before you know why; nothing of it was taken",
            )
        files.add(same)
        folders |= above
        known.append(plain)
    return known
