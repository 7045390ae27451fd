"""What a figure is about: model, adapter and test set by their digests, taken before they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorasmith.errors import DataError, InputError, os_errors
from lorasmith.files.digests import digest_folder, sha256_file
from lorasmith.records.base import FileDigest


@dataclass(frozen=True)
class Inputs:
    """Folders and test set of one piece of work."""

    folders: tuple[Path, ...]
    """Model, and adapter or merged model where there is one."""
    test_set: Path
    digests: tuple[str, ...]
    """Of the folders."""
    file: FileDigest
    """Of the test set."""

    @classmethod
    def of(cls, folders: Sequence[Path], test_set: Path) -> Inputs:
        """As they are now; raises `InputError` for what is not there."""
        file = describe_test_set(test_set)
        return cls(tuple(folders), test_set, tuple(digest_folder(folder) for folder in folders), file)

    def require_unchanged(self) -> None:
        """Raise `InputError` where something has changed since.

        To be called once everything is read: a record names what it was made from by these digests.
        """
        after = Inputs.of(self.folders, self.test_set)
        before, now = (*self.digests, self.file.sha256), (*after.digests, after.file.sha256)
        for path, one, two in zip((*self.folders, self.test_set), before, now, strict=True):
            if one != two:
                raise InputError(
                    "it changed while it was read",
                    where=path,
                    expected="inputs that nothing writes to",
                    remedy="give the same command again when the file is complete",
                )


def describe_test_set(test_set: Path) -> FileDigest:
    """Name, size and digest of the file, without its folder."""
    with os_errors(test_set, "read"):
        if not test_set.is_file():
            raise DataError("the test set is not a file", where=test_set, expected="a .jsonl file")
        size = test_set.stat().st_size
    return FileDigest(path=test_set.name, bytes=size, sha256=sha256_file(test_set))
