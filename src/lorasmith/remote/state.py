"""What this machine remembers of other machines: jobs, rentals, host keys; for their owner's eyes alone."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lorasmith.errors import InputError, UsageError, os_errors
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


def jobs() -> list[RemoteJob]:
    """All jobs, the newest first."""
    files = (state_folder() / "jobs").glob("*.json")
    newest = sorted(files, key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return [read_record(path, RemoteJob) for path in newest]


def find_job(name: str | None) -> RemoteJob:
    """The job whose id begins with `name`; the newest for None. Raises `UsageError` unless it is one."""
    known = jobs()
    if not known:
        raise InputError(
            "no job is known here",
            where=state_folder() / "jobs",
            remedy="start one with: lorasmith remote run --host user@machine -- COMMAND",
        )
    if name is None:
        return known[0]
    found = [job for job in known if job.id.startswith(name)]
    if len(found) != 1:
        ids = ", ".join(job.id for job in known[:5])
        raise UsageError(
            f"{name!r} is the beginning of {len(found)} jobs", expected=f"one of {ids}", where=state_folder()
        )
    return found[0]


def save_rental(rental: Rental) -> None:
    """Write the rental, durably: it is on disk when this returns."""
    write_record(state_folder() / "rentals" / f"{rental.label}.json", rental)


def rentals() -> Iterator[Rental]:
    """Every rental ever written here."""
    for path in sorted((state_folder() / "rentals").glob("*.json")):
        yield read_record(path, Rental)


def change_rental(label: str, **changes: object) -> Rental:
    """Write down what has become known of a rental."""
    path = state_folder() / "rentals" / f"{label}.json"
    rental = read_record(path, Rental).model_copy(update=changes)
    write_record(path, rental)
    return rental


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
