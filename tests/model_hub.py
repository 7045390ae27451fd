"""A server that answers about models as the Hugging Face hub does, and a cache laid out as the hub's."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = ".safetensors"
"""What the hub keeps in large-file storage, described by SHA-256 instead of Git's hash."""


class ModelHub(ThreadingHTTPServer):
    """One model, its branches, and what was asked for."""

    daemon_threads = True

    def __init__(self, repository: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repository = repository
        self.files: dict[str, bytes] = {}
        self.revisions = {"main": COMMIT}
        self.gated = False
        self.broken: set[str] = set()
        """Files that answer with an error of the server."""
        self.damaged: set[str] = set()
        """Files whose bytes are not those that were announced."""
        self.told: dict[str, object] = {}
        """What the description of the model says instead of the truth, by field."""
        self.headers: dict[str, str] = {}
        """What the answers' headers say of weights instead of the truth."""
        self.asked: list[str] = []
        """Files in the order in which their bytes were asked for, and `api` for the list."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def load(self, folder: Path) -> None:
        """Offer the files of a model folder."""
        self.files |= {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


@contextmanager
def serving(repository: str) -> Iterator[ModelHub]:
    """The server while the block runs."""
    server = ModelHub(repository)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ModelHub

    def log_message(self, format: str, *args: object) -> None: ...

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        name, rest = "/".join(parts[2:4] if api else parts[:2]), parts[4:] if api else parts[2:]
        # Both begin with a word (`revision` or `resolve`); a revision may hold slashes, files here do not.
        revision = "/".join(rest[1:] if api else rest[1:-1]) or "main"
        commit = self.server.revisions.get(revision, revision)
        if name != self.server.repository:
            self._refuse(401, "RepoNotFound")
        elif commit not in self.server.revisions.values():
            self._refuse(404, "RevisionNotFound")
        elif api:
            self.server.asked.append("api")
            self._send(json.dumps(self._describe(commit)).encode(), commit, with_body)
        elif self.server.gated and not self.headers.get("Authorization"):
            self._refuse(401, "GatedRepo")
        elif rest[-1] in self.server.broken:
            self._refuse(404, "EntryNotFound")
        else:
            if with_body:
                self.server.asked.append(rest[-1])
            self._send(self.server.files[rest[-1]], commit, with_body, rest[-1])

    def _describe(self, commit: str) -> dict[str, object]:
        siblings = []
        for file, content in self.server.files.items():
            entry: dict[str, object] = {"rfilename": file, "size": len(content), "blobId": _git(content)}
            if file.endswith(LARGE):
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
            siblings.append(entry)
        return {"id": self.server.repository, "sha": commit, "siblings": siblings, **self.server.told}

    def _send(self, content: bytes, commit: str, with_body: bool, file: str = "") -> None:
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_git(content)}"'}
        if file.endswith(LARGE):
            headers["X-Linked-Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            headers["X-Linked-Size"] = str(len(content))
            headers |= self.server.headers
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(content if file not in self.server.damaged else bytes(len(content)))

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _git(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def fill_cache(
    cache: Path, repository: str, folder: Path, *, commit: str = COMMIT, ref: str = "main"
) -> Path:
    """A snapshot of a folder as huggingface_hub would have downloaded it: links into a store of blobs."""
    place = cache / ("models--" + repository.replace("/", "--"))
    snapshot, blobs = place / "snapshots" / commit, place / "blobs"
    for made in (snapshot, blobs, place / "refs"):
        made.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        content = file.read_bytes()
        blob = blobs / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", blob.name))
    (place / "refs" / ref).write_text(commit)
    return snapshot
