"""What can be wrong with a command for another machine, as typed: one message each, with its exit code."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.remote.jobs import model_folder, start
from tests.remote.machines import SSHD, Machine, bad_line, free_port, make_key

pytestmark = pytest.mark.skipif(not Path(SSHD).exists(), reason="needs Debian's openssh-server and rsync")

PROGRAM = [sys.executable, "-m", "lorasmith.cli.main"]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base of 3 MB and an adapter, in the present folder."""
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "base", 3_000_000)
    model_folder(tmp_path / "adapter", 1000)
    return tmp_path


@pytest.fixture
def typed(other: Machine, fake_lorasmith: str, files: Path) -> Callable[..., list[str]]:
    """`lorasmith remote run … -- merge …` with changes."""

    def words(*more: str, port: int | None = None, seconds: int = 0, **changes: str) -> list[str]:
        user = other.address.split("@")[0]
        options = {
            "--host": f"{user}@127.0.0.1:{port or other.port}",
            "--identity": str(other.key),
            "--fingerprint": other.fingerprint,
            "--remote-python": fake_lorasmith,
            **{f"--{name}": value for name, value in changes.items()},
        }
        given = [word for name, value in options.items() if value for word in (name, value)]
        merge = ["merge", "--base", "base", "--adapter", "adapter", "--output", "merged"]
        return [*PROGRAM, "remote", "run", *given, "--", *merge, "--seed", str(seconds), *more]

    return words


