"""Another machine for the tests: a real sshd with keys of its own, and a bad line to it."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

SSHD = "/usr/sbin/sshd"


@dataclass
class Machine:
    """A running sshd for the current user."""

    port: int
    home: Path
    key: Path
    """Private key that is let in."""
    fingerprint: str
    wrapper: Path
    """Every session runs through this shell script: a test may change it."""

    @property
    def address(self) -> str:
        return f"{_user()}@127.0.0.1:{self.port}"

    def environment(self, **variables: str) -> None:
        """The sessions' variables: home and path, with changes."""
        known = {"HOME": str(self.home), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", **variables}
        exports = "".join(f"export {name}='{value}'\n" for name, value in known.items())
        self.wrapper.write_text(
            f'#!/bin/sh\n{exports}cd "$HOME"\n'
            'if [ -n "$SSH_ORIGINAL_COMMAND" ]; then exec /bin/sh -c "$SSH_ORIGINAL_COMMAND"; fi\n'
        )


def _user() -> str:
    return subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make_key(path: Path) -> str:
    """A key pair; returns its fingerprint."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    shown = subprocess.run(["ssh-keygen", "-lf", str(path)], capture_output=True, text=True, check=True)
    return shown.stdout.split()[1]


@contextmanager
def machine(folder: Path, *, port: int | None = None) -> Iterator[Machine]:
    """Start an sshd below `folder`, on its own port, with its own keys; gone at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    home = folder / "home"
    home.mkdir()
    fingerprint = make_key(folder / "host")
    make_key(folder / "user")
    (folder / "authorized").write_text((folder / "user.pub").read_text())
    found = Machine(port or free_port(), home, folder / "user", fingerprint, folder / "wrapper")
    found.environment()
    found.wrapper.chmod(0o755)
    settings = f"""Port {found.port}
ListenAddress 127.0.0.1
HostKey {folder / "host"}
AuthorizedKeysFile {folder / "authorized"}
PidFile {folder / "pid"}
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
MaxStartups 100
PermitRootLogin yes
ForceCommand {found.wrapper}
"""
    (folder / "sshd_config").write_text(settings)
    with suppress(PermissionError):
        Path("/run/sshd").mkdir(exist_ok=True)
    with (folder / "sshd.log").open("wb") as log:
        server = subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=log)
        try:
            _wait_for(found.port)
            yield found
        finally:
            server.terminate()
            server.wait()


def _wait_for(port: int) -> None:
    for _ in range(200):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.02)
    raise AssertionError(f"nothing listens on port {port}")


@dataclass
class Line:
    """A TCP proxy: slow, and cut after so many bytes."""

    port: int
    cuts: int = 0
    """Connections cut so far."""
    cut_after: int | None = None
    """Bytes towards either side after which a connection is cut; None for never."""
    most_cuts: int = 1000
    bytes_per_second: float | None = None
    dead: bool = False
    """True: nobody is let through."""
    bytes: int = 0
    """Passed on so far, both ways."""


@contextmanager
def bad_line(to: int) -> Iterator[Line]:
    """A proxy in front of a port; change the fields of what it yields while it runs."""
    server = socket.create_server(("127.0.0.1", 0))
    line = Line(server.getsockname()[1])
    stopped = threading.Event()

    def accept() -> None:
        while not stopped.is_set():
            try:
                client, _ = server.accept()
            except OSError:
                return
            if line.dead:
                client.close()
                continue
            upstream = socket.create_connection(("127.0.0.1", to))
            threading.Thread(target=carry_both, args=(client, upstream), daemon=True).start()

    def carry_both(client: socket.socket, upstream: socket.socket) -> None:
        passed = [0]
        back = threading.Thread(target=carry, args=(upstream, client, passed), daemon=True)
        back.start()
        carry(client, upstream, passed)
        back.join()
        # Closed only now: a number that is given anew while a thread still reads from it mixes up two lines.
        client.close()
        upstream.close()

    def carry(source: socket.socket, sink: socket.socket, passed: list[int]) -> None:
        with suppress(OSError):
            while piece := source.recv(16384):
                if line.bytes_per_second:
                    time.sleep(len(piece) / line.bytes_per_second)
                passed[0] += len(piece)
                line.bytes += len(piece)
                if line.cut_after is not None and passed[0] > line.cut_after and line.cuts < line.most_cuts:
                    line.cuts += 1
                    break
                sink.sendall(piece)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    listener = threading.Thread(target=accept, daemon=True)
    listener.start()
    try:
        yield line
    finally:
        stopped.set()
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        server.close()
        listener.join(5)
