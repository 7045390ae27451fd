"""The storage that all machines of a cluster see: a worker makes sure that it reads the command's files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from lorasmith.errors import CheckpointError
from lorasmith.files.digests import folder_files

SHARED = "one storage that all machines see under the same path"


def files_digest(folders: Sequence[Path]) -> str:
    """Digest of the names and sizes of all files in these folders.

    Contents are not hashed: every worker would read the whole model once more before it begins.
    """
    listed = [
        [[file.relative_to(folder).as_posix(), file.stat().st_size] for file in folder_files(folder)]
        for folder in folders
    ]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def require_same_files(digest: str, model: str, adapter: str | None) -> None:
    """Raise `CheckpointError` unless a worker's folders have the `files_digest` of the caller's."""
    if files_digest([Path(folder) for folder in (model, adapter) if folder is not None]) != digest:
        raise CheckpointError(
            "a worker finds other files under this path than the command",
            where=model if adapter is None else f"{model}, {adapter}",
            expected=SHARED,
        )
