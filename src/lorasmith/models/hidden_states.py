"""Hidden states at the scored positions, kept on disk: what a comparison needs of a model it has done with.

[N, H] numbers for a test set are a small part of a model, and all that its head needs. So validation can keep
them for the comparison that follows, and a comparison can hold one model at a time. They lie in a journal,
with the log-probabilities, under a key of everything that decides them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from lorasmith import __version__
from lorasmith.errors import CheckpointError, DataError, UsageError
from lorasmith.files.digests import digest_folder, folder_files
from lorasmith.files.journal import Journal, Rows
from lorasmith.machine.resources import require_disk
from lorasmith.models.device import Route, choose_route, release_memory, resolve_device
from lorasmith.models.forward import TokenForward
from lorasmith.models.load import LoadedModel
from lorasmith.models.scoring import Floats, RowWork, open_forward, score_states, unpack_arrays
from lorasmith.models.session import ScoringOptions, Workload, prepare_workload
from lorasmith.models.text import Encoded

Scored = tuple[list[Floats], torch.Tensor]
"""Log-probabilities of the scored tokens of each row of a batch, and the batch's [N, H] hidden states."""


def open_states(
    path: Path, folders: Sequence[Path], loaded: LoadedModel, work: Workload, route: Route
) -> Journal:
    """The journal of the hidden states of one model (`folders`: model, adapter) on these very tokens.

    States that another model, other tokens or batches, another device, arithmetic or version gave are
    dropped. Raises `DiskError` where they would not fit, `UsageError` unless the arithmetic is float32.
    """
    if route.dtype != torch.float32:
        raise UsageError(
            f"hidden states in {route.label} are of no use to a comparison",
            expected="auto, mkl or onednn where states are kept",
        )
    settings = work.settings
    key = {
        "folders": [digest_folder(folder) for folder in folders],
        "tokens": digest_tokens(work.rows),
        "batches": [settings.layout, settings.batch_tokens, settings.batch_size],
        "place": [route.name, loaded.device.type, torch.get_num_threads()],
        "versions": [__version__, *(version(name) for name in ("torch", "transformers", "peft"))],
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    journal = Journal(path, digest, {})
    done = {row for chunk in journal.chunks() for row in chunk}
    missing = sum(row.scored for index, row in enumerate(work.rows) if index not in done)
    width = int(loaded.model.config.get_text_config().hidden_size)
    try:
        require_disk(path.parent, 4 * missing * width, "keep the hidden states of the scored tokens")
    except BaseException:
        journal.__exit__(None, None, None)
        raise
    return journal


def digest_tokens(rows: Sequence[Encoded]) -> str:
    """Of all tokens and of where scoring begins in each row."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.array([len(row.ids), row.scored_from, *row.ids], dtype="<i8").tobytes())
    return digest.hexdigest()


def scoring_work(forward: TokenForward, work: Workload, *, keep: bool) -> RowWork[Scored]:
    """Score batches of rows; with `keep` their hidden states go into the journal as well."""

    def score(rows: Rows) -> Scored:
        logprobs, hidden = score_states(forward, work.batch(rows), work.names)
        return logprobs, hidden.cpu() if keep else hidden[:0]

    return RowWork(
        work.rows,
        forward.device,
        action=score,
        to_arrays=lambda scored: [*scored[0], *([scored[1].numpy()] if keep else [])],
        from_arrays=lambda rows, arrays: (
            [array.astype(np.float32) for array in arrays[: len(rows)]],
            torch.from_numpy(arrays[-1]) if keep else torch.empty(0),
        ),
    )


class KeptStates:
    """Reads the hidden states of any rows from a journal that `scoring_work` filled."""

    def __init__(self, journal: Journal, rows: Sequence[Encoded]) -> None:
        self._journal = journal
        self._places: dict[int, tuple[Rows, int, int]] = {}
        for chunk in journal.chunks():
            start = 0
            for row in chunk:
                self._places[row] = (chunk, start, start + rows[row].scored)
                start += rows[row].scored

    def __contains__(self, row: int) -> bool:
        return row in self._places

    def of(self, rows: Rows) -> torch.Tensor:
        """[N, H] of these rows, one after the other; KeyError for a row that is not kept."""
        whole: dict[Rows, torch.Tensor] = {}
        found = []
        for row in rows:
            chunk, start, stop = self._places[row]
            if chunk not in whole:
                whole[chunk] = torch.from_numpy(unpack_arrays(self._journal.read(chunk))[-1])
            found.append(whole[chunk][start:stop])
        return torch.cat(found)


# A model of its own for a worker elsewhere: made from what can be sent, not from what is in memory here.


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
        work = prepare_workload(Path(self.test_set), loaded, self.options, route)
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
