"""The workers of a cluster: started, given chunks, replaced when they die."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from lorasmith import __version__
from lorasmith.errors import RemoteError
from lorasmith.executors.base import Recipe
from lorasmith.executors.chunks import Waiting
from lorasmith.executors.worker import Answer, Worker, unpack_error
from lorasmith.files.elsewhere import note_machine, note_process
from lorasmith.files.journal import Rows
from lorasmith.files.meter import this_machine
from lorasmith.records.conditions import Conditions

_TRIES = 3
"""How many workers one chunk may bring down before it is held responsible."""
_WAIT_SECONDS = 5.0

Result = tuple[Rows, bytes, Conditions]


class Crew:
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

    def results(self, waiting: Waiting, recipe: Recipe, wanted: int) -> Iterator[Result]:
        """Every chunk with its packed result, as they are done; `wanted` workers at most are put to it."""
        return _Piece(self, waiting, recipe).results(wanted)

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


class _Piece:
    """One piece of work, and what the workers have of it."""

    def __init__(self, crew: Crew, waiting: Waiting, recipe: Recipe) -> None:
        self._crew, self._ray, self._waiting, self._recipe = crew, crew._ray, waiting, recipe
        made = {"version": __version__, "function": recipe.function, "arguments": dict(recipe.arguments)}
        self._packed = self._ray.put(pickle.dumps(made))  # one copy for all workers
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
        """See `Crew.results`."""
        for worker in self._crew.first(wanted):
            self._open(worker)
        waited = 0.0
        while self._give() or self._waiting:
            done = self._answered()
            if not done:
                waited += _WAIT_SECONDS
                if not self._conditions and waited >= self._crew._start_seconds:
                    raise self._crew.nobody()
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
            parcel = self._recipe.parcel(rows) if self._recipe.parcel else None
            self._pending[worker.run.remote(rows, parcel)] = (worker, rows)
        return any(rows is not None for _, rows in self._pending.values())

    def _take(self, reference: Any, wanted: int) -> Result | None:
        worker, rows = self._pending.pop(reference)
        try:
            answer: Answer = self._ray.get(reference)
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
        self._open(self._crew.replace(worker))
