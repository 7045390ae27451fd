"""What lies beside the tensors of a merge: its own record, config and tokenizer, held against the inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lorasmith.errors import InputError
from lorasmith.files.atomic import read_record
from lorasmith.parsing import parse_json
from lorasmith.proving.weights.model_folder import read_json
from lorasmith.records.base import FileDigest, Finding
from lorasmith.records.merging import MergeRecord

RECORD = "lorasmith_merge.json"

CHECKABLE = ("nearest", "dithered", "calibrated")
"""Roundings whose result this proof can judge."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)

_GENERATION = "generation_config.json"

_FREE_KEYS = frozenset(
    {
        "dtype",
        "torch_dtype",
        "quantization_config",
        "tie_word_embeddings",
        "vocab_size",
        "transformers_version",
        "_name_or_path",
    }
)
"""Keys of a config that a merge may change: precision, vocabulary, and who wrote the file."""


@dataclass(frozen=True)
class Claims:
    """What a merge says of itself; nothing of it is believed unchecked."""

    record: MergeRecord | None = None
    problem: Finding | None = None

    @property
    def rounding(self) -> str:
        """Without a record, the rule that every tool means to follow."""
        return self.record.rounding if self.record else "nearest"

    def rounding_of(self, tensor: str) -> str:
        """The rule of one tensor with products; a calibrated merge says which it could only dither."""
        if self.record is None or self.record.rounding != "calibrated":
            return self.rounding
        return self._own.get(tensor, "nearest")

    @cached_property
    def _own(self) -> dict[str, str]:
        return {tensor.name: tensor.rounding for tensor in self.record.tensors} if self.record else {}


@dataclass(frozen=True)
class Identity:
    """What was read for this proof, by digest."""

    base: str
    adapters: list[str]
    merged: list[FileDigest]
    weights: list[float]


def read_claims(merged: Path) -> Claims:
    """Read the merge's own record, if it has one; raises `InputError` for a rounding unknown here."""
    path = merged / RECORD
    if not path.is_file():
        return Claims()
    try:
        record = read_record(path, MergeRecord)
    except InputError as error:
        return Claims(problem=_error("damaged-record", error.found, RECORD, error.expected))
    if record.rounding not in CHECKABLE:
        raise InputError(
            f"cannot check rounding {record.rounding!r}",
            where=path,
            expected=" or ".join(repr(name) for name in CHECKABLE),
            remedy="merge with one of these, or compare the behaviour of the models instead",
        )
    wrong = sorted({tensor.rounding for tensor in record.tensors} - set(CHECKABLE))
    if record.rounding != "nearest" and (record.seed is None or wrong):
        raise InputError(
            f"the record of a {record.rounding} merge has no seed"
            if record.seed is None
            else f"the record holds tensors of an unknown rounding {wrong[0]!r}",
            where=path,
            expected="a record as `lorasmith merge` writes it",
        )
    return Claims(record)


def check_files(
    claims: Claims, identity: Identity, base: Path, adapters: Sequence[Path], merged: Path
) -> list[Finding]:
    """All findings on record, config and tokenizer; those of severity `error` make a merge `different`."""
    found = [claims.problem] if claims.problem else []
    if claims.record:
        found += _check_record(claims.record, identity)
    found += _check_config(base, merged)
    found += _check_generation(base, merged)
    found += _check_tokenizer(base, adapters, merged)
    return found


def merged_config(merged: Path) -> dict[str, Any]:
    """The merge's config, empty where there is none to read (which `check_files` reports)."""
    try:
        return read_json(merged / "config.json")
    except InputError:
        return {}


