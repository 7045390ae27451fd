"""Work through chunks on a Ray cluster: each worker holds the model, a lost one costs the chunk in its hands.

The chunks are those of `executors.local`, so are their results: a worker packs what this process would have
computed, with the same arithmetic, threads and batches. Only rows and packed results travel; models lie on
storage that all machines see.
"""

from __future__ import annotations

import importlib
import pickle
import platform
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lorasmith import errors
from lorasmith.errors import LorasmithError, MachineError, MemoryLimitError, RemoteError
from lorasmith.executors.base import Recipe
from lorasmith.executors.local import Work, remaining
from lorasmith.files.journal import Journal, Rows

R = TypeVar("R")

_TRIES = 3
"""How many workers one chunk may bring down before it is held responsible."""
_OBJECT_STORE = 200_000_000
"""Bytes of a cluster that is started here: packed results are kilobytes, and are taken out at once."""
_WAIT_SECONDS = 5.0


@dataclass
class Cluster:
    """An executor on Ray, local or at an address."""

    address: str | None = None
    """`auto`, `ray://host:10001`, `host:6379`; None starts one on this machine."""
    workers: int | None = None
    """By default one for each `threads` processors of the cluster, or for each GPU."""
    threads: int | None = None
    """Of each worker; by default those of this process. Equal threads give equal bytes."""
    gpus: float = 0.0
    """Of each worker."""
    start_seconds: float = 600.0
    """How long the first worker may take to come, as where a cluster grows on demand."""
    _facts: set[str] = field(default_factory=set)
    _losses: int = 0

    @property
    def losses(self) -> int:
        """Workers lost so far."""
        return self._losses

    def hardware(self) -> list[str]:
        """What computed the results so far, one entry for each kind of worker."""
        return sorted(self._facts)

    def work_through(
        self, chunks: Iterable[Rows], work: Work[R], journal: Journal | None, recipe: Recipe
    ) -> Iterator[tuple[Rows, R]]:
        """Each chunk with its result, as they come; a split chunk comes as its parts.

        What the journal holds comes first. Raises `MemoryLimitError` when the smallest part does not fit,
        `RemoteError` when a chunk brings down one worker after the other or no worker comes, and whatever
        the work raises.
        """
        waiting: deque[Rows] = deque()
        for chunk in chunks:
            waiting.extend(remaining(chunk, work, journal) if journal else [chunk])
        if journal:
            for rows, packed in journal.entries():
                yield rows, work.unpack(rows, packed)
        if not waiting:
            return
        _connect(self.address)
        pool = _Pool(self, recipe, len(waiting))
        limit = journal.limit if journal else None
        try:
            for rows, status, packed in pool.results(waiting):
                if status == "too large":
                    limit = work.size(rows) if limit is None else min(limit, work.size(rows))
                    parts = work.split(rows)
                    if not parts:
                        raise MemoryLimitError(
                            f"too little memory even for the smallest piece of work: {packed.decode()}",
                            remedy="shorten the longest rows (--max-length), or use larger machines",
                        )
                    waiting.extendleft(reversed(parts))
                    continue
                if journal:
                    journal.add(rows, packed, limit)
                yield rows, work.unpack(rows, packed)
        finally:
            pool.close()

    def threads_each(self) -> int:
        """Threads of each worker."""
        if self.threads is not None:
            return self.threads
        import torch

        return torch.get_num_threads()


