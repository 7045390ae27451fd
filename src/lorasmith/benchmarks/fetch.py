"""Download the benchmarks from the Hugging Face hub: pinned revisions, every file checked.

A finished file is checked against the hub's own hash of that revision (SHA-256 of large files, the Git blob
hash of small ones) and, where `Source` holds one, against a SHA-256 that ships with lorasmith. A file that
is there already and right is not fetched again; one that was cut off is continued.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.benchmarks.base import Source
from lorasmith.benchmarks.registry import BENCHMARKS, choose
from lorasmith.errors import DataError, MachineError, UsageError, os_errors
from lorasmith.files.atomic import write_record
from lorasmith.files.inputs import open_input
from lorasmith.files.output_folder import require_own_record
from lorasmith.hub.download import plain_names, reporting
from lorasmith.machine.resources import require_disk
from lorasmith.progress import Advance, Progress, silent
from lorasmith.records.base import Finding
from lorasmith.records.dataset import FetchedFile, FetchRecord

SOURCES: dict[str, Source] = {benchmark.name: benchmark.hub for benchmark in BENCHMARKS if benchmark.hub}
"""Where each benchmark lies on the hub."""

_BLOCK = 1 << 20
_RECORD = "fetched.json"


@dataclass(frozen=True)
class _Remote:
    """A file as the hub describes it."""

    name: str
    size: int
    etag: str


def fetch(
    output: Path,
    *,
    only: Sequence[str] | None = None,
    token: str | None = None,
    progress: Progress = silent,
) -> FetchRecord:
    """Download the named benchmarks, or the guide's five, to `output/NAME/…`; write `output/fetched.json`.

    The token comes from `HF_TOKEN` or `hf auth login` unless given; the hub from `HF_ENDPOINT`. A benchmark
    that cannot be had is a finding of severity `error`, and the others are still fetched.

    Raises `DiskError` when there is too little space, `MachineError` when the hub cannot be reached at all.
    """
    require_own_record(output / _RECORD)
    files: list[FetchedFile] = []
    findings: list[Finding] = []
    for benchmark in choose(only):
        source = SOURCES.get(benchmark.name)
        if source is None:
            raise UsageError(f"{benchmark.name} has no place on the hub", remedy="bring your own copy")
        if source.note:
            findings.append(
                Finding(severity="note", code="about", message=f"{benchmark.name}: {source.note}")
            )
        try:
            files += _fetch_one(benchmark.name, source, output, token, progress)
        except DataError as error:
            findings.append(
                Finding(
                    severity="error",
                    code="not-fetched",
                    message=error.found,
                    where=error.where,
                    expected=error.expected,
                    remedy=error.remedy,
                )
            )
    record = FetchRecord(files=files, findings=findings)
    write_record(output / _RECORD, record)
    return record


def _fetch_one(
    name: str, source: Source, output: Path, token: str | None, progress: Progress
) -> list[FetchedFile]:
    remotes = [_ask(name, source, file, token) for file in source.files]
    folder = output / name.lower()
    require_disk(output, sum(remote.size for remote in remotes), f"fetch {name}")
    fetched = []
    with progress(f"Fetch {name}", total=sum(remote.size for remote in remotes), unit="B") as advance:
        for remote in remotes:
            path = folder / remote.name
            if path.is_file() and _wrong(path, remote, source) is None:
                advance(remote.size)
            else:
                path.unlink(missing_ok=True)  # else its age alone could make it count as fetched
                _download(name, source, remote, folder, token, advance)
                wrong = _wrong(path, remote, source)
                if wrong is not None:
                    path.unlink()
                    raise DataError(wrong, where=path, remedy="fetch it again")
            fetched.append(
                FetchedFile(
                    benchmark=name,
                    repository=source.repository,
                    revision=source.revision,
                    path=path.relative_to(output).as_posix(),
                    bytes=path.stat().st_size,
                    sha256=_hash(path, hashlib.sha256()),
                    checked_against="a known SHA-256" if remote.name in source.known else "the hub's hash",
                )
            )
    return fetched


def _ask(name: str, source: Source, file: str, token: str | None) -> _Remote:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(source.repository, file, repo_type="dataset", revision=source.revision)
    with _explained(name, source):
        told = get_hf_file_metadata(url, token=token)
    if told.commit_hash != source.revision or not told.etag or told.size is None:
        raise DataError(
            f"the hub does not describe {name} at its pinned revision",
            where=url,
            expected=f"revision {source.revision}",
            remedy="check HF_ENDPOINT",
        )
    return _Remote(file, told.size, told.etag)


def _download(
    name: str, source: Source, remote: _Remote, folder: Path, token: str | None, advance: Advance
) -> None:
    from huggingface_hub import hf_hub_download

    with os_errors(folder, f"write {name}"), _explained(name, source), plain_names():
        folder.mkdir(parents=True, exist_ok=True)
        hf_hub_download(
            source.repository,
            remote.name,
            repo_type="dataset",
            revision=source.revision,
            local_dir=folder,
            token=token,
            tqdm_class=reporting(advance),
        )


def _wrong(path: Path, remote: _Remote, source: Source) -> str | None:
    """Why the file is not the one of the pinned revision; None when it is."""
    if path.stat().st_size != remote.size:
        return f"the file has {path.stat().st_size} bytes, the hub's has {remote.size}"
    known = source.known.get(remote.name)
    if known and _hash(path, hashlib.sha256()) != known:
        return "the file is not the one that is known under this revision"
    if len(remote.etag) == 64:
        own = _hash(path, hashlib.sha256())
    else:
        own = _hash(path, hashlib.sha1(f"blob {remote.size}\0".encode()))
    return None if own == remote.etag else "the file's hash is not the one that the hub gives for it"


def _hash(path: Path, digest: Any) -> str:
    with os_errors(path, "read"), open_input(path) as handle:
        while block := handle.read(_BLOCK):
            digest.update(block)
    return str(digest.hexdigest())


@contextmanager
def _explained(name: str, source: Source) -> Iterator[None]:
    """The hub's errors as ours; anything else stays what it is."""
    from huggingface_hub import errors, get_token

    page = f"https://huggingface.co/datasets/{source.repository}"
    gone = (
        errors.RepositoryNotFoundError,
        errors.DisabledRepoError,
        errors.RevisionNotFoundError,
        errors.RemoteEntryNotFoundError,
    )
    network = (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)
    try:
        yield
    except errors.GatedRepoError as error:
        have = "your token has no access yet" if get_token() else "there is no token"
        raise DataError(
            f"{name} is gated, and {have}",
            where=page,
            remedy="accept the conditions on that page, then run `hf auth login` or set HF_TOKEN; "
            f"or put your own copy of {name} into the folder",
        ) from error
    except gone as error:
        raise DataError(
            f"the hub does not have {name} under its pinned revision ({type(error).__name__})",
            where=page,
            remedy=f"bring your own copy of {name}: every public layout is read",
        ) from error
    except Exception as error:
        if isinstance(error, network) or type(error).__module__.startswith("httpx"):
            raise MachineError(
                f"the hub cannot be reached while fetching {name} ({type(error).__name__})",
                where=page,
                remedy="check the network, HF_ENDPOINT and HF_HUB_OFFLINE; the same command goes on",
            ) from error
        raise