def _check_record(record: MergeRecord, identity: Identity) -> Iterator[Finding]:
    claimed = {file.path: file for file in record.files}
    actual = {file.path: file for file in identity.merged if file.path != RECORD}
    for path in sorted(claimed.keys() | actual.keys()):
        if path not in actual:
            yield _error("record-disagrees", f"the record lists {path!r}, which is missing", path)
        elif path not in claimed:
            yield _warning("unlisted-file", f"the merge's record does not list {path!r}", path)
        elif claimed[path] != actual[path]:
            yield _error(
                "record-disagrees", f"{path!r} is not the file the record lists", path, claimed[path].sha256
            )
    if record.base_sha256 != identity.base:
        yield _warning(
            "other-base-files",
            "the merge was made from a base folder with other files",
            RECORD,
            identity.base,
        )
    if record.adapter_sha256 != identity.adapters:
        yield _warning("other-adapter-files", "the merge had adapter folders with other files", RECORD)
    if record.adapter_weights != identity.weights:
        yield _error(
            "record-disagrees",
            f"the record has the adapter weights {record.adapter_weights}",
            RECORD,
            str(identity.weights),
        )


def _check_config(base: Path, merged: Path) -> Iterator[Finding]:
    if not (merged / "config.json").is_file():
        yield _error("missing-config", "the merged folder has no config.json", "config.json")
        return
    try:
        found = read_json(merged / "config.json")
    except InputError as error:
        yield _error("damaged-config", error.found, "config.json")
        return
    if found.get("quantization_config"):
        yield _error(
            "quantization-left",
            "the config still has a quantization_config",
            "config.json",
            "none: the weights are not",
        )
    wanted = read_json(base / "config.json")
    for key, ours, theirs in _differing(wanted, found, ""):
        if ours is not None and theirs is not None:
            yield _error("config-differs", f"{key} is {theirs!r}", "config.json", f"{ours!r}, as in the base")
        else:
            yield _note("config-differs", f"{key} is {theirs!r} (base: {ours!r})", "config.json")


def _differing(wanted: Any, found: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(wanted, Mapping) and isinstance(found, Mapping):
        for key in sorted(wanted.keys() | found.keys()):
            if key not in _FREE_KEYS:
                yield from _differing(wanted.get(key), found.get(key), f"{path}.{key}" if path else key)
    elif wanted != found:
        yield path, wanted, found


def _check_generation(base: Path, merged: Path) -> Iterator[Finding]:
    """Without it a model is sampled otherwise, and may not know its end token."""
    ours, theirs = base / _GENERATION, merged / _GENERATION
    if not ours.is_file():
        return
    if not theirs.is_file():
        yield _warning("missing-generation-config", f"{_GENERATION!r} is missing", _GENERATION, str(ours))
    elif not _same_generation(ours, theirs):
        yield _warning("generation-config-differs", f"{_GENERATION!r} is not the base's", _GENERATION)


def _same_generation(one: Path, other: Path) -> bool:
    try:
        contents = [read_json(file) for file in (one, other)]
    except InputError:
        return False
    found = [{key: value for key, value in body.items() if key not in _FREE_KEYS} for body in contents]
    return found[0] == found[1]


def _check_tokenizer(base: Path, adapters: Sequence[Path], merged: Path) -> Iterator[Finding]:
    for name in TOKENIZER_FILES:
        sources = [folder / name for folder in (*adapters, base) if (folder / name).is_file()]
        ours = merged / name
        if not ours.is_file():
            if sources:
                yield _warning("missing-tokenizer", f"{name!r} is missing", name, str(sources[0]))
        elif sources and not any(_same_content(source, ours) for source in sources):
            yield _warning("tokenizer-differs", f"{name!r} is neither the base's nor the adapter's", name)


def _same_content(a: Path, b: Path) -> bool:
    one, other = a.read_bytes(), b.read_bytes()
    if one == other:
        return True
    if a.suffix != ".json":
        return False
    try:
        return bool(parse_json(one) == parse_json(other))
    except ValueError:
        return False


def _error(code: str, message: str, where: str, expected: str | None = None) -> Finding:
    return Finding(severity="error", code=code, message=message, where=where, expected=expected)


def _warning(code: str, message: str, where: str, expected: str | None = None) -> Finding:
    return Finding(severity="warning", code=code, message=message, where=where, expected=expected)


def _note(code: str, message: str, where: str) -> Finding:
    return Finding(severity="note", code=code, message=message, where=where)
