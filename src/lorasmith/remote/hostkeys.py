"""Which machine is it? Known hosts, and the first contact with a new one."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from lorasmith.errors import ConnectionLostError, RemoteError, UsageError, os_errors

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
        chosen = [found for found in keys if found in wanted]
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
        handle.writelines(f"{keys[found]}\n" for found in chosen)
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
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    keys = [line for line in found.stdout.splitlines() if line and not line.startswith("#")]
    if not keys:
        raise ConnectionLostError(
            f"no ssh server answers: {_last_line(found.stderr) or 'no key was shown'}",
            where=f"{host}:{port}",
            remedy="check the address and port, and that the machine is up",
        )
    return keys


def _fingerprint(key: str) -> str:
    found = subprocess.run(["ssh-keygen", "-lf", "-"], input=key, capture_output=True, text=True, check=True)
    return found.stdout.split()[1]


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return lines[-1].strip() if lines else ""
