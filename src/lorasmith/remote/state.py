"""What this machine remembers of other machines: jobs, rentals, host keys; for their owner's eyes alone."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from lorasmith.errors import InputError, LorasmithError, UsageError, os_errors
from lorasmith.files.atomic import read_record, write_bytes, write_record
from lorasmith.records.remote import RemoteJob, Rental


def state_folder() -> Path:
    """`LORASMITH_STATE`, else `lorasmith` below `XDG_STATE_HOME`; made with access for its owner alone."""
    own = os.environ.get("LORASMITH_STATE")
    shared = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    folder = Path(own) if own else Path(shared) / "lorasmith"
    with os_errors(folder, "make the folder of jobs and rentals"):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name in ("jobs", "rentals"):
            (folder / name).mkdir(exist_ok=True, mode=0o700)
    return folder


def own_name() -> str:
    """What tells this computer's jobs from those of another: drawn once."""
    path = state_folder() / "name"
    if not path.is_file():
        write_bytes(path, secrets.token_hex(8).encode())
    with os_errors(path, "read"):
        return path.read_text()


@contextmanager
def only_one(job: str, say: Callable[[str], None]) -> Iterator[None]:
    """Send and fetch the files of a job in one process at a time; another that comes meanwhile waits."""
    path = state_folder() / "jobs" / f"{job}.lock"
    lock = FileLock(path, mode=0o600, fallback_to_soft=False)
    with os_errors(path, "write"):
        try:
            lock.acquire(blocking=False)
        except Timeout:
            say("another command here copies the files of this job; waiting for it")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def save_job(job: RemoteJob) -> None:
    """Write the job, durably."""
    write_record(state_folder() / "jobs" / f"{job.id}.json", job)


def find_job(name: str | None) -> RemoteJob:
    """The job whose id begins with `name`; the newest for None. Raises `UsageError` unless it is one.

    No other job's file is read: a damaged one is in nobody else's way.
    """
    files = (state_folder() / "jobs").glob("*.json")
    newest = sorted(files, key=lambda path: path.stat().st_mtime_ns, reverse=True)
    if not newest:
        raise InputError(
            "no job is known here",
            where=state_folder() / "jobs",
            remedy="start one with: lorasmith remote run --host user@machine -- COMMAND",
        )
    if name is None:
        return read_record(newest[0], RemoteJob)
    begun = [path for path in newest if path.stem.startswith(name)]
    if len(begun) != 1:
        ids = ", ".join(path.stem for path in newest[:5])
        raise UsageError(
            f"{name!r} is the beginning of {len(begun)} jobs", expected=f"one of {ids}", where=state_folder()
        )
    return read_record(begun[0], RemoteJob)


# Rentals: one file each, named by its label. Money depends on them, so that each is read for itself.


PREFIX = "lorasmith-"
"""Begins every label, and nothing else in the account."""
LABEL = re.compile(PREFIX + r"[0-9A-Za-z-]+")
"""What is searched for in the account and destroyed: a file that names anything else is not believed."""


@dataclass(frozen=True)
class UnreadableRental:
    """A file of a rental that cannot be read as one, and what is still legible of it."""

    path: Path
    label: str | None
    """The label that the file or its name tells; None where it tells none of ours."""
    instance: int | None
    problem: str


def save_rental(rental: Rental) -> None:
    """Write the rental, durably: it is on disk when this returns."""
    write_record(state_folder() / "rentals" / f"{rental.label}.json", rental)


def read_rentals() -> tuple[list[Rental], list[UnreadableRental]]:
    """Every rental ever written here, and the files that should be one: neither keeps the other from use."""
    whole: list[Rental] = []
    unreadable: list[UnreadableRental] = []
    for path in sorted((state_folder() / "rentals").glob("*.json")):
        try:
            if not path.is_file():  # a pipe would be waited for, and a folder holds no rental
                raise InputError("it is no file", where=path)
            rental = read_record(path, Rental)
            if rental.label != path.stem or not LABEL.fullmatch(rental.label):
                raise InputError(f"it is the rental {rental.label!r} under another name", where=path)
            whole.append(rental)
        except (LorasmithError, ValueError, RecursionError) as error:
            unreadable.append(_legible(path, str(error).partition("\n")[0]))
    return whole, unreadable


def _legible(path: Path, problem: str) -> UnreadableRental:
    """What a damaged or foreign file still tells of the machine that it stands for."""
    try:
        text = path.read_bytes()[:100_000].decode(errors="replace") if path.is_file() else ""
    except OSError:
        text = ""
    told = re.search(rf'"label":\s*"({LABEL.pattern})"', text)
    named = told[1] if told else path.stem
    number = re.search(r'"instance":\s*(\d{1,18})\b', text)
    return UnreadableRental(
        path=path,
        label=named if LABEL.fullmatch(named) else None,
        instance=int(number[1]) if number else None,
        problem=problem,
    )


def rentals() -> list[Rental]:
    """Every rental ever written here that can be read."""
    return read_rentals()[0]


def open_rentals() -> list[Rental]:
    """Rentals that may still cost money."""
    return [rental for rental in rentals() if rental.state in ("asked", "rented")]


def rental_at(host: str, port: int | None) -> Rental | None:
    """The rental whose ssh server answers there."""
    for rental in open_rentals():
        if (rental.host, rental.port) == (host, port or 22):
            return rental
    return None


def rental_hosts(label: str) -> Path:
    """The file with the host keys of one rental, and of nothing else."""
    return state_folder() / "rentals" / f"{label}.known_hosts"
