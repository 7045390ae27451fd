"""Bring a model from the Hugging Face hub into its cache: only the files that are needed, each checked."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.errors import CheckpointError, MachineError, os_errors
from lorasmith.files.atomic import write_bytes
from lorasmith.files.digests import remember_sha256
from lorasmith.hub.cache import HubModel, cache_of, shards_of
from lorasmith.hub.model_files import CODE_FILES, OTHER_FILES, TOKENIZER_FILES, fits, names_code
from lorasmith.machine.resources import require_disk
from lorasmith.progress import Advance, Progress

SMALL_FILES = ("config.json", "README.md", *TOKENIZER_FILES, *OTHER_FILES)
"""Wanted beside the weights; the readme tells the licence."""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_BLOCK = 1 << 20
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PLAIN = re.compile(r"[\w=+-][\w.=+-]*")
"""What may become the name of a file or folder."""
_NAMING = ("x-repo-commit", "x-linked-etag", "etag", "x-xet-hash")
"""Headers by which huggingface_hub names what it writes, joined to a folder as they come."""


@dataclass(frozen=True)
class _Remote:
    """A file as the hub describes it."""

    name: str
    size: int
    sha256: str | None
    """SHA-256 of a file in large-file storage; None for any other."""
    blob: str | None
    """Git's hash of a file outside large-file storage."""


def download(model: HubModel, progress: Progress, *, adapters: bool = False) -> Path:
    """The snapshot's folder, whole. Weights come last, so a download that was killed goes on with its shards.

    `adapters`: take the repository of an adapter as well, which has no config.json.

    Never fetches pickles. Raises `CheckpointError` where the model cannot be had or holds no safetensors,
    `MachineError` where the hub cannot be reached, `DiskError` before anything large is fetched.
    """
    commit, listed = _describe(model)
    snapshot = cache_of(model.repository) / "snapshots" / commit
    adapter = adapters and "config.json" not in listed and ADAPTER_CONFIG in listed
    small_names = (*SMALL_FILES, ADAPTER_CONFIG) if adapter else (*SMALL_FILES, INDEX)
    small = [listed[name] for name in listed if fits(name, small_names)]
    if not adapter and "config.json" not in listed:
        raise _unusable(model, "no config.json", "a model; this may be an adapter or a data set")
    _fetch(model, commit, small, snapshot, progress, "files")
    if names_code(snapshot):
        code = [listed[name] for name in listed if fits(name, CODE_FILES)]
        _fetch(model, commit, code, snapshot, progress, "code")
    weights = _weights(model, listed, snapshot, ADAPTER_WEIGHTS if adapter else SINGLE)
    _fetch(model, commit, weights, snapshot, progress, "weights")
    if model.revision != commit:
        # As huggingface_hub notes what a branch stood for, so that the next time needs no network.
        reference = cache_of(model.repository) / "refs" / model.revision
        with os_errors(reference, "write"):
            reference.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(reference, commit.encode())
    return snapshot


def _describe(model: HubModel) -> tuple[str, dict[str, _Remote]]:
    """The commit that a revision stands for, and its files by name, as far as that can be believed."""
    from huggingface_hub import HfApi

    try:
        with _explained(model):
            info = HfApi().model_info(model.repository, revision=model.revision, files_metadata=True)
        files = [
            _Remote(file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else None, file.blob_id)
            for file in info.siblings or []
        ]
        # The commit becomes a folder of the cache: `../..` would lead out of it.
        if not _COMMIT.fullmatch(info.sha or ""):
            raise ValueError(f"commit {info.sha!r}")
        for file in files:
            if not isinstance(file.name, str) or not isinstance(file.size, int) or file.size < 0:
                raise ValueError(f"a file {file.name!r} of {file.size!r} bytes")
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise _no_hub(f"does not describe {model.repository} as a hub does ({error})") from error
    return str(info.sha), {file.name: file for file in files}


def _weights(model: HubModel, listed: dict[str, _Remote], snapshot: Path, single: str) -> list[_Remote]:
    names = [single] if single in listed else shards_of(snapshot / INDEX)
    if not names:
        others = sorted(name for name in listed if name.endswith((".bin", ".pt", ".pth", ".gguf", ".h5")))
        raise _unusable(
            model,
            f"{others[0]}, but no safetensors weights" if others else "no weights",
            f"{SINGLE} or {INDEX}" if single == SINGLE else single,
            "take a revision that has them, or convert the model where you trust it: no pickle is loaded",
        )
    missing = [name for name in names if name not in listed]
    if missing:
        raise _unusable(model, f"no {missing[0]}, which its index names", "all shards")
    return [listed[name] for name in names]


def _fetch(
    model: HubModel, commit: str, files: list[_Remote], snapshot: Path, progress: Progress, what: str
) -> None:
    """One file after the other; what is there already counts as done."""
    missing = [file for file in files if not (snapshot / file.name).is_file()]
    if not missing:
        return
    needed = sum(file.size for file in missing)
    require_disk(snapshot, needed, f"download {model.repository}")
    with progress(f"Download {model.repository} ({what})", total=needed, unit="B") as advance:
        for file in missing:
            _fetch_one(model, commit, file, advance)


