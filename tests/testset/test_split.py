"""The hold-out: exact size, strata, the training file untouched unless told, and nothing lost on the way."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lorasmith.data.rows import read_examples
from lorasmith.errors import DataError, InputError, UsageError
from lorasmith.testset import split as module
from lorasmith.testset.split import split


def row(number: int, **changes: Any) -> dict[str, Any]:
    made = {
        "prompt": f"question number {number}",
        "response": f"answer {number}",
        "difficulty": ("easy", "medium", "hard")[number % 3],
        "domain": ("math", "code")[number % 2],
    }
    return made | changes


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(made) + "\n" for made in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def prompts(path: Path) -> set[str]:
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return {json.loads(line)["prompt"] for line in raw.splitlines()}


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return write(tmp_path / "train.jsonl", [row(number) for number in range(600)])


def test_exactly_the_size_stratified_and_the_training_file_untouched(train: Path, tmp_path: Path) -> None:
    before = (train.read_bytes(), train.stat().st_mtime_ns)
    record = split(train, tmp_path / "out" / "test.jsonl", size=200)
    examples = read_examples(tmp_path / "out" / "test.jsonl")
    assert len(examples) == 200
    strata = Counter((e.metadata.difficulty, e.metadata.domain) for e in examples)
    # Six strata of 100 rows: quotas of 33.3.
    assert sorted(strata.values()) == [33, 33, 33, 33, 34, 34]
    assert {name: counts["held_out"] for name, counts in record.strata.items()} == {
        f"{difficulty} / {domain}": count for (difficulty, domain), count in strata.items()
    }
    assert (train.read_bytes(), train.stat().st_mtime_ns) == before
    assert not record.removed_from_train and record.train_after is None
    assert list(tmp_path.glob("*.bak")) == []


def test_it_says_aloud_when_a_hold_out_is_independent(train: Path, tmp_path: Path) -> None:
    record = split(train, tmp_path / "test.jsonl", size=10)
    [finding] = record.findings
    assert finding.severity == "warning"
    assert "independent only if the training has not seen it" in finding.message


def test_the_choice_depends_on_seed_and_rows_not_on_their_order(train: Path, tmp_path: Path) -> None:
    split(train, tmp_path / "a.jsonl", size=50)
    write(train, [row(number) for number in reversed(range(600))])
    split(train, tmp_path / "b.jsonl", size=50)
    split(train, tmp_path / "c.jsonl", size=50, seed=7)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert (tmp_path / "a.jsonl").read_bytes() != (tmp_path / "c.jsonl").read_bytes()


def test_a_rare_stratum_keeps_a_row_and_a_lost_one_is_reported(tmp_path: Path) -> None:
    rows = [row(number, domain="math", difficulty="easy") for number in range(500)]
    rows += [row(900 + number, domain="rare", difficulty="easy") for number in range(2)]
    rows += [row(990, domain="single", difficulty="easy")]
    record = split(write(tmp_path / "train.jsonl", rows), tmp_path / "test.jsonl", size=10)
    assert record.strata["easy / rare"] == {"rows": 2, "held_out": 1}
    assert record.strata["easy / single"] == {"rows": 1, "held_out": 0}
    assert sum(counts["held_out"] for counts in record.strata.values()) == 10
    [lost] = [finding for finding in record.findings if finding.code == "rare-strata"]
    assert "easy / single" in lost.message


def test_remove_takes_the_rows_out_atomically_with_a_backup(train: Path, tmp_path: Path) -> None:
    before = train.read_bytes()
    record = split(train, tmp_path / "out" / "test.jsonl", size=100, remove=True)
    held, rest = prompts(tmp_path / "out" / "test.jsonl"), prompts(train)
    assert not held & rest and len(held) == 100 and len(rest) == 500
    assert record.backup == "train.jsonl.bak"
    assert (tmp_path / "train.jsonl.bak").read_bytes() == before
    assert record.rows_removed == 100


def test_no_backup_is_left_when_told_so(train: Path, tmp_path: Path) -> None:
    record = split(train, tmp_path / "test.jsonl", size=100, remove=True, backup=False)
    assert record.backup is None and list(tmp_path.glob("*.bak*")) == []
    assert not list(tmp_path.glob(".*"))


def test_an_older_backup_is_never_overwritten(train: Path, tmp_path: Path) -> None:
    older = tmp_path / "train.jsonl.bak"
    older.write_text("precious\n")
    record = split(train, tmp_path / "test.jsonl", size=100, remove=True)
    assert older.read_text() == "precious\n"
    assert record.backup == "train.jsonl.bak1"


def test_the_same_command_again_changes_nothing(train: Path, tmp_path: Path) -> None:
    first = split(train, tmp_path / "test.jsonl", size=100, remove=True)
    state = (train.read_bytes(), (tmp_path / "test.jsonl").read_bytes())
    assert split(train, tmp_path / "test.jsonl", size=100, remove=True) == first
    assert (train.read_bytes(), (tmp_path / "test.jsonl").read_bytes()) == state
    with pytest.raises(DataError, match="already been removed"):
        split(train, tmp_path / "test.jsonl", size=50, remove=True)


def test_killed_before_the_rename_it_ends_the_same(
    train: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = train.read_bytes()
    real = Path.replace

    def killed(self: Path, target: Path) -> Path:
        if target == train:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        split(train, tmp_path / "test.jsonl", size=100, remove=True)
    assert train.read_bytes() == before
    monkeypatch.undo()
    split(train, tmp_path / "test.jsonl", size=100, remove=True)
    assert len(prompts(train)) == 500 and len(read_examples(tmp_path / "test.jsonl")) == 100


def test_rows_with_one_prompt_count_as_one_and_leave_together(tmp_path: Path) -> None:
    rows = [row(number) for number in range(100)]
    rows += [row(number, response="another", domain="elsewhere") for number in range(100)]
    rows += [row(number, prompt=f"  QUESTION number   {number} ") for number in range(100)]
    train = write(tmp_path / "train.jsonl", rows)
    kept = split(train, tmp_path / "kept" / "test.jsonl", size=40)
    assert any(found.code == "repeated-prompts" and found.severity == "warning" for found in kept.findings)
    record = split(train, tmp_path / "test.jsonl", size=40, remove=True)
    held = {prompt.strip().lower().split()[-1] for prompt in prompts(tmp_path / "test.jsonl")}
    rest = {prompt.strip().lower().split()[-1] for prompt in prompts(train)}
    assert len(held) == 40 and not held & rest
    assert record.rows_removed == 120


def test_other_shapes_of_training_rows_are_read(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"question": f"q{n}", "answer": f"a{n}", "metadata": {"domain": "math", "source": "mine"}}
        for n in range(9)
    ]
    rows += [{"instruction": f"do {n}", "input": f"this {n}", "output": f"done {n}"} for n in range(9)]
    split(write(tmp_path / "train.jsonl", rows), tmp_path / "test.jsonl", size=6, stratify_by=["domain"])
    examples = read_examples(tmp_path / "test.jsonl")
    assert Counter(example.metadata.domain for example in examples) == {"math": 3, "unknown": 3}
    instructed = next(example for example in examples if example.metadata.domain == "unknown")
    number = instructed.response.split()[-1]
    assert instructed.prompt == f"do {number}\n\nthis {number}"


def test_a_field_that_no_row_has_is_said(train: Path, tmp_path: Path) -> None:
    record = split(train, tmp_path / "test.jsonl", size=5, stratify_by=["dificulty"])
    assert any(found.code == "no-such-field" and "'dificulty'" in found.message for found in record.findings)


def test_gzip_stays_gzip(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl.gz", [row(number) for number in range(30)])
    split(train, tmp_path / "test.jsonl", size=10, remove=True)
    assert len(prompts(train)) == 20


@pytest.mark.parametrize("size", [0, -5])
def test_sizes_below_one_are_refused(train: Path, tmp_path: Path, size: int) -> None:
    with pytest.raises(UsageError, match="1 or more"):
        split(train, tmp_path / "test.jsonl", size=size)


@pytest.mark.parametrize("size", [600, 601, 10**12])
def test_a_size_that_leaves_no_training_rows_is_refused(train: Path, tmp_path: Path, size: int) -> None:
    with pytest.raises(DataError, match="the file has 600"):
        split(train, tmp_path / "test.jsonl", size=size)
    assert not (tmp_path / "test.jsonl").exists()


def test_the_training_file_as_output_is_refused(train: Path) -> None:
    before = train.read_bytes()
    with pytest.raises(UsageError, match="itself"):
        split(train, train, size=5)
    assert train.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a"}\n', "no prompt and response"),
        (b'{"prompt": "a", "response": ""}\n', "'response' is empty"),
        (b'{"prompt": "a", "response": "b"}\nnot json\n', "not JSON"),
        (b'{"prompt": "a", "response": NaN}\n', "not JSON"),
        (b'{"prompt": "\\ud800", "response": "b"}\n', "not UTF-8"),
        (b'[1, 2]\n{"prompt": "a", "response": "b"}\n', "list holds a JSON int"),
        ("{}\n".encode("utf-16"), "UTF-16"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "LFS pointer"),
        (b"<html><body>404</body></html>", "web page"),
        (b'{"prompt": "a\x00"}\n', "NUL"),
        (gzip.compress(b'{"prompt": "a", "response": "b"}\n' * 500, mtime=0)[:60], "cut off"),
        (b"", "no rows"),
    ],
)
def test_wrong_files_are_one_message(tmp_path: Path, content: bytes, message: str) -> None:
    train = tmp_path / "train.jsonl"
    train.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        split(train, tmp_path / "test.jsonl", size=1)
    assert str(train) in str(caught.value)
    assert not (tmp_path / "test.jsonl").exists()


def test_a_folder_or_nothing_in_place_of_the_file_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="folder"):
        split(tmp_path, tmp_path / "test.jsonl", size=1)
    with pytest.raises(InputError, match="does not exist"):
        split(tmp_path / "nothing.jsonl", tmp_path / "test.jsonl", size=1)


def test_a_line_without_end_is_refused_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorasmith.files.jsonl.MAX_LINE_BYTES", 1 << 16)
    train = tmp_path / "train.jsonl"
    train.write_bytes(b'{"prompt": "' + b"a" * (1 << 18))
    with pytest.raises(DataError, match="line 1 is longer than"):
        split(train, tmp_path / "test.jsonl", size=1)


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Kept: at most `size` choices per stratum; the rest is counted. (Figures for 10^7 rows: benches.)"""
    train = write(tmp_path / "train.jsonl", [row(number) for number in range(3000)])
    reservoir = module.scan(train, ["difficulty", "domain"], 20, 42, lambda done: None)
    assert sum(reservoir.rows.values()) == 3000
    assert all(len(kept.by_key) == len(kept.heap) == 20 for kept in reservoir.kept.values())
