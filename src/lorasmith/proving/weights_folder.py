"""Model and adapter folders as the proof reads them: files, shard index and headers, problems noted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lorasmith.errors import InputError, os_errors
from lorasmith.proving.weights_reading import ProvenFile
from lorasmith.proving.weights_stored import BYTES, DTYPES, Stored
from lorasmith.records.base import Finding

_MAX_JSON_BYTES = 64 << 20


@dataclass
class TensorFolder:
    """The tensors of a folder, and what is wrong with its files."""

    path: Path
    tensors: dict[str, Stored] = field(default_factory=dict)
    files: list[ProvenFile] = field(default_factory=list)
    problems: list[Finding] = field(default_factory=list)
    """What a person must know; nothing here is raised, so that a damaged merge can be graded."""

    def problem(self, code: str, message: str, where: str | Path, expected: str | None = None) -> None:
        """Note an error."""
        self.problems.append(
            Finding(severity="error", code=code, message=message, where=str(where), expected=expected)
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises `InputError` naming the file."""
    with os_errors(path, "read"):
        size = path.stat().st_size
        if size > _MAX_JSON_BYTES:
            raise InputError(f"the file has {size} bytes", where=path, expected="a JSON file of a few kB")
        content = path.read_bytes()
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"this is not JSON: {error}", where=path, expected="a JSON object") from error
    if not isinstance(body, dict):
        raise InputError("this is JSON, but no object", where=path, expected="a JSON object")
    return body


def open_model(path: Path, *, released: bool = False) -> TensorFolder:
    """The tensors of a model folder: `model.safetensors`, or the shards of its index.

    `released` folders are held to what loaders want beyond the tensors: the header's format, the index's
    total size. Raises `InputError` where there is no such folder or it holds neither file; all else becomes
    a problem.
    """
    with os_errors(path, "read"):
        if not path.is_dir():
            raise InputError("there is no such folder", where=path, expected="a model folder")
    folder = TensorFolder(path)
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if index.is_file():
        if single.is_file():
            folder.problem(
                "two-checkpoints",
                "there is a shard index and a model.safetensors beside it, and loaders take the latter",
                single,
                "one of them",
            )
        _read_index(folder, index, released)
    elif single.is_file():
        folder.tensors = dict(_read_header(folder, single, released))
    else:
        raise InputError(
            "the folder holds no safetensors checkpoint",
            where=path,
            expected="model.safetensors, or model.safetensors.index.json and its shards",
            remedy="convert a pickle checkpoint with transformers' save_pretrained first",
        )
    if released:
        _note_strays(folder)
    return folder


def _note_strays(folder: TensorFolder) -> None:
    """Weights beside the checkpoint that no loader takes by default, and that nothing here checks."""
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        for file in sorted(set(folder.path.glob(pattern)) - {known.path for known in folder.files}):
            folder.problems.append(
                Finding(
                    severity="warning",
                    code="stray-weights",
                    message=f"{file.name!r} is not part of the checkpoint and was not checked",
                    where=file.name,
                )
            )


def open_file(path: Path) -> TensorFolder:
    """The tensors of one safetensors file."""
    folder = TensorFolder(path.parent)
    folder.tensors = dict(_read_header(folder, path, released=False))
    return folder


def _read_index(folder: TensorFolder, index: Path, released: bool) -> None:
    try:
        body = read_json(index)
    except InputError as error:
        folder.problem("damaged-index", error.found, index)
        return
    wanted = body.get("weight_map")
    if not isinstance(wanted, dict) or not all(isinstance(file, str) for file in wanted.values()):
        folder.problem("damaged-index", "the index has no weight_map of names", index)
        return
    shards: dict[str, dict[str, Stored]] = {}
    for file in sorted(set(wanted.values())):
        shard = folder.path / file
        if Path(file).name != file or not file.endswith(".safetensors"):
            folder.problem("index-escapes", f"the index names the file {file!r}", index, "a shard beside it")
        elif not shard.is_file():
            folder.problem("missing-shard", f"the shard {file!r} is missing", index)
        else:
            shards[file] = dict(_read_header(folder, shard, released))
    for name, file in wanted.items():
        if file in shards and name not in shards[file]:
            folder.problem("index-lies", f"tensor {name!r} is not in {file!r}, where the index has it", index)
    for file, tensors in shards.items():
        for name, stored in tensors.items():
            if wanted.get(name) != file:
                folder.problem("index-lies", f"tensor {name!r} of {file!r} is not in the index", index)
            folder.tensors.setdefault(name, stored)
    if released:
        _check_total(folder, body, index)


def _check_total(folder: TensorFolder, body: dict[str, Any], index: Path) -> None:
    metadata = body.get("metadata")
    claimed = metadata.get("total_size") if isinstance(metadata, dict) else None
    actual = sum(stored.bytes for stored in folder.tensors.values())
    if claimed is not None and claimed != actual and not folder.problems:
        folder.problem("index-lies", f"the index has total_size {claimed}", index, str(actual))


def _read_header(folder: TensorFolder, path: Path, released: bool) -> Iterator[tuple[str, Stored]]:
    """The tensors of a file, as `safetensors` finds them: it accepts no gaps, so sizes tell the places."""
    file = ProvenFile(path)
    folder.files.append(file)
    try:
        with os_errors(path, "read"), safe_open(path, framework="pt") as handle:
            found = []
            for name in handle.offset_keys():
                part = handle.get_slice(name)
                found.append((name, part.get_dtype(), tuple(part.get_shape())))
            kind = (handle.metadata() or {}).get("format")
    except SafetensorError as error:
        folder.problem("damaged-file", f"this is no intact safetensors file: {error}", path)
        return
    except UnicodeDecodeError as error:
        folder.problem("damaged-file", f"the header is not UTF-8: {error.reason}", path)
        return
    if released and kind != "pt":
        folder.problem("wrong-metadata", f"the header's format is {kind!r}", path, "'pt'")
    start = file.data_start
    for name, dtype, shape in found:
        if dtype not in DTYPES:
            folder.problem("unknown-dtype", f"tensor {name!r} is stored as {dtype}", path)
        if dtype not in BYTES:
            folder.problem("unknown-dtype", f"what follows {name!r} was not checked", path)
            return
        stored = Stored(file, start, name, dtype, shape)
        start += stored.bytes
        if dtype in DTYPES:
            yield name, stored
    if start != file.size:
        folder.problem("damaged-file", f"the tensors end at byte {start:,}", path, f"{file.size:,} bytes")
