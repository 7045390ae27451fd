"""Chunks in this process: none lost, none twice, also when memory runs out."""

from __future__ import annotations

import pytest

from lorasmith.errors import MemoryLimitError
from lorasmith.executors.local import work_through
from lorasmith.models.batches import halve
from lorasmith.models.memory import is_out_of_memory


def run(
    chunks: list[tuple[int, ...]], largest: int, released: list[int] | None = None
) -> list[tuple[int, ...]]:
    def work(rows: tuple[int, ...]) -> list[int]:
        if len(rows) > largest:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
            )
        return [row * 10 for row in rows]

    seen = []
    for rows, result in work_through(
        chunks,
        work,
        split=halve,
        out_of_memory=is_out_of_memory,
        release=lambda: (released if released is not None else []).append(1),
    ):
        assert result == [row * 10 for row in rows]
        seen.append(rows)
    return seen


def test_a_chunk_that_does_not_fit_comes_in_parts_in_order() -> None:
    released: list[int] = []
    assert run([(0, 1, 2, 3, 4), (5, 6)], 2, released) == [(0, 1), (2,), (3, 4), (5, 6)]
    assert len(released) == 2


def test_a_single_row_that_does_not_fit_is_a_lack_of_memory() -> None:
    with pytest.raises(MemoryLimitError, match="can't allocate"):
        run([(0, 1)], 0)


def test_another_error_is_not_taken_for_a_lack_of_memory() -> None:
    def work(rows: tuple[int, ...]) -> None:
        raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):
        list(work_through([(1, 2)], work, split=halve, out_of_memory=is_out_of_memory, release=lambda: None))


def test_a_lack_of_memory_is_seen_through_what_wraps_it() -> None:
    wrapped = ValueError("failed")
    wrapped.__cause__ = MemoryError()
    assert is_out_of_memory(wrapped)
    assert is_out_of_memory(RuntimeError("could not create a memory object"))
    assert not is_out_of_memory(RuntimeError("shape"))
