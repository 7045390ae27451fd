"""A base model by name: a folder as it is, or `org/name[@revision]` of the Hugging Face hub."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from os import fspath
from pathlib import Path

from lorasmith.errors import UsageError, os_errors
from lorasmith.files.paths import StrPath
from lorasmith.progress import Progress, silent

_NAME = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w-][\w.-]*(/[\w-][\w.-]*)*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class HubModel:
    """A model of the hub as a person names it."""

    repository: str
    revision: str
    """A branch, tag or commit."""


@dataclass(frozen=True)
class Origin:
    """Where the files of a folder come from, to the commit."""

    repository: str
    commit: str


def hub_name(named: StrPath) -> HubModel | None:
    """What a name means on the hub; None for an existing path and for what cannot be a name there."""
    text = fspath(named)
    found = _NAME.fullmatch(text)
    if found is None or Path(text).exists():
        return None
    return HubModel(found["repository"], found["revision"] or "main")


def local_model(named: StrPath, adapters: Sequence[StrPath] = (), *, progress: Progress = silent) -> Path:
    """The folder of a model: the path itself, or a model of the hub, downloaded unless the cache has it.

    A name without a revision takes the one that an adapter's config gives for it, else `main`. A revision
    that the cache holds is used as it is, without asking the hub. `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`,
    `HF_HUB_OFFLINE` and `HF_TOKEN` mean what they mean to huggingface_hub.

    Raises `CheckpointError` where the hub does not have the model or does not give it to this person, and
    `MachineError` where the hub cannot be reached or the disk is too small.
    """
    model = hub_name(named)
    if model is None:
        return Path(named)
    if "@" not in fspath(named):
        model = HubModel(model.repository, _revision_of(model.repository, adapters) or model.revision)
    cached = find_cached(model)
    if cached is not None:
        return cached
    from lorasmith.files.hub_download import download

    return download(model, progress)


def cache_of(repository: str) -> Path:
    """The folder of a model in the hub's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / ("models--" + repository.replace("/", "--"))


def find_cached(model: HubModel) -> Path | None:
    """The snapshot of a revision if the cache holds its config and all its weights."""
    cache = cache_of(model.repository)
    commit = model.revision
    reference = cache / "refs" / model.revision
    if not _COMMIT.fullmatch(commit):
        if not reference.is_file():
            return None
        with os_errors(reference, "read"):
            commit = reference.read_text(encoding="utf-8", errors="replace").strip()
    snapshot = cache / "snapshots" / commit
    return snapshot if _COMMIT.fullmatch(commit) and _whole(snapshot) else None


def _whole(snapshot: Path) -> bool:
    if not (snapshot / "config.json").is_file():
        return False
    if (snapshot / "model.safetensors").is_file():
        return True
    shards = shards_of(snapshot / _INDEX)
    return bool(shards) and all((snapshot / name).is_file() for name in shards)


def shards_of(index: Path) -> list[str]:
    """The shards that an index names, by name; none where it is missing or unreadable, which is found later.

    Names that point outside the folder are left out; opening the folder refuses them.
    """
    try:
        named = set(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    return sorted(
        name for name in named if isinstance(name, str) and name.endswith(".safetensors") and "/" not in name
    )


def origin_of(folder: Path) -> Origin | None:
    """Repository and commit of a folder that lies in a hub cache; None for any other."""
    snapshots = folder.absolute().parent
    repository = snapshots.parent.name.removeprefix("models--").replace("--", "/", 1)
    known = snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--")
    if not known or not _COMMIT.fullmatch(folder.name) or "/" not in repository:
        return None
    return Origin(repository, folder.name)


def base_of(adapter: Path, flag: str = "--base") -> str:
    """What an adapter's config names as its base, with the revision if it gives one.

    Raises `UsageError` naming `flag` where it names none, or a folder that is not there.
    """
    config = adapter / "adapter_config.json"
    with os_errors(config, "read"):
        content = config.read_bytes()
    named, revision = _base_and_revision(content)
    if named and ((Path(named) / "config.json").is_file() or not revision):
        spelled = named
    else:
        spelled = f"{named}@{revision}" if named else ""
    if not spelled or not ((Path(spelled) / "config.json").is_file() or hub_name(spelled)):
        raise UsageError(
            f"the base model that the adapter names, {named!r}, is no folder here",
            where=config,
            remedy=f"give it with {flag}",
        )
    return spelled


def _revision_of(repository: str, adapters: Sequence[StrPath]) -> str | None:
    """The revision of the base in the first adapter that was trained on this repository and gives one."""
    for adapter in adapters:
        try:
            content = (Path(adapter) / "adapter_config.json").read_bytes()
        except OSError:
            continue  # what is wrong with the adapter is said when it is opened
        named, revision = _base_and_revision(content)
        if named == repository and revision and hub_name(f"{repository}@{revision}"):
            return revision
    return None


def _base_and_revision(content: bytes) -> tuple[str, str]:
    try:
        config = json.loads(content)
        named, revision = config.get("base_model_name_or_path"), config.get("revision")
    except (ValueError, AttributeError, RecursionError):
        return "", ""
    return named if isinstance(named, str) else "", revision if isinstance(revision, str) else ""
