"""Files there and back: however often the line breaks, and not done before every SHA-256 is right."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lorasmith.errors import ConnectionLostError, DamageError, RemoteError, os_errors
from lorasmith.files.atomic import publish_folder
from lorasmith.files.machine import human_bytes, require_disk
from lorasmith.progress import Progress
from lorasmith.records.base import FileDigest
from lorasmith.records.remote import Transfer
from lorasmith.remote.job import Parcel, delete, differing, staging
from lorasmith.remote.transport import Patience, Transport, ask

_ROUNDS = 3
"""How often files that arrive damaged are sent again."""


@dataclass(frozen=True)
class Exchange:
    """One other machine and the folder of a job on it."""

    transport: Transport
    folder: str
    patience: Patience
    progress: Progress
    alive: Callable[[], None]
    """Called often; raises to end it."""

    def send(self, parcel: Parcel, missing: list[str], verify: Callable[[list[Any]], list[str]]) -> None:
        """Send what is missing of the parcel.

        `verify` has SHA-256 compared there, of all of it, and tells which files are wrong.
        """
        for _ in range(_ROUNDS):
            if missing:
                send = partial(self.transport.send, parcel.folder, missing, self.folder)
                self._move("Upload", parcel.bytes_of(missing), send, partial(self._arrived, missing))
            missing = verify(parcel.listed)
            if not missing:
                return
        raise _damaged(missing, self.transport.where, "the SHA-256 of the files here")

    def fetch(self, item: Transfer, found: list[FileDigest]) -> str:
        """Fetch one output, compare every SHA-256, and only then put it in its place; what was done."""
        files = [file for file in found if _belongs(file.path, item.remote)]
        if not files:
            raise RemoteError(f"the command left nothing at {item.remote}", where=self.transport.where)
        total = sum(file.bytes for file in files)
        place, local = staging(item), Path(item.local)
        inner = [file.model_copy(update={"path": _inner(file.path, item.remote)}) for file in files]
        single = [file.path for file in files] == [item.remote]
        done = f"{len(files)} files, {human_bytes(total)}: every SHA-256 is the other machine's → {local}"
        if not differing(local.parent if single else local, inner):
            return done
        require_disk(place.parent, total, "fetch the results")
        with os_errors(place, "make a folder for the results"):
            place.mkdir(parents=True, exist_ok=True)
        source = f"{self.folder}/{Path(item.remote).parent if single else item.remote}"
        missing = [file.path for file in inner]
        for _ in range(_ROUNDS):
            receive = partial(self.transport.receive, source, missing, place)
            self._move("Download", total, receive, partial(_sizes, place, missing))
            missing = differing(place, inner)
            if not missing:
                break
            delete(place, missing)
        else:
            raise _damaged(missing, place, "the SHA-256 that the other machine tells")
        if single:
            with os_errors(local, "write"):
                local.parent.mkdir(parents=True, exist_ok=True)
                (place / inner[0].path).replace(local)
                shutil.rmtree(place, ignore_errors=True)
        else:
            publish_folder(place, local)
        return done

    def _arrived(self, files: list[str]) -> int:
        """Bytes of these files that are there."""
        request = {"do": "arrived", "job": self.folder, "files": files}
        return int(ask(self.transport, self.patience, request)["bytes"])

    def _move(
        self,
        label: str,
        total: int,
        copy: Callable[[Callable[[int], None]], None],
        arrived: Callable[[], int],
    ) -> None:
        """Copy until it is through, with one bar for all attempts.

        What has `arrived` tells whether a broken attempt got further: a line that is cut again and again is
        borne with as long as it carries something each time, even less than rsync tells of.
        """
        with self.progress(label, total=max(total, 1), unit="B") as advance:
            before = shown = 0
            most = arrived()

            def on_bytes(count: int) -> None:
                nonlocal shown
                self.alive()
                step = min(before + count, total) - shown
                if step > 0:
                    advance(step)
                    shown += step

            def attempt(moved: Callable[[], None]) -> None:
                nonlocal before, most
                before = shown
                try:
                    copy(on_bytes)
                except ConnectionLostError:
                    if (now := arrived()) > most:
                        most = now
                        moved()
                    raise

            self.patience.over(attempt)


def _sizes(folder: Path, files: list[str]) -> int:
    """Bytes of these files that are here."""
    places = [folder / name for name in files]
    return sum(place.stat().st_size for place in places if place.is_file())


def _damaged(missing: list[str], where: str | Path, expected: str) -> DamageError:
    return DamageError(
        f"{len(missing)} files arrive damaged again and again, the first of them {missing[0]}",
        where=where,
        expected=expected,
        remedy="check that nothing changes them meanwhile; else take another machine",
    )


def _belongs(path: str, remote: str) -> bool:
    return path == remote or path.startswith(remote + "/")


def _inner(path: str, remote: str) -> str:
    return Path(path).name if path == remote else path.removeprefix(remote + "/")
