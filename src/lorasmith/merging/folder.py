"""The merged folder on its way: a lock, a partial folder that a killed merge goes on with, a journal."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lorasmith.errors import InputError, UsageError, os_errors
from lorasmith.files.atomic import aside, publish_folder, read_record, write_bytes, write_record
from lorasmith.files.place import holds_another, require_outside
from lorasmith.records.base import FileDigest, Record
from lorasmith.records.merging import MergedTensor

_STATE = ".merge"
"""Folder within the partial folder: the key, and one journal entry per finished shard."""


class ShardDone(Record):
    """A shard that is on disk, synced, with what became of its tensors."""

    FORMAT: ClassVar[str] = "lorasmith/merge-shard/1"

    file: FileDigest
    source_sha256: str
    tensors: list[MergedTensor]


def check_place(output: Path, inputs: Sequence[Path]) -> None:
    """`UsageError` where the output is an input, lies in one, holds one, or would replace something else."""
    require_outside(output, inputs)
    if holds_another(output, "config.json"):
        raise UsageError(
            "the output folder exists and does not hold a model",
            where=output,
            expected="a new place, or a model that may be replaced",
            remedy="choose another output folder, or remove this one",
        )


def make_key(parts: Mapping[str, Any]) -> str:
    """A digest of everything that the merged bytes depend on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def identity_of(files: Sequence[Path]) -> list[list[Any]]:
    """Name, device, inode, size and times of each file: equal exactly while nobody touched them."""
    found = []
    for file in files:
        with os_errors(file, "read"):
            state = file.stat()
        times = [state.st_mtime_ns, state.st_ctime_ns]
        found.append([file.name, state.st_dev, state.st_ino, state.st_size, *times])
    return found


class PartialFolder:
    """`.NAME.partial` beside the output: kept when the process dies, taken up only by the same merge."""

    def __init__(self, output: Path, key: str) -> None:
        self.output = output
        self.path = aside(output)
        self._state = self.path / _STATE
        with os_errors(output, "write"):
            if self.path.exists() and self._key() != key:
                shutil.rmtree(self.path)
            if not self.path.exists():
                self._state.mkdir(parents=True)
                write_bytes(self._state / "key", key.encode())

    @property
    def scratch(self) -> Path:
        """A folder for what is needed until the merge is done; it goes with the state."""
        return self._state / "scratch"

    def _key(self) -> str | None:
        try:
            return (self._state / "key").read_text()
        except (OSError, UnicodeDecodeError):
            return None

    def done(self, shard: str) -> ShardDone | None:
        """The journal's entry of a shard whose file is there with its full size."""
        entry = self._state / f"{shard}.json"
        file = self.path / shard
        if not entry.exists() or not file.exists():
            return None
        try:
            record = read_record(entry, ShardDone)
        except InputError:
            return None
        return record if file.stat().st_size == record.file.bytes else None

    def finish_shard(self, shard: str, record: ShardDone) -> None:
        """Note that a synced shard is whole."""
        write_record(self._state / f"{shard}.json", record)

    def write(self, name: str, content: bytes) -> None:
        """A small file of the merged folder."""
        write_bytes(self.path / name, content)

    def publish(self, expected: Sequence[str]) -> None:
        """Take the state away, check that nothing foreign is in the folder, and rename it into place."""
        with os_errors(self.output, "write"):
            shutil.rmtree(self._state)
            for file in self.path.rglob("*"):
                if file.is_file() and file.relative_to(self.path).as_posix() not in expected:
                    file.unlink()
        publish_folder(self.path, self.output)
