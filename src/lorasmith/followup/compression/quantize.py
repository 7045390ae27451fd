"""Run auto-round beside us: the job, the rows that calibrate, its progress, and where its files ended up."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorasmith.data.rows import read_examples
from lorasmith.errors import CheckpointError, DataError, MachineError, MemoryLimitError, os_errors
from lorasmith.models.load import load_tokenizer
from lorasmith.models.text import encode_examples
from lorasmith.progress import Progress

_UNCUT = 1 << 30
"""Length of a row in tokens, at most, before it is laid behind the others: no row is that long."""

WORKER = ("-m", "lorasmith.followup.compression.quantize_worker")
"""Python's arguments for the process that quantizes."""

_BLOCK = re.compile(rb"\| (\d+)/(\d+) \[")
"""`… | 7/30 [00:14<…`: the library's own bar over the blocks of the model."""

_BESIDE_GGUF = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
"""Copied beside a GGUF file: its own tokenizer is a conversion, the source's is the one that was proved."""


def calibration_samples(model: Path, file: Path, rows: int, length: int) -> list[list[int]]:
    """`rows` samples of `length` tokens: the file's rows as the model sees them, one after the other.

    Rows are laid end to end and cut, because the library drops every sample shorter than its length. Raises
    `DataError` when the file does not hold a single sample.
    """
    tokenizer = load_tokenizer(model)
    stream: list[int] = []
    for example in read_examples(file):
        encoded = encode_examples([example], tokenizer, max_length=_UNCUT)
        stream += encoded.rows[0].ids
        if len(stream) >= rows * length:
            break
    samples = [stream[at : at + length] for at in range(0, len(stream) - length + 1, length)][:rows]
    if not samples:
        raise DataError(
            f"the file holds {len(stream):,} tokens, less than one sample of {length:,}",
            where=file,
            remedy="give a longer file, or a smaller --calibration-length",
        )
    return samples


def quantize(job: Mapping[str, Any], folder: Path, blocks: int, progress: Progress) -> Path:
    """Do the job in a process of its own below `folder`; returns the folder that holds the model.

    `blocks` is how many the model has, for the progress.

    Raises `MachineError` where auto-round is not installed or fails, with the last line that it wrote.
    """
    raw, log = folder / "raw", folder / "log"
    with os_errors(folder, "write"):
        raw.mkdir(parents=True)
        (folder / "job.json").write_text(json.dumps({**job, "output": str(raw)}))
    command = [sys.executable, *WORKER, str(folder / "job.json")]
    with log.open("wb") as sink:
        worker = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=dict(os.environ))
        try:
            _watch(worker, log, blocks, progress)
        finally:
            worker.kill()
            worker.wait()
    if worker.returncode:
        raise _failure(log, worker.returncode)
    return _result(raw)


def _watch(worker: subprocess.Popen[bytes], log: Path, blocks: int, progress: Progress) -> None:
    """Follow the library's bar, if it shows one, until the process ends."""
    done = position = 0
    with progress("Quantize", total=blocks, unit="block") as advance:
        while worker.poll() is None:
            time.sleep(0.2)
            shown, position = _blocks(log, position)
            reached = shown[0] * blocks // max(1, shown[1]) if shown else 0
            if reached > done:
                advance(reached - done)
                done = reached
        advance(blocks - done)


def _blocks(log: Path, position: int) -> tuple[tuple[int, int] | None, int]:
    """The last `done/total` after `position`, and how far was read."""
    with log.open("rb") as handle:
        handle.seek(position)
        text = handle.read()
    lines = [line for line in re.split(rb"[\r\n]", text) if b"Quantizing" in line]
    match = _BLOCK.search(lines[-1]) if lines else None
    return (None if match is None else (int(match.group(1)), int(match.group(2)))), position + len(text)


def _failure(log: Path, code: int) -> MachineError:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1] if lines else f"it ended with {code} and wrote nothing"
    if "No module named" in last:
        return MachineError(
            f"compression needs a library that is not installed ({last.rpartition(': ')[2]})",
            remedy="pip install 'lorasmith[compress]'",
        )
    if code == -9 or "MemoryError" in last or "out of memory" in last.lower():
        return MemoryLimitError(
            "auto-round was killed or ran out of memory",
            remedy="use a machine with more memory, or fewer and shorter calibration rows",
        )
    return MachineError(f"auto-round failed: {last}", remedy="try --method rtn, or another --format")


def _result(raw: Path) -> Path:
    """Where the library put the model: the name of its subfolder varies with format and source."""
    folders = {file.parent for pattern in ("*.gguf", "*.safetensors") for file in raw.rglob(pattern)}
    if len(folders) != 1:
        raise CheckpointError(f"auto-round left {len(folders)} model folders", where=raw, expected="one")
    return folders.pop()


def collect(result: Path, model: Path, folder: Path, name: str) -> None:
    """Move the library's files up into `folder`, name a GGUF file, and put the tokenizer beside it."""
    with os_errors(folder, "write"):
        for file in sorted(result.iterdir()):
            file.rename(folder / (f"{name}.gguf" if file.suffix == ".gguf" else file.name))
        for leftover in ("raw", "log", "job.json"):
            place = folder / leftover
            shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
        if any(folder.glob("*.gguf")):
            for companion in _BESIDE_GGUF:
                if (model / companion).is_file():
                    shutil.copyfile(model / companion, folder / companion)


def weight_files(folder: Path) -> Sequence[Path]:
    """The files that hold weights."""
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.gguf")])
