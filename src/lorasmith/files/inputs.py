"""What is read from outside: regular files only, and links only where they may lead.

A pipe or a device in the place of a file would hold a command for ever or fill its memory. A link in a model
or adapter that somebody else made could have any file of this machine read, hashed, or copied into a release:
links are followed within their own folder and into the hub's cache, whose snapshots consist of them.
"""

from __future__ import annotations

import os
import stat
from io import BufferedReader
from pathlib import Path

from lorasmith.errors import InputError, os_errors

_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def special_kind(mode: int) -> str | None:
    """What a place is that is neither a file, a folder nor a link, such as "a pipe"; None for these."""
    return next((kind for holds, kind in _KINDS if holds(mode)), None)


def require_regular(path: Path) -> None:
    """Raise `InputError` where the path leads to a pipe, a socket or a device; nothing is opened."""
    with os_errors(path, "read"):
        mode = path.stat().st_mode
    _require_no_special(mode, path)


def _require_no_special(mode: int, path: Path) -> None:
    kind = special_kind(mode)
    if kind is not None:
        raise InputError(
            f"this is {kind}, not a file",
            where=path,
            expected="a regular file",
            remedy="write what it gives to a file, and give that",
        )


def open_input(path: Path) -> BufferedReader:
    """A file opened for reading; `InputError` at once for what `require_regular` refuses."""
    require_regular(path)
    # It may be exchanged for a pipe in between: opened without waiting, and looked at again.
    with os_errors(path, "read"):
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _require_no_special(os.fstat(handle).st_mode, path)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_input(path: Path) -> bytes:
    """A whole small file."""
    with open_input(path) as handle:
        return handle.read()


def require_own_links(folder: Path) -> None:
    """Raise `InputError` where a folder holds a link that leads out of it, a pipe, a socket or a device.

    A folder of the hub's cache, and the links that older downloads left elsewhere, lead into that cache.
    Hidden files are nobody's input and are passed over.
    """
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in [*folders, *files]:
            if not name.startswith("."):
                _require_own_entry(Path(parent) / name, folder)


def _require_own_entry(path: Path, folder: Path) -> None:
    try:
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            _require_near(path, folder)
            mode = path.stat().st_mode
    except FileNotFoundError:
        return  # a link to nothing, or a file that has just gone: who needs it says so
    _require_no_special(mode, path)


def _require_near(link: Path, folder: Path) -> None:
    try:
        target = link.resolve()
    except (RuntimeError, OSError) as error:
        raise InputError("the link leads to itself", where=link, expected="a file") from error
    if not any(target.is_relative_to(root) for root in _roots(folder.resolve())):
        raise InputError(
            f"the link leads out of its folder, to {target}",
            where=link,
            expected="links within the folder, or into the cache of the Hugging Face hub",
            remedy="put the file itself in the place of the link, if it belongs there; "
            "never do so for files that somebody else has linked",
        )


def _roots(folder: Path) -> list[Path]:
    from huggingface_hub import constants

    roots = [folder, Path(constants.HF_HUB_CACHE).resolve()]
    # A cache that lies elsewhere, such as a copied one: models--ORG--NAME/snapshots/COMMIT beside blobs.
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        roots.append(folder.parent.parent)
    return roots
