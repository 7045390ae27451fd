"""Attacks by an answer, in every way that programs are locked up, by root and by a user.

Each is bounded: should it come through, it changes a file, a process or a folder that the test made for it.
"""

from __future__ import annotations

import os
import signal
import socket
import tempfile
from pathlib import Path

import pytest

from lorasmith.benchmarks.sandbox.run import SandboxLimits
from tests.benchmarks.ways import QUICK, Way

TRY = """
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
through = []
def attempt(name, call):
    try:
        value = call()
    except (OSError, AttributeError, ValueError):
        return
    if value != -1:
        through.append(name)
"""
"""What an attack begins with: what is not refused is remembered, and asserted on at its end."""


def attack(way: Way, program: str, limits: SandboxLimits = QUICK) -> None:
    outcome = way.run(f"{TRY}{program}\nassert not through, through\n", limits)
    assert outcome.finished, outcome.reason


def test_a_file_of_the_user_is_not_changed_by_any_call_that_takes_its_name(way: Way, theirs: Path) -> None:
    key, folder, other = theirs / "key", theirs / "folder", theirs / "other"
    key.write_text("KEY")
    folder.mkdir()
    os.setxattr(key, "user.mine", b"kept")
    key.chmod(0o600)
    for path in (key, folder):
        os.chown(path, way.user, way.user)
    names = sorted(theirs.iterdir())
    before = {path: path.stat() for path in (theirs, key, folder)}
    attack(
        way,
        f"""
key, folder, other = {str(key)!r}, {str(folder)!r}, {str(other)!r}
for path in (key, folder, {str(theirs)!r}):
    attempt("chmod", lambda: os.chmod(path, 0o777))
    attempt("lchmod", lambda: libc.syscall(452, -100, path.encode(), 0o777, 0))
    attempt("chown", lambda: os.chown(path, os.getuid(), os.getgid()))
    attempt("lchown", lambda: os.lchown(path, os.getuid(), os.getgid()))
    attempt("utime", lambda: os.utime(path, (0, 0)))
    attempt("setxattr", lambda: os.setxattr(path, "user.new", b"x"))
    attempt("setxattrat", lambda: libc.syscall(463, -100, path.encode(), 0, b"user.new", b"x" * 16, 16))
    attempt("removexattr", lambda: os.removexattr(path, "user.mine"))
    attempt("file_setattr", lambda: libc.syscall(469, -100, path.encode(), b"\\0" * 24, 24, 0))
    attempt("rename", lambda: os.rename(path, other))
    attempt("handle", lambda: libc.name_to_handle_at(-100, path.encode(), b"\\x80" + bytes(200), bytes(4), 0))
attempt("truncate", lambda: os.truncate(key, 0))
attempt("read-only truncation", lambda: os.open(key, os.O_RDONLY | os.O_TRUNC))
attempt("read", lambda: os.open(key, os.O_RDONLY))
attempt("openat2", lambda: libc.syscall(437, -100, key.encode(), b"\\0" * 24, 24))
attempt("append", lambda: os.open(key, os.O_WRONLY | os.O_APPEND))
attempt("unlink", lambda: os.unlink(key))
attempt("link", lambda: os.link(key, other))
attempt("hard link to here", lambda: os.link(key, "mine"))
attempt("symlink", lambda: os.symlink(key, other))
attempt("mkdir", lambda: os.mkdir(other))
attempt("mkfifo", lambda: os.mkfifo(other))
attempt("mknod", lambda: os.mknod(other))
attempt("rmdir", lambda: os.rmdir(folder))
attempt("listdir", lambda: os.listdir(folder))
attempt("unnamed file", lambda: os.open(folder, os.O_TMPFILE | os.O_RDWR))
attempt("inotify", lambda: libc.inotify_add_watch(libc.inotify_init(), key.encode(), 0xFFF))
""",
    )
    assert key.read_text() == "KEY" and os.getxattr(key, "user.mine") == b"kept"
    assert os.listxattr(key) == ["user.mine"]
    assert sorted(theirs.iterdir()) == names
    for path, state in before.items():
        now = path.stat()
        assert (now.st_mode, now.st_uid, now.st_mtime_ns) == (state.st_mode, state.st_uid, state.st_mtime_ns)


def test_handles_for_reading_change_nothing(way: Way) -> None:
    """On Python's own file, which it may read. Each call would leave it as it is, were it let through."""
    attack(
        way,
        """
import fcntl
file = os.open(os.__file__, os.O_RDONLY)
state = os.fstat(file)
attempt("fchmod", lambda: os.fchmod(file, state.st_mode & 0o7777))
attempt("fchown", lambda: os.fchown(file, state.st_uid, state.st_gid))
attempt("futimens", lambda: os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns)))
attempt("flags of the inode", lambda: fcntl.ioctl(file, 0x80086601, bytes(8)))
attempt("lease", lambda: fcntl.fcntl(file, 1024, fcntl.F_RDLCK))
attempt("lock", lambda: fcntl.flock(file, fcntl.LOCK_SH))
attempt("read-only truncation", lambda: os.open("/dev/null", os.O_RDONLY | os.O_TRUNC))
""",
    )


