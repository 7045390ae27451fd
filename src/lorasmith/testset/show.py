"""What is in a file of rows, and what a model sees of it: for people who look why a loss is what it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasmith.data.rows import Reading, Row, Tally, findings_of, iterate_rows
from lorasmith.data.sources import parse_columns, source_files
from lorasmith.errors import DataError
from lorasmith.files.atomic import StrPath
from lorasmith.options import ShowOptions
from lorasmith.options.keywords import documented
from lorasmith.progress import Progress, silent
from lorasmith.records.dataset import DataRecord, Example, ShownRow, TokenCounts

if TYPE_CHECKING:
    from lorasmith.models.text import Encoded

FAULTS = 20
"""Rows that cannot be used are named up to so many."""


@documented(ShowOptions)
def show(
    data: StrPath,
    *,
    model: StrPath | None = None,
    adapter: StrPath | None = None,
    options: ShowOptions | None = None,
    progress: Progress = silent,
    **given: Any,
) -> DataRecord:
    """Read all rows of a file, a folder or a data set of the hub; none but those that are shown is held.

    With a `model`, whose tokenizer is all that is loaded, rows are counted in tokens and shown as it sees
    them. Rows that cannot be used are counted and named. Raises `DataError` for a file that cannot be read.
    """
    asked = ShowOptions.given(options, given)
    files = source_files(data)
    reading = Reading(parse_columns(asked.columns))
    encoder = None
    if model is not None:
        encoder = _Encoder.load(Path(model), None if adapter is None else Path(adapter), asked, progress)
    seen = _Seen(files, asked, encoder)
    with progress("Read rows", total=sum(file.stat().st_size for file in files), unit="B") as advance:
        for file in files:
            for row in iterate_rows(file, reading, advance):
                seen.take(row, file, reading)
    return seen.record()


@dataclass
class _Seen:
    """What the rows so far have shown."""

    files: list[Path]
    asked: ShowOptions
    encoder: _Encoder | None
    tally: Tally = field(default_factory=Tally)
    faults: list[tuple[str, str]] = field(default_factory=list)
    unusable: int = 0
    answers: Counter[int] = field(default_factory=Counter)
    system_prompts: int = 0
    tools: int = 0
    characters: int = 0
    shown: list[ShownRow] = field(default_factory=list)

    def take(self, row: Row, file: Path, reading: Reading) -> None:
        """Count a row, and show it if few were shown."""
        before = len(self.tally.faults)
        example = self.tally.admit(row, file, reading, skip=True)
        place = f"{file.name}:{row.number}"
        if example is None:
            self._fault(place, self.tally.faults[before][1])
            return
        encoded = None
        if self.encoder is not None:
            try:
                encoded = self.encoder.take(example)
            except DataError as error:
                self._fault(place, error.found)
                return
        roles = [turn.role for turn in example.turns] if not example.is_text else ["text"]
        self.answers[roles.count("assistant")] += 1
        self.system_prompts += roles[0] in ("system", "developer")
        self.tools += bool(example.tools)
        self.characters += len(example.prompt) + len(example.response)
        if len(self.shown) < self.asked.rows:
            self.shown.append(
                ShownRow(
                    id=example.id,
                    place=place,
                    layout=row.layout,
                    turns=roles,
                    pieces=_read_pieces(example) if encoded is None else self._model_pieces(encoded),
                    tokens=None if encoded is None else len(encoded.ids),
                    scored=None if encoded is None else encoded.scored,
                )
            )

    def _fault(self, place: str, reason: str) -> None:
        self.unusable += 1
        if len(self.faults) < FAULTS:
            self.faults.append((place, reason))

    def _model_pieces(self, encoded: Encoded) -> list[tuple[str, bool]]:
        assert self.encoder is not None
        return list(model_pieces(encoded, self.encoder.tokenizer))

    def record(self) -> DataRecord:
        """All of it."""
        self.tally.faults.clear()  # named in the record itself
        return DataRecord(
            files=[file.name for file in self.files],
            rows=sum(self.answers.values()),
            layouts=dict(self.tally.layouts),
            answers={str(count): rows for count, rows in sorted(self.answers.items())},
            system_prompts=self.system_prompts,
            tools=self.tools,
            characters=self.characters,
            tokens=None if self.encoder is None else self.encoder.counts(self.asked.max_length),
            faults=self.faults,
            unusable=self.unusable,
            shown=self.shown,
            findings=findings_of(self.tally, self.files[0]),
        )


def _read_pieces(example: Example) -> list[tuple[str, bool]]:
    """A row as people read it; which tokens are scored is not known without a tokenizer."""
    return [(f"{example.prompt}\n", False), (example.response, False)]


def model_pieces(encoded: Encoded, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """A row as the model sees it, special tokens included, cut where the scoring begins and ends."""
    at = 0
    for start, stop in encoded.spans:
        if at < start:
            yield tokenizer.decode(encoded.ids[at:start]), False
        yield tokenizer.decode(encoded.ids[start:stop]), True
        at = stop
    if at < len(encoded.ids):
        yield tokenizer.decode(encoded.ids[at:]), False


@dataclass
class _Encoder:
    """Makes tokens of rows, and keeps their lengths."""

    tokenizer: Any
    manner: Any
    """`models.text.Manner`."""
    name: str
    lengths: list[int] = field(default_factory=list)
    scored: int = 0
    straddling: int = 0

    @classmethod
    def load(cls, model: Path, adapter: Path | None, asked: ShowOptions, progress: Progress) -> _Encoder:
        """The tokenizer of a model, or of an adapter that brings its own."""
        from lorasmith.hub.models import local_model
        from lorasmith.models.chat_template import use_template
        from lorasmith.models.conversation import Wording
        from lorasmith.models.load import has_tokenizer, load_tokenizer, quiet_libraries
        from lorasmith.models.text import Manner, frame

        folder = asked.tokenizer or local_model(model, [], progress=progress)
        own = adapter if asked.tokenizer is None else None
        with quiet_libraries():
            tokenizer = load_tokenizer(folder, adapter=own)
        use_template(tokenizer, asked.chat_template)
        around = frame(tokenizer, asked.template, end_of_turn=asked.end_of_turn)
        manner = Manner(around, asked.loss_on, asked.boundary, Wording.of(asked))
        name = own.name if own is not None and has_tokenizer(own) else folder.name
        return cls(tokenizer, manner, name)

    def take(self, example: Example) -> Encoded:
        """A row in tokens; raises `DataError` where it cannot be laid out."""
        from lorasmith.models.text import encode_example

        encoded = encode_example(example, self.tokenizer, self.manner)
        self.lengths.append(len(encoded.ids))
        self.scored += encoded.scored
        self.straddling += encoded.straddling
        return encoded

    def counts(self, max_length: int | None) -> TokenCounts | None:
        """The lengths together; None where there are no rows."""
        if not self.lengths:
            return None
        lengths = np.sort(np.array(self.lengths))
        return TokenCounts(
            tokenizer=self.name,
            template=self.manner.around.template,
            boundary=self.manner.boundary,
            loss_on=self.manner.loss_on,
            total=int(lengths.sum()),
            scored=self.scored,
            shortest=int(lengths[0]),
            median=int(lengths[len(lengths) // 2]),
            most_are_below=int(np.quantile(lengths, 0.95, method="higher")),
            longest=int(lengths[-1]),
            straddling=self.straddling,
            too_long=None if max_length is None else int((lengths > max_length).sum()),
        )
