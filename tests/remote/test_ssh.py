"""Work on another machine: against a real sshd, over lines that are slow and cut."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorasmith.errors import (
    AccessError,
    BusyError,
    ConnectionLostError,
    DiskError,
    InputError,
    RemoteError,
    UsageError,
)
from lorasmith.records.remote import RemoteJob, Transfer
from lorasmith.remote.job import make_job
from lorasmith.remote.session import Session
from lorasmith.remote.ssh import SshTransport, parse_host
from lorasmith.remote.transport import Patience
from lorasmith.remote.wheel import build_wheel, constraints
from tests.remote.machines import SSHD, Machine, bad_line, free_port, machine, make_key

pytestmark = pytest.mark.skipif(not Path(SSHD).exists(), reason="needs Debian's openssh-server and rsync")

QUICK = Patience(attempts=6, first=0.05, longest=0.2)

# Stands in for lorasmith on the other machine.
FAKE = """
import json, os, pathlib, sys, time
words = sys.argv[1:]
if words[0] == "copy":
    source, target = map(pathlib.Path, words[1:3])
    target.mkdir(parents=True, exist_ok=True)
    for path in source.rglob("*"):
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    (target / ".lock").touch()
    print("copied", flush=True)
elif words[0] == "slow":
    print("began", flush=True)
    pathlib.Path(words[1]).mkdir(parents=True, exist_ok=True)
    for count in range(int(words[2])):
        print(f"tick {count}", flush=True)
        time.sleep(0.1)
    pathlib.Path(words[1], "ticks").write_text(words[2])
elif words[0] == "environment":
    pathlib.Path(words[1]).parent.mkdir(parents=True, exist_ok=True)
    secret = os.environ["SECRET_TOKEN"]
    pathlib.Path(words[1]).write_text(str(len(secret)))
sys.exit(int(words[-1]) if words[0] == "fail" else 0)
"""


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with machine(tmp_path_factory.mktemp("machine")) as found:
        yield found


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORASMITH_STATE", str(tmp_path / "state"))


@pytest.fixture
def fake_lorasmith(other: Machine) -> str:
    """An interpreter on the other machine whose `-m lorasmith.cli.main` is the fake above."""
    code = other.home / "fake.py"
    code.write_text(FAKE)
    shim = other.home / "python-with-fake"
    shim.write_text(
        f'#!/bin/sh\nif [ "$2" = lorasmith.cli.main ]; then shift 2; exec {sys.executable} {code} "$@"; fi\n'
        f'exec {sys.executable} "$@"\n'
    )
    shim.chmod(0o755)
    return str(shim)


def connect(other: Machine, port: int | None = None, **more: object) -> SshTransport:
    host = parse_host(other.address.rsplit(":", 1)[0] + f":{port or other.port}")
    transport = SshTransport(host, identity=other.key, **more)  # type: ignore[arg-type]
    transport.trust(fingerprint=other.fingerprint)
    return transport


def job_for(
    other: Machine,
    command: list[str],
    python: str | None,
    inputs: list[Path],
    outputs: list[Path],
    **more: object,
) -> RemoteJob:
    sent = [Transfer(local=str(path), remote=f"in/{n}/{path.name}") for n, path in enumerate(inputs)]
    back = [Transfer(local=str(path), remote=f"out/{n}/{path.name}") for n, path in enumerate(outputs)]
    settings = {"folder": "~/.lorasmith", "extras": [], "python": python, **more}
    return make_job(other.address, other.port, command, sent, back, **settings)


def session_for(
    transport: SshTransport, job: RemoteJob, patience: Patience = QUICK, **more: object
) -> tuple[Session, list[str]]:
    said: list[str] = []
    settings = {"poll_seconds": 0.05, **more}
    return Session(transport, job, patience=patience, say=said.append, **settings), said  # type: ignore[arg-type]


def model_folder(folder: Path, size: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "weights of a model.bin").write_bytes(os.urandom(size))
    (folder / "config.json").write_text("{}")
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


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
    model, copy = model_folder(tmp_path / "model", 1_500_000), tmp_path / "copy"
    with bad_line(other.port) as line:
        transport = connect(other, line.port, silence=2)
        line.cut_after, line.most_cuts, line.bytes_per_second = 400_000, 7, 10_000_000
        job = job_for(other, ["copy", "in/0/model", "out/0/copy"], fake_lorasmith, [model], [copy])
        session, _ = session_for(transport, job)
        assert session.run().code == 0
        # 1.5 MB each way through pieces of at most 0.4 MB: whatever arrives before a cut is kept.
        assert line.cuts >= 6
    assert digests(copy) == digests(model)


def test_an_interrupted_upload_goes_on_where_it_was(
    other: Machine, fake_lorasmith: str, tmp_path: Path
) -> None:
    """The command is ended in the middle of the upload, and given again."""
    model, copy = model_folder(tmp_path / "model", 4_000_000), tmp_path / "copy"
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
        assert 1_000_000 < kept < 4_000_000
        line.bytes_per_second, before = None, line.bytes
        again, _ = session_for(connect(other, line.port), job)
        assert again.run().code == 0
        # There what was missing, back all of it; wheel, digests and the log are some 0.4 MB more.
        assert line.bytes - before < 4_000_000 - kept + 4_000_000 + 1_000_000
    assert digests(copy) == digests(model)


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


def test_secrets_reach_the_command_and_nothing_else(
    other: Machine, fake_lorasmith: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "hf_" + "verysecret" * 3
    monkeypatch.setenv("SECRET_TOKEN", secret)
    result = tmp_path / "length.txt"
    job = job_for(
        other, ["environment", "out/0/length.txt"], fake_lorasmith, [], [result], environment=["SECRET_TOKEN"]
    )
    transport = connect(other)
    calls: list[str] = []
    real = subprocess.Popen

    def watched(command: object, *args: object, **kwargs: object) -> object:
        calls.append(str(command))
        return real(command, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr("lorasmith.remote.ssh.subprocess.Popen", watched)
    session, said = session_for(transport, job)
    assert session.run().code == 0
    assert result.read_text() == str(len(secret))
    assert calls and not [call for call in calls if secret in call]
    assert secret not in "\n".join(said)
    for folder in (other.home, tmp_path / "state"):
        for path in folder.rglob("*"):
            assert not path.is_file() or secret.encode() not in path.read_bytes(), path
    monkeypatch.delenv("SECRET_TOKEN")
    job = job.model_copy(update={"id": "another"})
    result.unlink()
    with pytest.raises(UsageError, match="SECRET_TOKEN is not set"):
        session_for(transport, job)[0].run()


def test_lorasmith_is_installed_into_an_environment_of_its_own(
    other: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a wheel that needs nothing, since torch would take minutes: the installation is the real one."""
    name = "lorasmith-0.1.0"
    wheel = tmp_path / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("lorasmith/__init__.py", "")
        archive.writestr("lorasmith/cli/__init__.py", "")
        archive.writestr(
            "lorasmith/cli/main.py",
            "import pathlib, sys\npathlib.Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)\n"
            "pathlib.Path(sys.argv[1], 'prefix').write_text(sys.prefix)\n",
        )
        archive.writestr(
            f"{name}.dist-info/METADATA", "Metadata-Version: 2.1\nName: lorasmith\nVersion: 0.1.0\n"
        )
        archive.writestr(
            f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{name}.dist-info/RECORD", "")
    monkeypatch.setattr("lorasmith.remote.job.build_wheel", lambda: (wheel.name, wheel.read_bytes()))
    monkeypatch.setattr("lorasmith.remote.session._ENVIRONMENT_BYTES", 0)
    for count in ("first", "second"):
        result = tmp_path / count
        job = job_for(other, [f"out/0/{count}"], None, [], [result])
        session, said = session_for(connect(other), job)
        assert session.run().code == 0, said
        prefix = Path((result / "prefix").read_text())
        assert prefix.parent == other.home / ".lorasmith" / "envs"
    assert not [line for line in said if "Installing collected" in line]  # the second job finds it ready


def test_our_wheel_holds_this_source_and_pip_accepts_it(tmp_path: Path) -> None:
    name, packed = build_wheel()
    assert build_wheel() == (name, packed)
    (tmp_path / name).write_bytes(packed)
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        tmp_path / "t",
    ]
    subprocess.run([*command, tmp_path / name], check=True)
    import lorasmith

    source = Path(lorasmith.__file__).parent
    ours = {path.relative_to(source): path.read_bytes() for path in source.rglob("*.py")}
    theirs = tmp_path / "t" / "lorasmith"
    assert {path.relative_to(theirs): path.read_bytes() for path in theirs.rglob("*.py")} == ours
    pinned = dict(line.split("==") for line in constraints().splitlines())
    assert "torch" in pinned and "+" not in pinned["torch"]
    assert "lorasmith" not in pinned


