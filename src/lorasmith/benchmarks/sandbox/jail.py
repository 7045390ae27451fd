"""Runs inside the sandbox's process: lock it up step by step, then run the program. See `run.py`.

Only the standard library and `kernel` are imported, by a Python without site packages and with a clean
environment. The launcher (this process) stays outside; its child is locked up and runs the program. What they
tell goes to one pipe, a line each: a word and a text. The program can write there too, so that nothing after
`start` is believed but what is of no harm.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

from lorasmith.benchmarks.sandbox import kernel

_NOBODY = 65534
_FOLDER = "/sandbox"
"""Python looks for temporary folders in the working folder when there is no /tmp."""
_SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
_WORLD = kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC
_THREADS = 64

PROMISES = {
    "network": "no connection, by no kind of socket",
    "files": "no file outside its folder is read, written, made, removed or changed in mode, owner or time",
    "signals": "no signal to another process",
    "processes": "no new process or program; limits, priority and processors of others stay theirs",
    "memory": "no more than its share, memory that has no address included",
    "cpu": "no more seconds than its share, and few threads",
    "disk": "no more in all its files than its share",
}
"""What a program is kept from. Nothing runs where one of them cannot be kept, unless that is asked for."""


class _Tell:
    """Lines for the caller."""

    def __init__(self, result: int) -> None:
        self.result = result

    def __call__(self, word: str, text: object = "") -> None:
        line = f"{word} {text}".replace("\n", " ").encode("utf-8", "replace")[:600]
        os.write(self.result, line + b"\n")


def main(result: int) -> None:
    """Read the order from standard input, lock up, run; what is told goes to the descriptor `result`."""
    order: dict[str, Any] = json.loads(sys.stdin.buffer.read())
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    tell = _Tell(result)
    kernel.die_with_parent()
    tasks = _tasks_of(os.getuid() or _NOBODY)  # counted here: the new file tree has no /proc
    jailed = not order["mode"].startswith("landlock") and _try(
        tell, "no namespaces", lambda: _namespaces(order)
    )
    child = os.fork()
    if child == 0:
        kernel.die_with_parent()
        given = _lock(order, jailed, tasks, tell)
        lacking = [name for name in PROMISES if name not in given]
        tell("lacking", ",".join(lacking))
        if lacking and not order["anyway"]:
            os._exit(0)
        tell("start")
        _run(order["program"], order["token"], tell)
    _, status = os.waitpid(child, 0)
    tell("status", os.waitstatus_to_exitcode(status))


def _try(tell: _Tell, without: str, step: Callable[[], object]) -> bool:
    """Take a step, and tell what is missing and why where the kernel refuses it."""
    try:
        step()
    except OSError as error:
        tell("note", f"{without}: {error}")
        return False
    return True


def _namespaces(order: dict[str, Any]) -> None:
    """An own network, process table and file tree that holds Python alone."""
    user, group = os.getuid(), os.getgid()
    try:
        if user != 0 or order["mode"] == "user":
            raise PermissionError
        kernel.unshare(_WORLD)
    except OSError:
        if user == 0:  # the real user is the one whose threads are counted, and root's never are
            os.setresuid(_NOBODY, 0, 0)
        kernel.unshare(_WORLD | kernel.CLONE_NEWUSER)
        _map(user, group)
    _new_root(order["scratch"], order["file_bytes"])


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
    # Files and folders take pages of it as well as their bytes: what a program leaves goes with the mount.
    kernel.mount("tmpfs", own, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, f"size={file_bytes},nr_inodes=4k")
    os.chmod(own, 0o1777)
    kernel.pivot_root(root)
    os.chdir(_FOLDER)


def _lock(order: dict[str, Any], jailed: bool, tasks: int, tell: _Tell) -> set[str]:
    """Take from this process what it does not need; the promises that hold from now on."""
    if not jailed:
        os.chmod(order["scratch"], 0o755)
        os.chdir(order["scratch"])
    _drop_user(jailed, tell)
    limited = _try(tell, "no limits", lambda: _limit(order, tasks))
    # Without namespaces there is no folder of its own: nothing bounds all files of one together.
    files = jailed or _try(tell, "no Landlock, which Linux has from 5.13", lambda: _landlock(order, tell))
    filtered = _try(tell, "no system call filter", _filter)
    given = set()
    if limited:
        given.add("cpu")
    if filtered:  # it knows nothing of paths: which files can be reached, the step before decides
        given |= {"network", "signals", "processes"}
    if limited and filtered:
        given.add("memory")
    if files and filtered:
        given |= {"files", "disk"}
    return given


def _filter() -> None:
    kernel.drop_capabilities()
    kernel.filter_calls()


def _landlock(order: dict[str, Any], tell: _Tell) -> None:
    readable = [*_SYSTEM, *_DEVICES, sys.base_prefix, order["scratch"]]
    version = kernel.landlock(
        [path for path in readable if os.path.exists(path)],
        ["/dev/null"],
        newest=1 if order["mode"] == "landlock-1" else 99,
    )
    tell("note", f"Landlock {version}; nothing can be written, names and sizes of files can be asked for")


def _limit(order: dict[str, Any], tasks: int) -> None:
    for kind, wanted in (
        (resource.RLIMIT_CPU, order["cpu_seconds"]),
        (resource.RLIMIT_AS, order["memory_bytes"]),
        (resource.RLIMIT_FSIZE, order["file_bytes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, tasks + _THREADS),  # of the user, on the whole machine
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        _, most = resource.getrlimit(kind)
        limit = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
        try:
            resource.setrlimit(kind, (limit, limit))
        except ValueError as error:
            raise OSError(str(error)) from error


def _tasks_of(user: int) -> int:
    """Threads of a user: the limit on them counts those that are there already."""
    count = 0
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        with contextlib.suppress(OSError):  # processes end while they are counted
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == user:
                count += len(os.listdir(f"/proc/{name}/task"))
    return count


def _drop_user(jailed: bool, tell: _Tell) -> None:
    """Root becomes nobody. To read a Python that is closed to others it stays root, without capabilities.

    Even then its real user is nobody, for whom threads are counted: for root no limit of them holds.
    """
    if os.getuid() != 0:
        return
    reader = _NOBODY if jailed or _readable_by_all(os.path.realpath(sys.base_prefix)) else 0
    if reader == 0:
        tell("note", "reads as root, without capabilities: Python's folder is closed to others")
    _try(tell, "stays root, without capabilities", lambda: _become(reader))  # a namespace without other users
    kernel.die_with_parent()  # which a change of user undoes


def _become(reader: int) -> None:
    os.setgroups([])
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(_NOBODY, reader, reader)


def _readable_by_all(path: str) -> bool:
    while path != "/":
        if not os.stat(path).st_mode & 0o001:
            return False
        path = os.path.dirname(path)
    return True


def _run(program: str, token: str, tell: _Tell) -> None:
    """Only a program that reaches its end gets the token told: leaving early is no success.

    It runs as a module of its own, not as `__main__`: what an answer does when it is started as a script,
    such as to read input, is no part of the function that is asked for. HumanEval's own check does the same.
    """
    code = 1
    module = type(sys)("program")
    sys.modules["program"] = module  # dataclasses and typing look there
    try:
        exec(compile(program, "program.py", "exec"), module.__dict__)
        tell("token", token)
        code = 0
    except BaseException as error:
        with contextlib.suppress(BaseException):  # its text may be code of the program
            tell("error", f"{type(error).__name__}: {error}"[:500])
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
        os._exit(code)
