"""What an executor is: chunks of work in, results out, wherever they are computed."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

from lorasmith.errors import MemoryLimitError, os_errors
from lorasmith.files.atomic import write_bytes
from lorasmith.files.journal import Journal, Rows
from lorasmith.records.base import Finding
from lorasmith.records.scoring import ChunkRecord, Conditions

# Chunks that wait to be computed: those that do not fit in memory split, finished ones left out.


R = TypeVar("R")


class ChunkWork(Protocol[R]):
    """What is done to a chunk, and how a chunk and its result are handled."""

    def run(self, rows: Rows) -> R:
        """The result of one chunk."""

    def split(self, rows: Rows) -> list[Rows]:
        """The parts of a chunk, none when it cannot be split; always the same for the same chunk."""

    def size(self, rows: Rows) -> int:
        """What it takes of memory, in any unit."""

    def out_of_memory(self, error: BaseException) -> bool:
        """Whether an error is worth a split."""

    def release(self) -> None:
        """Give memory back before the next attempt."""

    def pack(self, result: R) -> bytes:
        """The result as bytes: for the journal, and for the way from a worker."""

    def unpack(self, rows: Rows, packed: bytes) -> R:
        """The result that was packed."""

    def conditions(self) -> Conditions:
        """What may decide the last digits of its results in this process."""


class Unsplittable:
    """What pieces of work have in common that are never split, such as a shard."""

    def split(self, rows: Rows) -> list[Rows]:
        """No parts."""
        return []

    def size(self, rows: Rows) -> int:
        """How many pieces."""
        return len(rows)

    def out_of_memory(self, error: BaseException) -> bool:
        """There is nothing to split: the work itself says what it lacks."""
        return False

    def release(self) -> None:
        """Nothing is held."""


class ChunkQueue:
    """The chunks to come; once a chunk of some size did not fit, later ones of that size are split ahead."""

    def __init__(self, chunks: Iterable[Rows], work: ChunkWork[R], journal: Journal | None) -> None:
        self._work: ChunkWork[R] = work
        self._line: deque[Rows] = deque()
        for chunk in chunks:
            self._line.extend(remaining(chunk, work, journal) if journal else [chunk])
        self.limit = journal.limit if journal else None
        """Smallest size that did not fit so far."""

    def __len__(self) -> int:
        return len(self._line)

    def take(self) -> Rows | None:
        """The next chunk, None when there is none now."""
        while self._line:
            rows = self._line.popleft()
            too_large = self.limit is not None and self._work.size(rows) >= self.limit
            parts = self._work.split(rows) if too_large else []
            if not parts:
                return rows
            self._line.extendleft(reversed(parts))
        return None

    def again(self, rows: Rows) -> None:
        """A chunk that was taken but not computed."""
        self._line.appendleft(rows)

    def too_large(self, rows: Rows, message: str) -> None:
        """A chunk did not fit: its parts come next; `MemoryLimitError` when it has none."""
        size = self._work.size(rows)
        self.limit = size if self.limit is None else min(self.limit, size)
        parts = self._work.split(rows)
        if not parts:
            raise MemoryLimitError(
                f"too little memory even for the smallest piece of work: {message}",
                remedy="shorten the longest rows (--max-length), or use a machine with more memory",
            )
        self._line.extendleft(reversed(parts))


def remaining(chunk: Rows, work: ChunkWork[R], journal: Journal) -> list[Rows]:
    """What is left of a chunk, in the same parts as when it was interrupted: the results keep their bytes."""
    if chunk in journal:
        return []
    if not journal.touches(chunk):
        return [chunk]
    return [rest for part in work.split(chunk) for rest in remaining(part, work, journal)]


# What computed each chunk of one piece of work, and whether that was everywhere the same.


class ChunkLog:
    """Chunks with their conditions, those of an interrupted command as its journal tells them."""

    def __init__(self, part: str = "") -> None:
        """`part` names the piece of work where a result has several."""
        self._part = part
        self._by: dict[tuple[str, Rows], Conditions] = {}

    def note(self, rows: Rows, conditions: Conditions) -> None:
        """A chunk was computed under these conditions."""
        self._by[self._part, rows] = conditions

    def of(self, rows: Rows) -> Conditions:
        """What a chunk was computed under."""
        return self._by[self._part, rows]

    def note_kept(self, rows: Rows, journal: Journal) -> None:
        """A chunk came out of the journal."""
        made_by = journal.made_by(rows)
        if made_by is not None:
            self.note(rows, Conditions.model_validate(made_by))

    def part(self, name: str) -> ChunkLog:
        """The log of one part of the work; what it hears stands here as well."""
        log = ChunkLog(name)
        log._by = self._by
        return log

    def kinds(self) -> dict[str, int]:
        """Each kind of conditions, as a line for a person → how many chunks."""
        return dict(sorted(Counter(conditions.label for conditions in self._by.values()).items()))

    def findings(self) -> list[Finding]:
        """`mixed-hardware` where the chunks were not all computed under equal conditions."""
        kinds = self.kinds()
        if len(kinds) < 2:
            return []
        told = " | ".join(f"{count} on {label}" for label, count in kinds.items())
        finding = Finding(
            severity="note",
            code="mixed-hardware",
            message="mixed hardware: the chunks of this result were computed under several conditions, which "
            f"may differ in the last digits: {told}",
            remedy="for the same bytes each time, give all workers one kind of hardware and one image",
        )
        return [finding]

    def write(self, path: Path, *, wanted: bool, keys: Sequence[str] | None = None) -> None:
        """One line for each chunk, by their rows; no file where that is not wanted and nothing is mixed.

        `keys`: what names each row of the data, to be written as well.
        """
        if not wanted and len(self.kinds()) < 2:
            with os_errors(path, "remove"):
                path.unlink(missing_ok=True)
            return
        lines = (
            ChunkRecord(
                part=part,
                rows=list(rows),
                keys=None if keys is None else [keys[row] for row in rows],
                conditions=conditions,
            ).model_dump(mode="json", exclude_none=True)
            for (part, rows), conditions in sorted(self._by.items(), key=lambda item: item[0])
        )
        write_bytes(path, b"".join(json.dumps(line).encode() + b"\n" for line in lines))


# Work through chunks of rows in this process: split what does not fit, skip what is in the journal.


def map_chunks(
    chunks: Iterable[Rows], work: ChunkWork[R], journal: Journal | None = None, log: ChunkLog | None = None
) -> Iterator[tuple[Rows, R]]:
    """Each chunk with its result; a split chunk comes as its parts, none left out, none twice.

    What the journal holds comes first, unpacked; the rest is computed and written to it, with the conditions
    that it was computed under, which `log` gets as well. Raises `MemoryLimitError` when even the smallest
    part does not fit.
    """
    log = ChunkLog() if log is None else log
    waiting = ChunkQueue(chunks, work, journal)
    yield from kept(journal, work, log)
    while rows := waiting.take():
        # The next attempt starts outside the except block: inside it, the traceback would keep the
        # tensors of the failed attempt alive.
        outcome = _attempt(rows, work)
        if isinstance(outcome, _TooLarge):
            work.release()
            waiting.too_large(rows, outcome.message)
            continue
        conditions = work.conditions()
        if journal:
            journal.add(rows, work.pack(outcome), waiting.limit, conditions.model_dump())
        log.note(rows, conditions)
        yield rows, outcome


def kept(journal: Journal | None, work: ChunkWork[R], log: ChunkLog) -> Iterator[tuple[Rows, R]]:
    """What the journal holds, unpacked."""
    if journal:
        for rows, packed in journal.entries():
            log.note_kept(rows, journal)
            yield rows, work.unpack(rows, packed)


class _TooLarge:
    """The outcome of a chunk that did not fit."""

    def __init__(self, error: BaseException) -> None:
        self.message = (str(error).strip() or type(error).__name__).splitlines()[0]


def _attempt(rows: Rows, work: ChunkWork[R]) -> R | _TooLarge:
    try:
        return work.run(rows)
    except Exception as error:
        if not work.out_of_memory(error):
            raise
        return _TooLarge(error)


@dataclass(frozen=True)
class WorkSpec:
    """How a worker makes the work itself: by a function that it imports, with arguments that can be sent."""

    function: Callable[..., AbstractContextManager[Any]]
    """A function at the top level of a module; what it opens is the work."""
    arguments: Mapping[str, Any]
    gpu: bool = False
    """Whether the work computes on a GPU; a worker then gets one unless told otherwise."""
    parcel: Callable[[Rows], Any] | None = None
    """What a chunk needs besides its rows: made here, sent with it, given to the work's `take` before it
    runs. Without it a worker reads what it needs from storage."""

    def __post_init__(self) -> None:
        """Raise `TypeError` for a function that no other process could import, such as a lambda."""
        try:
            module, name = self.place
            # What is `__main__` here is another module in a worker.
            importable = module != "__main__" and import_function(module, name) is self.function
        except (ImportError, AttributeError):
            importable = False
        if not importable:
            raise TypeError(f"{self.function!r} is not a function that a worker can import")

    @property
    def place(self) -> tuple[str, str]:
        """The function's module, and its name there."""
        return self.function.__module__, self.function.__qualname__


