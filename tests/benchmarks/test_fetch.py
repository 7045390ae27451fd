"""Fetching, against a local server that answers as the hub does."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lorasmith.benchmarks import fetch as module
from lorasmith.benchmarks.base import Benchmark
from lorasmith.benchmarks.fetch import SOURCES, Source, fetch
from lorasmith.benchmarks.registry import BENCHMARKS
from lorasmith.errors import InputError, MachineError, UsageError
from lorasmith.testset.build import build
from tests.benchmarks.layouts import layout, write_layout

REVISION = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Files by (repository, name); what was asked for is kept."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[tuple[str, str], bytes] = {}
        self.large: set[tuple[str, str]] = set()
        self.gated: set[str] = set()
        self.cut_after: int | None = None
        self.tag: str | None = None
        """What is given as every file's tag instead of its hash."""
        self.asked: list[tuple[str, str, str | None]] = []
        self.tokens: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        _, kind, owner, name, resolve, revision, file = self.path.split("/", 6)
        assert (kind, resolve) == ("datasets", "resolve")
        repository = f"{owner}/{name}"
        self.server.asked.append((self.command, file, self.headers.get("Range")))
        self.server.tokens.append(self.headers.get("Authorization"))
        if repository in self.server.gated and not self.headers.get("Authorization"):
            self.refuse(401, "GatedRepo")
        elif (repository, file) not in self.server.files:
            self.refuse(404, "EntryNotFound")
        else:
            self.send_file(repository, revision, file, with_body)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_file(self, repository: str, revision: str, file: str, with_body: bool) -> None:
        content = self.server.files[repository, file]
        start = 0
        asked = self.headers.get("Range")
        if asked:
            start = int(asked.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if asked else 200)
        self.send_header("X-Repo-Commit", revision)
        blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        self.send_header("ETag", f'"{self.server.tag or blob}"')
        if (repository, file) in self.server.large:
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Linked-Size", str(len(content)))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if with_body:
            end = len(content) if self.server.cut_after is None else self.server.cut_after
            self.wfile.write(content[start : max(start, end)])
            if end < len(content):
                self.server.cut_after = None
                self.close_connection = True
                self.connection.close()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import huggingface_hub.constants

    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.shutdown()
    server.server_close()


def serve(hub: Hub, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], **changes: Any) -> Source:
    """One invented place for HumanEval."""
    source = Source("owner/set", REVISION, tuple(files), **changes)
    monkeypatch.setattr(module, "SOURCES", {**SOURCES, "HumanEval": source})
    for name, content in files.items():
        hub.files["owner/set", name] = content
    return source


