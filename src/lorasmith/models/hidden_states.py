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
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from lorasmith import __version__
from lorasmith.errors import UsageError
from lorasmith.files.digests import digest_folder
from lorasmith.files.journal import Journal, Rows
from lorasmith.machine.resources import require_disk
from lorasmith.models.scorer import Scorer
from lorasmith.models.scoring import Floats, RowWork, open_forward, score_states, unpack_arrays
from lorasmith.models.text import Encoded

Scored = tuple[list[Floats], torch.Tensor]
"""Log-probabilities of the scored tokens of each row of a batch, and the batch's [N, H] hidden states."""


def open_states(path: Path, folders: Sequence[Path], scorer: Scorer) -> Journal:
    """The journal of the hidden states of one model (`folders`: model, adapter) on the scorer's very tokens.

    States that another model, other tokens or batches, another device, arithmetic or version gave are
    dropped. Raises `DiskError` where they would not fit, `UsageError` unless the arithmetic is float32.
    """
    loaded, work, route = scorer.loaded, scorer.work, scorer.route
    if route.dtype != torch.float32:
        raise UsageError(
            f"hidden states in {route.label} are of no use to a comparison",
            expected="auto, mkl or onednn where states are kept",
        )
    settings = work.settings
    key = {
        "folders": [digest_folder(folder) for folder in folders],
        "tokens": work.digest,
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


@contextmanager
def open_scoring(scorer: Scorer, keep: bool) -> Iterator[RowWork[Scored, Floats]]:
    """Score batches of rows; with `keep` their hidden states go into the journal as well."""
    work = scorer.work
    with open_forward(scorer.loaded, work.rows, scorer.route) as forward:

        def score(rows: Rows) -> Scored:
            logprobs, hidden = score_states(forward, work.batch(rows), work.names)
            return logprobs, hidden.cpu() if keep else hidden[:0]

        yield RowWork(
            work.rows,
            forward.device,
            action=score,
            to_arrays=lambda scored: [*scored[0], *([scored[1].numpy()] if keep else [])],
            from_arrays=lambda rows, arrays: (
                [array.astype(np.float32) for array in arrays[: len(rows)]],
                torch.from_numpy(arrays[-1]) if keep else torch.empty(0),
            ),
            per_row=lambda scored: scored[0],
        )


class KeptStates:
    """Reads the hidden states of any rows from a journal that `open_scoring` filled."""

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
        states = []
        for row in rows:
            chunk, start, stop = self._places[row]
            if chunk not in whole:
                whole[chunk] = torch.from_numpy(unpack_arrays(self._journal.read(chunk))[-1])
            states.append(whole[chunk][start:stop])
        return torch.cat(states)
