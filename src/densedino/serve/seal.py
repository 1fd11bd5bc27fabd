"""Owns what a decoding process may do: bounded memory, no new files, no network, no other programs.

Limits come from setrlimit; on Linux (x86-64, arm64) a seccomp filter makes the kernel refuse the calls that open files
and sockets, start programs or touch other processes. Elsewhere the limits alone hold. Numbers of calls are Linux's own
(include/uapi/asm-generic/unistd.h, arch/x86/entry/syscalls/syscall_64.tbl), the filter's layout is linux/filter.h.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys

__all__ = ["seal"]

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_DENIED = {
    "x86_64": {
        "open": 2,
        "socket": 41,
        "connect": 42,
        "bind": 49,
        "fork": 57,
        "vfork": 58,
        "execve": 59,
        "kill": 62,
        "truncate": 76,
        "rename": 82,
        "mkdir": 83,
        "rmdir": 84,
        "creat": 85,
        "link": 86,
        "unlink": 87,
        "symlink": 88,
        "chmod": 90,
        "ptrace": 101,
        "mknod": 133,
        "tgkill": 234,
        "openat": 257,
        "mkdirat": 258,
        "unlinkat": 263,
        "renameat": 264,
        "linkat": 265,
        "symlinkat": 266,
        "process_vm_readv": 310,
        "process_vm_writev": 311,
        "renameat2": 316,
        "bpf": 321,
        "execveat": 322,
        "io_uring_setup": 425,
        "openat2": 437,
    },
    "aarch64": {
        "mkdirat": 34,
        "unlinkat": 35,
        "symlinkat": 36,
        "linkat": 37,
        "renameat": 38,
        "truncate": 45,
        "openat": 56,
        "ptrace": 117,
        "kill": 129,
        "tgkill": 131,
        "socket": 198,
        "bind": 200,
        "connect": 203,
        "execve": 221,
        "process_vm_readv": 270,
        "process_vm_writev": 271,
        "renameat2": 276,
        "bpf": 280,
        "execveat": 281,
        "io_uring_setup": 425,
        "openat2": 437,
    },
}
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 1, 38, 22, 2
_LOAD, _JUMP_IF_EQUAL, _JUMP_IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | 1, 0x80000000  # 1 is EPERM
_X32 = 0x40000000  # calls of the x32 ABI carry this bit, and would pass for others


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def seal(*, memory: int) -> bool:
    """Give up, for the rest of this process' life, what decoding needs not.

    Args:
        memory: bytes of address space.

    Returns:
        Whether the kernel also refuses files, sockets and programs.
    """
    if os.name == "posix":
        import resource

        for limit, value in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
            if sys.platform == "linux" or limit != resource.RLIMIT_AS:
                resource.setrlimit(limit, (value, value))
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _ARCHITECTURES:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0)  # a server that was killed leaves no orphans
    return _filter_calls(libc, _ARCHITECTURES[machine], sorted(_DENIED[machine].values()))


def _filter_calls(libc: ctypes.CDLL, architecture: int, denied: list[int]) -> bool:
    """Install the filter; containers that forbid it keep the limits alone."""
    count = len(denied)
    code = [
        (_LOAD, 0, 0, 4),  # the architecture
        (_JUMP_IF_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),  # the number of the call
        (_JUMP_IF_AT_LEAST, count + 1, 0, _X32),
        *((_JUMP_IF_EQUAL, count - i, 0, number) for i, number in enumerate(denied)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    ]
    packed = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *step) for step in code))
    program = _Program(len(code), ctypes.cast(packed, ctypes.c_void_p))
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return False
    return bool(libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) == 0)
