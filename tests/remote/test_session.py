"""A job on another machine: files, a bad line, endings, against a real sshd."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from lorasmith.errors import BusyError, ConnectionLostError, InputError, RemoteError, UsageError
from lorasmith.remote.ssh import Patience
from tests.remote.jobs import connect, digests, job_for, model_folder, session_for
from tests.remote.machines import SSHD, Machine, bad_line

CUTS = int(os.environ.get("LORASMITH_LINE_CUTS", "7"))

pytestmark = pytest.mark.skipif(not Path(SSHD).exists(), reason="needs Debian's openssh-server and rsync")


def test_files_go_there_and_results_come_back_verified(
    other: Machine, fake_lorasmith: str, tmp_path: Path
) -> None:
    model, copy = model_folder(tmp_path / "a model", 300_000), tmp_path / "results" / "copy"
    job = job_for(other, ["copy", "in/0/a model", "out/0/copy"], fake_lorasmith, [model], [copy])
    session, said = session_for(connect(other), job)
    assert session.run().code == 0
    assert digests(copy) == digests(model)  # the hidden lock stays there
    assert "copied" in said
    # The same command again has nothing to do: the job is done, its results are compared once more.
    again, said = session_for(connect(other), job)
    assert again.run().code == 0
    assert not [line for line in said if "runs there by itself" in line]


def test_a_slow_and_repeatedly_cut_line_changes_nothing(
    other: Machine, fake_lorasmith: str, tmp_path: Path
) -> None:
    model, copy = model_folder(tmp_path / "model", 200_000 * CUTS), tmp_path / "copy"
    with bad_line(other.port) as line:
        transport = connect(other, line.port, silence=2)
        line.cut_after, line.most_cuts, line.bytes_per_second = 400_000, CUTS, 10_000_000
        job = job_for(other, ["copy", "in/0/model", "out/0/copy"], fake_lorasmith, [model], [copy])
        session, _ = session_for(transport, job)
        assert session.run().code == 0
        # 0.2 MB for each cut, both ways, in pieces of at most 0.4 MB: what arrives before a cut is kept.
        assert line.cuts >= CUTS - 1
        print(f"{200_000 * CUTS / 1e6} MB each way, {line.cuts} cuts, {line.bytes / 1e6:.1f} MB on the line")
    assert digests(copy) == digests(model)


LARGE = 24_000_000
"""Bytes that take six seconds on the throttled line: what looks now and then catches it in the middle."""


def test_an_interrupted_upload_goes_on_where_it_was(
    other: Machine, fake_lorasmith: str, tmp_path: Path
) -> None:
    """The command is ended in the middle of the upload, and given again."""
    model, copy = model_folder(tmp_path / "model", LARGE), tmp_path / "copy"
    job = job_for(other, ["copy", "in/0/model", "out/0/copy"], fake_lorasmith, [model], [copy])

    def stop_in_the_middle() -> None:
        if partial.exists() and partial.stat().st_size > 1_000_000:
            raise KeyboardInterrupt

    with bad_line(other.port) as line:
        line.bytes_per_second = 4_000_000
        session, _ = session_for(connect(other, line.port), job)
        partial = Path(session.folder) / "in/0/model/weights of a model.bin"
        session.alive = stop_in_the_middle
        with pytest.raises(KeyboardInterrupt):
            session.run()
        kept = partial.stat().st_size
        assert 1_000_000 < kept < LARGE
        line.bytes_per_second, before = None, line.bytes
        again, _ = session_for(connect(other, line.port), job)
        assert again.run().code == 0
        # There what was missing, back all of it; wheel, digests and the log are some 0.4 MB more.
        assert line.bytes - before < LARGE - kept + LARGE + 1_000_000
    assert digests(copy) == digests(model)


def test_an_interrupted_fetch_goes_on_where_it_was(
    other: Machine, fake_lorasmith: str, tmp_path: Path
) -> None:
    """The line is cut in the middle of the results and stays dead; the command is given again later."""
    model, copy = model_folder(tmp_path / "model", LARGE), tmp_path / "copy"
    job = job_for(other, ["copy", "in/0/model", "out/0/copy"], fake_lorasmith, [model], [copy])
    session, _ = session_for(connect(other), job)
    session.finish = lambda found: found  # type: ignore[method-assign]
    assert session.run().code == 0
    with bad_line(other.port) as line:
        line.bytes_per_second = 4_000_000
        session, _ = session_for(connect(other, line.port, silence=3), job, Patience(2, 0.01, 0.01))
        staged = tmp_path / ".copy.fetching"

        def cut() -> None:
            if sum(file.stat().st_size for file in staged.glob("*")) > 1_000_000:
                line.dead, line.cut_after, line.most_cuts = True, 0, 1000

        session.alive = cut
        with pytest.raises(ConnectionLostError):
            session.fetch()
    assert not copy.exists()
    kept = sum(file.stat().st_size for file in staged.glob("*"))
    assert 1_000_000 < kept < LARGE
    with bad_line(other.port) as line:
        again, _ = session_for(connect(other, line.port), job)
        assert again.finish(again.attach()).code == 0
        assert line.bytes < LARGE - kept + 300_000
    assert digests(copy) == digests(model) and not staged.exists()


def test_a_model_larger_than_the_memory_is_noted_before_it_is_sent(
    other: Machine, fake_lorasmith: str, tmp_path: Path
) -> None:
    model = model_folder(tmp_path / "model", 300_000)
    job = job_for(other, ["copy", "in/0/model", "out/0/c"], fake_lorasmith, [model], [tmp_path / "c"])
    session, said = session_for(connect(other), job)
    found = session.look()
    session.machine = found.model_copy(update={"memory": 100_000, "gpus": []})
    assert session.run().code == 0
    assert any("300.0 kB does not fit into the machine's 100.0 kB of memory" in line for line in said)


def test_a_job_outlives_the_connection(other: Machine, fake_lorasmith: str, tmp_path: Path) -> None:
    result = tmp_path / "slow"
    job = job_for(other, ["slow", "out/0/slow", "25"], fake_lorasmith, [], [result])
    with bad_line(other.port) as line:
        session, _ = session_for(connect(other, line.port, silence=3), job, Patience(2, 0.01, 0.01))

        def close_the_laptop(text: str) -> None:
            if "tick" in text:
                line.dead, line.cut_after, line.most_cuts = True, 0, 1000

        session.say = close_the_laptop
        with pytest.raises(ConnectionLostError, match="connection"):
            session.run()
    assert not result.exists()
    later, said = session_for(connect(other), job)
    assert later.finish(later.attach()).code == 0
    assert (result / "ticks").read_text() == "25"
    assert "\n".join(said).count("tick 7") == 1


def test_stop_and_go_on(other: Machine, fake_lorasmith: str, tmp_path: Path) -> None:
    result = tmp_path / "stopped"
    job = job_for(other, ["slow", "out/0/stopped", "600"], fake_lorasmith, [], [result])
    session, _ = session_for(connect(other), job)

    class Enough(Exception):
        pass

    def leave(text: str) -> None:
        if "tick 1" in text:
            raise Enough

    session.say = leave
    with pytest.raises(Enough):
        session.run()
    session.say = lambda line: None
    assert session.status().phase == "running"
    found = session.stop()
    assert (found.phase, found.code, found.reason) == ("ended", 143, "stopped")
    assert session.finish(found).code == 143
    assert not result.exists()


def test_the_exit_code_of_a_failed_command_comes_back(
    other: Machine, fake_lorasmith: str, tmp_path: Path
) -> None:
    job = job_for(other, ["fail", "3"], fake_lorasmith, [], [tmp_path / "never"])
    session, _ = session_for(connect(other), job)
    assert session.run().code == 3
    assert not (tmp_path / "never").exists()


def test_a_supervisor_that_is_killed_shows_as_lost(
    other: Machine, fake_lorasmith: str, tmp_path: Path
) -> None:
    job = job_for(other, ["slow", "out/0/x", "20"], fake_lorasmith, [], [tmp_path / "x"])
    session, _ = session_for(connect(other), job)
    session.attach = lambda offset=0: session.status()  # type: ignore[method-assign]
    with pytest.raises(RemoteError, match="no finished job"):
        session.run()
    state = json.loads((other.home / ".lorasmith" / "jobs" / job.id / "state.json").read_text())
    os.kill(state["pid"], 9)
    time.sleep(0.2)
    assert session.status().phase == "lost"
    with pytest.raises(RemoteError, match="gone without a word"):
        session.finish(session.status())


def test_a_damaged_result_is_fetched_again(other: Machine, fake_lorasmith: str, tmp_path: Path) -> None:
    model, copy = model_folder(tmp_path / "model", 50_000), tmp_path / "damaged"
    job = job_for(other, ["copy", "in/0/model", "out/0/damaged"], fake_lorasmith, [model], [copy])
    transport = connect(other)
    session, _ = session_for(transport, job)
    honest, damages = transport.receive, [1, 1]

    def damage(source: str, files: list[str], target: Path, on_bytes: object) -> None:
        honest(source, files, target, on_bytes)  # type: ignore[arg-type]
        if damages and damages.pop():
            path = target / "weights of a model.bin"
            path.write_bytes(b"x" + path.read_bytes()[1:])

    transport.receive = damage  # type: ignore[method-assign]
    assert session.run().code == 0
    assert not damages
    assert digests(copy) == digests(model)


def test_results_do_not_land_on_something_else(other: Machine, fake_lorasmith: str, tmp_path: Path) -> None:
    taken = model_folder(tmp_path / "taken", 10)
    job = job_for(other, ["slow", "out/0/taken", "1"], fake_lorasmith, [], [taken])
    session, _ = session_for(connect(other), job)
    with pytest.raises(UsageError, match="taken"):
        session.run()
    assert (taken / "config.json").exists()


def test_a_missing_input_is_named_before_anything_is_sent(
    other: Machine, fake_lorasmith: str, tmp_path: Path
) -> None:
    job = job_for(other, ["copy", "in/0/nothing", "out/0/c"], fake_lorasmith, [tmp_path / "nothing"], [])
    session, _ = session_for(connect(other), job)
    with pytest.raises(InputError, match="does not exist"):
        session.run()


def test_two_runs_on_one_remote_folder(other: Machine, fake_lorasmith: str, tmp_path: Path) -> None:
    data = tmp_path / "data.txt"
    data.write_text("one")
    result = tmp_path / "result"
    job = job_for(other, ["slow", "out/0/result", "900"], fake_lorasmith, [data], [result])
    first, _ = session_for(connect(other), job)
    first.attach = lambda offset=0: first.status()  # type: ignore[method-assign]
    with pytest.raises(RemoteError, match="no finished job"):
        first.run()
    data.write_text("two")
    second, _ = session_for(connect(other), job)
    with pytest.raises(BusyError, match="other inputs"):
        second.run()
    assert first.stop().reason == "stopped"
