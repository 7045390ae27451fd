"""A machine that lies: in its list of results, in what it asks for, in what it sends and what it says."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorasmith.cli.remote.jobs import relay
from lorasmith.errors import LorasmithError
from lorasmith.records.remote import RemoteJob, Transfer
from lorasmith.remote.session import Session
from lorasmith.remote.ssh import OnBytes, Patience
from lorasmith.visible import is_visible

CONTENT = b"a result"
GOOD = hashlib.sha256(CONTENT).hexdigest()
MACHINE = {
    "python": "3.11.7",
    "system": "Linux",
    "folder": "/root/.lorasmith",
    "disk_free": 10**12,
    "memory": 10**11,
    "cores": 2,
    "gpus": [],
    "rsync": True,
}


class Liar:
    """A transport that answers as it is told, and writes what it likes into the folder that it is given."""

    where = "root@rented"

    def __init__(self, **answers: Any) -> None:
        self.answers: dict[str, Any] = {
            "check": MACHINE,
            "status": {"phase": "ended", "code": 0},
            "follow": {"phase": "ended", "code": 0},
            "arrived": {"bytes": 0},
            "start": {"started": True},
            "prepare_folders": {"missing": []},
            "verify": {"wrong": []},
            **answers,
        }
        self.sent: list[str] = []
        self.write: Callable[[Path, list[str]], None] = write_them

    def request(self, request: dict[str, Any]) -> dict[str, Any]:
        answer = self.answers[request["do"]]
        return {"ok": True, **answer} if isinstance(answer, dict) else {"ok": True, "files": answer}

    def stream(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self.answers.get("log", [])
        yield self.request(request)

    def send(self, source: Path, files: list[str], target: str, on_bytes: OnBytes) -> None:
        self.sent += files

    def receive(self, source: str, files: list[str], target: Path, on_bytes: OnBytes) -> None:
        self.write(target, files)


def write_them(target: Path, files: list[str]) -> None:
    for name in files:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(CONTENT)


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A file that is nobody's business, three folders above where results gather."""
    path = tmp_path / "precious.txt"
    path.write_text("the user's file")
    return path


def session_with(tmp_path: Path, liar: Liar, inputs: list[Path] | None = None) -> tuple[Session, list[str]]:
    (tmp_path / "work" / "deep").mkdir(parents=True, exist_ok=True)
    job = RemoteJob(
        id="0123456789ab",
        host="root@rented",
        folder="~/.lorasmith",
        command=["merge"],
        inputs=[
            Transfer(local=str(path), remote=f"in/{n}/{path.name}") for n, path in enumerate(inputs or [])
        ],
        outputs=[Transfer(local=str(tmp_path / "work" / "deep" / "run"), remote="out/0/run")],
        extras=[],
        python="python3",
    )
    said: list[str] = []
    return Session(liar, job, patience=Patience(attempts=2, sleep=lambda s: None), say=said.append), said