def _fetch_one(model: HubModel, commit: str, file: _Remote, advance: Advance) -> None:
    from huggingface_hub import hf_hub_download

    with _explained(model), plain_names():
        path = Path(
            hf_hub_download(model.repository, file.name, revision=commit, tqdm_class=reporting(advance))
        )
    sha256 = _check(path, file)
    if sha256 is None:
        with os_errors(path, "remove"):
            path.resolve().unlink()
            path.unlink(missing_ok=True)
        raise CheckpointError(
            f"{file.name} arrived damaged: it is not the file that the hub describes",
            where=path,
            remedy="give the same command again; what is finished is kept",
        )
    remember_sha256(path, sha256)


@contextmanager
def plain_names() -> Iterator[None]:
    """Refuse an answer of the hub that would have huggingface_hub write outside its cache.

    It joins a file's tag to the folder of blobs as the hub gives it. A question asked before would not help:
    the hub may answer the second one otherwise.
    """
    from huggingface_hub import get_session

    hooks = get_session().event_hooks["response"]
    hooks.append(_refuse_paths)
    try:
        yield
    finally:
        hooks.remove(_refuse_paths)


def _refuse_paths(response: Any) -> None:
    if (
        response.request.method != "HEAD"
    ):  # the one that asks for names; storage behind the hub has tags of its own
        return
    for header in _NAMING:
        value = response.headers.get(header)
        if value is not None and not _PLAIN.fullmatch(value.removeprefix("W/").strip('"')):
            raise _no_hub(f"names a file by {header} {value!r}", str(response.request.url))


def _check(path: Path, file: _Remote) -> str | None:
    """The file's SHA-256, or None where its size or the hub's own hash is another."""
    ours = hashlib.sha256()
    git = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
    with os_errors(path, "read"), path.open("rb") as handle:
        size = 0
        while block := handle.read(_BLOCK):
            size += len(block)
            ours.update(block)
            if file.sha256 is None:
                git.update(block)
    right = git.hexdigest() == file.blob if file.sha256 is None else ours.hexdigest() == file.sha256
    return ours.hexdigest() if size == file.size and right else None


def reporting(advance: Advance) -> type[Any]:
    """A bar for huggingface_hub that draws nothing and hands on what arrives."""
    from huggingface_hub.utils.tqdm import tqdm

    class Reporting(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            advance(int(n or 0))
            return None

    return Reporting


@contextmanager
def _explained(model: HubModel) -> Iterator[None]:
    """The hub's errors as ours; anything else stays what it is."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{model.repository}"
    network = (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)
    try:
        yield
    except errors.GatedRepoError as error:
        raise _gated(model, page) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"the hub's {model.repository} has no revision {model.revision!r}",
            where=page,
            expected="a branch, tag or commit of it",
        ) from error
    except (errors.RepositoryNotFoundError, errors.DisabledRepoError, errors.HFValidationError) as error:
        raise CheckpointError(
            f"there is no folder {model.repository!r} here, and the hub gives no model of that name",
            where=page,
            expected="a folder, or org/name of a model on the hub",
            remedy="check the spelling; a private model needs `hf auth login` or HF_TOKEN",
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise MachineError(
            f"{model.repository} at {model.revision} is neither a folder here nor whole in the hub's cache, "
            "and HF_HUB_OFFLINE is set",
            where=cache_of(model.repository),
            remedy="give a folder, or download it once with HF_HUB_OFFLINE=0",
        ) from error
    except network as error:
        raise _unreachable(model, page, error) from error
    except OSError as error:
        with os_errors(cache_of(model.repository), f"download {model.repository}"):
            raise error
    except Exception as error:
        if type(error).__module__.startswith(("httpx", "httpcore")):
            raise _unreachable(model, page, error) from error
        raise


def _gated(model: HubModel, page: str) -> CheckpointError:
    from huggingface_hub import get_token

    have = "your token has no access to it yet" if get_token() else "there is no token"
    return CheckpointError(
        f"{model.repository} is gated, and {have}",
        where=page,
        remedy="accept the conditions on that page, then run `hf auth login` or set HF_TOKEN",
    )


def _unreachable(model: HubModel, page: str, error: Exception) -> MachineError:
    return MachineError(
        f"there is no folder {model.repository!r} here, and the hub cannot be reached for a model of that "
        f"name ({type(error).__name__})",
        where=page,
        remedy="check the path, or the network and HF_ENDPOINT; the same command goes on where this stopped",
    )


def _no_hub(found: str, where: str | None = None) -> CheckpointError:
    from huggingface_hub import constants

    return CheckpointError(
        f"the hub {found}",
        where=where or constants.ENDPOINT,
        expected="answers of a Hugging Face hub, with a commit and plain names",
        remedy="check HF_ENDPOINT; nothing was taken from this answer",
    )


def _unusable(model: HubModel, found: str, expected: str, remedy: str | None = None) -> CheckpointError:
    return CheckpointError(
        f"the hub's {model.repository} at {model.revision} holds {found}", expected=expected, remedy=remedy
    )
