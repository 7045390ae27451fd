"""What is made on the other machine: an environment, models of the hub, a command with its secrets."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lorasmith.errors import UsageError
from lorasmith.records.remote import Transfer
from lorasmith.remote.job import build_wheel, constraints, hub_model
from tests.model_hub import COMMIT, serving
from tests.remote.jobs import connect, job_for, session_for
from tests.remote.machines import SSHD, Machine

pytestmark = pytest.mark.skipif(not Path(SSHD).exists(), reason="needs Debian's openssh-server and rsync")


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


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer.json": b"{}"},
        {"adapter_config.json": b"{}", "adapter_model.safetensors": b"factors"},
    ],
    ids=["a model", "an adapter"],
)
def test_models_are_fetched_from_the_hub_there_once(
    other: Machine,
    fake_lorasmith: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, bytes],
) -> None:
    """A model or an adapter: safetensors and what belongs to them, checked, and never a pickle."""
    monkeypatch.setattr("lorasmith.remote.job.build_wheel", build_wheel)  # with the code that fetches
    with serving("Qwen/Qwen3-8B") as hub:
        hub.revisions["v1"] = COMMIT
        hub.files = {**files, "training_args.bin": b"a pickle", "original/params.json": b"{}"}
        shim = other.home / f"python-with-hub-{len(files)}"
        shim.write_text(
            Path(fake_lorasmith)
            .read_text()
            .replace("#!/bin/sh\n", f"#!/bin/sh\nexport HF_ENDPOINT={hub.url} HF_HUB_OFFLINE=0\n")
        )
        shim.chmod(0o755)
        model = hub_model("hub:Qwen/Qwen3-8B@v1", "in/hub-0/Qwen3-8B")
        folder = f"~/.lorasmith-{len(files)}"
        for count in (1, 2):  # the place is that of the first command, and is not cleared by the next
            copy = tmp_path / f"copy{count}"
            command = ["copy", model.remote, "out/0/copy"]
            job = job_for(other, command, str(shim), [], [copy], hub=[model], folder=folder)
            job = job.model_copy(update={"outputs": [Transfer(local=str(copy), remote="out/0/copy")]})
            session, said = session_for(connect(other), job)
            assert session.run().code == 0, said
            assert {path.name: path.read_bytes() for path in copy.iterdir()} == files
        assert sum(name.endswith(".safetensors") for name in hub.asked) == 1
        (weights,) = (name for name in files if name.endswith(".safetensors"))
        hub.files[weights], hub.damaged, hub.revisions["v2"] = b"newer ones", {weights}, COMMIT[::-1]
        damaged = hub_model("hub:Qwen/Qwen3-8B@v2", "in/hub-0/Qwen3-8B")
        job = job_for(
            other, ["copy", damaged.remote, "out/0/x"], str(shim), [], [tmp_path / "x"],
            hub=[damaged], folder=folder,
        )  # fmt: skip
        session, said = session_for(connect(other), job)
        assert session.run().code == 3
        assert any("arrived damaged" in line for line in said), said
    for wrong in ("hub:Qwen3-8B", "hub:a/b/c", "hub:../x", "hub:a/b@../../c", "hub:a/b@"):
        with pytest.raises(UsageError, match="no model of the hub"):
            hub_model(wrong, "x")