def test_limits_priority_and_processors_of_others_stay_theirs(way: Way) -> None:
    victim = way.victim()
    niceness = os.getpriority(os.PRIO_PROCESS, victim.pid)
    try:
        attack(
            way,
            f"""
import resource
for pid in ({victim.pid}, os.getppid() or {victim.pid}):  # 0: its own process, in a table of its own
    attempt("prlimit", lambda: resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, 4096)))
    attempt("prlimit, reading", lambda: resource.prlimit(pid, resource.RLIMIT_FSIZE))
    attempt("priority", lambda: os.setpriority(os.PRIO_PROCESS, pid, 19))
    attempt("affinity", lambda: os.sched_setaffinity(pid, {{0}}))
    attempt("scheduler", lambda: os.sched_setscheduler(pid, os.SCHED_BATCH, os.sched_param(0)))
    attempt("scheduler's parameter", lambda: os.sched_setparam(pid, os.sched_param(0)))
    attempt("sched_setattr", lambda: libc.syscall(314, pid, (b"\\x30" + bytes(47)), 0))
    attempt("priority of disk", lambda: libc.syscall(251, 1, pid, 3 << 13))
    attempt("pages", lambda: libc.syscall(256, pid, 8, b"\\1" + bytes(7), b"\\1" + bytes(7)))
    attempt("memory", lambda: libc.syscall(310, pid, 0, 0, 0, 0, 0))
attempt("priority of all", lambda: os.setpriority(os.PRIO_USER, 0, 19))
attempt("own priority", lambda: os.nice(1))
""",
        )
        assert os.getpriority(os.PRIO_PROCESS, victim.pid) == niceness
        assert "Max file size             unlimited" in Path(f"/proc/{victim.pid}/limits").read_text()
        assert os.sched_getaffinity(victim.pid) == os.sched_getaffinity(0)
        assert os.sched_getscheduler(victim.pid) == os.SCHED_OTHER
    finally:
        victim.kill()
        victim.wait()


def test_no_signal_goes_by_way_of_a_handle_or_a_timer(way: Way) -> None:
    victim = way.victim()
    try:
        attack(
            way,
            f"""
import fcntl, signal, struct
read, write = os.pipe()
attempt("F_SETSIG", lambda: fcntl.fcntl(read, 10, signal.SIGTERM))
attempt("F_SETOWN", lambda: fcntl.fcntl(read, 8, {victim.pid}))
attempt("F_SETOWN_EX", lambda: fcntl.fcntl(read, 15, struct.pack("ii", 1, {victim.pid})))
fcntl.fcntl(read, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
os.write(write, b"x")
attempt("queue", lambda: libc.sigqueue({victim.pid}, 15, 0))
attempt("timer", lambda: libc.syscall(222, 0, 0, 0))
attempt("group", lambda: os.killpg({victim.pid}, 15))
attempt("own group", lambda: os.setpgid(0, 0))
attempt("session", lambda: os.setsid() or 1)
""",
        )
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


def test_no_datagram_reaches_a_socket_of_the_machine(way: Way, theirs: Path) -> None:
    """By a pair of sockets, which needs no `socket` call and has addresses all the same."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as named, \
         socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as abstract:  # fmt: skip
        named.bind(str(theirs / "socket"))
        (theirs / "socket").chmod(0o777)
        abstract.bind(hidden := f"\0lorasmith-{os.getpid()}")
        attack(
            way,
            f"""
import socket
for kind in (socket.SOCK_DGRAM, socket.SOCK_SEQPACKET, socket.SOCK_STREAM):
    for target in ({str(theirs / "socket")!r}, {hidden!r}):
        def send():
            one, other = socket.socketpair(socket.AF_UNIX, kind)
            return one.sendto(b"out", target)
        def connect():
            one, other = socket.socketpair(socket.AF_UNIX, kind)
            one.connect(target)
        attempt(f"datagram {{kind}}", send)
        attempt(f"connection {{kind}}", connect)
""",
        )
        for server in (named, abstract):
            server.settimeout(0.05)
            with pytest.raises(TimeoutError):
                server.recv(10)


def test_no_memory_lies_beside_the_limit(way: Way) -> None:
    """At most 24 MB are taken, were it to be had: files in memory, large pipes, segments, pinned pages."""
    attack(
        way,
        """
import fcntl, mmap
def in_memory():
    file = os.memfd_create("more")
    return os.write(file, bytes(8 << 20))
for _ in range(3):
    attempt("memfd", in_memory)