NAMES = [
    "out/0/run/../../../precious.txt",
    "out/0/run/../../../../precious.txt",
    "out/0/../../precious.txt",
    "/etc/passwd",
    "out/0/run//etc/passwd",
    "out/0/run/",
    "out/0/run/./a",
    "out/0/run/a\\..\\b",
    "out/0/run/a\0b",
    "out/0/run/\x1b[2Ja",
    "out/0/run/a\ud800",
    "out/0/run/" + "a" * 300,
    "out/0/other/a",
    "in/0/base",
    "",
    7,
    None,
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize("honest_size", [True, False])
def test_a_name_in_the_list_of_results_that_leads_elsewhere_is_refused_before_any_use(
    tmp_path: Path, precious: Path, name: object, honest_size: bool
) -> None:
    """Reproduced before: the file was fetched, found different, and deleted here."""
    size = len(CONTENT) if honest_size else 1
    liar = Liar(
        manifest=[["out/0/run/ok.txt", len(CONTENT), GOOD], [name, size, GOOD if honest_size else "0" * 64]]
    )
    asked: list[str] = []
    liar.write = lambda target, files: asked.extend(files)
    session, _ = session_with(tmp_path, liar)
    with pytest.raises(LorasmithError):
        session.fetch()
    assert precious.read_text() == "the user's file" and not asked
    assert not (tmp_path / "work" / "deep" / "run").exists()


@pytest.mark.parametrize(
    "rows",
    [
        None,
        "files",
        [["out/0/run/a"]],
        [["out/0/run/a", "8", GOOD]],
        [["out/0/run/a", -1, GOOD]],
        [["out/0/run/a", True, GOOD]],
        [["out/0/run/a", 8, GOOD.upper()]],
        [["out/0/run/a", 8, None]],
        [["out/0/run/a", 8, GOOD], ["out/0/run/A", 8, GOOD]],
        [["out/0/run/a", 8, GOOD], ["out/0/run/a/b", 8, GOOD]],
        [{"path": "out/0/run/a"}],
        [],
    ],
    ids=str,
)
def test_a_list_of_results_that_is_none_is_one_message(tmp_path: Path, rows: object) -> None:
    session, _ = session_with(tmp_path, Liar(manifest={"files": rows}))
    with pytest.raises(LorasmithError):
        session.fetch()


@pytest.mark.parametrize(
    "kind", ["link to a file", "link to a folder", "pipe", "link in place of the folder"]
)
def test_what_arrives_and_is_no_file_is_refused_and_removed(
    tmp_path: Path, precious: Path, kind: str
) -> None:
    def write(target: Path, files: list[str]) -> None:
        write_them(target, files[1:])
        if kind == "link to a file":
            (target / "a").symlink_to(precious)
        elif kind == "link to a folder":
            (target / "sub").symlink_to(precious.parent)
        elif kind == "pipe":
            os.mkfifo(target / "a")
        else:
            (target / "a").symlink_to(precious.parent / "nothing")

    liar = Liar(manifest=[["out/0/run/a", 8, GOOD], ["out/0/run/b", 8, GOOD]])
    liar.write = write
    session, _ = session_with(tmp_path, liar)
    with pytest.raises(LorasmithError, match="has arrived, which is no file"):
        session.fetch()
    assert precious.read_text() == "the user's file"
    assert not any((tmp_path / "work" / "deep").iterdir())


def test_what_was_not_asked_for_is_no_result(tmp_path: Path) -> None:
    def write(target: Path, files: list[str]) -> None:
        write_them(target, [*files, "extra.py", ".hidden", "sub/more"])

    liar = Liar(manifest=[["out/0/run/a", 8, GOOD]])
    liar.write = write
    session, _ = session_with(tmp_path, liar)
    session.fetch()
    run = tmp_path / "work" / "deep" / "run"
    assert [path.name for path in run.rglob("*") if path.is_file()] == ["a"]


def test_a_file_that_never_arrives_deletes_nothing_here(tmp_path: Path, precious: Path) -> None:
    liar = Liar(manifest=[["out/0/run/a", 8, GOOD]])
    liar.write = lambda target, files: None
    session, _ = session_with(tmp_path, liar)
    with pytest.raises(LorasmithError, match="arrive damaged again and again"):
        session.fetch()
    assert precious.exists()


@pytest.mark.parametrize("key", ["missing", "wrong"])
@pytest.mark.parametrize(
    "name", ["../precious.txt", "/etc/passwd", "in/0/base", "in/0/base/../../../precious.txt", 3]
)
def test_only_files_of_the_job_are_sent_whatever_is_asked_for(
    tmp_path: Path, precious: Path, key: str, name: object
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    answers = {"prepare_folders": {"missing": [name]}} if key == "missing" else {"verify": {"wrong": [name]}}
    liar = Liar(**answers, status={"phase": "absent"})
    session, _ = session_with(tmp_path, liar, [base])
    with pytest.raises(LorasmithError, match="none of this job's"):
        session.run()
    assert not liar.sent


@pytest.mark.parametrize(
    ("do", "change"),
    [
        ("check", {"folder": "relative"}),
        ("check", {"folder": "/root/../../x"}),
        ("check", {"folder": ":module"}),
        ("check", {"folder": "/a\nb"}),
        ("check", {"memory": "much"}),
        ("check", {"gpus": "all"}),
        ("check", {"disk_free": None}),
        ("status", {"phase": "made up"}),
        ("status", {"phase": None}),
        ("status", {"phase": "ended", "code": "0"}),
        ("follow", {"phase": "ended", "code": []}),
    ],
    ids=str,
)
def test_an_answer_that_is_none_is_one_message(tmp_path: Path, do: str, change: dict[str, Any]) -> None:
    liar = Liar(**{do: {**(MACHINE if do == "check" else {}), **change}})
    session, _ = session_with(tmp_path, liar)
    with pytest.raises(LorasmithError, match="answer cannot be used"):
        session.look()
        session.status()
        session.attach()


def test_a_log_is_shown_line_by_line_and_obeyed_by_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pieces end within a character and within a line, and hold what a terminal would obey."""
    text = "Größe 1\nzwei \x1b]0;title\x07\x1b[2Jdrei\r\n模型\u202e\x9b31m\nend".encode()
    pieces = [{"log": text[i : i + 3].decode("latin-1"), "offset": i + 3} for i in range(0, len(text), 3)]
    session, _ = session_with(tmp_path, Liar(log=pieces))
    session.say = relay
    session.attach()
    shown = capsys.readouterr().out
    assert is_visible(shown)
    lines = [line for line in shown.split("\n") if line]
    assert lines == ["Größe 1", r"zwei \u001b]0;title\u0007\u001b[2Jdrei", r"模型\u202e\u009b31m", "end"]
