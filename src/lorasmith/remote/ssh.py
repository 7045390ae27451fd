"""The system's ssh and rsync as a transport: host keys always checked, nothing secret in any argument."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lorasmith.errors import (
    AccessError,
    ConnectionLostError,
    DiskError,
    MachineError,
    RemoteError,
    UsageError,
)
from lorasmith.remote import kept, rsync, supervise, there
from lorasmith.remote.hostkeys import Confirm, trust
from lorasmith.remote.process import piped
from lorasmith.remote.state import state_folder
from lorasmith.remote.transport import OnBytes

# The first Python that is new enough; the program comes over standard input, so no argument tells anything.
_LAUNCH = """for p in python3 python3.14 python3.13 python3.12 python3.11 /venv/main/bin/python \\
/opt/conda/bin/python; do
case $($p -V 2>/dev/null) in "Python 3.1"[1-9]*|"Python 3."[2-9][0-9]*) exec $p -I -;; esac; done
echo '@lorasmith {"ok": false, "no_python": true}'; cat >/dev/null"""

# The parts become modules of their own names there, so that they import each other as they do here.
_PROGRAM = """import json, sys, types
for name, source in json.loads({parts!r}):
    part = sys.modules[name] = types.ModuleType(name)
    exec(compile(source, name, "exec"), part.__dict__)
part.answer(json.loads({request!r}))
"""

_PATTERN = re.compile(r"^(?:(?P<user>[^@\s]+)@)?(?P<name>\[[^\]]+\]|[^:@\s]+)(?::(?P<port>\d+))?$")
_REFUSED = ("Permission denied", "Too many authentication failures", "no such identity")
_WRONG_KEY = ("REMOTE HOST IDENTIFICATION HAS CHANGED", "Host key verification failed")


@dataclass(frozen=True)
class Host:
    """`user@name:port`; the name may be one of `~/.ssh/config`."""

    name: str
    user: str | None = None
    port: int | None = None

    @property
    def login(self) -> str:
        """For ssh's command line."""
        return f"{self.user}@{self.name}" if self.user else self.name


def parse_host(text: str) -> Host:
    """Read `user@host[:port]`; raises `UsageError`. A name that ssh could take for an option is refused."""
    match = _PATTERN.match(text)
    if not match or text.startswith("-") or match["name"].startswith("-"):
        raise UsageError(f"{text!r} is not a machine", expected="user@host or user@host:port")
    port = int(match["port"]) if match["port"] else None
    return Host(match["name"].strip("[]"), match["user"], port)


