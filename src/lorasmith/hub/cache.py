"""Models of the Hugging Face hub by name, and as they lie in its cache."""

from __future__ import annotations

import re
from dataclasses import dataclass
from os import fspath
from pathlib import Path

from lorasmith.errors import InputError, os_errors
from lorasmith.files.atomic import StrPath
from lorasmith.files.inputs import read_input
from lorasmith.parsing import parse_json

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
    return None if Path(text).exists() else spelled_model(text)


def spelled_model(text: str) -> HubModel | None:
    """The model that `org/name[@revision]` spells, whatever is here; None for what cannot be a name there."""
    match = _NAME.fullmatch(text)
    return HubModel(match["repository"], match["revision"] or "main") if match else None


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
        named = set(parse_json(read_input(index))["weight_map"].values())
    except (OSError, InputError, ValueError, KeyError, TypeError, AttributeError):
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
