"""What validation and comparison have in common: options, the encoded test set, settings, identities."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorasmith import __version__
from lorasmith.data.rows import read_rows
from lorasmith.errors import DataError, InputError, UsageError, os_errors
from lorasmith.files.digests import digest_folder, sha256_file
from lorasmith.files.journal import Journal
from lorasmith.models.batches import BATCH_TOKENS, BATCH_TOKENS_GPU, Batch
from lorasmith.models.chat_template import use_template
from lorasmith.models.conversation import Wording
from lorasmith.models.device import Route, choose_route, resolve_device
from lorasmith.models.layout import LAYOUTS, choose_layout, lay_out, layout_findings, plan_rows
from lorasmith.models.load import LoadedModel, load_model
from lorasmith.models.scoring import check_ids
from lorasmith.models.text import Encoded, EncodedSet, encode_examples, encoding_findings
from lorasmith.options import BatchOptions, SampleOptions, ScoringOptions
from lorasmith.records.base import FileDigest, Finding
from lorasmith.records.dataset import Example
from lorasmith.records.scoring import ModelIdentity, ScoringSettings

# What a figure is about: model, adapter and test set by their digests, taken before they are read.


@dataclass(frozen=True)
class Inputs:
    """Folders and test set of one piece of work."""

    folders: tuple[Path, ...]
    """Model, and adapter or merged model where there is one."""
    test_set: Path
    digests: tuple[str, ...]
    """Digest of each folder."""
    file: FileDigest
    """Name, size and digest of the test set."""

    @classmethod
    def of(cls, folders: Sequence[Path], test_set: Path) -> Inputs:
        """As they are now; raises `InputError` for what is not there."""
        file = describe_test_set(test_set)
        return cls(tuple(folders), test_set, tuple(digest_folder(folder) for folder in folders), file)

    def require_unchanged(self) -> None:
        """Raise `InputError` where something has changed since.

        To be called once everything is read: a record names what it was made from by these digests.
        """
        after = Inputs.of(self.folders, self.test_set)
        before, now = (*self.digests, self.file.sha256), (*after.digests, after.file.sha256)
        for path, one, two in zip((*self.folders, self.test_set), before, now, strict=True):
            if one != two:
                raise InputError(
                    "it changed while it was read",
                    where=path,
                    expected="inputs that nothing writes to",
                    remedy="give the same command again when the file is complete",
                )


def describe_test_set(test_set: Path) -> FileDigest:
    """Name, size and digest of the file, without its folder."""
    with os_errors(test_set, "read"):
        if not test_set.is_file():
            raise DataError("the test set is not a file", where=test_set, expected="a .jsonl file")
        size = test_set.stat().st_size
    return FileDigest(path=test_set.name, bytes=size, sha256=sha256_file(test_set))


_NO_LIMIT = 1 << 30
"""Length limit, in tokens, of a model whose config names none."""


def resolve_place(options: BatchOptions) -> tuple[torch.device, Route]:
    """Device and arithmetic, resolved; raises `UsageError` for what there is not."""
    device = resolve_device(options.device)
    return device, choose_route(options.arithmetic, device)


def load_for(
    options: BatchOptions,
    folder: Path,
    *,
    adapter: Path | None = None,
    dtype: torch.dtype = torch.float32,
    tokenizer_from: Path | None = None,
) -> LoadedModel:
    """`load_model` on the device, or spread by the device map, that was chosen.

    A tokenizer that the options name goes before `tokenizer_from`.
    """
    loaded = load_model(
        folder,
        adapter=adapter,
        device=resolve_place(options)[0],
        dtype=dtype,
        tokenizer_from=options.tokenizer or tokenizer_from,
        device_map=options.device_map,
    )
    use_template(loaded.tokenizer, options.chat_template)
    return loaded


@dataclass(frozen=True)
class Workload:
    """A test set ready for a model."""

    examples: list[Example]
    encoded: EncodedSet
    settings: ScoringSettings
    partial: bool
    """True when `limit` left rows out."""
    findings: list[Finding]

    @property
    def rows(self) -> list[Encoded]:
        """The examples in tokens."""
        return self.encoded.rows

    @property
    def names(self) -> list[str]:
        """The examples' ids."""
        return [example.id for example in self.examples]

    @property
    def tokens(self) -> int:
        """Prompt and response tokens of all rows."""
        return sum(len(row.ids) for row in self.rows)

    @property
    def digest(self) -> str:
        """Digest of all tokens and of where scoring begins in each row."""
        digest = hashlib.sha256()
        for row in self.rows:
            # A row of one answer counts by where that begins; one of several by where each begins and ends.
            single = len(row.spans) == 1 and row.spans[0][1] == len(row.ids)
            where = row.spans[0][:1] if single else [end for span in row.spans for end in span]
            digest.update(np.array([len(row.ids), *where, *row.ids], dtype="<i8").tobytes())
        return digest.hexdigest()

    def batches(self) -> list[tuple[int, ...]]:
        """Row indices of each batch."""
        return self.plan(self.rows)

    def plan(self, rows: Sequence[Encoded]) -> list[tuple[int, ...]]:
        """Batches of other rows, in the same layout and of the same size."""
        settings = self.settings
        return plan_rows(rows, settings.layout, settings.batch_tokens, settings.batch_size)

    def batch(self, rows: Sequence[int]) -> Batch:
        """The tensors of a batch."""
        return lay_out(rows, self.rows, self.settings.layout)


