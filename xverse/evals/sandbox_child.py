"""PROGRAM -> VERDICT, SHUT IN. Limits itself for good, then runs one program from standard input.

A script of its own, started by sandbox.py without site packages; imports nothing of the house.
"""

import ctypes
import json
import os
import platform
import resource
import struct
import sys

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER = 38, 22, 2
_ALLOW, _EPERM, _KILL = 0x7FFF0000, 0x00050001, 0x80000000
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06  # BPF_LD|W|ABS, JEQ, JSET, RET
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# What Python needs to compute, read modules and end. Numbers of the kernel's x86-64 and arm64
# tables; what is not here (sockets, processes, signals, names of files) fails with EPERM.
_ALLOWED = {
    "x86_64": (
        # read write close stat fstat lstat poll lseek mmap mprotect munmap brk rt_sigaction
        # rt_sigprocmask rt_sigreturn
        *range(0, 2), *range(3, 16),
        17, 20, 21, 23, 24, 25, 28,  # pread64 writev access select sched_yield mremap madvise
        32, 35, 36, 37, 38, 39,  # dup nanosleep getitimer alarm setitimer getpid
        60, 63, 72, 79, 89, 96, 97, 98, 99,  # exit uname fcntl getcwd readlink ... sysinfo
        102, 104, 107, 108, 110, 131,  # getuid getgid geteuid getegid getppid sigaltstack
        186, 201, 202, 204, 217, 218,  # gettid time futex sched_getaffinity getdents64 ...
        228, 229, 230, 231, 262, 267, 273, 318, 332, 334,  # clocks exit_group newfstatat ...
    ),
    "aarch64": (
        17, 23, 25, 48, 56 + 1, 61, 62, 63, 64, 66, 67, 72, 73, 78, 79, 80,
        93, 94, 96, 98, 99, 101, 102, 103, 113, 114, 115, 123, 124, 132, 134, 135, 139,
        153, 160, 163, 165, 169, 172, 173, 174, 175, 176, 177, 178, 179,
        214, 215, 216, 222, 226, 233, 278, 291, 293,
    ),
}  # fmt: skip
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# Opening is allowed for reading only; raising a limit is not: (number, argument, bits that refuse).
_GUARDED = {
    "x86_64": ((2, 1, _WRITING), (257, 2, _WRITING), (302, 2, 0xFFFFFFFF)),
    "aarch64": ((56, 2, _WRITING), (261, 2, 0xFFFFFFFF)),
}


def main() -> None:
    """Take {"program", "verdict_to", "memory_bytes", "cpu_s"}; the last act is to write {"passed"}
    or {"error"} to the pipe `verdict_to`, the one thing that can be written to."""
    asked = json.load(sys.stdin)
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    sys.stdin = open(0, encoding="utf-8")  # noqa: SIM115 - for as long as this process lives
    code = compile(asked["program"], "<solution>", "exec", dont_inherit=True)
    limit(asked["memory_bytes"], asked["cpu_s"])
    shut_in()
    try:
        exec(code, {"__name__": "__solution__"})  # noqa: S102 - what this process is for
    except BaseException as error:
        # SystemExit, too: who leaves early has not passed.
        verdict: dict[str, object] = {"error": f"{type(error).__name__}: {error!s:.200}"}
    else:
        verdict = {"passed": True}
    os.write(asked["verdict_to"], json.dumps(verdict).encode())
    os._exit(0)


def limit(memory_bytes: int, cpu_s: int) -> None:
    """Bounds that nobody in here can raise: memory, seconds of CPU, files, dumps."""
    for kind, most in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, 1 << 20),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def shut_in() -> None:
    """From here on only the allowed system calls work; OSError where the kernel has no filters."""
    machine = platform.machine()
    program = _filter(machine)
    libc = ctypes.CDLL(None, use_errno=True)
    size = len(program) // 8
    buffer = ctypes.create_string_buffer(program)
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", size, ctypes.addressof(buffer)))
    for call in ((_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_PR_SET_SECCOMP, _FILTER, header, 0, 0)):
        if libc.prctl(*call) != 0:
            raise OSError(ctypes.get_errno(), "the kernel refuses a filter of system calls")


def _filter(machine: str) -> bytes:
    """A classic BPF program over struct seccomp_data: nr at 0, arch at 4, arguments from 16 on."""
    if machine not in _AUDIT:
        raise OSError(f"no filter is known for {machine}")
    lines = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _AUDIT[machine]), (_RETURN, 0, 0, _KILL)]
    lines.append((_LOAD, 0, 0, 0))
    for number in _ALLOWED[machine]:
        lines += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    for number, argument, bits in _GUARDED[machine]:
        low = 16 + 8 * argument
        lines += [
            (_EQUAL, 0, 6, number),
            (_LOAD, 0, 0, low + 4),
            (_EQUAL, 0, 3, 0),
            (_LOAD, 0, 0, low),
            (_ANY_BIT, 1, 0, bits),
            (_RETURN, 0, 0, _ALLOW),
            (_RETURN, 0, 0, _EPERM),
        ]
    lines.append((_RETURN, 0, 0, _EPERM))
    return b"".join(struct.pack("HBBI", *line) for line in lines)


if __name__ == "__main__":
    main()
