"""A base model by name: a folder as it is, or `org/name[@revision]` of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from os import fspath
from pathlib import Path

from lorasmith.errors import LorasmithError, UsageError, os_errors
from lorasmith.files.atomic import StrPath
from lorasmith.files.inputs import read_input, require_own_links
from lorasmith.hub.cache import HubModel, find_cached, hub_name
from lorasmith.parsing import parse_json
from lorasmith.progress import Progress, silent


def local_model(named: StrPath, adapters: Sequence[StrPath] = (), *, progress: Progress = silent) -> Path:
    """The folder of a model: the path itself, or a model of the hub, downloaded unless the cache has it.

    A name without a revision takes the one that an adapter's config gives for it, else `main`. A revision
    that the cache holds is used as it is, without asking the hub. `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`,
    `HF_HUB_OFFLINE` and `HF_TOKEN` mean what they mean to huggingface_hub.

    Raises `InputError` for folders with links that lead out of them, with pipes, sockets or devices,
    `CheckpointError` where the hub does not have the model or does not give it to this person, and
    `MachineError` where the hub cannot be reached or the disk is too small.
    """
    for adapter in adapters:
        require_own_links(Path(adapter))
    model = hub_name(named)
    if model is None:
        require_own_links(Path(named))
        return Path(named)
    if "@" not in fspath(named):
        model = HubModel(model.repository, _revision_of(model.repository, adapters) or model.revision)
    cached = find_cached(model)
    if cached is not None:
        return cached
    from lorasmith.hub.download import download

    return download(model, progress)


def base_of(adapter: Path, flag: str = "--base") -> str:
    """What an adapter's config names as its base, with the revision if it gives one.

    Raises `UsageError` naming `flag` where it names none, or a folder that is not there.
    """
    config = adapter / "adapter_config.json"
    with os_errors(config, "read"):
        content = read_input(config)
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
            content = read_input(Path(adapter) / "adapter_config.json")
        except (OSError, LorasmithError):
            continue  # what is wrong with the adapter is said when it is opened
        named, revision = _base_and_revision(content)
        if named == repository and revision and hub_name(f"{repository}@{revision}"):
            return revision
    return None


def _base_and_revision(content: bytes) -> tuple[str, str]:
    try:
        config = parse_json(content)
        named, revision = config.get("base_model_name_or_path"), config.get("revision")
    except (ValueError, AttributeError):
        return "", ""
    return named if isinstance(named, str) else "", revision if isinstance(revision, str) else ""