class SshTransport:
    """Requests by ssh, files by rsync over it."""

    def __init__(
        self,
        host: Host,
        *,
        identity: Path | None = None,
        silence: int = 20,
        known_hosts: Path | None = None,
    ) -> None:
        """`silence`: seconds without a sign of life after which a connection counts as lost.

        `known_hosts`: the only file of host keys that counts; lorasmith's own and the user's by default.
        """
        for program in ("ssh", "rsync"):
            if shutil.which(program) is None:
                raise MachineError(f"{program} is not installed here", remedy=f"apt-get install {program}")
        self.host = host
        self.where = host.login + (f":{host.port}" if host.port else "")
        self.silence = silence
        self.known_hosts = known_hosts or state_folder() / "known_hosts"
        self._other_hosts = [] if known_hosts else ["~/.ssh/known_hosts", "/etc/ssh/ssh_known_hosts"]
        self._folder = tempfile.TemporaryDirectory(prefix="lorasmith-ssh-")
        self._config = Path(self._folder.name) / "config"
        self._config.write_text(self._settings(identity))

    def _settings(self, identity: Path | None) -> str:
        every = max(1, self.silence // 4)
        own = f"IdentityFile {_quoted(identity.absolute())}\nIdentitiesOnly yes\n" if identity else ""
        return (
            "Host *\nBatchMode yes\nStrictHostKeyChecking yes\nUpdateHostKeys no\n"
            f"UserKnownHostsFile {' '.join([_quoted(self.known_hosts), *self._other_hosts])}\n"
            "GlobalKnownHostsFile none\n"
            f"ConnectTimeout {self.silence}\nServerAliveInterval {every}\nServerAliveCountMax 3\n"
            f"ForwardAgent no\nForwardX11 no\nClearAllForwardings yes\n{own}"
            "Include ~/.ssh/config\n"
        )

    def trust(
        self,
        *,
        fingerprint: str | Sequence[str] | None = None,
        confirm: Confirm | None = None,
    ) -> list[str]:
        """Make sure that the machine's key is known, by one of these fingerprints: see `hostkeys.trust`."""
        found = subprocess.run(
            ["ssh", "-F", str(self._config), *self._port(), "-G", self.host.login],
            capture_output=True,
            text=True,
            check=False,
        )
        settings = dict(line.split(" ", 1) for line in found.stdout.splitlines() if " " in line)
        if settings.get("proxyjump", "none") != "none" or settings.get("proxycommand", "none") != "none":
            return []  # reachable through another machine only: ssh checks its key against known_hosts
        given = [fingerprint] if isinstance(fingerprint, str) else fingerprint or []
        return trust(
            settings.get("hostname", self.host.name),
            int(settings.get("port", self.host.port or 22)),
            self.known_hosts,
            [Path(file).expanduser() for file in self._other_hosts],
            fingerprints=given,
            confirm=confirm,
        )

    def request(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request to `remote/there.py` and its answer."""
        last: dict[str, Any] = {}
        for answer in self.stream(request):
            last = answer
        return last

    def stream(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """A request with several answers, as they come; the last has `ok`."""
        if request["do"] == "start":
            request = {**request, "supervisor": Path(supervise.__file__).read_text()}
        program = _PROGRAM.format(parts=json.dumps(_parts()), request=json.dumps(request))
        command = ["ssh", "-F", str(self._config), *self._port(), self.host.login, "--", _LAUNCH]
        with piped(command, program.encode()) as child:
            finished = False
            for line in child.output:
                if line.startswith(there.MARK.encode()) and line.endswith(b"\n"):
                    answer = json.loads(line[len(there.MARK) :])
                    self._require_python(answer)
                    finished = "ok" in answer
                    yield answer
            code = child.wait()
        if not finished:
            raise self._failure(code, child.messages)

    def _require_python(self, answer: dict[str, Any]) -> None:
        if answer.get("no_python"):
            raise RemoteError(
                "there is no Python 3.11 or newer on the other machine",
                where=self.where,
                remedy="install one there (apt-get install python3 python3-venv, or conda), then try again",
            )

    def send(self, source: Path, files: list[str], target: str, on_bytes: OnBytes) -> None:
        """Copy files below `source` to the same places below `target` there; goes on with partial files."""
        self._copy(f"{source}/", f"{self._rsync_host()}:{target}/", files, on_bytes)

    def receive(self, source: str, files: list[str], target: Path, on_bytes: OnBytes) -> None:
        """The other way round."""
        self._copy(f"{self._rsync_host()}:{source}/", f"{target}/", files, on_bytes)

    def _copy(self, source: str, target: str, files: list[str], on_bytes: OnBytes) -> None:
        ssh = ["ssh", "-F", str(self._config), *self._port()]
        code, message = rsync.copy(ssh, source, target, files, self.silence, on_bytes)
        if not code:
            return
        if code == rsync.FULL or "No space left" in message or "Disk quota" in message:
            raise DiskError(
                f"a file cannot be written: the disk is full or fails. {_first(message)}".rstrip(),
                where=self.where,
                remedy="free some space and give the same command again; what was copied is kept",
            )
        if code in rsync.BROKEN:
            raise self._failure(255, message)
        raise RemoteError(f"rsync ended with code {code}: {_first(message)}", where=self.where)

    def _failure(self, code: int, message: str) -> Exception:
        """What a broken ssh call means."""
        if any(sign in message for sign in _WRONG_KEY):
            return RemoteError(
                "the machine's host key is not the known one",
                where=self.where,
                expected=f"a key in {self.known_hosts} or ~/.ssh/known_hosts",
                remedy="find out why; where the machine is a new one at an old address, give --fingerprint",
            )
        if any(sign in message for sign in _REFUSED):
            return AccessError(
                f"the machine lets nobody in with these keys: {_first(message)}",
                where=self.where,
                remedy="give the private key with --identity, or add your public key there",
            )
        if code in (127, 126):
            return RemoteError(f"the other machine has no usable shell: {_first(message)}", where=self.where)
        return ConnectionLostError(
            f"the connection broke or never came about: {_first(message) or f'ssh ended with {code}'}",
            where=self.where,
            remedy="check address, port and network; the same command goes on where it was",
        )

    def _port(self) -> list[str]:
        return ["-p", str(self.host.port)] if self.host.port else []

    def _rsync_host(self) -> str:
        name = f"[{self.host.name}]" if ":" in self.host.name else self.host.name
        return f"{self.host.user}@{name}" if self.host.user else name


@cache
def _parts() -> list[tuple[str, str]]:
    """Name and source of what runs there; one imports only from those before it."""
    return [(part.__name__, inspect.getsource(part)) for part in (kept, there)]


def _quoted(path: Path) -> str:
    return f'"{path}"'


def _first(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip() and not line.startswith("@@")]
    return lines[0] if lines else ""
