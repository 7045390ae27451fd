"""Work through chunks on a Ray cluster: each worker holds the model, a lost one costs the chunk in its hands.

The chunks are those of `executors.local`, so are their results: a worker packs what this process would have
computed, with the same arithmetic, threads and batches. Models lie on storage that all machines see; rows and
packed results travel, at most one chunk's for each worker at a time.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

from lorasmith.errors import MachineError, RemoteError
from lorasmith.executors.base import ChunkLog, ChunkQueue, ChunkWork, WorkSpec, kept
from lorasmith.executors.worker import Worker, WorkerReply, pack_spec, unpack_error
from lorasmith.files.journal import Journal, Rows
from lorasmith.machine.meter import note_machine, note_process, this_machine
from lorasmith.records.scoring import Conditions

# The workers of a cluster: started, given chunks, replaced when they die.


_TRIES = 3
"""How many workers one chunk may bring down before it is held responsible."""
_WAIT_SECONDS = 5.0

Result = tuple[Rows, bytes, Conditions]


class WorkerPool:
    """Workers that stay from one piece of work to the next."""

    def __init__(self, threads: int, gpus: float, start_seconds: float) -> None:
        import ray

        self._ray = ray
        self.threads, self.gpus, self._start_seconds = threads, gpus, start_seconds
        self.losses = 0
        """Workers lost so far."""
        self._kind = ray.remote(Worker).options(
            num_cpus=threads,
            num_gpus=gpus,
            max_restarts=0,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}},
        )
        self._workers: list[Any] = []

    def results(self, waiting: ChunkQueue, spec: WorkSpec, wanted: int) -> Iterator[Result]:
        """Every chunk with its packed result, as they are done; `wanted` workers at most are put to it."""
        return _PoolRun(self, waiting, spec).results(wanted)

    def first(self, count: int) -> list[Any]:
        """So many workers, new ones where there are too few."""
        while len(self._workers) < count:
            self._workers.append(self._kind.remote())
        return self._workers[:count]

    def replace(self, worker: Any) -> Any:
        """Another worker for one that is gone."""
        self.losses += 1
        self._workers.remove(worker)
        return self.first(len(self._workers) + 1)[-1]

    def dismiss(self) -> None:
        """Give the cluster back what the workers hold."""
        for worker in self._workers:
            with suppress(Exception):  # it may be gone already
                self._ray.kill(worker)
        self._workers = []

    def nobody(self) -> RemoteError:
        """No worker came."""
        return RemoteError(
            f"no worker has started within {self._start_seconds:.0f} s",
            where="the Ray cluster",
            expected=f"{self.threads} free processors, {self.gpus:g} GPUs for each worker",
            remedy="see `ray status`; ask for fewer --worker-threads or --workers, or a larger cluster",
        )


class _PoolRun:
    """One piece of work on a pool: which chunks wait, which are under way, and whose worker died."""

    def __init__(self, pool: WorkerPool, waiting: ChunkQueue, spec: WorkSpec) -> None:
        self._pool, self._ray, self._waiting, self._spec = pool, pool._ray, waiting, spec
        self._packed = self._ray.put(pack_spec(spec))  # one copy for all workers
        self._pending: dict[Any, tuple[Any, Rows | None]] = {}
        """What is awaited → the worker, and its chunk or None while it makes the work."""
        self._conditions: dict[Any, Conditions] = {}
        self._idle: list[Any] = []
        self._tries: dict[Rows, int] = {}
        self._failed_starts = 0
        self._known = this_machine().devices
        """Devices that somebody counts already."""
        self._meters: list[Any] = []
        """Workers that count what their machine's devices take, one for each machine that has some."""

    def results(self, wanted: int) -> Iterator[Result]:
        """See `WorkerPool.results`."""
        for worker in self._pool.first(wanted):
            self._open(worker)
        waited = 0.0
        while self._give() or self._waiting:
            done = self._answered()
            if not done:
                waited += _WAIT_SECONDS
                if not self._conditions and waited >= self._pool._start_seconds:
                    raise self._pool.nobody()
            for reference in done:
                finished = self._take(reference, wanted)
                if finished is not None:
                    self._give()  # before the caller has its time with the result
                    yield finished
        self._read_meters()

    def _answered(self) -> list[Any]:
        """What is done by now, after a while at least one: looking at all of them costs as much as at one."""
        every = list(self._pending)
        done, rest = self._ray.wait(every, num_returns=1, timeout=_WAIT_SECONDS)
        if done and rest:
            more, _ = self._ray.wait(rest, num_returns=len(rest), timeout=0)
            done += more
        return list(done)

    def _open(self, worker: Any) -> None:
        self._pending[worker.open.remote(self._packed)] = (worker, None)

    def _give(self) -> bool:
        """Hand chunks to idle workers; whether any chunk is under way."""
        while self._idle and (rows := self._waiting.take()):
            worker = self._idle.pop()
            parcel = self._spec.parcel(rows) if self._spec.parcel else None
            self._pending[worker.run.remote(rows, parcel)] = (worker, rows)
        return any(rows is not None for _, rows in self._pending.values())

    def _take(self, reference: Any, wanted: int) -> Result | None:
        worker, rows = self._pending.pop(reference)
        try:
            answer: WorkerReply = self._ray.get(reference)
        except self._ray.exceptions.RayActorError as error:
            self._lost(worker, rows, error, wanted)
            return None
        note_process(answer.cpu_seconds, answer.peak_rss_bytes)
        if answer.status == "failed":
            raise unpack_error(answer.packed)
        self._idle.append(worker)
        if rows is None:
            self._conditions[worker] = Conditions.model_validate_json(answer.packed)
            self._meter(worker, answer.devices)
            return None
        if answer.status == "too large":
            self._waiting.too_large(rows, answer.packed.decode())
            return None
        return rows, answer.packed, self._conditions[worker]

    def _meter(self, worker: Any, devices: frozenset[str]) -> None:
        """Have the worker count the devices of its machine, unless another one does."""
        if devices - self._known:
            worker.meter.remote(self._known)
            self._known |= devices
            self._meters.append(worker)

    def _read_meters(self) -> None:
        """One that is gone has taken its counts along."""
        for worker in self._meters:
            try:
                note_machine(self._ray.get(worker.read_meter.remote()))
            except self._ray.exceptions.RayActorError:
                note_machine(None)

    def _lost(self, worker: Any, rows: Rows | None, error: BaseException, wanted: int) -> None:
        """A worker is gone, with its machine or alone: its chunk waits again, another takes its place."""
        if rows is None:
            self._failed_starts += 1
            if self._failed_starts >= _TRIES * wanted:
                raise RemoteError(f"workers cannot start: {error}", where="the Ray cluster") from error
        else:
            self._tries[rows] = self._tries.get(rows, 0) + 1
            if self._tries[rows] >= _TRIES:
                raise RemoteError(
                    f"{_TRIES} workers in a row died over one chunk of {len(rows)} rows",
                    where="the Ray cluster",
                    remedy="their memory may be too small: give smaller batches, or larger machines",
                ) from error
            self._waiting.again(rows)
        self._open(self._pool.replace(worker))


