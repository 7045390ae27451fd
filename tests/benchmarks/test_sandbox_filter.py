"""The filter of system calls, read as the kernel reads it: which calls pass, with which arguments."""

from __future__ import annotations

import struct

import pytest

from lorasmith.benchmarks.sandbox import kernel

ALLOW, EPERM, ENOSYS, KILL = 0x7FFF0000, 0x50001, 0x50026, 0x80000000
X86, ARM = 0xC000003E, 0xC00000B7
POINTER = 0x7F00_0000_1000


def verdict(column: int, number: int, *arguments: int, arch: int | None = None) -> int:
    """What the program says of a call: the machine of `linux/bpf_common.h`, as far as filters use it."""
    arch = (X86, ARM)[column] if arch is None else arch
    padded = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("<iIQ6Q", number, arch, 0, *padded)
    program = kernel._filter(column, (X86, ARM)[column])
    steps = list(struct.iter_unpack("<HBBI", program))
    place = held = 0
    while True:
        code, if_true, if_false, value = steps[place]
        place += 1
        if code == 0x20:
            [held] = struct.unpack_from("<I", data, value)
        elif code == 0x54:
            held &= value
        elif code == 0x06:
            return int(value)
        else:
            holds = {0x15: held == value, 0x35: held >= value}[code]
            place += if_true if holds else if_false


NEVER = {  # x86_64, aarch64
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "utimensat": (280, 88),
    "utime": (132, None),
    "setxattr": (188, 5),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "setxattrat": (463, 463),
    "truncate": (76, 45),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "openat2": (437, 437),
    "flock": (73, 32),
    "setpriority": (141, 140),
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    "ioprio_set": (251, 30),
    "setrlimit": (160, 164),
    "kill": (62, 129),
    "tgkill": (234, 131),
    "timer_create": (222, 107),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "mlock": (149, 228),
    "io_uring_setup": (425, 425),
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "sendmsg": (46, 211),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "pidfd_open": (434, 434),
    "execve": (59, 221),
    "fork": (57, None),
    "vfork": (58, None),
    "mount": (165, 40),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "keyctl": (250, 219),
    "setuid": (105, 146),
    "setresuid": (117, 147),
    "setpgid": (109, 154),
    "setsid": (112, 157),
    "chroot": (161, 51),
    "inotify_init1": (294, 26),
}


@pytest.mark.parametrize("column", [0, 1], ids=["x86_64", "aarch64"])
def test_what_reaches_out_is_refused_with_any_arguments(column: int) -> None:
    for name, numbers in NEVER.items():
        number = numbers[column]
        if number is not None:
            for arguments in ((), (1,), (0, 1, 2, 3, 4, 5), (POINTER,) * 6):
                assert verdict(column, number, *arguments) == EPERM, name


@pytest.mark.parametrize("column", [0, 1], ids=["x86_64", "aarch64"])
def test_calls_that_nobody_knows_yet_are_not_there(column: int) -> None:
    assert all(verdict(column, number) == ENOSYS for number in range(471, 1000))
    assert verdict(column, 435) == ENOSYS  # clone3: libraries then use clone


def test_another_architecture_kills() -> None:
    for column, other in ((0, ARM), (1, X86), (0, 0x40000003)):
        assert verdict(column, 0, arch=other) == KILL
    assert verdict(0, 0x40000000 + 59) == KILL  # the x32 calls have x86_64's architecture


CASES = [  # name of the call, number, arguments, verdict
    ("fcntl F_SETFL", 72, (3, 4, 0), ALLOW),
    ("fcntl F_SETOWN", 72, (3, 8, 1), EPERM),
    ("fcntl F_SETOWN, high bits set", 72, (3, (1 << 32) | 8, 1), EPERM),
    ("ioctl TCGETS", 16, (1, 0x5401, POINTER), ALLOW),
    ("ioctl TIOCSTI", 16, (0, 0x5412, POINTER), EPERM),
    ("prlimit of its own", 302, (0, 7, 0, POINTER), ALLOW),
    ("prlimit of process 1", 302, (1, 7, POINTER, 0), EPERM),
    ("open to read", 257, (0, POINTER, 0o2000000), ALLOW),
    ("open to write anew", 257, (0, POINTER, 0o1 | 0o100 | 0o1000), ALLOW),
    ("open to read, cut", 257, (0, POINTER, 0o1000), EPERM),
    ("open without rights, cut", 257, (0, POINTER, 0o3 | 0o1000), EPERM),
    ("open by the old call, cut", 2, (POINTER, 0o1000), EPERM),
    ("clone of a thread", 56, (0x3D0F00,), ALLOW),
    ("clone of a process", 56, (17,), EPERM),
    ("prctl to set a name", 157, (15, POINTER), ALLOW),
    ("prctl to outlive the parent", 157, (1, 0), EPERM),
    ("a pair of streams", 53, (1, 1 | 0o2000000, 0, POINTER), ALLOW),
    ("a pair for datagrams", 53, (1, 2, 0, POINTER), EPERM),
    ("a pair of another family", 53, (2, 1, 0, POINTER), EPERM),
    ("send", 44, (3, POINTER, 1, 0, 0, 0), ALLOW),
    ("send to an address", 44, (3, POINTER, 1, 0, POINTER, 110), EPERM),
    ("send to an address whose low half is 0", 44, (3, POINTER, 1, 0, 1 << 32, 110), EPERM),
]


@pytest.mark.parametrize(("_", "number", "arguments", "said"), CASES, ids=[case[0] for case in CASES])
def test_arguments_decide(_: str, number: int, arguments: tuple[int, ...], said: int) -> None:
    assert verdict(0, number, *arguments) == said