class _Pool:
    """The workers of one piece of work."""

    def __init__(self, cluster: Cluster, recipe: Recipe, chunks: int) -> None:
        import ray

        self._ray = ray
        self._cluster = cluster
        self._threads = cluster.threads_each()
        self._recipe = pickle.dumps((recipe.function, dict(recipe.arguments)))
        available = ray.cluster_resources()
        each = (
            available.get("GPU", 0) / cluster.gpus
            if cluster.gpus
            else available.get("CPU", 1) / self._threads
        )
        self._wanted = max(1, min(cluster.workers or int(each), chunks))
        self._kind = ray.remote(_Worker).options(
            num_cpus=self._threads,
            num_gpus=cluster.gpus,
            max_restarts=0,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(self._threads), "OMP_WAIT_POLICY": "PASSIVE"}},
        )
        self._pending: dict[Any, tuple[Any, Rows | None]] = {}
        """What is awaited → the worker, and its chunk or None while it starts."""
        self._tries: dict[Rows, int] = {}
        self._failed_starts = 0
        self._workers: list[Any] = []
        for _ in range(self._wanted):
            self._start()

    def _start(self) -> None:
        worker = self._kind.remote(self._recipe, self._threads)
        self._workers.append(worker)
        self._pending[worker.facts.remote()] = (worker, None)

    def results(self, waiting: deque[Rows]) -> Iterator[tuple[Rows, str, bytes]]:
        """Chunks as they are done; `waiting` may grow in between."""
        idle: list[Any] = []
        waited, started = 0.0, False
        while waiting or any(rows is not None for _, rows in self._pending.values()):
            while waiting and idle:
                self._give(idle.pop(), waiting.popleft())
            done, _ = self._ray.wait(list(self._pending), num_returns=1, timeout=_WAIT_SECONDS)
            if not done:
                waited += _WAIT_SECONDS
                if not started and waited >= self._cluster.start_seconds:
                    raise self._nobody()
                continue
            worker, rows = self._pending.pop(done[0])
            try:
                answer = self._ray.get(done[0])
            except self._ray.exceptions.RayActorError as error:
                self._lost(rows, waiting, error)
                continue
            started = True
            idle.append(worker)
            if rows is None:
                self._cluster._facts.add(answer)
            else:
                status, packed = answer
                if status == "failed":
                    raise _rebuilt(packed)
                yield rows, status, packed

    def _give(self, worker: Any, rows: Rows) -> None:
        self._pending[worker.run.remote(rows)] = (worker, rows)

    def _lost(self, rows: Rows | None, waiting: deque[Rows], error: BaseException) -> None:
        """A worker is gone, with its machine or alone: its chunk waits again, another takes its place."""
        self._cluster._losses += 1
        if rows is None:
            self._failed_starts += 1
            if self._failed_starts >= _TRIES * self._wanted:
                raise RemoteError(f"workers cannot start: {error}", where="the Ray cluster") from error
        else:
            self._tries[rows] = self._tries.get(rows, 0) + 1
            if self._tries[rows] >= _TRIES:
                raise RemoteError(
                    f"{_TRIES} workers in a row died over one chunk of {len(rows)} rows",
                    where="the Ray cluster",
                    remedy="their memory may be too small: give smaller --batch-tokens, or larger machines",
                ) from error
            waiting.appendleft(rows)
        self._start()

    def _nobody(self) -> RemoteError:
        return RemoteError(
            f"no worker has started within {self._cluster.start_seconds:.0f} s",
            where="the Ray cluster",
            expected=f"{self._threads} free processors, {self._cluster.gpus:g} GPUs for each worker",
            remedy="see `ray status`; ask for fewer --threads or --workers, or a larger cluster",
        )

    def close(self) -> None:
        """Give the cluster back what the workers hold."""
        for worker in self._workers:
            with suppress(Exception):  # it may be gone already
                self._ray.kill(worker)


class _Worker:
    """One replica of the work, in a process of its own."""

    def __init__(self, recipe: bytes, threads: int) -> None:
        function, arguments = pickle.loads(recipe)
        module, _, name = function.partition(":")
        self._stack = ExitStack()
        self._failure: bytes | None = None
        try:
            self._work = self._stack.enter_context(
                getattr(importlib.import_module(module), name)(**arguments)
            )
        except LorasmithError as error:
            self._failure = _packed(error)
        self._threads = threads

    def facts(self) -> str:
        """What may decide the last digits of its results."""
        torch = sys.modules.get("torch")
        if torch is None:
            return f"{_processor()}, {self._threads} threads"
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
        return f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads"

    def run(self, rows: Rows) -> tuple[str, bytes]:
        """`done` and the packed result, `too large` and why, or `failed` and the error."""
        if self._failure is not None:
            return "failed", self._failure
        rows = tuple(rows)
        message = None
        try:
            return "done", self._work.pack(self._work.run(rows))
        except LorasmithError as error:
            return "failed", _packed(error)
        except Exception as error:
            if not self._work.out_of_memory(error):
                raise
            message = (str(error).strip() or type(error).__name__).splitlines()[0]
        self._work.release()
        return "too large", message.encode()


def _connect(address: str | None) -> None:
    """Join the cluster, once in a process; raises `MachineError` without ray, `RemoteError` without it."""
    try:
        import ray
    except ImportError as error:
        raise MachineError("ray is not installed here", remedy="pip install 'lorasmith[cluster]'") from error
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address is None:
            ray.init(include_dashboard=False, object_store_memory=_OBJECT_STORE, **quiet)
        else:
            ray.init(address=address, **quiet)
    except Exception as error:  # of no class of its own where a node does not come up in time
        raise RemoteError(
            f"cannot join the Ray cluster: {error}",
            where=address,
            remedy="check --ray-address, and that `ray status` shows the cluster from here",
        ) from error


def _processor() -> str:
    with suppress(OSError), open("/proc/cpuinfo") as lines:  # noqa: PTH123 - read to its first match
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def _packed(error: LorasmithError) -> bytes:
    fields = {name: getattr(error, name) for name in ("where", "expected", "remedy")}
    return pickle.dumps((type(error).__name__, error.found, fields))


def _rebuilt(packed: bytes) -> LorasmithError:
    """The error that a worker met, as its own class."""
    name, found, fields = pickle.loads(packed)
    kind = getattr(errors, name, RemoteError)
    made: LorasmithError = kind(found, **fields)
    return made
