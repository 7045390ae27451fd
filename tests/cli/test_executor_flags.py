"""Where the work is done, as flags: a mistake is one message before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorasmith.cli.main import run

COMMANDS = {
    "validate": ["--model", "m", "--test-set", "t", "--output", "o"],
    "compare": ["--base", "b", "--adapter", "a", "--merged", "m", "--test-set", "t"],
    "respond": ["--model", "m", "--data", "d", "--output", "o"],
    "merge": ["--base", "b", "--adapter", "a", "--output", "o"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers", "2"], "--workers without a cluster"),
        (["--worker-gpus", "1"], "--worker-gpus without a cluster"),
        (["--ray-address", "auto"], "--ray-address without a cluster"),
        (["--executor", "spark"], "--executor is 'spark'"),
        (["--executor", "ray", "--worker-threads", "0"], "--worker-threads is 0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_flags_that_do_not_fit(
    command: str, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([command, *COMMANDS[command], *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_run_refuses_them_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = ["--base", "b", "--adapter", "a", "--test-set", "t", "--output", str(tmp_path / "run")]
    assert run(["run", *paths, "--executor", "spark"]) == 2
    assert "--executor" in capsys.readouterr().err
    assert run(["run", *paths, "--executor", "ray", "--workers", "2", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert 'executor = "ray"' in printed and "workers = 2" in printed


def test_roundings_are_compared_in_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--compare-roundings", "--test-set", "t", "--executor", "ray"]
    assert run(["merge", *COMMANDS["merge"], *flags]) == 2
    assert "--compare-roundings" in capsys.readouterr().err
