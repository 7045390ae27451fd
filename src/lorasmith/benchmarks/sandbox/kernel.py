"""Linux calls that Python does not offer: namespaces, mounts, capabilities, Landlock and seccomp filters.

Only the standard library is imported: this file also runs inside the jail. Every call raises `OSError`.
Numbers and structures are those of the kernel's public headers (`unistd_64.h`, `asm-generic/unistd.h`,
`linux/seccomp.h`, `linux/landlock.h`, `linux/mount.h`).
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from typing import NamedTuple

_LIBC = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS, CLONE_NEWIPC = 0x00020000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_BIND, MS_REC, MS_PRIVATE, MS_NOSUID, MS_NODEV = 4096, 16384, 1 << 18, 2, 4
_CLONE_THREAD = 0x00010000
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 22, 24, 38
_SIGKILL, _EPERM, _ENOSYS = 9, 1, 38

_PR_SET_NAME, _PR_GET_NAME, _PR_SET_VMA = 15, 16, 0x53564D41
_AF_UNIX, _SOCK_STREAM = 1, 1
_TYPE_BITS = 0xF
"""SOCK_NONBLOCK and SOCK_CLOEXEC lie above the four bits of a socket's type."""
_O_ACCMODE, _O_TRUNC = 0o3, 0o1000
_OPEN_MODES = (0, 1, 2, 1 | _O_TRUNC, 2 | _O_TRUNC)
"""To read, to write, both; cut to nothing only by who may write. Linux lets O_RDONLY cut as well, and
Landlock before version 3 (Linux 6.2) takes that for reading: with this and without truncate(2), version 1
suffices."""


class _Only(NamedTuple):
    """One argument of a call and the values it may have, as far as `mask` looks; None for a null pointer."""

    argument: int
    values: tuple[int, ...] | None
    mask: int = 0xFFFFFFFF


