"""What is made today is what was made when `expected.json` was written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.golden.comparable import differences
from tests.golden.made import PARTS
from tests.golden.make import EXPECTED


@pytest.mark.parametrize("part", PARTS)
def test_nothing_that_was_made_before_is_lost(part: str, tmp_path: Path) -> None:
    expected = json.loads(EXPECTED.read_text())[part]
    # Through JSON, as the expected values were.
    found = json.loads(json.dumps(PARTS[part](tmp_path)))
    lines = list(differences(expected, found))
    assert not lines, "\n".join(lines[:40])


def test_every_pinned_part_is_still_made() -> None:
    assert json.loads(EXPECTED.read_text()).keys() == PARTS.keys()