def test_a_tag_that_climbs_is_refused_and_nothing_is_written_outside(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    serve(hub, monkeypatch, {"human-eval.jsonl": b"{}"})
    hub.tag = "/../../../../../outside"
    with pytest.raises(InputError, match="names a file by etag"):
        fetch(tmp_path / "sets" / "raw", only=["HumanEval"])
    assert not list(tmp_path.rglob("*outside*"))


def test_every_benchmark_is_pinned_to_a_commit() -> None:
    assert set(SOURCES) == {benchmark.name for benchmark in BENCHMARKS}
    for source in SOURCES.values():
        assert len(source.revision) == 40 and int(source.revision, 16)
    assert "taken down" in SOURCES["MATH"].note


def test_files_are_fetched_checked_and_recorded(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    content = os.urandom(300_000)
    serve(hub, monkeypatch, {"a/test.parquet": content, "small.jsonl": b"{}\n"})
    hub.large.add(("owner/set", "a/test.parquet"))
    record = fetch(tmp_path, only=["HumanEval"])
    assert (tmp_path / "humaneval" / "a" / "test.parquet").read_bytes() == content
    assert [file.path for file in record.files] == ["humaneval/a/test.parquet", "humaneval/small.jsonl"]
    assert record.files[0].sha256 == hashlib.sha256(content).hexdigest()
    assert record.files[0].revision == REVISION
    assert json.loads((tmp_path / "fetched.json").read_text())["format"] == "lorasmith/benchmarks-fetched/1"


def test_what_is_there_and_right_is_not_fetched_again(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    serve(hub, monkeypatch, {"a.jsonl": b'{"a": 1}\n' * 100})
    first = fetch(tmp_path, only=["HumanEval"])
    hub.asked.clear()
    assert fetch(tmp_path, only=["HumanEval"]) == first
    assert [command for command, _, _ in hub.asked] == ["HEAD"]
    path = tmp_path / "humaneval" / "a.jsonl"
    path.write_bytes(path.read_bytes().replace(b"1", b"2"))
    assert fetch(tmp_path, only=["HumanEval"]) == first


def test_a_download_that_was_cut_off_goes_on(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    content = os.urandom(3_000_000)
    serve(hub, monkeypatch, {"a.parquet": content})
    hub.cut_after = 1_500_000
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 16)
    arrived: list[int] = []

    class Bar:
        def __init__(self, label: str, *, total: int, unit: str) -> None:
            assert total == len(content) and unit == "B"

        def __enter__(self) -> Any:
            return arrived.append

        def __exit__(self, *exception: object) -> None:
            return None

    fetch(tmp_path, only=["HumanEval"], progress=Bar)
    assert (tmp_path / "humaneval" / "a.parquet").read_bytes() == content
    assert any(asked and asked.startswith("bytes=") for _, _, asked in hub.asked)
    assert sum(arrived) == len(content)


def test_a_file_that_is_not_the_known_one_is_refused_and_removed(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    serve(hub, monkeypatch, {"a.parquet": b"other"}, known={"a.parquet": "0" * 64})
    record = fetch(tmp_path, only=["HumanEval"])
    [finding] = [found for found in record.findings if found.severity == "error"]
    assert "not the one that is known" in finding.message
    assert not (tmp_path / "humaneval" / "a.parquet").exists()


def test_gated_sets_say_how_to_get_access_and_the_others_still_come(hub: Hub, tmp_path: Path) -> None:
    gpqa, drop = SOURCES["GPQA"], SOURCES["DROP"]
    hub.files[gpqa.repository, gpqa.files[0]] = b"secret"
    hub.files[drop.repository, drop.files[0]] = b"rows"
    hub.gated.add(gpqa.repository)
    record = fetch(tmp_path, only=["GPQA", "DROP"])
    assert [file.benchmark for file in record.files] == ["DROP"]
    [finding] = [found for found in record.findings if found.severity == "error"]
    assert "gated" in finding.message and "there is no token" in finding.message
    assert str(finding.where).endswith(gpqa.repository)
    assert "accept the conditions" in str(finding.remedy) and "HF_TOKEN" in str(finding.remedy)


def test_the_token_of_the_usual_place_is_used(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpqa = SOURCES["GPQA"]
    hub.files[gpqa.repository, gpqa.files[0]] = b"rows"
    hub.gated.add(gpqa.repository)
    monkeypatch.setenv("HF_TOKEN", "hf_from_the_environment")
    record = fetch(tmp_path, only=["GPQA"])
    assert [file.benchmark for file in record.files] == ["GPQA"]
    assert set(hub.tokens) == {"Bearer hf_from_the_environment"}


def test_a_set_that_was_taken_down_is_explained(hub: Hub, tmp_path: Path) -> None:
    record = fetch(tmp_path, only=["MATH"])
    [error] = [found for found in record.findings if found.severity == "error"]
    assert "does not have MATH" in error.message and "your own copy" in str(error.remedy)
    assert any("taken down" in found.message for found in record.findings)


def test_no_network_is_one_message_and_exit_3(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub.constants

    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", nowhere)
    template = nowhere + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    with pytest.raises(MachineError, match="cannot be reached"):
        fetch(tmp_path, only=["DROP"])


def test_a_benchmark_without_a_place_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "SOURCES", {})
    with pytest.raises(UsageError, match="no place"):
        fetch(tmp_path, only=["DROP"])


def test_the_command_fetches_what_testset_build_reads(hub: Hub, tmp_path: Path) -> None:
    """The hub's own layout from end to end, HF_ENDPOINT set; the MMLU file is not the known one."""
    wanted: dict[str, tuple[str, str]] = {
        "DROP": ("hub", "parquet"),
        "HumanEval": ("parquet", "parquet"),
        "MATH": ("MATH-500", "jsonl"),
        "MMLU": ("hub", "parquet"),
    }
    made: list[Benchmark] = [benchmark for benchmark in BENCHMARKS if benchmark.name in wanted]
    for benchmark in made:
        source = SOURCES[benchmark.name]
        shape = layout(benchmark.name, wanted[benchmark.name][0])
        path = write_layout(tmp_path / "hub" / benchmark.name, shape)
        hub.files[source.repository, source.files[0]] = path.read_bytes()
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "lorasmith.cli.main", "benchmarks", "fetch"]
    command += ["--output", str(tmp_path / "data")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "not the one that is known under this revision" in done.stdout
    assert "the hub does not have GPQA" in done.stdout and "Traceback" not in done.stderr
    names = ["DROP", "HumanEval", "MATH"]
    statistics = build(tmp_path / "data", tmp_path / "test.jsonl", samples_per_benchmark=1, only=names)
    assert statistics.by_source == {"DROP": 1, "HumanEval": 1, "MATH": 1}
