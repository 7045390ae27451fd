"""The merged folder on its way: a lock, a partial folder that a killed merge goes on with, a journal."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lorasmith.checkpoint.base_match import MERGE_RECORD
from lorasmith.checkpoint.header import dump_object
from lorasmith.checkpoint.model import INDEX, Checkpoint
from lorasmith.errors import InputError, UsageError, os_errors
from lorasmith.files.atomic import aside, publish_folder, read_record, write_bytes, write_record
from lorasmith.files.digests import describe
from lorasmith.files.inputs import read_input
from lorasmith.files.output_folder import holds_another, require_own_place
from lorasmith.hub.model_files import CODE_FILES, OTHER_FILES, TOKENIZER_FILES, fits, names_code
from lorasmith.merging.plan import PRECISIONS, Plan
from lorasmith.records.base import FileDigest, Finding, Record
from lorasmith.records.merging import MergedTensor

_STATE = ".merge"
"""Folder within the partial folder: the key, and one journal entry per finished shard."""


class ShardDone(Record):
    """A shard that is on disk, synced, with what became of its tensors."""

    FORMAT: ClassVar[str] = "lorasmith/merge-shard/1"

    file: FileDigest
    source_sha256: str
    tensors: list[MergedTensor]


def check_place(output: Path, inputs: Sequence[Path]) -> None:
    """`UsageError` where the output is an input, lies in one, holds one, or would replace something else."""
    require_own_place(output, MERGE_RECORD, inputs)
    partial = aside(output)
    # Its own state, or the record alone where the merge was killed just before the rename.
    if holds_another(partial, _STATE, MERGE_RECORD):
        raise UsageError(
            "the folder that the merge would be made in holds something else",
            where=partial,
            remedy="move it away, or choose another output folder",
        )


def make_key(parts: Mapping[str, Any]) -> str:
    """A digest of everything that the merged bytes depend on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def identity_of(files: Sequence[Path]) -> list[list[Any]]:
    """Name, device, inode, size and times of each file: equal exactly while nobody touched them."""
    identities = []
    for file in files:
        with os_errors(file, "read"):
            state = file.stat()
        times = [state.st_mtime_ns, state.st_ctime_ns]
        identities.append([file.name, state.st_dev, state.st_ino, state.st_size, *times])
    return identities


class PartialFolder:
    """`.NAME.partial` beside the output: kept when the process dies, taken up only by the same merge."""

    def __init__(self, output: Path, key: str) -> None:
        self.output = output
        self.path = aside(output)
        self._state = self.path / _STATE
        with os_errors(output, "write"):
            # What another merge has begun cannot be taken up: its bytes would be mixed with this one's.
            if self.path.exists() and self._key() != key:
                shutil.rmtree(self.path)
            if not self.path.exists():
                self._state.mkdir(parents=True)
                write_bytes(self._state / "key", key.encode())

    @property
    def scratch(self) -> Path:
        """A folder for what is needed until the merge is done; it goes with the state."""
        return self._state / "scratch"

    def _key(self) -> str | None:
        try:
            return (self._state / "key").read_text()
        except (OSError, UnicodeDecodeError):
            return None

    def done(self, shard: str) -> ShardDone | None:
        """The journal's entry of a shard whose file is there with its full size."""
        entry = self._state / f"{shard}.json"
        file = self.path / shard
        if not entry.exists() or not file.exists():
            return None
        try:
            record = read_record(entry, ShardDone)
        except InputError:
            return None
        return record if file.stat().st_size == record.file.bytes else None

    def finish_shard(self, shard: ShardDone) -> None:
        """Note that a synced shard is whole."""
        write_record(self._state / f"{shard.file.path}.json", shard)

    def write(self, name: str, content: bytes) -> None:
        """A small file of the merged folder."""
        write_bytes(self.path / name, content)

    def publish(self, expected: Sequence[str]) -> None:
        """Take the state away, check that nothing foreign is in the folder, and rename it into place."""
        with os_errors(self.output, "write"):
            shutil.rmtree(self._state)
            for file in self.path.rglob("*"):
                if file.is_file() and file.relative_to(self.path).as_posix() not in expected:
                    file.unlink()
        publish_folder(self.path, self.output)


# The small files that make a merged folder complete: configs, tokenizer, chat template, shard index.


_MAIN_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "spiece.model",
)
_TEMPLATES = ("chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja")


def small_files(base: Path, adapters: Sequence[Path]) -> dict[str, Path]:
    """Name in the merged folder → file to copy.

    The tokenizer is that of the first adapter that has a whole one, else the base's; a chat template
    beside an adapter counts even where its tokenizer is the base's. Everything else is the base's.
    """
    chosen = _matching(base, (*OTHER_FILES, *CODE_FILES) if names_code(base) else OTHER_FILES)
    with_tokenizer = next((folder for folder in adapters if _has_tokenizer(folder)), base)
    chosen |= _matching(with_tokenizer, TOKENIZER_FILES)
    if with_tokenizer is base:
        for folder in adapters:
            templates = _matching(folder, _TEMPLATES)
            if templates:
                chosen = {name: file for name, file in chosen.items() if name not in _TEMPLATES} | templates
                break
    return dict(sorted(chosen.items()))


