"""How many verbatim questions the check finds, and how many clean rows it flags, on real questions."""

from __future__ import annotations

from pathlib import Path

import pytest
from benches.contamination import WRAPPINGS, asked, duplicates, flagged, halves, missed, real_rows

from lorasmith.records.dataset import Example
from lorasmith.testset.overlap import words

DATA = Path(__file__).parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="needs the folder of real benchmark rows")


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    return real_rows(DATA, tmp_path_factory.mktemp("recall"), 200)


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_questions_that_stand_in_the_training_data_are_found_in_any_wrapping(
    questions: list[Example], tmp_path: Path, wrapping: str
) -> None:
    lost = missed(tmp_path, questions, WRAPPINGS[wrapping])
    assert len(lost) <= 0.01 * len(questions), sorted(lost)[:5]
    short = {one.id for one in questions if len(words(asked(one)[1])) < 13}
    assert len(short) > 50 and len(lost & short) <= 0.01 * len(short), sorted(lost & short)


def test_other_questions_of_the_same_benchmarks_are_not_flagged(
    questions: list[Example], tmp_path: Path
) -> None:
    """A test set against questions that are not in it: what both share is the benchmark's own wording."""
    rows = wrong = 0
    for seed in (1, 2, 3):
        test, train = halves(questions, seed)
        same = duplicates(test, train)
        hit = flagged(tmp_path, test, train)
        assert same <= hit  # questions that stand in both halves are rightly found
        rows, wrong = rows + len(test) - len(same), wrong + len(hit - same)
    assert wrong <= 0.01 * rows