R = TypeVar("R")

_OBJECT_STORE = 200_000_000
"""Bytes of a cluster that is started here; results beyond it go to disk, and are taken out at once."""


@dataclass
class Cluster:
    """An executor on Ray, local or at an address. Inside a `with` block its workers stay."""

    address: str | None = None
    """`auto`, `ray://host:10001`, `host:6379`; None starts one on this machine."""
    workers: int | None = None
    """By default as many as the cluster has room for. A larger number lets a cluster grow that can."""
    threads: int | None = None
    """Threads of each worker, by default those of this process. Equal threads give equal bytes."""
    gpus: float | None = None
    """GPUs of each worker, by default one where the work computes on a GPU."""
    start_seconds: float = 600.0
    """How long the first worker may take to come, as where a cluster grows on demand."""
    remote: bool = True
    _pool: WorkerPool | None = field(default=None, repr=False)
    _blocks: int = 0
    _losses: int = 0

    @property
    def losses(self) -> int:
        """Workers lost so far."""
        return self._losses + (self._pool.losses if self._pool else 0)

    def __enter__(self) -> Cluster:
        self._blocks += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._blocks -= 1
        if self._pool is not None and (error is not None or not self._blocks):
            self._dismiss(self._pool)

    def map_chunks(
        self,
        chunks: Iterable[Rows],
        work: ChunkWork[R],
        journal: Journal | None,
        spec: WorkSpec,
        log: ChunkLog | None = None,
    ) -> Iterator[tuple[Rows, R]]:
        """Each chunk with its result, as they come; a split chunk comes as its parts.

        What the journal holds comes first. Raises `MemoryLimitError` when the smallest part does not fit,
        `RemoteError` when a chunk brings down one worker after the other or no worker comes, and whatever
        the work raises.
        """
        log = ChunkLog() if log is None else log
        waiting = ChunkQueue(chunks, work, journal)
        yield from kept(journal, work, log)
        if not waiting:
            return
        wanted = max(1, min(self.places(spec), len(waiting)))
        pool, alone = self._pool_for(spec), not self._blocks
        try:
            for rows, packed, conditions in pool.results(waiting, spec, wanted):
                if journal:
                    journal.add(rows, packed, waiting.limit, conditions.model_dump())
                log.note(rows, conditions)
                yield rows, work.unpack(rows, packed)
        except BaseException:
            alone = True  # what they still compute is of no use
            raise
        finally:
            if alone:
                self._dismiss(pool)

    def places(self, spec: WorkSpec) -> int:
        """The number asked for, else of how many workers the cluster's machines have room for now."""
        join(self.address)
        if self.workers is not None:
            return self.workers
        import ray

        threads, gpus = self._threads(), self._gpus(spec)
        room = 0
        for node in ray.nodes():
            if node["Alive"]:
                has = node["Resources"]
                fits = int(has.get("CPU", 0) // threads)
                room += min(fits, int(has.get("GPU", 0) / gpus)) if gpus else fits
        return max(1, room)

    def _pool_for(self, spec: WorkSpec) -> WorkerPool:
        gpus = self._gpus(spec)
        if self._pool is not None and self._pool.gpus != gpus:
            self._dismiss(self._pool)
        if self._pool is None:
            self._pool = WorkerPool(self._threads(), gpus, self.start_seconds)
        return self._pool

    def _dismiss(self, pool: WorkerPool) -> None:
        """Send workers away. Work that was broken off may come late to it, when others have taken over."""
        pool.dismiss()
        if self._pool is pool:
            self._losses += pool.losses
            self._pool = None

    def _threads(self) -> int:
        if self.threads is not None:
            return self.threads
        import torch

        return torch.get_num_threads()

    def _gpus(self, spec: WorkSpec) -> float:
        return self.gpus if self.gpus is not None else float(spec.gpu)


def join(address: str | None) -> None:
    """Join the cluster, once in a process; raises `MachineError` without ray, `RemoteError` without it."""
    try:
        import ray
    except ImportError as error:
        raise MachineError("ray is not installed here", remedy="pip install 'lorasmith[cluster]'") from error
    if ray.is_initialized():
        return
    ended = signal.getsignal(signal.SIGTERM)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address is None:  # "local": Ray would else join any cluster that runs on this machine
            ray.init(address="local", include_dashboard=False, object_store_memory=_OBJECT_STORE, **quiet)
        else:
            ray.init(address=address, **quiet)
    except Exception as error:  # of no class of its own where a node does not come up in time
        with suppress(Exception):
            ray.shutdown()
        raise RemoteError(
            f"cannot join the Ray cluster: {error}",
            where=address,
            remedy="check --ray-address, and that `ray status` shows the cluster from here",
        ) from error
    # Ray puts a handler of its own in place, which would end a command with another exit code.
    if callable(ended) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, ended)
