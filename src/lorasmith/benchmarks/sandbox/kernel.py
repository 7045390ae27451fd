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

_LIBC = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS, CLONE_NEWIPC = 0x00020000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_BIND, MS_REC, MS_PRIVATE, MS_NOSUID, MS_NODEV = 4096, 16384, 1 << 18, 2, 4
_CLONE_THREAD = 0x00010000
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 22, 24, 38
_SIGKILL, _EPERM, _ENOSYS = 9, 1, 38

# name: (x86_64, aarch64); None where the architecture has no such call.
_FORBIDDEN: dict[str, tuple[int | None, int | None]] = {
    "socket": (41, 198),
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "mount_setattr": (442, 442),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "open_by_handle_at": (304, 265),
    "io_uring_setup": (425, 425),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "sethostname": (170, 161),
}
_CLONE, _CLONE3, _PRCTL = (56, 220), (435, 435), (157, 167)
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


def landlock(readable: list[str], writable: str) -> int:
    """Allow reading below `readable` and all below `writable`, nothing else; returns the ABI version."""
    version = _check(_LIBC.syscall(444, None, ctypes.c_size_t(0), 1), "landlock")
    everything = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    attributes = struct.pack("<Q", everything)
    if version >= 4:
        attributes += struct.pack("<Q", 3)
    if version >= 6:
        attributes += struct.pack("<Q", 3)
    rules = _check(_LIBC.syscall(444, attributes, ctypes.c_size_t(len(attributes)), 0), "landlock")
    read_only = 0b1101
    for path, access in [*((path, read_only) for path in readable), (writable, everything)]:
        folder = os.open(path, os.O_PATH)
        allowed = access if os.path.isdir(path) else access & 0b0111
        _check(_LIBC.syscall(445, rules, 1, struct.pack("<Qi", allowed, folder), 0), f"landlock {path}")
        os.close(folder)
    _check(_LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl NO_NEW_PRIVS")
    _check(_LIBC.syscall(446, rules, 0), "landlock")
    os.close(rules)
    return version


def filter_calls() -> None:
    """Install the seccomp filter: no processes, programs, sockets, signals to others, mounts or tracing.

    Threads stay possible. A forbidden call fails with EPERM; a call of another architecture kills.
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


def _filter(column: int, arch: int) -> bytes:
    load, equal, at_least, bits, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, error = 0x7FFF0000, 0x80000000, 0x00050000

    def step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("<HBBI", code, if_true, if_false, value)

    steps = [step(load, 4), step(equal, arch, 1, 0), step(give, kill), step(load, 0)]
    if column == 0:
        steps += [step(at_least, 0x40000000, 0, 1), step(give, kill)]
    for numbers in _FORBIDDEN.values():
        number = numbers[column]
        if number is not None:
            steps += [step(equal, number, 0, 1), step(give, error | _EPERM)]
    # clone3 hides its flags in memory: without it, libraries use clone, whose flags can be seen.
    steps += [step(equal, _CLONE3[column], 0, 1), step(give, error | _ENOSYS)]
    steps += [step(equal, _CLONE[column], 0, 4), step(load, 16), step(bits, _CLONE_THREAD, 1, 0)]
    steps += [step(give, error | _EPERM), step(give, allow)]
    steps += [step(equal, _PRCTL[column], 0, 4), step(load, 16), step(equal, _PR_SET_PDEATHSIG, 0, 1)]
    steps += [step(give, error | _EPERM), step(give, allow), step(give, allow)]
    return b"".join(steps)
