"""Killed at any moment, a merge goes on when it is asked again, and ends with the same bytes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorasmith.files.digests import digest_folder
from lorasmith.merging import shards
from lorasmith.merging.merge import merge
from tests.tiny import save_adapter, save_base

STEPS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "shutil.rmtree", "os.truncate")
"""What Python announces before it changes something on the disk."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    folder = tmp_path_factory.mktemp("inputs")
    base = save_base(folder / "base", max_shard_size="30KB")
    adapter = save_adapter(folder / "adapter", base)
    merge(base, adapter, folder / "expected")
    return base, adapter, digest_folder(folder / "expected")


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process and give its wait status."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def die_at(step: int, output: Path) -> Callable[[], None]:
    """A hook that kills its process just before the `step`-th change on the disk around `output`."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in STEPS and str(output.parent) in str(arguments[0] if arguments else ""):
            seen += 1
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)

    def arm() -> None:
        sys.addaudithook(hook)

    return arm


def kill_points(count: int) -> list[int]:
    """Steps spread over a whole merge; one beyond the end, where it is not killed any more."""
    return sorted({1 + number * 79 // count for number in range(count)})


@pytest.mark.parametrize("step", kill_points(24))
def test_a_killed_merge_goes_on(tmp_path: Path, inputs: tuple[Path, Path, str], step: int) -> None:
    base, adapter, expected = inputs
    output = tmp_path / "out"
    arm = die_at(step, output)

    def work() -> None:
        arm()
        merge(base, adapter, output)

    status = in_child(work)
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL
    if output.exists():
        assert digest_folder(output) == expected, "a half-made folder was published"
    merge(base, adapter, output)
    assert digest_folder(output) == expected
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("step", kill_points(14)[4:])
def test_an_older_model_is_there_until_the_new_one_is(
    tmp_path: Path, inputs: tuple[Path, Path, str], step: int
) -> None:
    base, adapter, expected = inputs
    output = tmp_path / "out"
    merge(base, adapter, output, precision="float16")
    older = digest_folder(output)
    arm = die_at(step, output)

    def work() -> None:
        arm()
        merge(base, adapter, output)

    in_child(work)
    assert digest_folder(output) in (older, expected)
    merge(base, adapter, output)
    assert digest_folder(output) == expected
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.campaign
def test_a_merge_killed_at_every_step_goes_on(tmp_path: Path, inputs: tuple[Path, Path, str]) -> None:
    for step in range(1, 82):
        folder = tmp_path / str(step)
        folder.mkdir()
        test_a_killed_merge_goes_on(folder, inputs, step)


def test_finished_shards_are_not_made_again(
    tmp_path: Path, inputs: tuple[Path, Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, expected = inputs
    output = tmp_path / "out"
    made: list[str] = []
    real = shards.write_shard

    def stop_after_one(*arguments: Any) -> Any:
        if made:
            raise KeyboardInterrupt
        made.append(arguments[0].path.name)
        return real(*arguments)

    monkeypatch.setattr("lorasmith.merging.shards.write_shard", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        merge(base, adapter, output)
    first = tmp_path / ".out.partial" / made[0]
    written = first.stat().st_ino
    monkeypatch.setattr("lorasmith.merging.shards.write_shard", real)
    merge(base, adapter, output)
    assert (output / made[0]).stat().st_ino == written
    assert digest_folder(output) == expected


@pytest.mark.parametrize("change", ["precision", "weights", "base"])
def test_what_was_begun_for_another_merge_is_made_again(
    tmp_path: Path, inputs: tuple[Path, Path, str], change: str
) -> None:
    base, adapter, expected = inputs
    output = tmp_path / "out"
    arm = die_at(40, output)

    def work() -> None:
        arm()
        if change == "base":
            other = save_base(tmp_path / "other" / "base", seed=5, max_shard_size="30KB")
            merge(other, adapter, output)
        elif change == "weights":
            merge(base, adapter, output, weights=[0.5])
        else:
            merge(base, adapter, output, precision="float32")

    assert os.WTERMSIG(in_child(work)) == signal.SIGKILL
    merge(base, adapter, output)
    assert digest_folder(output) == expected
