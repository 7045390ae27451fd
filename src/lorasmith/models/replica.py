"""A model of its own for a worker elsewhere: made from what can be sent, not from what is in memory here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from lorasmith.errors import CheckpointError, DataError
from lorasmith.files.digests import folder_files
from lorasmith.models.arithmetic import Route, choose_route, resolve_device
from lorasmith.models.load import LoadedModel
from lorasmith.models.loglik import open_forward
from lorasmith.models.memory import release_memory
from lorasmith.models.session import ScoringOptions, Workload, prepare
from lorasmith.models.states import Scored, digest_tokens, scoring_work
from lorasmith.models.work import RowWork

OPEN_SCORING = "lorasmith.models.replica:open_scoring"
"""Where a worker finds the function below."""


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
    route: str
    """Name of the arithmetic that the caller chose, so that no worker probes for another."""
    files: str
    """Digest of names and sizes in the folders: their contents are not hashed once more by every worker."""
    tokens: str
    """Digest of the rows in tokens."""

    @classmethod
    def of(
        cls,
        work: Workload,
        model: Path,
        adapter: Path | None,
        test_set: Path,
        options: ScoringOptions,
        route: Route,
        tokenizer_from: Path | None = None,
    ) -> Replica:
        """Of what is loaded here; `auto` becomes what it is here, so that no worker takes another device."""
        device = resolve_device(options.device).type
        return cls(
            model=str(model.absolute()),
            adapter=None if adapter is None else str(adapter.absolute()),
            tokenizer_from=None if tokenizer_from is None else str(tokenizer_from.absolute()),
            test_set=str(test_set.absolute()),
            options=replace(options, device=device),
            route=route.name,
            files=files_digest([model] if adapter is None else [model, adapter]),
            tokens=digest_tokens(work.rows),
        )

    @property
    def gpu(self) -> bool:
        """Whether it computes on a GPU."""
        return self.options.device == "cuda"

    def open(self) -> tuple[LoadedModel, Workload, Route]:
        """Load the model, unless this process has it from the last piece of work, and encode the rows.

        Raises `CheckpointError` or `DataError` where the files are not the caller's, and as validation does.
        """
        place, _ = self.options.place()
        route = choose_route(self.route, place)
        require_same_files(self.files, self.model, self.adapter)
        loaded = self._load(route)
        work = prepare(Path(self.test_set), loaded, self.options, route)
        if digest_tokens(work.rows) != self.tokens:
            raise DataError(
                "a worker reads other rows under this path than the command",
                where=self.test_set,
                expected="one storage that all machines see under the same path",
            )
        return loaded, work, route

    def _load(self, route: Route) -> LoadedModel:
        options = self.options
        key = (self.files, self.model, self.adapter, self.tokenizer_from, options.device, options.device_map)
        kept = _kept.get((*key, route.dtype))
        if kept is None:
            _kept.clear()
            release_memory()
            kept = options.load(
                Path(self.model),
                adapter=None if self.adapter is None else Path(self.adapter),
                dtype=route.dtype,
                tokenizer_from=None if self.tokenizer_from is None else Path(self.tokenizer_from),
            )
            _kept[*key, route.dtype] = kept
        return kept


_kept: dict[object, LoadedModel] = {}
"""The model of a worker's last piece of work: the next one may be about the same."""


def files_digest(folders: list[Path]) -> str:
    """Of the names and sizes of all files in these folders."""
    found = [
        [[file.relative_to(folder).as_posix(), file.stat().st_size] for file in folder_files(folder)]
        for folder in folders
    ]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def require_same_files(digest: str, model: str, adapter: str | None) -> None:
    """Raise `CheckpointError` unless a worker's folders have the `files_digest` of the caller's."""
    if files_digest([Path(folder) for folder in (model, adapter) if folder is not None]) != digest:
        raise CheckpointError(
            "a worker finds other files under this path than the command",
            where=model if adapter is None else f"{model}, {adapter}",
            expected="one storage that all machines see under the same path",
        )


@contextmanager
def open_scoring(replica: Replica, keep: bool) -> Iterator[RowWork[Scored]]:
    """The work of scoring, as the caller's own process would do it; `keep` sends hidden states as well."""
    loaded, work, route = replica.open()
    with open_forward(loaded, work.rows, route) as forward:
        yield scoring_work(forward, work, keep=keep)
