"""Files go through aligned buffers, past the cache or through it, and come out byte for byte."""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasmith.errors import CheckpointError, MemoryLimitError
from lorasmith.files.digests import digest_folder
from lorasmith.merging import disk
from lorasmith.merging.disk import FileReader, FileWriter, Lanes, PendingPieces
from lorasmith.merging.merge import merge
from lorasmith.merging.numbers.threads import Workers
from tests.tiny import save_adapter, save_base

SIZES = [0, 1, 511, 4095, 4096, 4097, 3 * 4096, 8192 * 3 + 7, 8192 * 9 - 1]


@pytest.fixture
def lanes(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(disk, "BUFFER_BYTES", 8192)
    found = Lanes()
    yield found
    found.close()


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
@pytest.mark.parametrize("size", SIZES)
def test_a_file_copied_through_the_buffers_is_the_same(
    tmp_path: Path, lanes: Lanes, monkeypatch: pytest.MonkeyPatch, size: int, direct: bool
) -> None:
    if not direct:
        monkeypatch.setattr(disk, "_DIRECT", 0)
    content = random.Random(size).randbytes(size)
    (tmp_path / "in").write_bytes(content)
    with (
        FileReader(tmp_path / "in", size, lanes, digest=True) as reader,
        FileWriter(tmp_path / "out", size, lanes, PendingPieces()) as writer,
    ):
        for chunk in reader.chunks():
            writer.append(chunk)
        written, read = writer.finish(), reader.finish()
    assert (tmp_path / "out").read_bytes() == content
    assert read == written == hashlib.sha256(content).hexdigest()
    assert lanes.direct is direct or direct


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path, lanes: Lanes) -> None:
    (tmp_path / "in").write_bytes(bytes(100_000))
    with (
        pytest.raises(CheckpointError, match="ended while it was read"),
        FileReader(tmp_path / "in", 200_000, lanes, digest=True) as reader,
    ):
        for _ in reader.chunks():
            pass


def test_without_direct_io_the_merge_is_the_same_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    merge(base, adapter, tmp_path / "one")
    monkeypatch.setattr(disk, "_DIRECT", 0)
    record = merge(base, adapter, tmp_path / "two")
    assert not record.direct_io
    assert digest_folder(tmp_path / "one") == digest_folder(tmp_path / "two")


@pytest.mark.parametrize("padding", [0, 1, 3, 6])
def test_tensors_at_odd_offsets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, padding: int) -> None:
    """The format asks for no alignment: numbers may straddle the ends of the buffers."""
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    precisions = ("base", "float32")
    for precision in precisions:
        merge(base, adapter, tmp_path / f"expected-{precision}", precision=precision)
    shift_base(base / "model.safetensors", load_file(base / "model.safetensors"), padding)
    monkeypatch.setattr(disk, "BUFFER_BYTES", 4096)
    for precision in precisions:
        merge(base, adapter, tmp_path / "out", precision=precision)
        found = load_file(tmp_path / "out" / "model.safetensors")
        expected = load_file(tmp_path / f"expected-{precision}" / "model.safetensors")
        assert set(found) == {*expected, "model.flags"}
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name


def shift_base(path: Path, tensors: dict[str, torch.Tensor], padding: int) -> None:
    """Write a file whose data begins at an odd byte, with three booleans before everything else."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = bytes([1, 0, 1])
    entries["model.flags"] = {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]}
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        entries[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8 + padding)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_a_failed_write_ends_the_merge_and_leaves_no_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    before = digest_folder(base)

    def full(*_: Any) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(Exception, match="the disk is full") as caught:
        merge(base, adapter, tmp_path / "out")
    assert getattr(caught.value, "exit_code", None) == 3
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    merge(base, adapter, tmp_path / "out")
    assert digest_folder(base) == before


def test_a_base_with_one_more_tensor_type(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    file = base / "model.safetensors"
    extra = {"model.steps": torch.tensor(7), "model.empty": torch.empty(0, 4), "model.one": torch.tensor(1.5)}
    save_file({**load_file(file), **extra}, file, metadata={"format": "pt"})
    merge(base, adapter, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in extra.items())


@pytest.mark.parametrize("precision", ["base", "float32"])
def test_pieces_that_threads_are_slow_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """No buffer is read into, hashed, written or used again before the pieces in it are made."""
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    merge(base, adapter, tmp_path / "expected", precision=precision)
    monkeypatch.setattr(disk, "BUFFER_BYTES", 4096)
    begin, delay = Workers.begin, random.Random(0)

    def slow(self: Workers, work: Any, parts: Any) -> Any:
        def late(part: Any) -> Any:
            time.sleep(delay.random() * 2e-3)
            return work(part)

        return begin(self, late, parts)

    monkeypatch.setattr(Workers, "begin", slow)
    merge(base, adapter, tmp_path / "out", precision=precision)
    assert digest_folder(tmp_path / "out") == digest_folder(tmp_path / "expected")


def test_a_piece_that_fails_ends_the_merge_when_no_thread_is_at_work_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    monkeypatch.setattr(disk, "BUFFER_BYTES", 4096)
    begin, made, at_work = Workers.begin, iter(range(10_000)), set()

    def failing(self: Workers, work: Any, parts: Any) -> Any:
        def fails(part: Any) -> Any:
            number = next(made)
            at_work.add(number)
            time.sleep(2e-3)
            try:
                if number == 20:
                    raise MemoryError("piece 20")
                return work(part)
            finally:
                at_work.discard(number)

        return begin(self, fails, parts)

    stray: list[set[int]] = []
    close = FileReader.close

    def closed(self: FileReader) -> None:
        stray.append(set(at_work))
        close(self)

    monkeypatch.setattr(Workers, "begin", failing)
    monkeypatch.setattr(FileReader, "close", closed)
    with pytest.raises(MemoryLimitError, match="too little memory to merge a shard") as stopped:
        merge(base, adapter, tmp_path / "out")
    assert str(stopped.value.__cause__) == "piece 20"
    assert stray == [set()]
    assert not (tmp_path / "out").exists()