def code_findings(base: Path) -> list[Finding]:
    """A warning for code of the base that goes into the merged folder, a note for code that does not."""
    files = sorted(_matching(base, CODE_FILES))
    if not files:
        return []
    listed = ", ".join(files)
    if names_code(base):
        return [
            Finding(
                severity="warning",
                code="model-code",
                message=f"the base comes with code, which was copied and not run: {listed}",
                remedy="read it before you load the model with trust_remote_code, which runs it",
            )
        ]
    return [
        Finding(
            severity="note",
            code="code-left-out",
            message=f"the base holds code that its configs do not name; it was not copied: {listed}",
        )
    ]


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").is_file() and any(
        (folder / name).is_file() for name in _MAIN_TOKENIZER_FILES
    )


def _matching(folder: Path, patterns: tuple[str, ...]) -> dict[str, Path]:
    with os_errors(folder, "read"):
        nested = (*folder.glob("additional_chat_templates/*"), *folder.glob("custom_generate/*"))
        files = [file for file in (*folder.iterdir(), *nested) if file.is_file()]
    names = {file.relative_to(folder).as_posix(): file for file in files}
    return {name: file for name, file in names.items() if fits(name, patterns)}


def merged_config(
    config: Mapping[str, Any],
    precision: str,
    *,
    untied: bool,
    vocabulary: int | None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """The base's config with the merged model's own type, tying and vocabulary, without a quantization.

    `dtype` is set where the config names none.
    """
    merged = copy.deepcopy(dict(config))
    for part in [merged, *(part for part in merged.values() if isinstance(part, dict))]:
        # A base in 16 bits may carry the settings of a twin that was quantized; the merged weights are not.
        part.pop("quantization_config", None)
        part.pop("compression_config", None)
    parts = [merged] + [part for part in merged.values() if isinstance(part, dict)]
    if dtype is not None and merged.get("dtype") is None and merged.get("torch_dtype") is None:
        merged["dtype"] = dtype
    if precision != "base":
        for part in parts:
            for field in ("dtype", "torch_dtype"):
                if part.get(field) is not None:
                    part[field] = precision
        if "dtype" not in merged and "torch_dtype" not in merged:
            merged["dtype"] = precision
    if vocabulary is not None:
        holders = [part for part in parts if "vocab_size" in part]
        text = [part for part in holders if part is merged.get("text_config")] or holders[:1] or [merged]
        for part in text:
            part["vocab_size"] = vocabulary
    if untied:
        for part in parts:
            if "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False
        merged["tie_word_embeddings"] = False
    return merged


def merged_index(base: Checkpoint, plan: Plan) -> bytes | None:
    """The shard index with every tensor's file and the right `total_size`; None for a single file."""
    if base.index is None:
        return None
    weight_map = {output.name: shard for shard, outputs in plan.shards.items() for output in outputs}
    metadata = dict(base.index.get("metadata") or {})
    metadata["total_size"] = sum(output.nbytes for output in plan.outputs)
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(output.elements for output in plan.outputs)
    return dump_object({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


def write_small_files(
    base: Checkpoint, adapters: Sequence[Path], plan: Plan, precision: str, partial: PartialFolder
) -> list[FileDigest]:
    """Write them into the partial folder."""
    if plan.keeps_format:
        contents = {name: (base.folder / name).read_bytes() for name in _own_files(base)}
        return _write_all(contents, base, adapters, partial)
    types = {tensor.dtype for tensor in base.decoded.values()}
    config = merged_config(
        base.config,
        precision,
        untied=plan.untied,
        vocabulary=plan.vocabulary,
        # A loader takes the type of the first tensor where the config is silent, which may be another.
        dtype=next((name for name, short in PRECISIONS.items() if short in types), None),
    )
    contents = {"config.json": dump_object(config)}
    index = merged_index(base, plan)
    if index is not None:
        contents[INDEX] = index
    return _write_all(contents, base, adapters, partial)


def _own_files(base: Checkpoint) -> list[str]:
    """Config and index, which a merge that keeps the format takes over as they are."""
    return [name for name in ("config.json", INDEX) if (base.folder / name).exists()]


def _write_all(
    contents: dict[str, bytes], base: Checkpoint, adapters: Sequence[Path], partial: PartialFolder
) -> list[FileDigest]:
    for name, file in small_files(base.folder, adapters).items():
        with os_errors(file, "read"):
            contents[name] = read_input(file)
    for name, content in contents.items():
        partial.write(name, content)
    return describe([partial.path / name for name in sorted(contents)], partial.path, rehash=True)
