"""Hidden rows: whoever has the source can show which rows were used, and gets the whole test set back."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorasmith.errors import DamageError, DataError
from lorasmith.files.jsonl import write_examples
from lorasmith.packaging.pack import pack
from lorasmith.packaging.unpack import rejoin, unpack
from tests.samples import sample_examples, sample_run

ROWS = sample_examples(15)
GPQA = [row for row in ROWS if row.metadata.source == "GPQA"]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unpacked package."""
    folder = tmp_path_factory.mktemp("rejoin")
    pack(sample_run(folder / "run", rows=ROWS), folder / "package")
    unpack([folder / "package"], folder / "out")
    return folder / "out"


def test_the_whole_test_set_comes_back_to_the_byte(unpacked: Path, tmp_path: Path) -> None:
    write_examples(tmp_path / "whole.jsonl", rejoin(unpacked, GPQA))
    original = unpacked.parent / "run" / "testset" / "test_set.jsonl"
    assert (tmp_path / "whole.jsonl").read_bytes() == original.read_bytes()
    assert rejoin(unpacked / "validation_results", ROWS) == ROWS


def test_another_text_is_not_taken_for_it(unpacked: Path) -> None:
    other = GPQA[1].model_copy(update={"response": GPQA[1].response + " "})
    with pytest.raises(DamageError, match=GPQA[1].id):
        rejoin(unpacked, [GPQA[0], other, *GPQA[2:]])


def test_a_row_that_is_missing_is_named(unpacked: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=GPQA[0].id):
        rejoin(unpacked, GPQA[1:])
    with pytest.raises(DataError, match="no test set"):
        rejoin(tmp_path, GPQA)
