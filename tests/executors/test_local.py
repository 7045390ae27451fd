"""Chunks in this process: none lost, none twice, also when memory runs out or the process is killed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lorasmith.errors import MemoryLimitError
from lorasmith.executors.base import ChunkLog, WorkSpec, import_function, map_chunks
from lorasmith.files.journal import Journal, Rows
from lorasmith.models.batches import halve
from lorasmith.models.device import is_out_of_memory
from lorasmith.records.scoring import ChunkRecord, Conditions
from tests.executors.squares import open_squares


@dataclass
class Squares:
    """Squares its rows; more than `largest` of them do not fit."""

    largest: int = 100
    before: Callable[[Rows], None] = lambda rows: None
    tried: list[Rows] = field(default_factory=list)
    released: int = 0
    processor: str = "here"

    def run(self, rows: Rows) -> list[int]:
        self.tried.append(rows)
        self.before(rows)
        if len(rows) > self.largest:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
            )
        return [row * row for row in rows]

    def split(self, rows: Rows) -> list[Rows]:
        return halve(rows)

    def size(self, rows: Rows) -> int:
        return len(rows)

    def out_of_memory(self, error: BaseException) -> bool:
        return is_out_of_memory(error)

    def release(self) -> None:
        self.released += 1

    def conditions(self) -> Conditions:
        return Conditions(device="cpu", processor=self.processor, threads=1)

    def pack(self, result: list[int]) -> bytes:
        return bytes(result)

    def unpack(self, rows: Rows, packed: bytes) -> list[int]:
        return list(packed)


def through(work: Squares, chunks: list[Rows], journal: Journal | None = None) -> list[Rows]:
    seen = []
    for rows, result in map_chunks(chunks, work, journal):
        assert result == [row * row for row in rows]
        seen.append(rows)
    return seen


def test_a_chunk_that_does_not_fit_comes_in_parts_in_order() -> None:
    work = Squares(largest=2)
    assert through(work, [(0, 1, 2, 3, 4), (5, 6)]) == [(0, 1), (2,), (3, 4), (5, 6)]
    assert work.released == 2


def test_later_chunks_of_a_size_that_did_not_fit_are_not_tried_in_vain() -> None:
    work = Squares(largest=3)
    assert through(work, [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10)]) == [
        (0, 1),
        (2, 3),
        (4, 5),
        (6, 7),
        (8, 9, 10),
    ]
    assert [rows for rows in work.tried if len(rows) > 3] == [(0, 1, 2, 3)]


def test_a_single_row_that_does_not_fit_is_a_lack_of_memory() -> None:
    with pytest.raises(MemoryLimitError, match="can't allocate"):
        through(Squares(largest=0), [(0, 1)])


def test_another_error_is_not_taken_for_a_lack_of_memory() -> None:
    def fail(rows: Rows) -> None:
        raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):
        through(Squares(before=fail), [(1, 2)])


def test_a_lack_of_memory_is_seen_through_what_wraps_it() -> None:
    wrapped = ValueError("failed")
    wrapped.__cause__ = MemoryError()
    assert is_out_of_memory(wrapped)
    assert is_out_of_memory(RuntimeError("could not create a memory object"))
    assert not is_out_of_memory(RuntimeError("shape"))


@pytest.mark.parametrize("stop", range(9))
def test_work_goes_on_where_it_stopped_in_the_same_parts(tmp_path: Path, stop: int) -> None:
    chunks: list[Rows] = [(0, 1, 2, 3, 4, 5), (6, 7, 8, 9), (10, 11)]
    whole = through(Squares(largest=2), chunks)

    class Stop(Exception):
        pass

    left = stop

    def interrupt(rows: Rows) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Stop

    first, second = Squares(largest=2, before=interrupt), Squares(largest=2)
    path = tmp_path / "journal"
    with Journal(path, "key", {}) as journal, pytest.raises(Stop):
        through(first, chunks, journal)
    with Journal(path, "key", {}) as journal:
        assert sorted(through(second, chunks, journal)) == sorted(whole)
    done = [rows for rows in first.tried[:stop] if len(rows) <= 2]
    assert not set(done) & set(second.tried)  # what was finished is not computed again


def test_chunks_that_another_machine_computed_before_are_labelled(tmp_path: Path) -> None:
    """A command that was interrupted on one machine and ended on another."""
    chunks: list[Rows] = [(0, 1), (2, 3), (4, 5)]
    there, here = Squares(processor="there"), Squares(processor="here")
    with Journal(tmp_path / "journal", "key", {}) as journal:
        list(map_chunks(chunks[:1], there, journal))
    with Journal(tmp_path / "journal", "key", {}) as journal:
        log = ChunkLog()
        assert len(list(map_chunks(chunks, here, journal, log))) == 3
    assert list(log.kinds().values()) == [2, 1]
    (finding,) = log.findings()
    assert finding.code == "mixed-hardware" and finding.message.startswith("mixed hardware: ")
    assert "2 on cpu; here" in finding.message and "1 on cpu; there" in finding.message
    log.write(tmp_path / "chunks.jsonl", wanted=False)  # what is mixed is always told
    lines = [ChunkRecord.model_validate_json(line) for line in (tmp_path / "chunks.jsonl").open()]
    assert [(line.rows, line.conditions.processor) for line in lines] == [
        ([0, 1], "there"),
        ([2, 3], "here"),
        ([4, 5], "here"),
    ]


def test_one_kind_of_machine_needs_no_word(tmp_path: Path) -> None:
    log = ChunkLog()
    (tmp_path / "chunks.jsonl").touch()  # of an earlier command
    list(map_chunks([(0, 1)], Squares(), None, log))
    assert not log.findings()
    log.write(tmp_path / "chunks.jsonl", wanted=False)
    assert not (tmp_path / "chunks.jsonl").exists()


def test_work_that_no_worker_could_import_is_refused_at_once() -> None:
    def local() -> Any:
        """A function of this test."""

    class Opener:
        def opened(self) -> Any:
            """A method, whose object would have to travel as well."""

    main = ModuleType("__main__")
    exec("def opened(): ...", vars(main))
    for function in (lambda: None, local, Opener().opened, partial(open_squares, largest=1), main.opened):
        with pytest.raises(TypeError, match="a worker can import"):
            WorkSpec(function, {})
    assert import_function(*WorkSpec(open_squares, {}).place) is open_squares
