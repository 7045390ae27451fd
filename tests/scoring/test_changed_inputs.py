"""Inputs that change or vanish while they are used, and two commands that write the same result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lorasmith.errors import BusyError, InputError
from lorasmith.models import scorer
from lorasmith.progress import Progress
from lorasmith.proving.behaviour.compare import compare
from lorasmith.scoring.validate import validate
from tests.tiny import save_adapter, save_base, tiny_rows


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("changed")
    save_base(folder / "base")
    save_base(folder / "merged", seed=3)
    save_adapter(folder / "adapter", folder / "base")
    write(folder / "test.jsonl", 8)
    return folder


@pytest.fixture
def place(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "place"))


def write(path: Path, rows: int) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(rows)))


def during(wanted: str, action: Callable[[], Any]) -> Progress:
    """Do something while a step is under way."""

    @contextmanager
    def watch(label: str, *, total: int, unit: str) -> Iterator[Any]:
        if label == wanted:
            action()
        yield lambda count: None

    return watch


@pytest.mark.parametrize("name", ["test.jsonl", "adapter/adapter_config.json"])
def test_what_changes_between_digest_and_reading_is_named(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    load = scorer.load_for

    def slow(*args: Any, **options: Any) -> Any:
        file = place / name
        file.write_text(file.read_text() + "\n")
        return load(*args, **options)

    monkeypatch.setattr(scorer, "load_for", slow)
    with pytest.raises(InputError, match="changed while it was read") as caught:
        validate(place / "base", place / "test.jsonl", tmp_path / "out", adapter=place / "adapter")
    assert caught.value.where == str(place / name.split("/")[0])
    assert not list((tmp_path / "out").glob("*.json"))


def test_a_test_set_edited_between_kill_and_resume_is_scored_as_it_is_now(
    place: Path, tmp_path: Path
) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        validate(
            place / "base", place / "test.jsonl", tmp_path / "one", progress=during("Validate base", stop)
        )
    write(place / "test.jsonl", 11)
    for name in ("one", "two"):
        validate(place / "base", place / "test.jsonl", tmp_path / name)
    for file in ("base.json", "base.parquet"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_what_is_read_may_go(place: Path, tmp_path: Path) -> None:
    """A model is in memory when its rows are scored: the result is as true without the files."""
    gone = during("Validate adapter", lambda: shutil.rmtree(place))
    options = {"adapter": place / "adapter", "progress": gone}
    assert validate(place / "base", place / "test.jsonl", tmp_path / "out", **options).overall.examples == 8


@pytest.mark.parametrize(
    ("victim", "named"),
    [
        ("base", "base"),
        ("base/model.safetensors", "base/model.safetensors"),
        ("adapter/adapter_model.safetensors", "adapter/adapter_model.safetensors"),
        ("merged", "merged"),
        ("merged/model.safetensors", "merged/model.safetensors"),
    ],
)
def test_what_vanishes_before_it_is_read_is_one_message_with_its_name(
    place: Path, tmp_path: Path, victim: str, named: str
) -> None:
    def remove() -> None:
        file = place / victim
        shutil.rmtree(file) if file.is_dir() else file.unlink()

    arguments = [place / name for name in ("base", "adapter", "merged", "test.jsonl")]
    with pytest.raises(InputError) as caught:
        compare(*arguments, tmp_path / "b.json", progress=during("Noise floor", remove))
    assert caught.value.where == str(place / named)
    assert "Error" not in caught.value.message()
    assert not (tmp_path / "b.json").exists()


def test_two_commands_do_not_write_one_result_at_once(place: Path, tmp_path: Path) -> None:
    refused: list[str] = []

    def second() -> None:
        with pytest.raises(BusyError) as caught:
            validate(place / "base", place / "test.jsonl", tmp_path / "out")
        refused.append(caught.value.message())
        validate(place / "base", place / "test.jsonl", tmp_path / "out", role="merged")  # another result

    validate(place / "base", place / "test.jsonl", tmp_path / "out", progress=during("Validate base", second))
    assert "another process works on the same output" in refused[0]
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["base.json", "base.parquet", "merged.json", "merged.parquet"]


def test_an_output_that_is_a_file_is_told(place: Path) -> None:
    with pytest.raises(InputError, match="a part of the path is a file"):
        validate(place / "base", place / "test.jsonl", place / "test.jsonl")
