"""Publishing, against a local server that answers as the hub does."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorasmith.errors import CheckpointError, MachineError, UsageError
from lorasmith.files.atomic import read_record, write_record
from lorasmith.files.digests import digest_folder
from lorasmith.packaging.card import write_card
from lorasmith.packaging.publish import Changes, publish
from lorasmith.records.merging import MergeRecord
from lorasmith.records.proof import WeightProof
from lorasmith.records.release import GateRecord
from tests.packaging.hub import LARGE, TOKEN, Hub, serving
from tests.samples import digest, sample_run

NAME = "acme/forged"


def proved(run: Path) -> None:
    """Let the proof be one of the merged folder as it is."""
    path = run / "proof" / "weights.json"
    proof = read_record(path, WeightProof)
    write_record(path, proof.model_copy(update={"merged_sha256": digest_folder(run / "merged")}))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a card, whose gates all pass; its weights are large enough for large-file storage."""
    folder = sample_run(tmp_path / "run", count=10)
    weights = folder / "merged" / "model.safetensors"
    weights.write_bytes(os.urandom(LARGE))
    path = folder / "merged" / "lorasmith_merge.json"
    record = read_record(path, MergeRecord)
    kept = [file for file in record.files if file.path != weights.name]
    files = [*kept, digest(weights, folder / "merged")]
    write_record(path, record.model_copy(update={"files": files}))
    gates = read_record(folder / "gates.json", GateRecord)
    good = [result for result in gates.gates if result.verdict == "pass"]
    write_record(folder / "gates.json", GateRecord(passed=True, gates=good))
    (tmp_path / "base").mkdir()
    write_card(folder, base=tmp_path / "base", adapter=tmp_path / "base")
    proved(folder)
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    with serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # The other storage protocol speaks to a server of its own; both skip what has arrived.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def merged(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "merged").iterdir()}


def test_the_merged_model_arrives_whole_and_private(run: Path, hub: Hub) -> None:
    done = publish(run, NAME)
    there = dict(hub.repositories[NAME])
    assert there.pop(".gitattributes")
    assert there == merged(run)
    assert (done.private, done.url, done.files) == (True, f"{hub.url}/{NAME}", len(there))
    assert hub.private[NAME]


def test_the_hub_checks_the_card_first(run: Path, hub: Hub) -> None:
    hub.card_errors = [{"message": '"license" must be one of [apache-2.0, mit]'}]
    with pytest.raises(UsageError, match="must be one of"):
        publish(run, NAME)
    assert "model.safetensors" not in hub.repositories[NAME]
    (card,) = hub.cards
    assert card == merged(run)["README.md"].decode()


def test_public_only_when_told(run: Path, hub: Hub) -> None:
    assert not publish(run, NAME, private=False).private
    assert not hub.private[NAME]


def test_the_same_again_replaces_nothing_and_asks_nothing(run: Path, hub: Hub) -> None:
    publish(run, NAME)
    publish(run, NAME)
    assert len(hub.uploads) == 1


def test_an_upload_that_broke_off_goes_on(run: Path, hub: Hub) -> None:
    hub.break_at = "/commit/"
    with pytest.raises(MachineError, match="cannot be reached") as caught:
        publish(run, NAME)
    assert "same command again" in str(caught.value)
    assert len(hub.uploads) == 1
    publish(run, NAME)
    assert len(hub.uploads) == 1, "the weights were sent twice"
    assert hub.repositories[NAME]["model.safetensors"] == merged(run)["model.safetensors"]


def test_other_files_are_replaced_only_by_agreement(run: Path, hub: Hub) -> None:
    publish(run, NAME)
    hub.repositories[NAME] |= {
        "model.safetensors": b"other", "model-00002-of-00002.safetensors": b"stale", "notes.md": b"mine",
    }  # fmt: skip
    before = dict(hub.repositories[NAME])
    with pytest.raises(UsageError, match="nobody agreed"):
        publish(run, NAME)
    assert hub.repositories[NAME] == before
    asked: list[Changes] = []

    def agree(changes: Changes) -> bool:
        asked.append(changes)
        return True

    publish(run, NAME, agree=agree)
    assert asked == [Changes(["model.safetensors"], ["model-00002-of-00002.safetensors"])]
    there = hub.repositories[NAME]
    assert there["model.safetensors"] == merged(run)["model.safetensors"]
    assert there["notes.md"] == b"mine"
    assert "model-00002-of-00002.safetensors" not in there


