"""One row in every kind of file; hostile files cost no memory and are one message."""

from __future__ import annotations

import csv
import gzip
import io
import json
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from lorasmith.data.files import raw_rows
from lorasmith.data.rows import read_rows
from lorasmith.data.sources import folder_files, parse_columns, prepare
from lorasmith.errors import DataError, UsageError
from lorasmith.followup.responses.rows import read_prompts

ROWS: list[dict[str, Any]] = [
    {"id": "a", "prompt": 'He said "no",\nand left', "response": "yes, he did"},
    {"id": "b", "prompt": "Größe?", "response": '["a", "b"]'},
]


def as_csv(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return ("\ufeff" + text.getvalue()).encode()


def as_arrow(rows: list[dict[str, Any]], *, stream: bool) -> bytes:
    table, sink = pa.Table.from_pylist(rows), io.BytesIO()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
KINDS: dict[str, bytes] = {
    "lines": LINES,
    "a list": json.dumps(ROWS, indent=2).encode(),
    "csv": as_csv(ROWS),
    "parquet": as_parquet(ROWS),
    "arrow": as_arrow(ROWS, stream=False),
    "arrow stream": as_arrow(ROWS, stream=True),
}
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "as it is": lambda raw: raw,
    "gzip": lambda raw: gzip.compress(raw, mtime=0),
    "zstd": zstandard.compress,
    "two frames of zstd": lambda raw: zstandard.compress(raw[:20]) + zstandard.compress(raw[20:]),
}


@pytest.mark.parametrize("packed", PACKED.values(), ids=PACKED.keys())
@pytest.mark.parametrize("raw", KINDS.values(), ids=KINDS.keys())
def test_rows_are_the_same_in_every_kind_of_file_whatever_it_is_called(
    tmp_path: Path, raw: bytes, packed: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(packed(raw))
    assert [row for _, row in raw_rows(path)] == ROWS


def test_tabs_and_tables_of_messages_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_bytes(as_csv(ROWS, "\t"))
    assert [row for _, row in raw_rows(path)] == ROWS
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.with_suffix(".csv").write_bytes(as_csv([{"messages": json.dumps(messages)}]))
    assert read_rows(path.with_suffix(".csv")).examples[0].response == "b"


def test_what_a_table_fills_in_is_no_value(tmp_path: Path) -> None:
    """Structs of Arrow have all fields of all rows; NaN stands for a missing cell."""
    rows = [{"m": [{"call": {"x": 1}}, {"call": {"y": 2.5}}], "n": None}, {"m": [], "n": float("nan")}]
    path = tmp_path / "rows.parquet"
    path.write_bytes(as_parquet(rows))
    assert [row for _, row in raw_rows(path)] == [
        {"m": [{"call": {"x": 1}}, {"call": {"y": 2.5}}]},
        {"m": []},
    ]


DAMAGED: dict[str, tuple[bytes, str]] = {
    "parquet cut off": (as_parquet(ROWS)[:-40], "Parquet file is damaged"),
    "gzip cut off": (gzip.compress(LINES * 500, mtime=0)[:60], "cut off"),
    "zstd cut off": (zstandard.compress(LINES * 500)[:40], "cut off"),
    "behind the list": (b'[{"a": 1}] {"b": 2}', "behind the end of the list"),
    "no comma": (b'[{"a": 1} {"b": 2}]', "a comma or \\] should"),
    "a list that is not closed": (b'[{"a": 1},', "not closed"),
    "a list of numbers": (b"[1, 2]", "a JSON int"),
    "NaN": (b'{"a": NaN}', "not JSON"),
    "not UTF-8": (b'{"a": "\xff"}', "not UTF-8"),
    "a web page": (b"<html><body>404</body></html>", "web page"),
    "nothing": (b" \n", "no rows"),
    "a ragged table": (b"a,b\n1,2\n1,2,3\n", "3 cells"),
    "one column twice": (b"a,a\n1,2\n", "one name"),
}


@pytest.mark.parametrize(("raw", "told"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_file_is_one_message(tmp_path: Path, raw: bytes, told: str) -> None:
    path = tmp_path / "data"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=told) as caught:
        list(raw_rows(path))
    assert str(path) in str(caught.value)


BOMBS = {
    "a line": b'{"prompt": "' + b"a" * (1 << 28),
    "a list": b'[{"prompt": "' + b"a" * (1 << 28),
    "a row of a table": b"prompt,response\n" + b"a" * (1 << 28),
    "a cell": b'prompt,response\n"' + b"a\n" * (1 << 27),
}


@pytest.mark.parametrize("raw", BOMBS.values(), ids=BOMBS.keys())
def test_a_small_archive_of_a_huge_row_is_refused_in_bounded_memory(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "bomb.zst"
    path.write_bytes(zstandard.compress(raw))
    code = (
        "import resource, sys; from pathlib import Path; from lorasmith.data.files import raw_rows\n"
        "from lorasmith.errors import DataError\n"
        "import pyarrow\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    list(raw_rows(Path(sys.argv[1])))\nexcept DataError as error:\n    print(error.found)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    found, grown = done.stdout.splitlines()
    assert "longer than" in found or "field larger" in found
    assert int(grown) < 700_000  # KiB; the row alone is 256 MiB, and JSON would make several copies of it


def test_a_folder_of_files_is_one_set_with_ids_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    for name in ("one", "two"):
        (folder / name).mkdir(parents=True)
        (folder / name / "a.jsonl").write_text(json.dumps({"prompt": name, "response": "b"}) + "\n")
    (folder / "README.md").write_text("about it")
    ready = prepare(folder)
    assert [(row.id, row.prompt) for row in read_rows(ready).examples] == [
        ("one/a.jsonl:1", "one"),
        ("two/a.jsonl:1", "two"),
    ]
    assert prepare(folder) == ready
    (folder / "train-0.jsonl").write_text("{}")
    (folder / "test-0.jsonl").write_text("{}")
    with pytest.raises(DataError, match="several splits: test, train"):
        folder_files(folder)


def test_what_was_set_aside_is_told_of_the_copy(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"q": "a", "r": "b"}) + "\n" + json.dumps({"q": "", "r": "b"}) + "\n")
    ready = prepare(path, columns=parse_columns(("prompt=q,response=r",)), skip=True)
    assert ready != path and len(read_rows(ready).examples) == 1
    assert [one.code for one in read_rows(ready).findings] == ["rows-set-aside"]


@pytest.mark.parametrize("given", ["prompt", "prompt=a", "prompt=a,prompt=b", "answer=a,prompt=b"])
def test_columns_that_say_nothing_are_refused(given: str) -> None:
    with pytest.raises(UsageError, match="--columns"):
        parse_columns((given,))


def test_the_hubs_data_sets_are_read_through_their_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}])
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["train", "test"])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: made)
    with pytest.raises(UsageError, match="splits train, test"):
        prepare("some/set")
    ready = prepare("some/set:train")
    assert read_rows(ready).examples[0].response == "b"


