"""The system's ssh and rsync as a transport: host keys always checked, nothing secret in any argument."""

from __future__ import annotations

import contextlib
import inspect
import json
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from lorasmith.errors import (
    AccessError,
    ConnectionLostError,
    DiskError,
    MachineError,
    RemoteError,
    UsageError,
    os_errors,
)
from lorasmith.parsing import parse_json
from lorasmith.remote.agent import file_store, requests, supervise
from lorasmith.remote.state import state_folder

# Which machine is it? Known hosts, and the first contact with a new one.


Confirm = Callable[[str, list[str]], bool]
"""Asks a person whether the machine named first really has one of these fingerprints."""


def trust(
    host: str,
    port: int,
    known_hosts: Path,
    others: list[Path],
    *,
    fingerprints: Sequence[str] = (),
    confirm: Confirm | None = None,
) -> list[str]:
    """Make sure that the machine's key is known: one of `fingerprints`, confirmed, or known before.

    The key goes into `known_hosts`; ssh itself then refuses any other. Returns the fingerprints that were
    added. Raises `RemoteError` for a machine with other keys than `fingerprints`, `UsageError` for an unknown
    one where nobody can be asked.
    """
    name = host if port == 22 else f"[{host}]:{port}"
    if not fingerprints and any(_is_known(name, file) for file in (known_hosts, *others)):
        return []
    keys = {_fingerprint(key): key for key in _scan(host, port)}
    if fingerprints:
        wanted = [text if text.startswith("SHA256:") else f"SHA256:{text}" for text in fingerprints]
        chosen = [fingerprint for fingerprint in keys if fingerprint in wanted]
        if not chosen:
            raise RemoteError(
                f"this is another machine: its keys are {', '.join(keys)}",
                where=name,
                expected=" or ".join(wanted),
                remedy="do not connect before you know why; the provider's console shows the right key",
            )
        _forget(name, known_hosts)
    elif confirm is not None and confirm(name, list(keys)):
        chosen = list(keys)
    else:
        raise UsageError(
            f"this machine is not known yet; it shows the keys {', '.join(keys)}",
            where=name,
            remedy="compare one of them with what its owner or provider tells, then give --fingerprint",
        )
    with os_errors(known_hosts, "write"), known_hosts.open("a") as handle:
        handle.writelines(f"{keys[fingerprint]}\n" for fingerprint in chosen)
    return chosen