def refused(words: list[str], code: int, message: str) -> str:
    """The command ends with this code and one message."""
    done = subprocess.run(words, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == code, done.stdout + done.stderr
    assert message in done.stderr
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr, done.stderr
    assert not Path("merged").exists()
    return done.stderr


def test_nobody_is_there(typed: Callable[..., list[str]]) -> None:
    refused(typed(port=free_port()), 3, "no ssh server answers")


def test_the_host_key_is_another_one(typed: Callable[..., list[str]], tmp_path: Path) -> None:
    refused(typed(fingerprint=make_key(tmp_path / "wrong")), 3, "this is another machine: its keys are")
    # Without a fingerprint nobody can be asked here; what is shown is what has to be compared.
    said = refused(typed(fingerprint=""), 2, "this machine is not known yet")
    assert "--fingerprint" in said


def test_the_first_contact_asks_a_person(typed: Callable[..., list[str]], other: Machine) -> None:
    """On a terminal: no leaves everything as it was, yes is remembered."""
    for answer, code in (("n", 2), ("y", 0)):
        ours, theirs = pty.openpty()
        done = start(typed(fingerprint=""), stdin=theirs, stderr=theirs)
        os.close(theirs)
        os.write(ours, f"{answer}\n".encode())
        said, _ = done.communicate(timeout=60)
        asked = everything_from(ours).decode()
        os.close(ours)
        assert done.returncode == code, said + asked
        assert other.fingerprint in asked and "not known yet" in asked
    assert Path("merged").read_text() == "merge"
    Path("merged").unlink()
    done = start([*PROGRAM, "remote", "fetch"], stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    said, _ = done.communicate(timeout=60)  # nobody is asked again
    assert done.returncode == 0 and "done: results fetched and verified" in said, said


def everything_from(terminal: int) -> bytes:
    """All that was written to a terminal whose other end is closed: one read may end within a character."""
    content = b""
    with suppress(OSError):  # how Linux tells the end of a terminal
        while piece := os.read(terminal, 100_000):
            content += piece
    return content


def test_the_host_key_has_changed(typed: Callable[..., list[str]], other: Machine, tmp_path: Path) -> None:
    make_key(tmp_path / "changed")
    key = " ".join((tmp_path / "changed.pub").read_text().split()[:2])
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "known_hosts").write_text(f"[127.0.0.1]:{other.port} {key}\n")
    refused(typed(fingerprint=""), 3, "the machine's host key is not the known one")


def test_the_machine_lets_nobody_in(typed: Callable[..., list[str]], tmp_path: Path) -> None:
    make_key(tmp_path / "stranger")
    refused(typed(identity=str(tmp_path / "stranger")), 3, "the machine lets nobody in with these keys")


def test_a_machine_without_python_and_one_without_a_gpu(
    typed: Callable[..., list[str]], other: Machine
) -> None:
    tools = other.home / "no-python"
    tools.mkdir()
    try:
        other.environment(PATH=str(tools))
        refused(typed(), 3, "there is no Python 3.11 or newer")
        # Nothing called nvidia-smi is found there, whatever this machine has.
        for name in ("python3", "rsync"):
            (tools / name).symlink_to(Path("/usr/bin/rsync") if name == "rsync" else sys.executable)
        refused(typed("--device", "cuda"), 3, "has no NVIDIA GPU")
    finally:
        other.environment()


def test_a_command_that_is_none_there(typed: Callable[..., list[str]]) -> None:
    words = typed()
    place = words.index("--") + 1
    refused([*words[:place], "chat", "--model", "base"], 2, "'chat' is no command that runs elsewhere")
    refused(typed(env="NOWHERE_SET"), 2, "the variable NOWHERE_SET is not set")


@contextmanager
def small_disk(other: Machine, megabytes: int) -> Iterator[Path]:
    place = other.home / "small"
    place.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", place]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("mounting needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def test_the_other_disk_is_full_from_the_beginning_or_in_the_middle(
    typed: Callable[..., list[str]], other: Machine
) -> None:
    with small_disk(other, 4) as place:
        refused(typed(folder=str(place)), 3, "too little disk space on the other machine")
    with small_disk(other, 14) as place, bad_line(other.port) as line:
        line.bytes_per_second = 3_000_000

        def fill() -> None:
            while not list(place.glob("jobs/*/in/0/base/weights*")):
                time.sleep(0.005)
            with (place / "somebody else's").open("wb", buffering=0) as file:
                while file.write(bytes(1 << 16)) == 1 << 16:
                    pass

        def until_full() -> None:
            try:
                fill()
            except OSError:
                return

        filler = threading.Thread(target=until_full, daemon=True)
        filler.start()
        said = refused(typed(port=line.port, folder=str(place)), 3, "full")
        filler.join(30)
        assert "what was copied is kept" in said or "what was sent is kept" in said
        # Space is made, and the same command goes on.
        (place / "somebody else's").unlink()
        line.bytes_per_second = None
        done = subprocess.run(typed(port=line.port, folder=str(place)), capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
    assert Path("merged").read_text() == "merge"


def test_an_upload_that_is_interrupted_goes_on(typed: Callable[..., list[str]], other: Machine) -> None:
    with bad_line(other.port) as line:
        line.bytes_per_second = 1_500_000
        words = typed(port=line.port)
        jobs = other.home / ".lorasmith" / "jobs"
        before = set(jobs.glob("*"))
        began = start(words, stderr=subprocess.PIPE)
        _until(
            lambda: any(
                file.stat().st_size > 1_000_000
                for job in set(jobs.glob("*")) - before
                for file in job.glob("in/0/base/weights*")
            )
        )
        began.send_signal(signal.SIGINT)
        _, said = began.communicate(timeout=60)
        assert began.returncode == 130, said
        assert "interrupted; give the same command again to continue" in said and "Traceback" not in said
        line.bytes_per_second, passed = None, line.bytes
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert line.bytes - passed < 2_000_000 + 700_000  # what was missing of 3 MB, wheel and requests
    assert Path("merged").read_text() == "merge"


def test_two_runs_on_one_remote_folder(typed: Callable[..., list[str]], other: Machine) -> None:
    words = typed(seconds=300)
    began = start(words, stderr=subprocess.STDOUT)
    try:
        assert began.stdout
        heard = ""
        while "began" not in heard:
            line = began.stdout.readline()
            assert line, heard
            heard += line
        Path("adapter/config.json").write_text('{"r": 8}')
        refused(words, 3, "another command, or this one with other inputs, runs in this job's folder")
        stopped = subprocess.run([*PROGRAM, "remote", "stop"], capture_output=True, text=True, check=False)
        assert "ended: stopped" in stopped.stdout, stopped.stdout + stopped.stderr
        assert began.wait(60) == 143
    finally:
        began.kill()
        began.communicate()


def _until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)
