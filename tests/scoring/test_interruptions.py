"""Too little memory and a kill midway: no row lost, none twice, and the same bytes in the end."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as pq
import pytest

from lorasmith.cli import console, main
from lorasmith.files.atomic import read_record
from lorasmith.models import forward
from lorasmith.proving.behaviour import texts
from lorasmith.proving.behaviour.compare import compare
from lorasmith.records.proof import BehaviourProof
from lorasmith.records.scoring import ValidationResult
from lorasmith.scoring.validate import validate
from tests.tiny import save_adapter, save_base, tiny_rows

HIDDEN = forward.TokenForward.hidden

PRELUDE = """
import os, resource, signal, sys
from contextlib import contextmanager
from pathlib import Path
import torch
torch.set_num_threads(1)
from lorasmith.scoring.validate import validate
from lorasmith.proving.behaviour.compare import compare
place, output, number = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
"""

KILLED = """
@contextmanager
def progress(label, *, total, unit):
    seen = []
    def advance(count):
        seen.append(count)
        if len(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)
    yield advance
"""

LIMITED = """
from lorasmith.models import scoring
release = scoring.release_memory
scoring.release_memory = lambda: print("halved") or release()

@contextmanager
def progress(label, *, total, unit):
    # The model is loaded now: leave this many more bytes of address space for the batches.
    used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + number, -1))
    yield lambda count: None
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
"""

VALIDATE = """
validate(place / 'base', place / 'test.jsonl', output, batch_tokens={tokens}, arithmetic='mkl',
    progress=progress)
"""
COMPARE = """
compare(place / 'base', place / 'adapter', place / 'merged', place / 'test.jsonl', output / 'behaviour.json',
    batch_tokens={tokens}, arithmetic='mkl', progress=progress)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interruptions")
    # Wide enough inside that a batch of all rows needs a hundred times the memory of the weights.
    save_base(folder / "base", intermediate_size=2048)
    save_base(folder / "merged", intermediate_size=2048, seed=1)
    save_adapter(folder / "adapter", folder / "base")
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(200)))
    return folder


def run(code: str, place: Path, output: Path, number: int) -> tuple[int, str]:
    """Exit code and printed text of a process of its own."""
    output.mkdir(exist_ok=True)
    command = [sys.executable, "-c", PRELUDE + code, str(place), str(output), str(number)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert "Error" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def validate_here(place: Path, output: Path, model: str = "base", **options: Any) -> ValidationResult:
    return validate(place / model, place / "test.jsonl", output, role="base", arithmetic="mkl", **options)


def compare_here(place: Path, output: Path | None, **options: Any) -> BehaviourProof:
    return compare(
        place / "base",
        place / "adapter",
        place / "merged",
        place / "test.jsonl",
        output,
        arithmetic="mkl",
        **options,
    )


def same_files(one: Path, two: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    return names == sorted(path.name for path in two.iterdir()) and all(
        (one / name).read_bytes() == (two / name).read_bytes() for name in names
    )


def test_a_batch_too_large_for_memory_is_halved_and_nothing_changes(place: Path, tmp_path: Path) -> None:
    script = LIMITED + VALIDATE.format(tokens=50_000)
    code, printed = run(script, place, tmp_path / "small", 150_000_000)
    assert (code, "halved" in printed) == (0, True)
    whole = validate_here(place, tmp_path / "whole")
    found = read_record(tmp_path / "small" / "base.json", ValidationResult)
    assert found.overall.tokens == whole.overall.tokens
    assert found.overall.loss == pytest.approx(whole.overall.loss, abs=1e-6)
    ids = pq.read_table(tmp_path / "small" / "base.parquet")["id"].to_pylist()
    assert ids == [row["id"] for row in tiny_rows(200)]


def test_a_killed_validation_goes_on_and_ends_with_the_same_bytes(place: Path, tmp_path: Path) -> None:
    code = KILLED + VALIDATE.format(tokens=1500)
    assert run(code, place, tmp_path / "killed", 3)[0] == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "killed").iterdir()] == [".base.journal"]
    shutil.copytree(tmp_path / "killed", tmp_path / "other")
    computed: list[int] = []

    @contextmanager
    def watch(label: str, *, total: int, unit: str) -> Iterator[Any]:
        with patch.object(forward.TokenForward, "hidden", autospec=True, side_effect=HIDDEN) as hidden:
            yield lambda count: None
        computed.append(hidden.call_count)

    validate_here(place, tmp_path / "killed", batch_tokens=1500, progress=watch)
    validate_here(place, tmp_path / "whole", batch_tokens=1500, progress=watch)
    assert same_files(tmp_path / "killed", tmp_path / "whole")
    assert computed[0] == computed[1] - 3  # the three finished batches were not computed again
    # The journal of one model is nothing to another.
    other = validate_here(place, tmp_path / "other", model="merged", batch_tokens=1500)
    assert other == validate_here(place, tmp_path / "alone", model="merged", batch_tokens=1500)


