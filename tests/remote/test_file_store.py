"""Files that one job has brought, and disks that are full."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lorasmith.errors import DiskError
from lorasmith.records.remote import RemoteJob
from lorasmith.remote.job import pack_parcel
from tests.remote.jobs import connect, digests, job_for, model_folder, session_for
from tests.remote.machines import SSHD, Machine, bad_line

pytestmark = pytest.mark.skipif(not Path(SSHD).exists(), reason="needs Debian's openssh-server and rsync")


def upload(other: Machine, job: RemoteJob) -> tuple[int, list[str]]:
    """Bytes on the line while the inputs are sent and verified, and what was said."""
    with bad_line(other.port) as line, pack_parcel(job) as parcel:
        session, said = session_for(connect(other, line.port), job)
        session.upload(parcel, session.check())
        return line.bytes, said


def test_what_one_job_has_brought_the_next_does_not_send_again(
    other: Machine, fake_lorasmith: str, tmp_path: Path
) -> None:
    model = model_folder(tmp_path / "model", 3_000_000)
    assert upload(other, job_for(other, ["first"], fake_lorasmith, [model], []))[0] > 3_000_000
    model = model.rename(tmp_path / "renamed")
    copy = tmp_path / "copy"
    job = job_for(other, ["copy", "in/0/renamed", "out/0/copy"], fake_lorasmith, [model], [copy])
    with bad_line(other.port) as line:
        session, said = session_for(connect(other, line.port), job)
        assert session.run().code == 0
        # Back, but not there: the rest are the requests, each with the program that answers it.
        assert line.bytes < 3_000_000 + 400_000
    assert any("MB of the inputs are there already; 0 B to send" in text for text in said)
    assert digests(copy) == digests(model)


def test_a_changed_input_leaves_other_jobs_what_they_have(
    other: Machine, fake_lorasmith: str, tmp_path: Path
) -> None:
    """rsync writes into the file that is there: it must not be the one that another job has as well."""
    data = tmp_path / "rows.txt"
    data.write_text("first\n" * 1000)
    jobs = [job_for(other, [name], fake_lorasmith, [data], []) for name in ("one", "two")]
    for job in jobs:
        upload(other, job)
    data.write_text("first\n" * 1000 + "and more\n")
    upload(other, jobs[0])
    one, two = (other.home / ".lorasmith/jobs" / job.id / "in/0/rows.txt" for job in jobs)
    assert one.read_text() == data.read_text()
    assert two.read_text() == "first\n" * 1000


def test_a_kept_file_that_is_damaged_is_sent_anew(
    other: Machine, fake_lorasmith: str, tmp_path: Path
) -> None:
    model = model_folder(tmp_path / "model", 200_000)
    upload(other, job_for(other, ["before"], fake_lorasmith, [model], []))
    kept = other.home / ".lorasmith" / "kept" / digests(model)["weights of a model.bin"]
    with kept.open("r+b") as file:
        file.write(b"damage")
    job = job_for(other, ["after"], fake_lorasmith, [model], [])
    assert upload(other, job)[0] > 200_000
    assert digests(other.home / ".lorasmith/jobs" / job.id / "in/0/model") == digests(model)
    assert hashlib.sha256(kept.read_bytes()).hexdigest() == kept.name


def test_kept_files_go_with_the_last_job_that_has_them(
    other: Machine, fake_lorasmith: str, tmp_path: Path
) -> None:
    model, small = model_folder(tmp_path / "model", 1000), tmp_path / "small.txt"
    small.write_text("x")
    jobs = [job_for(other, [name], fake_lorasmith, [model], []) for name in ("one", "two")]
    for job in jobs:
        upload(other, job)
    kept = other.home / ".lorasmith" / "kept" / digests(model)["weights of a model.bin"]
    for job, is_left in zip(jobs, (True, False), strict=True):
        shutil.rmtree(other.home / ".lorasmith/jobs" / job.id)
        upload(other, job_for(other, ["small"], fake_lorasmith, [small], []))
        assert kept.exists() == is_left


def test_results_that_are_here_are_not_fetched_again(
    other: Machine, fake_lorasmith: str, tmp_path: Path
) -> None:
    model, copy = model_folder(tmp_path / "model", 1_000_000), tmp_path / "here"
    job = job_for(other, ["copy", "in/0/model", "out/0/here"], fake_lorasmith, [model], [copy])
    session, _ = session_for(connect(other), job)
    assert session.run().code == 0
    with bad_line(other.port) as line:
        session, _ = session_for(connect(other, line.port), job)
        session.fetch()
        assert line.bytes < 300_000
        weights = copy / "weights of a model.bin"
        weights.write_bytes(b"x" + weights.read_bytes()[1:])  # changed here: then it is fetched
        session.fetch()
        assert 1_000_000 < line.bytes < 2_000_000
    assert digests(copy) == digests(model)


def test_two_commands_at_once_copy_the_files_of_a_job_one_after_the_other(
    other: Machine, fake_lorasmith: str, tmp_path: Path
) -> None:
    model, copy = model_folder(tmp_path / "model", 2_000_000), tmp_path / "both"
    job = job_for(other, ["copy", "in/0/model", "out/0/both"], fake_lorasmith, [model], [copy])
    with bad_line(other.port) as line, ThreadPoolExecutor() as pool:
        line.bytes_per_second = 5_000_000
        pairs = [session_for(connect(other, line.port), job) for _ in range(2)]
        ended = [pool.submit(session.run) for session, _ in pairs]
        assert [one.result().code for one in ended] == [0, 0]
        assert line.bytes < 2_000_000 * 2 + 1_500_000  # there once and back once; wheel and requests
    assert digests(copy) == digests(model)
    assert any("waiting for it" in text for _, said in pairs for text in said)


def test_the_other_disk_is_full(other: Machine, fake_lorasmith: str, tmp_path: Path) -> None:
    small = other.home / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", small], check=False).returncode:
        pytest.skip("mounting needs root")
    try:
        model = model_folder(tmp_path / "model", 3_000_000)
        job = job_for(
            other,
            ["copy", "in/0/model", "out/0/c"],
            fake_lorasmith,
            [model],
            [tmp_path / "c"],
            folder=str(small),
        )
        session, _ = session_for(connect(other), job)
        with pytest.raises(DiskError, match="too little disk space on the other machine"):
            session.run()
        # The space looked enough, and went to somebody else in the middle of the upload.
        found = session.check()
        session.machine = found.model_copy(update={"disk_free": 10**12})
        with pytest.raises(DiskError, match="the disk is full or fails"):
            session.run()
    finally:
        subprocess.run(["umount", "-l", small], check=True)
