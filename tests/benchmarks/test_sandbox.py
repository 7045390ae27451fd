"""Real escapes, tried against the sandbox in each way this machine offers it."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from lorasmith.benchmarks.sandbox.run import Outcome, SandboxLimits, run
from tests.benchmarks.ways import QUICK, Way

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox needs Linux")


def attempt(program: str, way: Way, limits: SandboxLimits = QUICK) -> Outcome:
    return way.run(program, limits)


def test_an_honest_program_runs_to_its_end(way: Way) -> None:
    outcome = attempt("import math, re, json, collections\nprint(math.comb(5, 2))", way)
    assert outcome.finished, outcome.reason
    assert outcome.output == "10\n"
    assert outcome.reason == "finished"


@pytest.mark.parametrize(
    "program",
    [
        "import os\nos._exit(0)",
        "import sys\nsys.exit(0)",
        "quit()",
        "raise SystemExit",
        "assert 0",
        "x =",
    ],
)
def test_leaving_early_or_failing_is_no_success(program: str, way: Way) -> None:
    assert not attempt(program, way).finished


def test_a_fork_bomb_cannot_start(way: Way) -> None:
    outcome = attempt(
        """
        import os
        started = 0
        for call in (os.fork, lambda: os.posix_spawn("/bin/true", ["true"], {}), lambda: os.system("true")):
            try:
                value = call()
            except OSError:
                continue
            started += value == 0
        assert started == 0, started
        """,
        way,
    )
    assert outcome.finished, outcome.reason


def test_no_process_by_the_library_either(way: Way) -> None:
    outcome = attempt("import subprocess\nsubprocess.run(['/bin/sh', '-c', 'echo out'])", way)
    assert not outcome.finished
    assert "PermissionError" in outcome.reason


def test_memory_is_limited(way: Way) -> None:
    outcome = attempt("x = bytearray(1 << 30)", way)
    assert not outcome.finished
    assert "MemoryError" in outcome.reason


def test_an_endless_loop_ends_at_the_limit_of_cpu_time(way: Way) -> None:
    began = time.monotonic()
    outcome = attempt("while True: pass", way)
    assert not outcome.finished
    assert "CPU" in outcome.reason
    assert time.monotonic() - began < 8


def test_an_endless_loop_that_catches_everything_ends_as_well(way: Way) -> None:
    program = """
        import signal
        for number in range(1, 65):
            try:
                signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError):
                pass
        while True:
            try:
                while True: pass
            except BaseException:
                pass
        """
    assert not attempt(program, way).finished


def test_sleeping_ends_at_the_deadline(way: Way) -> None:
    began = time.monotonic()
    outcome = attempt("import time\ntime.sleep(60)", way, SandboxLimits(wall_seconds=1))
    assert outcome.reason == "stopped after 1 s"
    assert time.monotonic() - began < 5


def test_nothing_outside_can_be_written(way: Way, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    name = f"lorasmith-escape-{os.getpid()}"
    outside = [
        Path(folder) / name for folder in ("/etc", "/usr", "/dev/shm", "/", sys.base_prefix, Path.home())
    ]
    targets = [str(tmp_path / "new"), f"/tmp/../{name}", f"../{name}", *map(str, outside)]
    outcome = attempt(
        f"""
        import os
        written = []
        for target in {targets!r}:
            try:
                with open(target, "w") as handle:
                    handle.write("x")
                written.append(target)
            except OSError:
                pass
        for path in ("/usr/lib", {sys.base_prefix!r}):
            try:
                os.rmdir(path)
                written.append(path)
            except OSError:
                pass
        assert not written, written
        """,
        way,
    )
    escaped = [path for path in outside if path.exists()]
    for path in escaped:
        path.unlink()  # a broken sandbox must not fail the next run as well
    assert outcome.finished, outcome.reason
    assert list(tmp_path.iterdir()) == []
    assert escaped == []


def test_its_own_folder_is_writable_private_and_gone_afterwards(way: Way) -> None:
    """Where there is one: without namespaces nothing would bound it, so that nothing can be written."""
    if way.mode.startswith("landlock"):
        outcome = attempt("import os\nassert os.listdir('.') == []\nopen('own.txt', 'w')", way)
        assert "PermissionError" in outcome.reason
        return
    outcome = attempt(
        """
        import os, tempfile
        assert os.listdir(".") == []
        with open("own.txt", "w") as handle:
            handle.write("x")
        print(os.path.realpath("own.txt"))
        """,
        way,
    )
    assert outcome.finished, outcome.reason
    assert not Path(outcome.output.strip()).exists()


def test_a_huge_file_is_cut(way: Way) -> None:
    outcome = attempt("open('big', 'wb').write(bytes(5 << 20))", way)
    assert not outcome.finished
    sparse = attempt("import os\nos.truncate(os.open('big', os.O_CREAT | os.O_RDWR), 1 << 40)", way)
    assert not sparse.finished


def test_files_of_the_user_cannot_be_read(way: Way, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("token")
    tmp_path.chmod(0o755)
    outcome = attempt(
        f"""
        read = []
        for path in ({str(secret)!r}, "/etc/passwd", "/etc/shadow", {__file__!r}):
            try:
                open(path).read()
                read.append(path)
            except OSError:
                pass
        assert not read, read
        """,
        way,
    )
    assert outcome.finished, outcome.reason


def test_the_callers_environment_is_out_of_reach(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "very-secret-token")
    outcome = attempt(
        f"""
        import os
        print(dict(os.environ))
        for pid in ("self", "1", {str(os.getpid())!r}, str(os.getppid())):
            for name in ("environ", "mem", "maps", "cmdline"):
                try:
                    print(open(f"/proc/{{pid}}/{{name}}", "rb").read(100000))
                except OSError:
                    pass
        """,
        way,
    )
    assert outcome.finished, outcome.reason
    assert "very-secret-token" not in outcome.output


def test_the_parent_and_others_get_no_signals(way: Way) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        outcome = attempt(
            f"""
            import os, signal
            sent = []
            # Signal 0 only asks; a broken sandbox must not take the machine down.
            for pid, number in [({os.getpid()}, signal.SIGUSR1), *((p, 0) for p in (os.getppid(), -1, 0, 1))]:
                try:
                    os.kill(pid, number)
                    sent.append(pid)
                except OSError:
                    pass
            assert not sent, sent
            """,
            way,
        )
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert outcome.finished, outcome.reason
    assert heard == []


def test_there_are_no_sockets(way: Way) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.2)
        port = server.getsockname()[1]
        outcome = attempt(
            f"""
            import socket
            for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK):
                try:
                    socket.socket(family).connect(("127.0.0.1", {port}))
                except OSError:
                    continue
                raise SystemExit("connected")
            """,
            way,
        )
        assert outcome.finished, outcome.reason
        with pytest.raises(TimeoutError):
            server.accept()


def test_the_lock_cannot_be_opened_from_inside(way: Way) -> None:
    outcome = attempt(
        """
        import ctypes, os, resource
        libc = ctypes.CDLL(None, use_errno=True)
        opened = []
        if os.uname().machine == "x86_64":
            child = libc.syscall(57)
            if child == 0: os._exit(0)
            if child > 0: opened.append("the bare fork call")
        if libc.unshare(0x10000000) == 0: opened.append("user namespace")
        if libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) == 0: opened.append("mount")
        if libc.chroot(b"/tmp") == 0: opened.append("chroot")
        if libc.setuid(0) == 0 and os.getuid() != 0: opened.append("setuid")
        if libc.prctl(1, 0, 0, 0, 0) == 0: opened.append("death signal")
        if libc.ptrace(16, os.getppid(), 0, 0) == 0: opened.append("ptrace")
        try:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            opened.append("memory limit")
        except (OSError, ValueError):
            pass
        assert not opened, opened
        """,
        way,
    )
    assert outcome.finished, outcome.reason


def test_threads_stay_within_the_memory(way: Way) -> None:
    outcome = attempt(
        """
        import threading, time
        try:
            while True:
                threading.Thread(target=time.sleep, args=(30,), daemon=True).start()
        except (RuntimeError, MemoryError):
            pass
        """,
        way,
        SandboxLimits(wall_seconds=4, cpu_seconds=2, memory_bytes=256 << 20),
    )
    # A thread without memory for its own start never tells the one that waits for it, in some Pythons.
    assert outcome.finished or outcome.reason == "stopped after 4 s"


def test_endless_output_is_thrown_away(way: Way) -> None:
    outcome = attempt("while True: print('x' * 10000)", way, SandboxLimits(wall_seconds=5, cpu_seconds=1))
    assert not outcome.finished
    assert len(outcome.output) == SandboxLimits().output_bytes


def test_nothing_is_left_running(way: Way) -> None:
    before = threading.active_count()
    attempt("import time\ntime.sleep(60)", way, SandboxLimits(wall_seconds=0.5))
    time.sleep(0.2)
    marker = "jail.main"
    running = [
        path
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if marker in _read(path) and str(os.getpid()) in _read(path.with_name("stat")).split()[3:4]
    ]
    assert running == []
    assert threading.active_count() == before


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def test_a_system_without_a_sandbox_runs_nothing_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    outcome = run("print('ran')")
    assert not outcome.finished
    assert outcome.output == ""
    assert "darwin" in outcome.reason and "network" in outcome.lacking