def test_a_killed_comparison_goes_on_and_ends_with_the_same_bytes(place: Path, tmp_path: Path) -> None:
    code = KILLED + COMPARE.format(tokens=3000)
    assert run(code, place, tmp_path / "killed", 2)[0] == -signal.SIGKILL
    for name in ("killed", "whole"):
        compare_here(place, tmp_path / name / "behaviour.json", batch_tokens=3000)
    assert same_files(tmp_path / "killed", tmp_path / "whole")


def test_asking_interrupted_does_not_validate_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = [
        {
            "id": f"DROP/{index}",
            "prompt": f"Passage: {'rain ' * index}\nQuestion: how many?\nAnswer:",
            "response": "7",
            "metadata": {"source": "DROP", "golds": [["7"]]},
        }
        for index in range(6)
    ]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    scored: dict[str, int] = {}

    def watched(stop_at: str) -> Any:
        @contextmanager
        def bar(label: str, *, total: int, unit: str) -> Iterator[Any]:
            def advance(count: int) -> None:
                if label == stop_at:
                    raise KeyboardInterrupt

            with patch.object(forward.TokenForward, "hidden", autospec=True, side_effect=HIDDEN) as hidden:
                yield advance
            scored[label] = hidden.call_count

        return bar

    def ask(output: str, stop_at: str = "") -> int:
        scored.clear()
        monkeypatch.setattr(console, "bar", watched(stop_at))
        options = ["--test-set", tmp_path / "asked.jsonl", "--output", tmp_path / output, "--batch-size", "2"]
        return main.run([str(word) for word in ["validate", "--model", place / "base", *options, "--tasks"]])

    assert ask("stopped", "Write answers") == 130
    assert scored["Validate base"] == 3
    assert ask("stopped") == 0
    assert scored["Validate base"] == 0
    assert ask("whole") == 0
    assert scored["Validate base"] == 3
    assert same_files(tmp_path / "stopped", tmp_path / "whole")  # and no journal is left
    capsys.readouterr()


@pytest.mark.parametrize("stop_at", ["Generate (adapter)", "Generate (merged)", "Compare"])
def test_texts_of_an_interrupted_comparison_are_not_written_again(
    place: Path, tmp_path: Path, stop_at: str
) -> None:
    class Stop(Exception):
        pass

    @contextmanager
    def stopping(label: str, *, total: int, unit: str) -> Iterator[Any]:
        def advance(count: int) -> None:
            if label == stop_at:
                raise Stop

        yield advance

    options = {"generate": 3, "limit": 40}
    with pytest.raises(Stop):
        compare_here(place, tmp_path / "stopped" / "behaviour.json", progress=stopping, **options)
    calls = {}
    for name in ("stopped", "whole"):
        generate = texts.generate_greedy
        with patch.object(texts, "generate_greedy", side_effect=generate) as counted:
            compare_here(place, tmp_path / name / "behaviour.json", **options)
        calls[name] = counted.call_count
    assert same_files(tmp_path / "stopped", tmp_path / "whole")
    # Forty rows, sixteen at a time, and sixteen of them once more alone, by each model.
    assert calls["whole"] == 2 * (3 + 16)
    done = {"Generate (adapter)": 1, "Generate (merged)": 3 + 16 + 1, "Compare": 2 * (3 + 16)}
    assert calls["stopped"] == calls["whole"] - done[stop_at]


def test_texts_of_another_length_are_not_taken(place: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    @contextmanager
    def stopping(label: str, *, total: int, unit: str) -> Iterator[Any]:
        if label == "Run merged":
            raise Stop
        yield lambda count: None

    with pytest.raises(Stop):
        compare_here(place, tmp_path / "stopped" / "b.json", progress=stopping, generate=2, limit=5)
    for name in ("stopped", "whole"):
        compare_here(place, tmp_path / name / "b.json", generate=6, limit=5)
    assert same_files(tmp_path / "stopped", tmp_path / "whole")


def test_a_comparison_without_output_leaves_nothing(place: Path) -> None:
    before = sorted(place.rglob("*"))
    compare_here(place, None, limit=3, generate=2)
    assert sorted(place.rglob("*")) == before
