"""Is this the base that an adapter was trained on? What names, revisions and a merge's record can tell.

The same adapter on another base of the same shape merges without an error and answers worse, or on a model
that it is already merged into counts twice. Names are compared as people and tools write them: with or
without an organisation, in any case, as a path into the hub's cache, or as the 4-bit twin of a base.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lorasmith.checkpoint.header import read_object
from lorasmith.errors import AdapterError, CheckpointError
from lorasmith.hub.cache import origin_of
from lorasmith.records.base import Finding

MERGE_RECORD = "lorasmith_merge.json"
"""What a merge leaves in its folder; it names the digests of its adapters."""

_COMMIT = re.compile(r"[0-9a-f]{7,40}")
_SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/[0-9a-f]{40}")
_TWIN = re.compile(r"-(?:unsloth-)?bnb-[48]bit$")
"""How the copies of a base that bitsandbytes has quantized are called: trained on, never merged into."""


@dataclass(frozen=True)
class GivenBase:
    """What is known of a base by its place and its config."""

    folder: str
    """The last part of its path."""
    repository: str | None = None
    """Its name on the hub, where it lies in the hub's cache."""
    commit: str | None = None
    config_name: str | None = None
    """`_name_or_path` of its config: where it was loaded from when it was saved."""


def given_base(folder: Path, config_name: object = None) -> GivenBase:
    """What is known of the base in a folder."""
    place = folder.resolve()
    origin = origin_of(folder) or origin_of(place)
    return GivenBase(
        folder=place.name,
        repository=origin.repository if origin else None,
        commit=origin.commit if origin else None,
        config_name=config_name if isinstance(config_name, str) and config_name else None,
    )


def compare_base(named: str | None, revision: str | None, base: GivenBase) -> list[Finding]:
    """A warning where an adapter names another base or revision, a note for a 4-bit twin of this one.

    `named` and `revision` are those of the adapter's config. Nothing is found where a name cannot tell: a
    folder may be called anything.
    """
    if not named or not _short(named):
        return []
    candidates = [name for name in (base.repository, base.config_name, base.folder) if name]
    if base.repository:
        candidates = [base.repository]  # what the hub calls it is certain; a config may keep an older name
    same = [name for name in candidates if _plain(name) == _plain(named)]
    if not same:
        other = next((name for name in candidates if _contradicts(named, name, base)), None)
        if other is None:
            return []
        return [
            _finding(
                "base-name",
                f"the adapter was trained on {_short(named)!r}, the base is {_short(other)!r}",
                "the base that the adapter was trained on",
            )
        ]
    if _is_twin(named) != _is_twin(same[0]):
        told = f"the adapter was trained on {_short(named)!r}, a quantized copy of {_short(same[0])!r}"
        remedy = (
            "what is merged is another model than the one that was trained, often a good one: go by its own "
            f"validation; give {_short(named)!r} as the base, with --into 16bit, to ship what was trained"
        )
        if _is_twin(same[0]):
            told = f"the base {_short(same[0])!r} is a quantized copy of the adapter's, {_short(named)!r}"
            remedy = (
                "right for an adapter that was trained on the copy (QLoRA keeps the name of the original); "
                "else give the original as the base"
            )
        return [
            Finding(
                severity="note",
                code="base-twin",
                message=f"{told}: their weights differ by the quantization",
                remedy=remedy,
            )
        ]
    return _compare_revision(revision or "", base)


def _compare_revision(revision: str, base: GivenBase) -> list[Finding]:
    # What a branch or tag stood for when the adapter was trained cannot be told from its name.
    if base.commit and _COMMIT.fullmatch(revision) and not base.commit.startswith(revision):
        return [
            _finding(
                "base-revision",
                f"the adapter was trained on the commit {revision} of its base, this is {base.commit}",
                "the base that the adapter was trained on",
            )
        ]
    return []


def _contradicts(named: str, other: str, base: GivenBase) -> bool:
    """Whether two different names are of two models, rather than one of them a folder called anyhow."""
    certain = other in (base.repository, base.config_name) and _is_hub_name(other)
    # `models/base` looks like a name on the hub; names of models there nearly always have a number.
    if certain and _is_hub_name(named) and re.search(r"\d", _short(named)):
        return True
    ours, theirs = _Kind.of(named), _Kind.of(other)
    if ours.family != theirs.family or not (ours.size and theirs.size):
        return False
    return ours != theirs


@dataclass(frozen=True)
class _Kind:
    """What a name such as `Qwen2.5-7B-Instruct` says of a model."""

    family: str
    size: str
    tuned: bool

    @classmethod
    def of(cls, name: str) -> _Kind:
        plain = _plain(name)
        family = re.match(r"[a-z]*", plain)
        size = re.search(r"(?<![a-z0-9.])\d+(?:\.\d+)?[bm](?![a-z0-9])", plain)
        tuned = re.search(r"(?<![a-z])(?:instruct|chat|it)(?![a-z])", plain)
        return cls(family[0] if family else "", size[0] if size else "", tuned is not None)


def _short(name: str) -> str:
    """The name of a model without its organisation, or that of a folder."""
    snapshot = _SNAPSHOT.search(name)
    return snapshot[2] if snapshot else PurePosixPath(name.replace("\\", "/")).name


def _plain(name: str) -> str:
    """A short name as it is compared: in lower case, the 4-bit twin as its base, Meta's prefix left out."""
    return _TWIN.sub("", _short(name).casefold()).removeprefix("meta-")


def _is_twin(name: str) -> bool:
    return _TWIN.search(_short(name).casefold()) is not None


def _is_hub_name(name: str) -> bool:
    if _SNAPSHOT.search(name):
        return True
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def _finding(code: str, message: str, expected: str) -> Finding:
    return Finding(severity="warning", code=code, message=message, expected=expected)


def require_not_merged(base: Path, adapters: Sequence[Path], adapter_sha256: Sequence[str]) -> None:
    """Raise `AdapterError` for an adapter that the base's own record says is merged into it already."""
    record = base / MERGE_RECORD
    if not record.is_file():
        return
    known = read_object(record, CheckpointError).get("adapter_sha256")
    for adapter, digest in zip(adapters, adapter_sha256, strict=True):
        if isinstance(known, list) and digest in known:
            raise AdapterError(
                "this adapter is merged into this base already",
                where=adapter,
                expected="the base that the adapter was trained on",
                remedy=f"give that one; what {base} was made from stands in its {MERGE_RECORD}",
            )