def test_a_path_that_leads_to_nothing_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        prepare(tmp_path / "rows.jsonl")


def test_a_table_between_semicolons_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt;response\n"how much; in euros";1,5\n')
    (one,) = read_rows(path).examples
    assert (one.prompt, one.response) == ("how much; in euros", "1,5")


def test_a_column_that_nobody_reads_may_hold_what_cannot_be_read(tmp_path: Path) -> None:
    far = pa.array([1 << 40, 1], type=pa.timestamp("s"))
    table = pa.table({"prompt": ["a", "b"], "response": ["c", "d"], "asked_at": far})
    pq.write_table(table, tmp_path / "rows.parquet")
    read = read_rows(tmp_path / "rows.parquet")
    assert [one.prompt for one in read.examples] == ["a", "b"]
    assert "asked_at" in next(one.message for one in read.findings if one.code == "fields-not-read")
    table = table.rename_columns(["other", "response", "prompt"])
    pq.write_table(table, tmp_path / "used.parquet")
    with pytest.raises(DataError, match="the field 'prompt' cannot be read"):
        read_rows(tmp_path / "used.parquet")


def test_a_missing_answer_of_a_table_is_told_as_such(tmp_path: Path) -> None:
    answers = pa.array([1.0, float("nan")])
    pq.write_table(pa.table({"prompt": ["a", "b"], "response": answers}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="the field 'response' is empty") as error:
        read_rows(tmp_path / "rows.parquet")
    assert str(error.value.where).endswith(":2")


def test_a_data_set_that_datasets_saved_is_read_as_a_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [
        {"messages": [{"role": "user", "content": f"a{n}"}, {"role": "assistant", "content": "b"}]}
        for n in range(5)
    ]
    made = datasets.Dataset.from_list(rows)
    made.save_to_disk(tmp_path / "one", num_shards=2)
    assert [one.prompt for one in read_rows(prepare(tmp_path / "one")).examples] == [
        f"a{n}" for n in range(5)
    ]
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match="several splits: test, train"):
        prepare(tmp_path / "two")
    assert len(read_rows(prepare(tmp_path / "two" / "test")).examples) == 5


def test_times_decimals_and_bytes_of_a_table_become_what_json_can_hold(tmp_path: Path) -> None:
    table = pa.table(
        {
            "prompt": pa.array([b"a"]),
            "response": pa.array([Decimal("1.50")]),
            "at": pa.array([0], type=pa.timestamp("s")),
            "raw": pa.array([b"\xff"]),
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    ((_, row),) = raw_rows(tmp_path / "rows.parquet")
    assert row["at"] == "1970-01-01 00:00:00"
    assert json.loads(json.dumps(row))["response"] == "1.50"
    (one,) = read_rows(tmp_path / "rows.parquet").examples
    assert (one.prompt, one.response) == ("a", "1.50")
    (asked,) = read_prompts(tmp_path / "rows.parquet")
    assert asked.value["at"] == row["at"]