def test_models_are_fetched_from_the_hub_there(other: Machine, fake_lorasmith: str, tmp_path: Path) -> None:
    stub = other.home / "stub"
    stub.mkdir()
    (stub / "huggingface_hub.py").write_text(
        "import pathlib\n"
        "def snapshot_download(repository, revision, local_dir):\n"
        "    pathlib.Path(local_dir).mkdir(parents=True)\n"
        "    pathlib.Path(local_dir, 'from').write_text(f'{repository} {revision}')\n"
    )
    shim = other.home / "python-with-hub"
    shim.write_text(
        Path(fake_lorasmith).read_text().replace("#!/bin/sh\n", f"#!/bin/sh\nexport PYTHONPATH={stub}\n")
    )
    shim.chmod(0o755)
    from lorasmith.remote.job import hub_model

    model = hub_model("hub:Qwen/Qwen3-8B@v1", "in/hub-0/Qwen3-8B")
    copy = tmp_path / "copy"
    job = job_for(other, ["copy", model.remote, "out/0/copy"], str(shim), [], [copy], hub=[model])
    session, _ = session_for(connect(other), job)
    assert session.run().code == 0
    assert (copy / "from").read_text() == "Qwen/Qwen3-8B v1"
    with pytest.raises(UsageError, match="no model of the hub"):
        hub_model("hub:Qwen3-8B", "x")


@pytest.mark.parametrize("text", ["", "-oProxyCommand=x", "a@-b", "root@host:port", "a b@c", "a@b@c"])
def test_hosts_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="not a machine"):
        parse_host(text)


def test_a_missing_input_is_named_before_anything_is_sent(
    other: Machine, fake_lorasmith: str, tmp_path: Path
) -> None:
    job = job_for(other, ["copy", "in/0/nothing", "out/0/c"], fake_lorasmith, [tmp_path / "nothing"], [])
    session, _ = session_for(connect(other), job)
    with pytest.raises(InputError, match="does not exist"):
        session.run()
