"""One object for all that is done to rows with a model: the model, its rows, and where that is computed.

What is done is a function that opens `RowWork` for a scorer: `open_scoring`, `open_choices`, `open_answers`,
`open_texts`. `Scorer.run` puts it to the executor; a worker elsewhere opens the same work on a scorer of its
own, which it makes from the `Replica`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from lorasmith.errors import DataError
from lorasmith.executors.base import ChunkLog, Executor, Local, WorkSpec
from lorasmith.executors.storage import SHARED, files_digest, require_same_files
from lorasmith.files.journal import Journal, Rows
from lorasmith.models.device import Route, choose_route, release_memory, resolve_device
from lorasmith.models.load import LoadedModel
from lorasmith.models.scoring import RowWork
from lorasmith.models.session import Workload, load_for, prepare_workload, resolve_place
from lorasmith.options import ScoringOptions
from lorasmith.progress import Progress, silent

T = TypeVar("T")


@dataclass(frozen=True)
class Replica:
    """What makes the same model and the same rows in another process.

    The paths have to lead to the same files there; `open` makes sure that they do.
    """

    model: str
    adapter: str | None
    tokenizer_from: str | None
    test_set: str
    options: ScoringOptions
    """Those of the command, with the device that `auto` is there: no worker takes another."""
    route: str
    """Name of the arithmetic that the command chose, so that no worker probes for another."""
    files: str
    """The `files_digest` of model and adapter."""
    tokens: str
    """Digest of the rows in tokens."""
    questions: bool = False
    """Whether rows without a reference answer are among them."""

    @property
    def gpu(self) -> bool:
        """Whether it computes on a GPU."""
        return self.options.device == "cuda"

    def open(self) -> Scorer:
        """Load the model, unless this process has it from the last piece of work, and encode the rows.

        Raises `CheckpointError` or `DataError` where the files are not the command's, and as validation does.
        """
        device, _ = resolve_place(self.options)
        route = choose_route(self.route, device)
        require_same_files(self.files, self.model, self.adapter)
        loaded = self._load(route)
        work = prepare_workload(Path(self.test_set), loaded, self.options, route, questions=self.questions)
        if work.digest != self.tokens:
            raise DataError(
                "a worker reads other rows under this path than the command",
                where=self.test_set,
                expected=SHARED,
            )
        return Scorer(loaded, work, route, self)

    def _load(self, route: Route) -> LoadedModel:
        options = self.options
        key = (
            self.files,
            self.model,
            self.adapter,
            self.tokenizer_from,
            options.tokenizer,
            options.device,
            options.device_map,
            route.dtype,
        )
        loaded = _last_model.get(key)
        if loaded is None:
            # The last one goes before the next one comes: two need not fit into memory.
            _last_model.clear()
            release_memory()
            loaded = load_for(
                options,
                Path(self.model),
                adapter=None if self.adapter is None else Path(self.adapter),
                dtype=route.dtype,
                tokenizer_from=None if self.tokenizer_from is None else Path(self.tokenizer_from),
            )
            _last_model[key] = loaded
        return loaded


_last_model: dict[object, LoadedModel] = {}
"""The model of a worker's last piece of work: the next one may be about the same."""


@dataclass(frozen=True)
class Scorer:
    """A model ready to be run over the rows of a test set, batch by batch."""

    loaded: LoadedModel
    work: Workload
    route: Route
    replica: Replica
    executor: Executor = field(default_factory=Local)
    """Where batches are computed."""
    log: ChunkLog = field(default_factory=ChunkLog)
    """Hears what each batch was computed under."""
    progress: Progress = silent
    journal: Journal | None = None
    """Keeps finished batches of the work that is run next; without one an interrupted command begins anew."""

    @classmethod
    def load(
        cls,
        model: Path,
        test_set: Path,
        options: ScoringOptions,
        route: Route,
        *,
        adapter: Path | None = None,
        tokenizer_from: Path | None = None,
        work: Workload | None = None,
        questions: bool = False,
        executor: Executor | None = None,
        log: ChunkLog | None = None,
        progress: Progress = silent,
    ) -> Scorer:
        """Load a model and encode the rows for it, unless `work` has them encoded already."""
        loaded = load_for(options, model, adapter=adapter, dtype=route.dtype, tokenizer_from=tokenizer_from)
        work = work or prepare_workload(test_set, loaded, options, route, questions=questions)
        replica = Replica(
            model=str(model.absolute()),
            adapter=None if adapter is None else str(adapter.absolute()),
            tokenizer_from=None if tokenizer_from is None else str(tokenizer_from.absolute()),
            test_set=str(test_set.absolute()),
            options=options.model_copy(update={"device": resolve_device(options.device).type}),
            route=route.name,
            files=files_digest([model] if adapter is None else [model, adapter]),
            tokens=work.digest,
            questions=questions,
        )
        return cls(loaded, work, route, replica, executor or Local(), log or ChunkLog(), progress)

    def part(self, name: str, journal: Journal | None) -> Scorer:
        """The same for one of several pieces of work: with a journal of its own, told apart in the log."""
        return replace(self, log=self.log.part(name), journal=journal)

    def here(self, journal: Journal | None) -> Scorer:
        """The same for a small piece of work on the side: in this process, unseen and not logged."""
        return replace(self, executor=Local(), log=ChunkLog(), progress=silent, journal=journal)

    def run(
        self,
        open_work: Callable[..., AbstractContextManager[RowWork[Any, T]]],
        batches: Sequence[Rows],
        label: str,
        *,
        unit: str = "row",
        **arguments: Any,
    ) -> dict[int, T]:
        """Each row of the batches with its result, of the work that `open_work(scorer, **arguments)` opens.

        The progress counts rows, or all tokens of prompts and responses where the `unit` is `tok`.
        """
        sent = {"replica": self.replica, "spec": WorkSpec(open_work, arguments)}
        spec = WorkSpec(open_replica, sent, self.replica.gpu)
        total = sum(self._amount(batch, unit) for batch in batches)
        results: dict[int, T] = {}
        with (
            open_work(self, **arguments) as work,
            self.progress(label, total=total, unit=unit) as advance,
        ):
            for rows, result in self.executor.map_chunks(batches, work, self.journal, spec, self.log):
                results.update(zip(rows, work.per_row(result), strict=True))
                advance(self._amount(rows, unit))
        return results

    def _amount(self, rows: Rows, unit: str) -> int:
        return sum(len(self.work.rows[row].ids) for row in rows) if unit == "tok" else len(rows)


@contextmanager
def open_replica(replica: Replica, spec: WorkSpec) -> Iterator[RowWork[Any, Any]]:
    """The work that `Scorer.run` was given, in another process."""
    with spec.function(replica.open(), **spec.arguments) as work:
        yield work