attempt("secret memory", lambda: libc.syscall(447, 0))
attempt("segment", lambda: libc.shmget(0, 8 << 20, 0o1600))
attempt("pipe", lambda: fcntl.fcntl(os.pipe()[0], 1031, 1 << 20))
attempt("pinned", lambda: libc.mlock(ctypes.create_string_buffer(1 << 20), 1 << 20))
attempt("queue", lambda: libc.mq_open(b"/lorasmith", 0o102, 0o600, None))
attempt("shared", lambda: mmap.mmap(-1, 300 << 20))
""",
    )


def test_all_files_together_stay_within_the_share_of_disk(way: Way) -> None:
    """At most 48 MB are written, were it possible: many files, and files without a name."""
    outcome = way.run(
        """
        import os
        written = 0
        for number in range(48):
            try:
                file = os.open(f"file-{number}", os.O_CREAT | os.O_RDWR)
                os.unlink(f"file-{number}") if number % 2 else None
                for part in range(16):
                    written += os.write(file, bytes(1 << 16))
            except OSError:
                pass
        print(written)
        """
    )
    assert outcome.finished, outcome.reason
    assert int(outcome.output) <= QUICK.file_bytes
    if way.mode.startswith("landlock"):  # nothing bounds a folder there, so that there is none
        assert int(outcome.output) == 0


def test_deep_folders_are_gone_afterwards(way: Way, theirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(theirs))
    outcome = way.run(
        """
        import os
        try:
            for number in range(3000):
                os.mkdir("d" * 200)
                os.chdir("d" * 200)
        except OSError:
            pass
        """,
        SandboxLimits(wall_seconds=10, cpu_seconds=5),
    )
    assert outcome.finished, outcome.reason
    assert list(theirs.iterdir()) == []


def test_threads_are_few_however_small_they_are(way: Way) -> None:
    outcome = way.run(
        """
        import threading, time
        threading.stack_size(32768)
        started = 0
        try:
            for number in range(300):
                threading.Thread(target=time.sleep, args=(3,), daemon=True).start()
                started += 1
        except (RuntimeError, MemoryError):
            pass
        print(started)
        """,
        SandboxLimits(wall_seconds=10, cpu_seconds=2, memory_bytes=256 << 20),
    )
    assert outcome.finished, outcome.reason
    assert 16 <= int(outcome.output) <= 100


FLOODS = {
    "deep": "'[' * 60000",
    "wrong kinds": '\'{"lacking": 7, "notes": 8, "status": []}\'',
    "not run": "'lacking network,files'",
    "another start": "'start\\nlacking network\\nnote no sandbox\\nstatus 0\\ntoken 0'",
    "numbers": "'status ' + '9' * 5000 + '\\nstatus -\\nstatus \\u0663'",
    "no text": "'\\udcff\\0\\x1b[2J'",
    "much": "'x' * (1 << 20)",
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS.keys())
def test_what_a_program_writes_to_every_handle_is_no_verdict(way: Way, flood: str) -> None:
    outcome = way.run(
        f"""
        import os
        for handle in range(3, 64):
            try:
                os.write(handle, b"\\n" + ({flood}).encode("utf-8", "surrogateescape") + b"\\n")
            except OSError:
                pass
        raise ValueError("the end")
        """
    )
    assert not outcome.finished
    assert outcome.lacking == []
    assert len(outcome.reason) < 2000


def test_an_answer_may_use_what_computing_needs(way: Way) -> None:
    """The filter names what is allowed: a list that is too short would fail right answers."""
    outcome = way.run(
        """
        import asyncio, concurrent.futures, contextlib, ctypes, dataclasses, datetime, decimal, enum
        import fractions, functools, hashlib, heapq, io, itertools, json, math, os, pickle, platform, random
        import re, select, signal, statistics, string, sys, threading, time, timeit, typing
        import unicodedata, uuid, zlib

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(abs, range(-9, 0))) == 45
        async def sleeps():
            await asyncio.sleep(0.01)
            return await asyncio.to_thread(sum, [1, 2])
        assert asyncio.run(sleeps()) == 3
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            print("unseen")
        @dataclasses.dataclass
        class Point:
            x: "int"
        assert typing.get_type_hints(Point) == {"x": int}
        assert pickle.loads(pickle.dumps(Point(3))) == Point(3)
        with contextlib.suppress(TimeoutError):
            def late(number, frame):
                raise TimeoutError
            signal.signal(signal.SIGALRM, late)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            while True:
                time.sleep(1)
        sort = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(abs)
        assert sort(-3) == 3
        print(__name__, datetime.date(2020, 1, 1), uuid.uuid4().version, platform.system())
        """,
        SandboxLimits(),
    )
    assert outcome.finished, outcome.reason
    assert outcome.output == "program 2020-01-01 4 Linux\n"
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