def import_function(module: str, name: str) -> Callable[..., AbstractContextManager[Any]]:
    """The function of that name; raises `ImportError` or `AttributeError` where there is none."""
    function: Callable[..., AbstractContextManager[Any]] = getattr(import_module(module), name)
    return function


class Executor(AbstractContextManager["Executor"], Protocol):
    """Computes chunks. Inside a `with` block its workers stay for the next piece of work."""

    remote: bool
    """Whether the work is made anew from its `WorkSpec`, in other processes."""

    def map_chunks(
        self,
        chunks: Iterable[Rows],
        work: ChunkWork[R],
        journal: Journal | None,
        spec: WorkSpec,
        log: ChunkLog | None = None,
    ) -> Iterator[tuple[Rows, R]]:
        """Each chunk with its result, in any order; `log` hears what each was computed under."""

    def places(self, spec: WorkSpec) -> int:
        """How many chunks can be under way at once."""


class Local:
    """This process."""

    remote = False

    def map_chunks(
        self,
        chunks: Iterable[Rows],
        work: ChunkWork[R],
        journal: Journal | None,
        spec: WorkSpec,
        log: ChunkLog | None = None,
    ) -> Iterator[tuple[Rows, R]]:
        """Each chunk with its result, in the order of the chunks."""
        return map_chunks(chunks, work, journal, log)

    def places(self, spec: WorkSpec) -> int:
        """One."""
        return 1

    def __enter__(self) -> Local:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is held."""