# The calls that a program may make: to compute, to use files that are there for it, to wait, and to have
# threads and pipes of its own. All others fail, those that nobody has thought of yet included. A list of what
# is forbidden cannot do that: chmod, utime, setxattr, prlimit, sched_setaffinity, truncate and memfd_create
# each reached out of a sandbox that had one, and every kernel brings new calls of their kind.
#
# name: (x86_64, aarch64), and what arguments must be; None where the architecture has no such call.
_ALLOWED: dict[str, tuple[int | None, int | None, *tuple[_Only, ...]]] = {
    # Files: names and bytes. Where they are, the file tree or Landlock decides.
    "read": (0, 63),
    "write": (1, 64),
    "open": (2, None, _Only(1, _OPEN_MODES, _O_ACCMODE | _O_TRUNC)),
    "openat": (257, 56, _Only(2, _OPEN_MODES, _O_ACCMODE | _O_TRUNC)),
    "close": (3, 57),
    "close_range": (436, 436),
    "stat": (4, None),
    "fstat": (5, 80),
    "lstat": (6, None),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "statfs": (137, 43),
    "fstatfs": (138, 44),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "lseek": (8, 62),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "readv": (19, 65),
    "writev": (20, 66),
    "preadv": (295, 69),
    "pwritev": (296, 70),
    "preadv2": (327, 286),
    "pwritev2": (328, 287),
    "sendfile": (40, 71),
    "copy_file_range": (326, 285),
    "fadvise64": (221, 223),
    "fallocate": (285, 47),
    "ftruncate": (77, 46),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "getdents": (78, None),
    "getdents64": (217, 61),
    "getcwd": (79, 17),
    "chdir": (80, 49),
    "fchdir": (81, 50),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "rmdir": (84, None),
    "creat": (85, None),
    "link": (86, None),
    "linkat": (265, 37),
    "symlink": (88, None),
    "symlinkat": (266, 36),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "umask": (95, 166),
    # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC. F_SETOWN would send signals to others,
    # F_SETPIPE_SZ take memory that no limit counts, leases and locks hold up who shares a file.
    "fcntl": (72, 25, _Only(1, (0, 1, 2, 3, 4, 1030))),
    # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX, TCGETS2: what Python asks of its own handles.
    # Others change files through a handle for reading, as FS_IOC_SETFLAGS does.
    "ioctl": (16, 29, _Only(1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451, 0x802C542A))),
    # Pipes, and pairs of connected sockets as asyncio makes them: streams, since a datagram has an address.
    "pipe": (22, None),
    "pipe2": (293, 59),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "socketpair": (53, 199, _Only(0, (_AF_UNIX,)), _Only(1, (_SOCK_STREAM,), _TYPE_BITS)),
    "sendto": (44, 206, _Only(4, None)),
    "recvfrom": (45, 207),
    "shutdown": (48, 210),
    "getsockname": (51, 204),
    "getsockopt": (55, 209),
    "poll": (7, None),
    "ppoll": (271, 73),
    "select": (23, None),
    "pselect6": (270, 72),
    "eventfd": (284, None),
    "eventfd2": (290, 19),
    "epoll_create": (213, None),
    "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21),
    "epoll_wait": (232, None),
    "epoll_pwait": (281, 22),
    "epoll_pwait2": (441, 441),
    # Memory, all of it within the limit of address space.
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "mremap": (25, 216),
    "msync": (26, 227),
    "mincore": (27, 232),
    "madvise": (28, 233),
    "membarrier": (324, 283),
    # Threads and waiting. A new process is a clone without this flag.
    "futex": (202, 98),
    "futex_waitv": (449, 449),
    "set_tid_address": (218, 96),
    "set_robust_list": (273, 99),
    "get_robust_list": (274, 100),
    "rseq": (334, 293),
    "arch_prctl": (158, None),
    "prctl": (157, 167, _Only(0, (_PR_SET_NAME, _PR_GET_NAME, _PR_SET_VMA))),
    "clone": (56, 220, _Only(0, (_CLONE_THREAD,), _CLONE_THREAD)),
    "gettid": (186, 178),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "sched_getscheduler": (145, 120),
    "sched_getparam": (143, 121),
    "sched_get_priority_max": (146, 125),
    "sched_get_priority_min": (147, 126),
    "getcpu": (309, 168),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "restart_syscall": (219, 128),
    "pause": (34, None),
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "times": (100, 153),
    "alarm": (37, None),
    "getitimer": (36, 102),
    "setitimer": (38, 103),
    "wait4": (61, 260),
    "waitid": (247, 95),
    # Handlers of its own signals; none can be sent.
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137),
    "rt_sigsuspend": (130, 133),
    "sigaltstack": (131, 132),
    # Questions about itself and the machine.
    "getpid": (39, 172),
    "getppid": (110, 173),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "getresuid": (118, 148),
    "getresgid": (120, 150),
    "getgroups": (115, 158),
    "getrlimit": (97, 163),
    "getrusage": (98, 165),
    # Process 0 is the caller: limits of others are theirs, and its own can only sink.
    "prlimit64": (302, 261, _Only(0, (0,))),
    "getpriority": (140, 141, _Only(1, (0,))),
    "getrandom": (318, 278),
    "uname": (63, 160),
    "sysinfo": (99, 179),
}
_CLONE3 = 435
_NEWEST_KNOWN = 470
"""Calls with larger numbers are newer than this table: "no such call" lets libraries take an older way."""
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def _check(result: int, call: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    """Leave the shared namespaces given by `flags`."""
    _check(_LIBC.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """mount(2)."""
    encoded = kind.encode() if kind else None
    _check(
        _LIBC.mount(
            source.encode(), target.encode(), encoded, ctypes.c_ulong(flags), options.encode() or None
        ),
        f"mount {target}",
    )


def make_read_only(target: str, *, recursive: bool) -> None:
    """Set a mount, or all below it, read-only and without set-user-id (mount_setattr, Linux 5.12)."""
    attributes = struct.pack("<QQQQ", 0x1 | 0x2, 0, 0, 0)
    flags = 0x8000 if recursive else 0
    _check(
        _LIBC.syscall(442, -100, target.encode(), flags, attributes, ctypes.c_size_t(len(attributes))),
        f"mount_setattr {target}",
    )


def pivot_root(new: str) -> None:
    """Make `new` the root and detach the old one, so that no path leads to it."""
    os.chdir(new)
    number = {"x86_64": 155, "aarch64": 41}[platform.machine()]
    _check(_LIBC.syscall(number, b".", b"."), "pivot_root")
    _check(_LIBC.umount2(b".", 2), "umount the old root")
    os.chdir("/")


def die_with_parent() -> None:
    """Be killed when the parent dies."""
    _check(_LIBC.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0), "prctl PDEATHSIG")


def drop_capabilities() -> None:
    """Give up all capabilities for good: none from files, none kept."""
    for capability in range(64):
        if _LIBC.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            break
    header = struct.pack("<Ii", 0x20080522, 0)
    _check(_LIBC.capset(header, bytes(24)), "capset")
    _check(_LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl NO_NEW_PRIVS")


_READ_FILE, _READ_DIR, _EXECUTE, _WRITE_FILE = 1 << 2, 1 << 3, 1 << 0, 1 << 1


def landlock(readable: list[str], writable: list[str], newest: int = 99) -> int:
    """Allow reading below `readable` and writing the devices `writable`, nothing else; returns the version.

    Version 1 (Linux 5.13) is enough beside the filter. No later right than those of version `newest` is used.
    """
    version = min(newest, _check(_LIBC.syscall(444, None, ctypes.c_size_t(0), 1), "landlock"))
    # What a rule set does not handle stays allowed: every right that this version knows is handled.
    everything = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    attributes = struct.pack("<Q", everything)
    if version >= 4:
        attributes += struct.pack("<Q", 3)  # TCP: bind and connect
    if version >= 6:
        attributes += struct.pack("<Q", 3)  # abstract sockets and signals of others
    rules = _check(_LIBC.syscall(444, attributes, ctypes.c_size_t(len(attributes)), 0), "landlock")
    for path, access in [
        *((path, _READ_FILE | _READ_DIR | _EXECUTE) for path in readable),
        *((path, _READ_FILE | _WRITE_FILE) for path in writable),
    ]:
        handle = os.open(path, os.O_PATH)
        allowed = access if os.path.isdir(path) else access & ~_READ_DIR
        _check(_LIBC.syscall(445, rules, 1, struct.pack("<Qi", allowed, handle), 0), f"landlock {path}")
        os.close(handle)
    _check(_LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl NO_NEW_PRIVS")
    _check(_LIBC.syscall(446, rules, 0), "landlock")
    os.close(rules)
    return version


def filter_calls() -> None:
    """Install the seccomp filter: a call that `_ALLOWED` does not name fails with EPERM.

    Threads stay possible. A call of another architecture kills.
    """
    machine = platform.machine()
    if machine not in _AUDIT_ARCH:
        raise OSError(_ENOSYS, f"no seccomp filter for {machine}")
    column = 0 if machine == "x86_64" else 1
    program = _filter(column, _AUDIT_ARCH[machine])
    buffer = ctypes.create_string_buffer(program)
    header = struct.pack("<HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    _check(_LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl NO_NEW_PRIVS")
    _check(_LIBC.prctl(_PR_SET_SECCOMP, 2, header, 0, 0), "seccomp")


_LOAD, _EQUAL, _AT_LEAST, _AND, _GIVE = 0x20, 0x15, 0x35, 0x54, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """One instruction of the filter's machine; jumps count the steps that are left out."""
    return struct.pack("<HBBI", code, if_true, if_false, value)


def _filter(column: int, arch: int) -> bytes:
    """The program: which architecture, which call, what arguments. `struct seccomp_data` begins with the
    call's number; the architecture is at byte 4, argument k at 16 + 8·k."""
    steps = [_step(_LOAD, 4), _step(_EQUAL, arch, 1, 0), _step(_GIVE, _KILL), _step(_LOAD, 0)]
    if column == 0:  # calls of the x32 ABI have the same architecture and other numbers
        steps += [_step(_AT_LEAST, 0x40000000, 0, 1), _step(_GIVE, _KILL)]
    for first, second, *conditions in _ALLOWED.values():
        number = (first, second)[column]
        if number is not None:
            verdict = [step for condition in conditions for step in _refuse_unless(condition)]
            verdict.append(_step(_GIVE, _ALLOW))
            steps += [_step(_EQUAL, number, 0, len(verdict)), *verdict]
    # clone3 hides its flags in memory: without it, libraries use clone, whose flags can be seen.
    steps += [_step(_EQUAL, _CLONE3, 0, 1), _step(_GIVE, _ERROR | _ENOSYS)]
    steps += [_step(_AT_LEAST, _NEWEST_KNOWN + 1, 0, 1), _step(_GIVE, _ERROR | _ENOSYS)]
    steps += [_step(_GIVE, _ERROR | _EPERM)]
    return b"".join(steps)


def _refuse_unless(condition: _Only) -> list[bytes]:
    """Steps that end the call with EPERM unless the argument is one of those allowed.

    The kernel takes these arguments as 32-bit numbers, so that the low word decides; a pointer has two.
    """
    low = 16 + 8 * condition.argument
    refuse = _step(_GIVE, _ERROR | _EPERM)
    if condition.values is None:
        halves = ([_step(_LOAD, place), _step(_EQUAL, 0, 1, 0), refuse] for place in (low, low + 4))
        return [step for half in halves for step in half]
    values = condition.values
    tests = [_step(_EQUAL, value, len(values) - place, 0) for place, value in enumerate(values)]
    return [_step(_LOAD, low), _step(_AND, condition.mask), *tests, refuse]