def fail_a_gate(run: Path) -> None:
    gates = read_record(run / "gates.json", GateRecord)
    bad = [result.model_copy(update={"verdict": "fail"}) for result in gates.gates]
    write_record(run / "gates.json", GateRecord(passed=False, gates=bad))


def grade_as_different(run: Path) -> None:
    proof = read_record(run / "proof" / "weights.json", WeightProof)
    write_record(run / "proof" / "weights.json", proof.model_copy(update={"grade": "different"}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (fail_a_gate, "gates that did not pass: loss"),
        (grade_as_different, "its weights are not the merge"),
        (lambda run: (run / "proof" / "weights.json").unlink(), "not proved"),
        (lambda run: (run / "gates.json").unlink(), "not judged"),
        (lambda run: (run / "testset" / "contamination.json").unlink(), "not checked for training rows"),
    ],
    ids=["gates", "different", "no proof", "no gates", "no check"],
)
def test_an_unproven_or_failed_run_stays_here_unless_told(
    run: Path, hub: Hub, change: object, says: str
) -> None:
    change(run)  # type: ignore[operator]
    with pytest.raises(UsageError, match=says):
        publish(run, NAME)
    assert not hub.repositories
    publish(run, NAME, allow_failed=True)
    assert "model.safetensors" in hub.repositories[NAME]


@pytest.mark.parametrize("name", ["model.safetensors", "extra.bin"])
def test_what_was_not_merged_never_leaves_even_when_told(run: Path, hub: Hub, name: str) -> None:
    (run / "merged" / name).write_bytes(os.urandom(LARGE))
    with pytest.raises(CheckpointError):
        publish(run, NAME, allow_failed=True)
    assert not hub.repositories


def test_a_proof_of_another_folder_is_no_proof(run: Path, hub: Hub) -> None:
    path = run / "merged" / "lorasmith_merge.json"
    record = read_record(path, MergeRecord)
    write_record(path, record.model_copy(update={"seed": 7}))
    with pytest.raises(CheckpointError, match="not the one that was proved"):
        publish(run, NAME, allow_failed=True)
    assert not hub.repositories


@pytest.mark.parametrize("name", ["forged", "a/b/c", "acme/", "../x", "acme/fo rged", "-/.."])
def test_a_wrong_name_is_refused_before_any_request(run: Path, name: str) -> None:
    with pytest.raises(UsageError, match="no name of a repository"):
        publish(run, name)


@pytest.mark.parametrize(("status", "kind"), [(401, UsageError), (403, UsageError), (500, MachineError)])
def test_errors_of_the_hub_never_show_the_token(
    run: Path, hub: Hub, status: int, kind: type[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    hub.status = status
    with pytest.raises(kind, match=f"HTTP {status}") as caught:
        publish(run, NAME)
    shown = capsys.readouterr()
    assert "secret" not in str(caught.value) + shown.out + shown.err
    assert caught.value.__cause__ is None


def test_without_a_token_the_remedy_is_a_login(
    run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UsageError, match="hf auth login"):
        publish(run, NAME)


def test_no_hub_and_no_network_are_the_machines_fault(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(MachineError, match="cannot be reached"):
        publish(run, NAME)


def command(run: Path, hub: Hub, *flags: str, answer: bytes | None = None) -> tuple[int, str]:
    """`lorasmith publish` as typed: exit code and all that it printed; `answer` is typed at a terminal."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    typed, terminal = pty.openpty()
    if answer is not None:
        os.write(typed, answer)
    done = subprocess.run(
        [sys.executable, "-m", "lorasmith.cli.main", "publish", str(run), "--repo", NAME, *flags],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL if answer is None else terminal, check=False,
    )  # fmt: skip
    os.close(typed)
    os.close(terminal)
    return done.returncode, done.stdout


def test_the_command_asks_at_a_terminal_and_refuses_elsewhere(run: Path, hub: Hub) -> None:
    code, out = command(run, hub)
    assert (code, TOKEN in out) == (0, False), out
    assert f"Published: {hub.url}/{NAME} (private," in out
    hub.repositories[NAME]["config.json"] = b"{}"
    code, out = command(run, hub)
    assert code == 2
    assert "--yes" in out
    code, out = command(run, hub, answer=b"n\n")
    assert code == 2
    assert "replaces config.json" in out
    assert hub.repositories[NAME]["config.json"] == b"{}"
    assert command(run, hub, answer=b"y\n")[0] == 0
    assert hub.repositories[NAME]["config.json"] == merged(run)["config.json"]
    hub.repositories[NAME]["config.json"] = b"{}"
    assert command(run, hub, "--yes")[0] == 0
    assert hub.repositories[NAME]["config.json"] == merged(run)["config.json"]
