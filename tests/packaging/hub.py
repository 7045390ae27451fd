"""A local server that takes uploads as the hub does: repositories, large files, commits."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_secretsecretsecretsecretsecretsec"
LARGE = 100_000
"""Bytes from which a file goes to large-file storage."""


class Hub(ThreadingHTTPServer):
    """Repositories by name; what was asked for is kept."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        """Large files by SHA-256, committed or not."""
        self.uploads: list[str] = []
        self.commits = 0
        self.cards: list[str] = []
        self.card_errors: list[dict[str, str]] = []
        self.break_at: str | None = None
        """The path whose next request breaks the connection."""
        self.status: int | None = None
        """Answer every request like this."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: Any) -> None: ...

    def reply(self, body: Any, status: int = 200, code: str = "") -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def refused(self) -> bool:
        if self.server.break_at and self.server.break_at in self.path:
            self.server.break_at = None
            self.close_connection = True
            self.connection.close()
            return True
        if self.server.status:
            self.reply({"error": f"no, {self.headers.get('Authorization')}"}, self.server.status)
            return True
        if self.path.startswith("/api/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.reply({"error": "who are you?"}, 401)
            return True
        return False

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self) -> None:
        if self.refused():
            return
        parts = self.path.split("?")[0].split("/")
        name = "/".join(parts[3:5])
        if name not in self.server.repositories:
            self.reply({"error": "not found"}, 404, "RepoNotFound")
        elif "tree" in parts:
            self.reply([
                {"type": "file", "oid": entry["blobId"], "path": entry["rfilename"], "size": entry["size"]}
                for entry in self.siblings(name)
            ])  # fmt: skip
        else:
            self.reply({
                "id": name, "modelId": name, "sha": "0" * 40, "private": self.server.private[name],
                "siblings": self.siblings(name), "tags": [], "downloads": 0, "likes": 0,
            })  # fmt: skip

    def siblings(self, name: str) -> list[dict[str, Any]]:
        found = []
        for path, content in self.server.repositories[name].items():
            sha = hashlib.sha256(content).hexdigest()
            large = {"lfs": {"sha256": sha, "size": len(content), "pointerSize": 1}}
            found.append({
                "rfilename": path, "size": len(content),
                "blobId": hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest(),
                **(large if len(content) >= LARGE else {}),
            })  # fmt: skip
        return found

    def do_POST(self) -> None:
        content = self.body()
        if self.refused():
            return
        if self.path == "/api/repos/create":
            asked = json.loads(content)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.server.repositories[name] = {".gitattributes": b"*.safetensors filter=lfs\n"}
            self.server.private[name] = asked.get("visibility") == "private"
            self.reply({"url": f"{self.server.url}/{name}", "name": name, "id": "1"})
        elif self.path == "/api/validate-yaml":
            self.server.cards.append(json.loads(content)["content"])
            self.reply(
                {"errors": self.server.card_errors, "warnings": []}, 400 if self.server.card_errors else 200
            )
        elif "/preupload/" in self.path:
            files = json.loads(content)["files"]
            self.reply({"files": [
                {"path": file["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if file["size"] >= LARGE else "regular"} for file in files
            ]})  # fmt: skip
        elif self.path.endswith("/info/lfs/objects/batch"):
            self.reply(
                {"transfer": "basic", "objects": [self.large(o) for o in json.loads(content)["objects"]]}
            )
        elif "/commit/" in self.path:
            self.commit("/".join(self.path.split("/")[3:5]), content)
        else:
            self.reply({}, 404)

    def large(self, asked: dict[str, Any]) -> dict[str, Any]:
        if asked["oid"] in self.server.objects:
            return asked
        return {**asked, "actions": {"upload": {"href": f"{self.server.url}/store/{asked['oid']}"}}}

    def do_PUT(self) -> None:
        content = self.body()
        if self.refused():
            return
        oid = self.path.split("/")[-1]
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.objects[oid] = content
        self.server.uploads.append(oid)
        self.reply({})

    def commit(self, name: str, content: bytes) -> None:
        files = self.server.repositories[name]
        for line in content.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        self.server.commits += 1
        oid = f"{self.server.commits:040x}"
        self.reply({"commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid, "success": True})


@contextmanager
def serving() -> Iterator[Hub]:
    """A server for the time of a test."""
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
