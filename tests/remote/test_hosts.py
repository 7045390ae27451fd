"""Which machine is it, does it let us in, and what does it have?"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lorasmith.errors import AccessError, ConnectionLostError, RemoteError, UsageError
from lorasmith.remote.job import make_job
from lorasmith.remote.ssh import Patience, SshTransport, parse_host
from tests.remote.jobs import connect, job_for, session_for
from tests.remote.machines import SSHD, Machine, free_port, make_key

pytestmark = pytest.mark.skipif(not Path(SSHD).exists(), reason="needs Debian's openssh-server and rsync")


def test_another_host_key_is_refused_everywhere(other: Machine, tmp_path: Path) -> None:
    wrong = make_key(tmp_path / "another")
    transport = SshTransport(parse_host(other.address), identity=other.key)
    with pytest.raises(RemoteError, match="another machine"):
        transport.trust(fingerprint=wrong)
    with pytest.raises(UsageError, match="not known yet") as unknown:
        transport.trust()
    assert other.fingerprint in str(unknown.value)
    with pytest.raises(UsageError, match="not known yet"):
        transport.trust(confirm=lambda name, prints: False)
    with pytest.raises(RemoteError, match="host key is not the known one"):
        transport.request({"do": "check", "folder": "~/x"})
    transport.trust(confirm=lambda name, prints: other.fingerprint in prints)
    assert transport.request({"do": "check", "folder": "~/x"})["ok"]
    # The machine at this address changes: its key is not the one that was confirmed.
    known = transport.known_hosts
    changed = (tmp_path / "another.pub").read_text().split()[:2]
    known.write_text(f"[127.0.0.1]:{other.port} {' '.join(changed)}\n")
    with pytest.raises(RemoteError, match="host key is not the known one"):
        transport.request({"do": "check", "folder": "~/x"})
    with pytest.raises(RemoteError, match="host key is not the known one"):
        transport.send(tmp_path, ["another.pub"], "~/x", lambda count: None)


def test_a_request_that_fails_there_is_an_answer_and_no_broken_connection(other: Machine) -> None:
    """Else it would be tried again and again, and be told as a fault of the line."""
    transport = connect(other)
    for request in ({"do": "no such request"}, {"do": "status"}):
        answer = transport.request(request)
        assert answer["ok"] is False and "KeyError" in answer["error"]


def test_nobody_is_there(tmp_path: Path) -> None:
    transport = SshTransport(parse_host(f"root@127.0.0.1:{free_port()}"), silence=2)
    with pytest.raises(ConnectionLostError, match="no ssh server answers"):
        transport.trust(fingerprint="SHA256:x")
    session, _ = session_for(
        transport,
        make_job("root@127.0.0.1", 1, ["x"], [], [], folder="~/x", extras=[]),
        Patience(2, 0.01, 0.01),
    )
    with pytest.raises(ConnectionLostError, match="connection") as lost:
        session.check()
    assert "refused" in str(lost.value)


def test_a_key_that_is_not_let_in(other: Machine, tmp_path: Path) -> None:
    make_key(tmp_path / "stranger")
    transport = SshTransport(parse_host(other.address), identity=tmp_path / "stranger")
    transport.trust(fingerprint=other.fingerprint)
    with pytest.raises(AccessError, match="nobody in"):
        transport.request({"do": "check", "folder": "~/x"})


def test_a_machine_without_python_or_rsync_or_gpu(
    other: Machine, fake_lorasmith: str, tmp_path: Path
) -> None:
    tools = other.home / "tools"
    tools.mkdir()
    job = job_for(other, ["fail", "0"], fake_lorasmith, [], [])
    try:
        other.environment(PATH=str(tools))
        with pytest.raises(RemoteError, match=r"no Python 3\.11"):
            connect(other).request({"do": "check", "folder": "~/x"})
        (tools / "python3").symlink_to(sys.executable)
        session, _ = session_for(connect(other), job)
        with pytest.raises(RemoteError, match="rsync is not installed"):
            session.check()
    finally:
        other.environment()
    session, _ = session_for(connect(other), job)
    if not session.check().gpus:
        with pytest.raises(RemoteError, match="no NVIDIA GPU"):
            session.check(needs_gpu=True)
    gpu = other.home / "gpu"
    gpu.mkdir()
    (gpu / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559 MiB'\n")
    (gpu / "nvidia-smi").chmod(0o755)
    try:
        other.environment(PATH=f"{gpu}:{Path(sys.executable).parent}:/usr/bin:/bin")
        session, _ = session_for(connect(other), job)
        assert session.check(needs_gpu=True).gpus == ["NVIDIA H100 80GB HBM3, 81559 MiB"]
    finally:
        other.environment()


@pytest.mark.parametrize("text", ["", "-oProxyCommand=x", "a@-b", "root@host:port", "a b@c", "a@b@c"])
def test_hosts_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="not a machine"):
        parse_host(text)
