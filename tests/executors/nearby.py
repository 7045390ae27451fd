"""An executor that makes the work from its `WorkSpec` as a cluster's worker does, in this process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from lorasmith.executors.base import ChunkLog, ChunkQueue, WorkSpec, kept
from lorasmith.executors.worker import Worker, WorkerReply, pack_spec, unpack_error
from lorasmith.files.journal import Journal, Rows
from lorasmith.records.scoring import Conditions


class Nearby:
    """A cluster without Ray."""

    remote = True

    def __init__(self) -> None:
        self.opened: list[str] = []

    def __enter__(self) -> Nearby:
        return self

    def __exit__(self, *error: object) -> None: ...

    def places(self, spec: WorkSpec) -> int:
        return 2

    def map_chunks(
        self,
        chunks: Iterable[Rows],
        work: Any,
        journal: Journal | None,
        spec: WorkSpec,
        log: ChunkLog | None = None,
    ) -> Iterator[tuple[Rows, Any]]:
        log = log or ChunkLog()
        waiting = ChunkQueue(chunks, work, journal)
        yield from kept(journal, work, log)
        self.opened.append(spec.arguments.get("spec", spec).function.__name__)
        worker = Worker()
        conditions = Conditions.model_validate_json(answered(worker.open(pack_spec(spec))))
        while rows := waiting.take():
            packed = answered(worker.run(rows, spec.parcel(rows) if spec.parcel else None))
            if journal:
                journal.add(rows, packed, waiting.limit, conditions.model_dump())
            log.note(rows, conditions)
            yield rows, work.unpack(rows, packed)
        worker._stack.close()


def answered(answer: WorkerReply) -> bytes:
    if answer.status == "failed":
        raise unpack_error(answer.packed)
    return answer.packed
