"""A finished run's merged model to the Hugging Face hub: checked before, private at first, resumable."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING

from lorasmith.errors import CheckpointError, DataError, LorasmithError, MachineError, UsageError
from lorasmith.files.atomic import read_record
from lorasmith.files.digests import CARD, combine, hash_file
from lorasmith.packaging.contents import MERGE_RECORD, model_files
from lorasmith.progress import Progress, silent
from lorasmith.records.base import FileDigest
from lorasmith.records.dataset import ContaminationRecord
from lorasmith.records.merging import MergeRecord
from lorasmith.records.proof import WeightProof
from lorasmith.records.release import GateRecord

if TYPE_CHECKING:
    from huggingface_hub import HfApi


# What goes wrong between here and the hub, as our errors; never with a token in them.


@contextmanager
def explained(repository: str, api: HfApi) -> Iterator[None]:
    """The hub's errors as ours. Its messages are not passed on whole: they may quote a request."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    where = f"{api.endpoint}/{repository}"
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403, 404):
            raise UsageError(
                f"the hub does not let you write there (HTTP {status})",
                where=where,
                expected="a token with the right to write",
                remedy="run `hf auth login` or set HF_TOKEN, and check the name",
            ) from None
        raise MachineError(
            f"the hub answers with an error (HTTP {status})",
            where=where,
            remedy="give the same command again later; what has arrived is kept",
        ) from None
    except OfflineModeIsEnabled:
        raise MachineError(
            "the hub is switched off here", where=where, remedy="unset HF_HUB_OFFLINE"
        ) from None
    except ValueError as error:
        if "README.md" not in str(error):
            raise
        raise UsageError(
            f"the hub does not accept the model card: {' '.join(str(error).split())}",
            where=where,
            remedy="the licence comes from the base's own card: correct it there and run again",
        ) from None
    except (ConnectionError, TimeoutError) as error:
        raise _unreachable(where, error) from None
    except Exception as error:
        if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2"):
            raise _unreachable(where, error) from None
        raise


def _unreachable(where: str, error: Exception) -> MachineError:
    return MachineError(
        f"the hub cannot be reached ({type(error).__name__})",
        where=where,
        remedy="check the network and HF_ENDPOINT, and give the same command again; what has arrived is kept",
    )


_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_STALE = re.compile(r"[^/]*\.(safetensors|bin|gguf)|[^/]*\.index\.json")
"""Weights at the top of a repository that would be mixed with ours when they stay."""


@dataclass(frozen=True)
class Changes:
    """What an upload does to a repository that exists."""

    replaced: list[str]
    """Files whose content changes."""
    removed: list[str]
    """Other weights at the top of it, which would be mixed with ours."""


@dataclass(frozen=True)
class Published:
    """Where the model is now."""

    url: str
    files: int
    private: bool


Agree = Callable[[Changes], bool]
"""Asked before anything that is there is replaced or removed."""


def publish(
    run: Path,
    repository: str,
    *,
    private: bool = True,
    allow_failed: bool = False,
    agree: Agree = lambda changes: False,
    token: str | None = None,
    progress: Progress = silent,
) -> Published:
    """Upload the merged folder of a finished run as the model `repository` (`org/name`).

    Every file is hashed and held against the merge record and the proof first; a run that is unproven or
    failed is refused unless `allow_failed`. The repository is made if it does not exist, private unless told;
    one that exists keeps what it is. What is already there with the same content is left alone, so that an
    upload that broke off goes on. `token` replaces the one that huggingface_hub finds (`HF_TOKEN`, or
    `hf auth login`).

    Raises `UsageError` for a wrong name, an unproven run, a lack of rights or a refusal by `agree`,
    `CheckpointError` for a folder that is not what was proved, `MachineError` where the hub is out of reach.
    """
    if not _NAME.fullmatch(repository):
        raise UsageError(f"{repository!r} is no name of a repository", expected="such as my-org/my-model")
    files = _checked_files(run, progress)
    problems = open_questions(run, files)
    if problems and not allow_failed:
        raise UsageError(
            "this run is not fit to be published: " + "; ".join(problems),
            where=run,
            remedy="see the report; --allow-failed publishes it all the same, and its card says so",
        )
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with explained(repository, api):
        there = _remote_files(api, repository)
    if there is not None:
        changes = _changes(run / "merged", files, there)
        if (changes.replaced or changes.removed) and not agree(changes):
            raise UsageError(
                f"{repository} holds other files of these names, and nobody agreed to replace them",
                where=", ".join([*changes.replaced, *changes.removed][:5]),
                remedy="choose another name, or agree with --yes",
            )
    with explained(repository, api):
        if there is None:
            api.create_repo(repository, private=private)
        api.upload_folder(
            repo_id=repository,
            folder_path=run / "merged",
            allow_patterns=[escape(file.path) for file in files],
            delete_patterns=[escape(name) for name in changes.removed] if there is not None else None,
            commit_message="Upload the merged model",
        )
        info = api.model_info(repository)
    return Published(f"{api.endpoint}/{repository}", len(files), bool(info.private))


