"""A job's files on the other machine, each kept once by its SHA-256: sent there with `requests.py`.

`kept/SHA256` beside `jobs/` holds every input that has arrived whole. A job has hard links to it, so that
what one command has brought, such as a base model, the next one does not send again. A kept file goes when no
job's folder has it any more.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any


def hash_file(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def shelf(job: Path) -> Path:
    """Where files are kept, for all jobs."""
    return job.parent.parent / "kept"


def prepare_folders(request: dict[str, Any]) -> dict[str, Any]:
    """Make the folders of a job, drop inputs of an earlier plan, link what is kept; tells what is missing."""
    job = Path(request["job"])
    wanted = {name: (size, sha256) for name, size, sha256 in request["files"]}
    for name in ("in", "out", *request["folders"]):
        (job / name).mkdir(parents=True, exist_ok=True)
    for path in sorted((job / "in").rglob("*"), reverse=True):
        if path.is_file() and path.relative_to(job).as_posix() not in wanted:
            path.unlink()
    missing = [name for name, (size, sha256) in wanted.items() if not have(job / name, size, sha256, job)]
    forget_unused(shelf(job))
    return {"missing": missing}


def have(place: Path, size: int, sha256: str, job: Path) -> bool:
    """Whether the file is kept, and now in its place; a part of it that is there stays to be continued."""
    kept = shelf(job) / sha256
    with contextlib.suppress(OSError):
        if place.samefile(kept):
            return True
    if place.is_file() and place.stat().st_nlink > 1:
        place.unlink()  # another content, that other jobs have too: sending would write into it
    with contextlib.suppress(OSError):  # not kept, or just forgotten, or a disk without links: it is sent
        if kept.stat().st_size == size:
            place.parent.mkdir(parents=True, exist_ok=True)
            link(kept, place)
            return True
    return False


def link(source: Path, target: Path) -> None:
    """A second name for a file, in place of what has that name."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.link")
    os.link(source, temporary)
    temporary.replace(target)
    temporary.unlink(missing_ok=True)  # where both are one file already, the rename did nothing


def forget_unused(folder: Path) -> None:
    """Remove what only the shelf has. A job that links it at this moment has it sent instead."""
    for kept in folder.glob("*"):
        with contextlib.suppress(OSError):
            if kept.stat().st_nlink == 1:
                kept.unlink()


def arrived(request: dict[str, Any]) -> dict[str, Any]:
    """How many bytes of these files are there so far."""
    places = [Path(request["job"]) / name for name in request["files"]]
    return {"bytes": sum(place.stat().st_size for place in places if place.is_file())}


def verify(request: dict[str, Any]) -> dict[str, Any]:
    """Which of the files are not what they should be; those are deleted, so that they are sent anew."""
    job = Path(request["job"])
    folder = shelf(job)
    folder.mkdir(mode=0o700, exist_ok=True)
    wrong = []
    for name, size, sha256 in request["files"]:
        path, kept = job / name, folder / sha256
        same = kept.exists() and path.exists() and path.samefile(kept)
        if path.is_file() and path.stat().st_size == size and hash_file(path) == sha256:
            if not same:
                with contextlib.suppress(OSError):  # a disk without links keeps nothing
                    link(path, kept)
            continue
        path.unlink(missing_ok=True)
        if same:
            kept.unlink(missing_ok=True)
        wrong.append(name)
    return {"wrong": wrong}


def manifest(request: dict[str, Any]) -> dict[str, Any]:
    """Size and SHA-256 of every file of the outputs, hidden ones left out."""
    job = Path(request["job"])
    files: list[tuple[str, int, str]] = []
    for name in request["outputs"]:
        place = job / name
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            inner = path.relative_to(place).parts
            if path.is_file() and not any(part.startswith(".") for part in inner):
                relative = path.relative_to(job).as_posix()
                files.append((relative, path.stat().st_size, hash_file(path)))
    return {"files": files}