def prepare_workload(
    test_set: Path, loaded: LoadedModel, options: ScoringOptions, route: Route, *, questions: bool = False
) -> Workload:
    """Read and encode a test set for a model; raises `DataError` for rows that cannot be scored.

    Rows without a reference answer have no loss and are left out, unless all that is wanted are `questions`.
    """
    read = read_rows(test_set)
    rows = read.examples
    everything = [example for example in rows if questions or example.has_reference]
    if not everything:
        raise DataError(
            "no row has a reference answer, of which a loss could be computed",
            where=test_set,
            remedy="add rows that have one; `lorasmith validate --tasks` asks these",
        )
    examples = take_rows(everything, options)
    context = loaded.context or _NO_LIMIT
    if options.max_length is not None and options.max_length > context:
        raise UsageError(
            f"the model was made for {context:,} tokens, not {options.max_length:,}",
            remedy=f"give --max-length {context} or less",
        )
    encoded = encode_for(options, examples, loaded)
    check_ids(encoded.rows, [example.id for example in examples], loaded.vocabulary)
    layout, reason = choose_layout(loaded, encoded.rows, route)
    default_budget = BATCH_TOKENS if loaded.device.type == "cpu" else BATCH_TOKENS_GPU
    settings = ScoringSettings(
        loss_on=options.loss_on,
        boundary=options.boundary,
        template=encoded.template,
        system=options.system,
        template_args=options.template_args,
        end_of_turn=options.end_of_turn,
        max_length=encoded.max_length,
        arithmetic=route.label,
        device=loaded.device.type,
        device_map=options.device_map,
        layout=layout,
        batch_tokens=options.batch_tokens or default_budget,
        batch_size=options.batch_size,
        limit=options.limit,
        shuffle_seed=options.shuffle_seed,
        seed=options.seed,
    )
    names = [example.id for example in examples]
    findings = [
        *read.findings,
        *_without_reference(len(rows) - len(everything)),
        *_other_tokenizer(options.tokenizer),
        *layout_findings(reason),
        *encoding_findings(encoded, names, loaded.context),
    ]
    return Workload(examples, encoded, settings, len(examples) < len(everything), findings)


def encode_for(options: ScoringOptions, examples: Sequence[Example], loaded: LoadedModel) -> EncodedSet:
    """The examples in tokens, as the options say; raises `DataError` for rows that cannot be scored."""
    return encode_examples(
        examples,
        loaded.tokenizer,
        template=options.template,
        end_of_turn=options.end_of_turn,
        max_length=options.max_length or loaded.context or _NO_LIMIT,
        loss_on=options.loss_on,
        boundary=options.boundary,
        wording=Wording.of(options),
        strict=options.strict,
    )


def _other_tokenizer(folder: Path | None) -> list[Finding]:
    if folder is None:
        return []
    told = f"the rows are encoded by the tokenizer and the chat template of {folder.name}"
    return [Finding(severity="note", code="other-tokenizer", message=told)]


def _without_reference(count: int) -> list[Finding]:
    if not count:
        return []
    message = f"{count} rows have no reference answer: they are asked with --tasks, and have no loss"
    return [Finding(severity="note", code="no-reference", message=message)]


def take_rows(examples: list[Example], options: SampleOptions) -> list[Example]:
    """Those that `limit` leaves: the first, or a choice by `shuffle_seed`; in the order of the file."""
    if options.limit is None or options.limit >= len(examples):
        return examples
    if options.shuffle_seed is None:
        return examples[: options.limit]
    chosen = np.random.default_rng(options.shuffle_seed).permutation(len(examples))[: options.limit]
    return [examples[index] for index in sorted(chosen)]


def identify(role: str, folder: Path, adapter: Path | None, loaded: LoadedModel) -> ModelIdentity:
    """Which model it is: by the digests of its folders."""
    return ModelIdentity(
        role=role,
        model_sha256=digest_folder(folder),
        adapter_sha256=None if adapter is None else digest_folder(adapter),
        architecture=loaded.architecture,
        parameters=loaded.parameters,
    )


def open_journal(
    path: Path | None, inputs: Inputs, options: ScoringOptions, **also: Any
) -> AbstractContextManager[Journal | None]:
    """The journal of one piece of work, nothing for no path.

    Its results count only for the same inputs, options, device and versions, and what `also` names. The route
    of the arithmetic is kept with them: probing again might choose another, and give other last digits.
    """
    if path is None:
        return nullcontext()
    device, route = resolve_place(options)
    versions = [__version__, *(version(name) for name in ("torch", "transformers", "peft"))]
    key = {
        "folders": inputs.digests,
        "test_set": inputs.file.sha256,
        "options": {**options.model_dump(mode="json"), "device": device.type, **also},
        "layouts": LAYOUTS,
        "versions": versions,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return Journal(path, digest, {"route": route.name})


def route_of(options: ScoringOptions, journal: Journal | None) -> Route:
    """The route of interrupted work, else the one that the options choose."""
    device, route = resolve_place(options)
    return choose_route(str(journal.notes["route"]), device) if journal else route