def _is_known(name: str, file: Path) -> bool:
    if not file.is_file():
        return False
    command = ["ssh-keygen", "-F", name, "-f", str(file)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _forget(name: str, file: Path) -> None:
    if _is_known(name, file):
        subprocess.run(["ssh-keygen", "-R", name, "-f", str(file)], capture_output=True, check=True)


def _scan(host: str, port: int) -> list[str]:
    command = ["ssh-keyscan", "-T", "10", "-p", str(port), host]
    scan = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    keys = [line for line in scan.stdout.splitlines() if line and not line.startswith("#")]
    if not keys:
        raise ConnectionLostError(
            f"no ssh server answers: {_last_line(scan.stderr) or 'no key was shown'}",
            where=f"{host}:{port}",
            remedy="check the address and port, and that the machine is up",
        )
    return keys


def _fingerprint(key: str) -> str:
    shown = subprocess.run(["ssh-keygen", "-lf", "-"], input=key, capture_output=True, text=True, check=True)
    return shown.stdout.split()[1]


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return lines[-1].strip() if lines else ""


# A program with all three pipes in use at once, which ends with the block it is used in.


@dataclass
class Child:
    """A running program; its messages are complete once the block has ended."""

    process: subprocess.Popen[bytes]
    output: IO[bytes]
    errors: list[bytes] = field(default_factory=list)

    def wait(self) -> int:
        """Its exit code."""
        return self.process.wait()

    @property
    def messages(self) -> str:
        """What it wrote to standard error."""
        return b"".join(self.errors).decode(errors="replace")


@contextmanager
def piped(command: Sequence[str], content: bytes) -> Iterator[Child]:
    """Start `command` with `content` on standard input; killed when the block is left before its end."""
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin and process.stdout and process.stderr  # all three are pipes
        child = Child(process, process.stdout)
        readers = [
            threading.Thread(target=_feed, args=(process.stdin, content)),
            threading.Thread(target=_drain, args=(process.stderr, child.errors)),
        ]
        for reader in readers:
            reader.start()
        try:
            yield child
        except BaseException:
            process.kill()
            raise
        finally:
            for reader in readers:
                reader.join()


def _feed(pipe: IO[bytes], content: bytes) -> None:
    # The other end may be gone already: its exit code and its messages say so.
    with contextlib.suppress(OSError), pipe:
        pipe.write(content)


def _drain(pipe: IO[bytes], into: list[bytes]) -> None:
    into.extend(pipe)


# How requests and files reach another machine: a small interface, and attempts that are worth repeating.


T = TypeVar("T")
OnBytes = Callable[[int], None]
"""Called with the bytes moved so far in this attempt."""


class Transport(Protocol):
    """One other machine. Every call raises `ConnectionLostError` when the connection breaks."""

    where: str
    """`user@host:port`, for messages."""

    def request(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request to `remote/agent/requests.py` and its answer."""

    def stream(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """A request with several answers, as they come; the last has `ok`."""

    def send(self, source: Path, files: list[str], target: str, on_bytes: OnBytes) -> None:
        """Copy files below `source` to the same places below `target` there; goes on with partial files."""

    def receive(self, source: str, files: list[str], target: Path, on_bytes: OnBytes) -> None:
        """The other way round."""


@dataclass(frozen=True)
class Patience:
    """How often a broken connection is tried again, with pauses that double."""

    attempts: int = 8
    """Attempts in a row without any progress."""
    first: float = 1.0
    longest: float = 30.0
    """Seconds."""
    sleep: Callable[[float], None] = time.sleep

    def over(self, attempt: Callable[[Callable[[], None]], T]) -> T:
        """The result of `attempt`, which calls what it is given when it has got further than before.

        Raises the last `ConnectionLostError` when patience is over.
        """
        failed = 0

        def moved() -> None:
            nonlocal failed
            failed = 0

        while True:
            try:
                return attempt(moved)
            except ConnectionLostError:
                failed += 1
                if failed >= self.attempts:
                    raise
                self.sleep(min(self.first * 2 ** (failed - 1), self.longest))


def ask(transport: Transport, patience: Patience, request: dict[str, Any]) -> dict[str, Any]:
    """A request that may be repeated; raises `RemoteError` for what the other machine could not do."""
    return checked(patience.over(lambda moved: transport.request(request)), transport.where)


def checked(answer: dict[str, Any], where: str) -> dict[str, Any]:
    """The answer, unless the other machine's system refused."""
    if answer.get("ok"):
        return answer
    if answer.get("errno") in (28, 122):  # no space, quota: the numbers of Linux, whatever runs here
        raise DiskError(
            f"the other machine's disk is full: {answer['error']}",
            where=where,
            remedy="free some space there, or take --folder on a larger disk; what was sent is kept",
        )
    raise RemoteError(f"the other machine cannot do it: {answer.get('error')}", where=where)


# Files by the system's rsync: continued where an earlier attempt broke off, with progress in bytes.


BROKEN = {10, 12, 30, 35, 255, -13, -1}
"""Exit codes for a broken or silent connection; 255 is ssh's own."""
FULL = 11
"""Exit code for an error in file I/O: often all that comes back when the receiving disk is full."""


ONLY_FILES = ["--no-links", "--no-devices", "--no-specials", "--chmod=D0755,F0644"]
"""What rsync may write here, whatever the other end sends: no links, devices or pipes, with plain rights."""


def copy(
    ssh: list[str],
    source: str,
    target: str,
    files: list[str],
    more: list[str],
    silence: int,
    on_bytes: OnBytes,
) -> tuple[int, str]:
    """Copy `files` below `source` to the same places below `target`; exit code and messages.

    `ssh`: how to reach the other end. `more`: further options of rsync. `silence`: seconds without a byte
    after which it is given up.
    """
    # Not --recursive: of a folder in place of a file nothing is copied.
    command = ["rsync", "-e", shlex.join(ssh), "--secluded-args", "--copy-links", "--times", *more]
    # Partial files are continued in place; whether the result is right, SHA-256 decides afterwards.
    command += ["--partial", "--append-verify", f"--timeout={silence}", "--info=progress2"]
    command += ["--no-inc-recursive", "--from0", "--files-from=-", source, target]
    with piped(command, "\0".join(files).encode()) as child:
        _watch(child.output, on_bytes)
        code = child.wait()
    return code, child.messages


def _watch(pipe: IO[bytes], on_bytes: OnBytes) -> None:
    """rsync's progress: bytes moved, at the beginning of each line that a carriage return ends."""
    rest = b""
    while piece := pipe.read1(4096) if hasattr(pipe, "read1") else pipe.read(4096):
        *lines, rest = re.split(rb"[\r\n]", rest + piece)
        for line in lines:
            number = line.split(b"%")[0].rsplit(b" ", 1)[0].strip().replace(b",", b"").replace(b".", b"")
            if number.isdigit():
                on_bytes(int(number))


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

_LONGEST_ANSWER = 256 << 20
"""Bytes of one answer: a manifest of a million files."""
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
        """User and host for ssh's command line."""
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
        """Make sure that the machine's key is known, by one of these fingerprints: see `trust` above."""
        resolved = subprocess.run(
            ["ssh", "-F", str(self._config), *self._port(), "-G", self.host.login],
            capture_output=True,
            text=True,
            check=False,
        )
        settings = dict(line.split(" ", 1) for line in resolved.stdout.splitlines() if " " in line)
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
        """One request to `remote/agent/requests.py` and its answer."""
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
            while line := child.output.readline(_LONGEST_ANSWER):
                if line.startswith(requests.MARK.encode()) and line.endswith(b"\n"):
                    answer = self._answer(line[len(requests.MARK) :])
                    self._require_python(answer)
                    finished = "ok" in answer
                    yield answer
            code = child.wait()
        if not finished:
            raise self._failure(code, child.messages)

    def _answer(self, line: bytes) -> dict[str, Any]:
        """One answer of the agent; raises `RemoteError` for what it would not say."""
        try:
            answer = parse_json(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise RemoteError(
                "the other machine gives no usable answer", where=self.where, expected="a JSON object a line"
            )
        return answer

    def _require_python(self, answer: dict[str, Any]) -> None:
        if answer.get("no_python"):
            raise RemoteError(
                "there is no Python 3.11 or newer on the other machine",
                where=self.where,
                remedy="install one there (apt-get install python3 python3-venv, or conda), then try again",
            )

    def send(self, source: Path, files: list[str], target: str, on_bytes: OnBytes) -> None:
        """Copy files below `source` to the same places below `target` there; goes on with partial files."""
        self._copy(f"{source}/", f"{self._rsync_host()}:{target}/", files, [], on_bytes)

    def receive(self, source: str, files: list[str], target: Path, on_bytes: OnBytes) -> None:
        """The other way round."""
        self._copy(f"{self._rsync_host()}:{source}/", f"{target}/", files, ONLY_FILES, on_bytes)

    def _copy(self, source: str, target: str, files: list[str], more: list[str], on_bytes: OnBytes) -> None:
        ssh = ["ssh", "-F", str(self._config), *self._port()]
        code, message = copy(ssh, source, target, files, more, self.silence, on_bytes)
        if not code:
            return
        if code == FULL or "No space left" in message or "Disk quota" in message:
            raise DiskError(
                f"a file cannot be written: the disk is full or fails. {_first(message)}".rstrip(),
                where=self.where,
                remedy="free some space and give the same command again; what was copied is kept",
            )
        if code in BROKEN:
            raise self._failure(255, message)
        raise RemoteError(f"rsync ended with code {code}: {_first(message)}", where=self.where)

    def _failure(self, code: int, message: str) -> Exception:
        """The error that a broken ssh call stands for."""
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
    return [(part.__name__, inspect.getsource(part)) for part in (file_store, requests)]


def _quoted(path: Path) -> str:
    return f'"{path}"'


def _first(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip() and not line.startswith("@@")]
    return lines[0] if lines else ""
