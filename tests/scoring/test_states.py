"""Hidden states kept by a validation serve the comparison: no figure changes, nothing is computed twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from lorasmith.errors import DiskError, UsageError
from lorasmith.models import forward, hidden_states
from lorasmith.proving.behaviour.compare import compare
from lorasmith.scoring.validate import validate
from tests.tiny import save_adapter, save_base, tiny_rows

HIDDEN = forward.TokenForward.hidden


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("states")
    save_base(folder / "base")
    save_base(folder / "merged", seed=3)
    save_adapter(folder / "adapter", folder / "base")
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(20)))
    return folder


def validate_both(place: Path, output: Path, kept: Path | None, **options: Any) -> None:
    validate(place / "base", place / "test.jsonl", output, adapter=place / "adapter", states=kept, **options)
    validate(place / "merged", place / "test.jsonl", output, role="merged", states=kept, **options)


def compare_them(place: Path, output: Path, kept: Path | None, **options: Any) -> list[str]:
    """Compare, and return the bars that were shown."""
    bars: list[str] = []

    @contextmanager
    def watch(label: str, *, total: int, unit: str) -> Iterator[Any]:
        bars.append(label)
        yield lambda count: None

    folders = (place / "base", place / "adapter", place / "merged", place / "test.jsonl")
    compare(*folders, output, states=kept, batch_tokens=300, progress=watch, **options)
    return bars


def test_kept_states_spare_both_models_and_change_no_byte(place: Path, tmp_path: Path) -> None:
    validate_both(place, tmp_path / "plain", None, batch_tokens=300)
    validate_both(place, tmp_path / "kept", tmp_path / "states", batch_tokens=300)
    for name in ("adapter.json", "adapter.parquet", "merged.json", "merged.parquet"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "kept" / name).read_bytes(), name
    assert compare_them(place, tmp_path / "alone.json", None) == [
        "Run adapter", "Noise floor", "Noise of bfloat16", "Run merged", "Compare",
    ]  # fmt: skip
    assert compare_them(place, tmp_path / "after.json", tmp_path / "states") == [
        "Noise floor", "Noise of bfloat16", "Compare",
    ]  # fmt: skip
    assert (tmp_path / "alone.json").read_bytes() == (tmp_path / "after.json").read_bytes()
    names = sorted(path.name for path in tmp_path.iterdir())  # no journal and no states of its own
    assert names == [
        "after.json",
        "alone.json",
        "kept",
        "plain",
        "states",
    ]


@pytest.mark.parametrize("changed", ["batch_tokens", "end_of_turn", "max_length"])
def test_states_of_other_tokens_or_batches_are_not_used(place: Path, tmp_path: Path, changed: str) -> None:
    other: dict[str, Any] = {"batch_tokens": 200, "end_of_turn": False, "max_length": 30}
    options = {"batch_tokens": 300, "strict": False, changed: other[changed]}
    validate_both(place, tmp_path / "v", tmp_path / "states", **options)
    assert "Run adapter" in compare_them(place, tmp_path / "one.json", tmp_path / "states")
    compare_them(place, tmp_path / "two.json", None)
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()


def test_states_of_another_model_are_not_used(place: Path, tmp_path: Path) -> None:
    validate(place / "base", place / "test.jsonl", tmp_path, role="merged", states=tmp_path, batch_tokens=300)
    assert "Run merged" in compare_them(place, tmp_path / "one.json", tmp_path)


def test_what_an_interrupted_comparison_ran_is_not_run_again(place: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    computed: list[int] = []

    def run(stop_at: str = "") -> None:
        @contextmanager
        def watch(label: str, *, total: int, unit: str) -> Iterator[Any]:
            if label == stop_at:
                raise Stop
            with patch.object(forward.TokenForward, "hidden", autospec=True, side_effect=HIDDEN) as hidden:
                yield lambda count: None
            if label.startswith("Run"):
                computed.append(hidden.call_count)

        folders = (place / "base", place / "adapter", place / "merged", place / "test.jsonl")
        compare(*folders, tmp_path / "out.json", batch_tokens=300, progress=watch)

    with pytest.raises(Stop):
        run("Compare")
    assert len(computed) == 2
    run()
    assert len(computed) == 2  # neither model ran again
    compare_them(place, tmp_path / "whole.json", None)
    assert (tmp_path / "out.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "whole.json"]


def test_states_are_refused_in_inexact_arithmetic_and_on_a_full_disk(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="bfloat16"):
        validate_both(place, tmp_path, tmp_path / "states", arithmetic="bfloat16")
    asked: list[int] = []

    def full(folder: Path, needed: int, doing: str) -> None:
        asked.append(needed)
        raise DiskError(f"too little disk space to {doing}")

    monkeypatch.setattr(hidden_states, "require_disk", full)
    with pytest.raises(DiskError, match="hidden states"):
        validate_both(place, tmp_path, tmp_path / "states")
    monkeypatch.undo()
    result = validate(place / "base", place / "test.jsonl", tmp_path, adapter=place / "adapter")
    assert asked == [4 * 32 * result.overall.tokens]  # float32, 32 numbers a token
    validate_both(place, tmp_path, tmp_path / "states")  # the lock was given back


def test_a_model_that_finishes_in_its_own_way_is_compared_from_its_states(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare_them(place, tmp_path / "one.json", None)
    verify = forward.TokenForward.verify

    def own(self: Any, batch: Any, padded: Any) -> None:
        verify(self, batch, padded)
        self.finish = "own finish"

    monkeypatch.setattr(forward.TokenForward, "verify", own)
    compare_them(place, tmp_path / "two.json", None)
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one["overall"]["loss_a"] == pytest.approx(two["overall"]["loss_a"], abs=1e-6)
    assert one["overall"]["kl"]["mean"] == pytest.approx(two["overall"]["kl"]["mean"], rel=1e-4)
