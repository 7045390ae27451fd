"""Runs inside the sandbox's process: lock it up step by step, then run the program. See `sandbox.py`.

Only the standard library and `kernel` are imported, by a Python without site packages and with a clean
environment. The launcher (this process) stays outside; its child is locked up and runs the program.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
from typing import Any

from lorasmith.benchmarks.sandbox import kernel

_NOBODY = 65534
_FOLDER = "/sandbox"
"""Python looks for temporary folders in the working folder when there is no /tmp."""
_SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
_WORLD = kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC
ESSENTIAL = ("network", "files", "signals", "processes", "memory", "cpu", "file size")


def main(result: int) -> None:
    """Read the order from standard input, lock up, run; progress goes to the descriptor `result`."""
    order: dict[str, Any] = json.loads(sys.stdin.buffer.read())
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    kernel.die_with_parent()
    given: set[str] = set()
    notes: list[str] = []
    jailed = order["mode"] != "landlock" and _namespaces(order, given, notes)
    child = os.fork()
    if child == 0:
        kernel.die_with_parent()
        _lock(order, jailed, given, notes)
        lacking = [name for name in ESSENTIAL if name not in given]
        told = {"lacking": lacking, "notes": notes}
        os.write(result, json.dumps(told).encode() + b"\n")
        if lacking:
            os._exit(0)
        _run(order["program"], order["token"], result)
    _, status = os.waitpid(child, 0)
    os.write(result, json.dumps({"status": os.waitstatus_to_exitcode(status)}).encode() + b"\n")


def _namespaces(order: dict[str, Any], given: set[str], notes: list[str]) -> bool:
    """An own network, process table and file tree that holds Python alone; False where not permitted."""
    user, group = os.getuid(), os.getgid()
    try:
        try:
            if user != 0 or order["mode"] == "user":
                raise PermissionError
            kernel.unshare(_WORLD)
        except OSError:
            kernel.unshare(_WORLD | kernel.CLONE_NEWUSER)
            _map(user, group)
        _new_root(order["scratch"], order["file_bytes"])
    except OSError as error:
        notes.append(f"no namespaces: {error}")
        return False
    given |= {"network", "files", "signals"}
    return True


def _map(user: int, group: int) -> None:
    for path, line in (
        ("/proc/self/setgroups", "deny"),
        ("/proc/self/uid_map", f"{_NOBODY} {user} 1"),
        ("/proc/self/gid_map", f"{_NOBODY} {group} 1"),
    ):
        with open(path, "w") as handle:
            handle.write(line)


def _new_root(root: str, file_bytes: int) -> None:
    """A file tree in memory with the system's libraries and Python read-only, and one empty folder."""
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("tmpfs", root, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=1m,mode=755")
    for path in dict.fromkeys((*_SYSTEM, *_DEVICES, os.path.realpath(sys.base_prefix))):
        inside = root + path
        if os.path.islink(path):
            os.symlink(os.readlink(path), inside)
        elif os.path.isdir(path):
            os.makedirs(inside, exist_ok=True)
            kernel.mount(path, inside, None, kernel.MS_BIND | kernel.MS_REC)
        elif os.path.exists(path):
            os.makedirs(os.path.dirname(inside), exist_ok=True)
            os.close(os.open(inside, os.O_CREAT | os.O_WRONLY))
            kernel.mount(path, inside, None, kernel.MS_BIND)
    own = root + _FOLDER
    os.mkdir(own)
    kernel.make_read_only(root, recursive=True)
    kernel.mount("tmpfs", own, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, f"size={file_bytes}")
    os.chmod(own, 0o1777)
    kernel.pivot_root(root)
    os.chdir(_FOLDER)


def _lock(order: dict[str, Any], jailed: bool, given: set[str], notes: list[str]) -> None:
    """All that can only be taken from the process that runs the program; each step says that it holds."""
    for kind, limit in (
        (resource.RLIMIT_CPU, order["cpu_seconds"]),
        (resource.RLIMIT_AS, order["memory_bytes"]),
        (resource.RLIMIT_FSIZE, order["file_bytes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    given |= {"memory", "cpu", "file size"}
    _drop_user(order["scratch"], jailed, notes)
    if not jailed:
        os.chdir(order["scratch"])
        readable = [path for path in (*_SYSTEM, *_DEVICES, sys.base_prefix) if os.path.exists(path)]
        try:
            notes.append(f"Landlock ABI {kernel.landlock(readable, order['scratch'])}")
            given.add("files")
        except OSError as error:
            notes.append(f"no Landlock: {error}")
    try:
        kernel.drop_capabilities()
        kernel.filter_calls()
        given |= {"network", "signals", "processes"}
    except OSError as error:
        notes.append(f"no system call filter: {error}")


def _drop_user(scratch: str, jailed: bool, notes: list[str]) -> None:
    """Root becomes nobody where nobody can still read Python; otherwise root without capabilities."""
    if os.getuid() != 0:
        return
    if not jailed:
        os.chmod(scratch, 0o777)
        path = os.path.realpath(sys.base_prefix)
        while path != "/":
            if not os.stat(path).st_mode & 0o001:
                notes.append(f"stays root without capabilities: {path} is closed to others")
                return
            path = os.path.dirname(path)
    try:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    except OSError as error:  # root of a user namespace without other users
        notes.append(f"stays root without capabilities: {error}")
    kernel.die_with_parent()


def _run(program: str, token: str, result: int) -> None:
    """Only a program that reaches its end gets the token written: leaving early is no success."""
    code = 1
    try:
        exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
        os.write(result, json.dumps({"token": token}).encode() + b"\n")
        code = 0
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"[:500]
        os.write(result, json.dumps({"error": text}).encode() + b"\n")
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
        os._exit(code)
