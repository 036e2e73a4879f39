"""Cores, memory and what one process may do to another here."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator

from memkv_engines.cli.doctor.finding import COMMAND_TIMEOUT_S, NOTE, OK, PROBLEM, Finding, Host

AREA = "machine"
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def check(host: Host) -> Iterator[Finding]:
    """The machine."""
    yield _cores(host)
    yield _huge_pages(host)
    yield _locked_memory()
    yield _reach()


def _cores(host: Host) -> Finding:
    usable = len(os.sched_getaffinity(0))
    limits = re.fullmatch(r"(\d{1,15}) ([1-9]\d{0,14})", host.text("sys/fs/cgroup/cpu.max"), re.ASCII)
    limit = int(limits[1]) / int(limits[2]) if limits else float(usable)
    value = f"{usable} of {os.cpu_count()} usable"
    if limit < usable:
        told = f"{value}, of which the container may use {limit:g}"
        return Finding(AREA, "cores", NOTE, told, "I/O shares them", "give the container a core for it")
    return Finding(AREA, "cores", OK, value)


def _huge_pages(host: Host) -> Finding:
    setting = host.text("sys/kernel/mm/transparent_hugepage/enabled")
    if "[never]" in setting or not setting:
        return Finding(
            AREA,
            "transparent huge pages",
            PROBLEM,
            setting or "not supported",
            "staging on 4 KiB pages halves the rate of some devices",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        )
    return Finding(AREA, "transparent huge pages", OK, setting)


def _locked_memory() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Finding(AREA, "locked memory", OK, "unlimited")
    why = "only pinned memory for GPUs and RDMA needs it"
    return Finding(AREA, "locked memory", NOTE, f"{soft // 1024} KiB", why, "ulimit -l unlimited, where there is one")


def _reach() -> Finding:
    """Whether a child may read its parent's memory, which is how the I/O process reaches the engine's pages."""
    secret = ctypes.create_string_buffer(os.urandom(16).hex().encode())
    program = (
        "import ctypes, sys\n"
        "class V(ctypes.Structure): _fields_ = [('b', ctypes.c_void_p), ('n', ctypes.c_size_t)]\n"
        "pid, address, size = map(int, sys.argv[1:])\n"
        "own = ctypes.create_string_buffer(size)\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "ours, theirs = V(ctypes.addressof(own), size), V(address, size)\n"
        "n = libc.process_vm_readv(pid, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0)\n"
        "print(own.value.decode() if n == size else ctypes.get_errno())\n"
    )
    where = [str(os.getpid()), str(ctypes.addressof(secret)), str(len(secret))]
    done = subprocess.run(
        [sys.executable, "-c", program, *where], capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S
    )
    if done.stdout.strip() == secret.value.decode():
        return Finding(AREA, "reach of the I/O process", OK, "a child can read its parent's memory")
    answer = done.stdout.strip()
    reason = os.strerror(int(answer)) if answer.isdigit() and len(answer) < 4 else "it failed"
    return Finding(
        AREA,
        "reach of the I/O process",
        NOTE,
        f"process_vm_readv: {reason}",
        "the I/O loop falls back to threads of the engine, which share its GIL",
        "allow ptrace for the container (--cap-add SYS_PTRACE), or set kernel.yama.ptrace_scope to 0",
    )
