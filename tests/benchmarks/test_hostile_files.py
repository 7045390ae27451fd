"""Whatever lies in a benchmark file: one of our errors or findings, never a traceback, in bounded memory."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorasmith.benchmarks.discover import read_folder, read_table
from lorasmith.benchmarks.registry import BENCHMARKS
from lorasmith.errors import DataError

NAMES = ["math.jsonl", "math.json", "math.csv", "math.parquet", "drop.jsonl.gz", "mmlu/test/anatomy_test.csv"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
KEYS = [
    "problem solution level type",
    "problem solution answer subject level unique_id",
    "question choices answer",
    "question A B C D answer",
    "passage question answers",
    "passage question answers_spans",
    "passage question answer validated_answers query_id",
    "context completion ref_text",
    "task_id prompt entry_point canonical_solution test",
    "id prompt response metadata",
]
"""The fields of each layout: with them, rows get as far as the readers."""
GPQA = ("Question", "Correct Answer", *(f"Incorrect Answer {k}" for k in (1, 2, 3)), "Record ID")
SHAPED = st.sampled_from([*(tuple(keys.split()) for keys in KEYS), GPQA]).flatmap(
    lambda keys: st.fixed_dictionaries(dict.fromkeys(keys, VALUES))
)


def findings_of(path: Path, root: Path) -> list[str]:
    found = read_folder(root, BENCHMARKS, BENCHMARKS, seed=1)
    return [finding.code for finding in found.findings]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(name=st.sampled_from(NAMES), content=st.binary(max_size=400), packed=st.booleans())
def test_any_bytes_give_findings_alone(tmp_path: Path, name: str, content: bytes, packed: bool) -> None:
    root = tmp_path / "in"
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in root.rglob("*.*"):
        if old.is_file():
            old.unlink()
    path.write_bytes(gzip.compress(content) if packed else content)
    assert findings_of(path, root)


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=st.lists(SHAPED, min_size=1, max_size=4), lines=st.booleans())
def test_any_json_rows_give_items_findings_or_rejections(
    tmp_path: Path, rows: list[dict[str, object]], lines: bool
) -> None:
    root = tmp_path / "in"
    root.mkdir(exist_ok=True)
    path = root / ("rows.jsonl" if lines else "rows.json")
    (root / ("rows.json" if lines else "rows.jsonl")).unlink(missing_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows)
    path.write_text(text)
    found = read_folder(root, BENCHMARKS, BENCHMARKS, seed=1)
    total = sum(len(candidates) for candidates in found.candidates.values())
    assert total or found.findings
    for candidates in found.candidates.values():
        for candidate in candidates:
            assert candidate.item.prompt.strip() and candidate.item.response.strip()


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_line_without_end_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("files.jsonl.MAX_LINE_BYTES", "benchmarks.discover.MAX_LINE_BYTES"):
        monkeypatch.setattr(f"lorasmith.{module}", 1 << 16)
    monkeypatch.setattr("lorasmith.benchmarks.discover.MAX_DOCUMENT_BYTES", 1 << 17)
    (tmp_path / name).write_bytes(b'{"a": "' + b"x" * (1 << 18))
    with pytest.raises(DataError, match=r"longer than|larger than|is not JSON"):
        list(read_table(tmp_path / name, name, lambda document: None))


def test_a_gigabyte_of_zeros_in_a_small_archive_does_not_fill_the_memory(tmp_path: Path) -> None:
    import tracemalloc

    with gzip.open(tmp_path / "math.jsonl.gz", "wb", compresslevel=1) as handle:
        handle.write(b'{"problem": "')
        for _ in range(128):
            handle.write(b"a" * (1 << 20))
    tracemalloc.start()
    assert findings_of(tmp_path / "math.jsonl.gz", tmp_path) == ["unreadable"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # One line of 64 MiB is read at most, and copied once while it grows.
    assert peak < 200 << 20


@pytest.mark.parametrize("bad", [r'"\ud800"', "NaN", "Infinity"])
def test_what_could_not_be_written_again_is_refused_when_read(tmp_path: Path, bad: str) -> None:
    for name in ("rows.json", "rows.jsonl"):
        (tmp_path / name).write_text(
            f'{{"problem": {bad}}}' if name.endswith("l") else f'[{{"problem": {bad}}}]'
        )
        with pytest.raises(DataError):
            list(read_table(tmp_path / name, name, lambda document: None))


def test_a_broken_quote_ends_at_a_field_and_not_at_the_end_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "anatomy_test.csv"
    path.write_text('"What, is it?,a,b,c,d,A\n' + "more,a,b,c,d,B\n" * 20_000)
    with pytest.raises(DataError, match="CSV is damaged"):
        list(read_table(path, path.name, lambda document: None))


def test_folders_and_hidden_files_are_no_tables(tmp_path: Path) -> None:
    (tmp_path / "math.jsonl").mkdir()
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "math.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="no benchmark files"):
        read_folder(tmp_path, BENCHMARKS, BENCHMARKS, seed=1)