def open_questions(run: Path, files: list[FileDigest]) -> list[str]:
    """Why this run should not leave the machine: what was not proved, not measured, or failed.

    Raises `CheckpointError` when the proof is one of another folder.
    """
    problems = []
    try:
        proof = read_record(run / "proof" / "weights.json", WeightProof)
    except LorasmithError:
        problems.append("its weights were not proved")
    else:
        if proof.merged_sha256 != combine(file for file in files if file.path != CARD):
            raise CheckpointError(
                "the merged folder is not the one that was proved",
                where=run / "merged",
                expected=f"digest {proof.merged_sha256}",
                remedy="run again: what changed is done again",
            )
        if proof.grade == "different":
            problems.append("its weights are not the merge")
    try:
        gates = read_record(run / "gates.json", GateRecord)
    except LorasmithError:
        problems.append("its gates were not judged")
    else:
        failed = [result.gate.name for result in gates.gates if result.verdict != "pass"]
        if failed:
            problems.append(f"gates that did not pass: {', '.join(failed)}")
    try:
        contamination = read_record(run / "testset" / "contamination.json", ContaminationRecord)
    except LorasmithError:
        problems.append("its test set was not checked for training rows")
    else:
        if contamination.verdict == "contaminated":
            problems.append("its test set holds training rows")
    return problems


def _checked_files(run: Path, progress: Progress) -> list[FileDigest]:
    """Every file of the merged folder as it is now, each the one that the merge wrote."""
    folder = run / "merged"
    if not (folder / MERGE_RECORD).is_file():
        raise DataError("there is no merged model in this run", where=run, expected=f"merged/{MERGE_RECORD}")
    names = model_files(folder)
    if CARD not in names:
        raise DataError(
            "the merged model has no card", where=folder, expected=CARD, remedy="finish the run first"
        )
    record = read_record(folder / MERGE_RECORD, MergeRecord)
    expected = {file.path: file.sha256 for file in record.files}
    digests = []
    total = sum((folder / name).stat().st_size for name in names)
    with progress("Check the model", total=total, unit="B") as advance:
        for name in names:
            path = folder / name
            digest = FileDigest(path=name, bytes=path.stat().st_size, sha256=hash_file(path))
            if digest.sha256 != expected.get(name, digest.sha256):
                raise CheckpointError(
                    "this file is not the one that the merge wrote",
                    where=path,
                    expected=f"SHA-256 {expected[name]}, found {digest.sha256}",
                    remedy="run again: the merge is done again",
                )
            digests.append(digest)
            advance(digest.bytes)
    return digests


def _remote_files(api: HfApi, repository: str) -> dict[str, str] | None:
    """Name → the hub's hash (SHA-256 of large files, else Git's); None where there is no such repository."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        info = api.model_info(repository, files_metadata=True)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return None
    return {
        file.rfilename: (file.lfs.sha256 if file.lfs else file.blob_id) or "" for file in info.siblings or []
    }


def _changes(folder: Path, files: list[FileDigest], there: dict[str, str]) -> Changes:
    ours = {file.path: file for file in files}
    replaced = [
        name
        for name, remote in sorted(there.items())
        if name in ours and remote not in (ours[name].sha256, _git_hash(folder / name, ours[name].bytes))
    ]
    removed = [name for name in sorted(there) if name not in ours and _STALE.fullmatch(name)]
    return Changes(replaced, removed)


def _git_hash(path: Path, size: int) -> str:
    digest = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
