"""What the tests of the steps after a release share; nothing of it is to be changed by a test."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorasmith.files.jsonl import write_rows
from lorasmith.followup.compression.compress import compress
from lorasmith.followup.drafts.draft import train_draft
from lorasmith.options import CompressOptions
from lorasmith.proving.behaviour.compare import compare_pair
from tests.followup.compressing import LOOSE, TINY
from tests.followup.drafting import SETTINGS, write_responses
from tests.followup.responding import COUNT, write
from tests.tiny import save_adapter, save_base, tiny_rows


@pytest.fixture(scope="session")
def answering(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, an `adapter` of it, and `data.jsonl` of `COUNT` rows."""
    folder = tmp_path_factory.mktemp("respond")
    save_base(folder / "base", dtype=torch.float32)
    save_adapter(folder / "adapter", folder / "base")
    write(folder / "data.jsonl", tiny_rows(COUNT))
    return folder


@pytest.fixture(scope="session")
def drafted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`target` of four layers, `responses.jsonl` with stored probabilities, `draft` of two of the layers."""
    folder = tmp_path_factory.mktemp("draft")
    save_base(folder / "target", num_hidden_layers=4, dtype=torch.float32)
    write_responses(folder, 60)
    train_draft(
        folder / "target", folder / "responses.jsonl", folder / "draft", layers=[0, 3], options=SETTINGS
    )
    return folder


@pytest.fixture(scope="session")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `rows.jsonl`, and `int4`: rounded to nearest, measured."""
    folder = tmp_path_factory.mktemp("compress")
    save_base(folder / "base", **TINY)
    write_rows(folder / "rows.jsonl", tiny_rows(24))
    options = CompressOptions(test_set=folder / "rows.jsonl", **LOOSE)
    compress(folder / "base", folder / "int4", options=options, compare=compare_pair)
    return folder
